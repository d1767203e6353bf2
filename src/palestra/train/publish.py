"""Stage the weights of a version for the engines, with a probe that proves their arrival."""

from pathlib import Path

import torch

from palestra.core.ledger import Ledger
from palestra.model.export import iterate_weights
from palestra.model.lora import iterate_adapter
from palestra.model.policy import Policy
from palestra.train.ranks import Ranks
from palestra.wire.weights import files
from palestra.wire.weights.manifest import Probe, Staged, record

KEPT_VERSIONS = 3


class Publisher:
    """Owns the staged versions: a version stays until a later one is loaded.

    The probe is one sequence of random tokens for the whole run: it needs no data, and a change of any weight moves it.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        ranks: Ranks,
        directory: Path,
        attempt: int,
        life: int = 0,
        dtype: torch.dtype,
        probe_tokens: int,
        seed: int,
        recorded_in: Path | None = None,
        base: str = "",
    ):
        """`recorded_in`: where every version is kept beside being staged; `base`: the model that adapters belong to."""
        self._base = base
        self._policy, self._ranks, self._directory = policy, ranks, directory
        self._attempt, self._life, self._dtype, self._recorded_in = attempt, life, dtype, recorded_in
        generator = torch.Generator().manual_seed(seed)
        self._probe_ids = torch.randint(policy.vocab_size, (probe_tokens,), generator=generator).to(ranks.device)
        self._previous: list[float] | None = None
        self._staged: list[int] = []

    @property
    def is_full(self) -> bool:
        """As many versions are staged as should ever lie there at once."""
        return len(self._staged) >= KEPT_VERSIONS

    def stage(self, version: int, ledger: Ledger) -> Staged:
        """A collective; the first rank writes. Errors: InfrastructureError, if the disk is full."""
        directory = self._path(version)
        with ledger.spend("stage"):
            self._staged.append(version)
            self._write(directory, version)
        with ledger.spend("probe"):
            logprobs = self._policy.score(self._probe_ids).tolist()
        probe = Probe(token_ids=self._probe_ids.tolist(), logprobs=logprobs, previous_logprobs=self._previous)
        self._previous = logprobs
        is_adapter = self._policy.adapter is not None
        staged = Staged(version=version, directory=str(directory), probe=probe, is_adapter=is_adapter)
        if self._recorded_in is not None and self._ranks.is_first:
            with ledger.spend("record"):
                record(staged, self._recorded_in)
        return staged

    def _write(self, directory: Path, version: int) -> None:
        """All weights, or the adapter alone. A collective; the first rank writes."""
        adapter = self._policy.adapter
        if adapter is None:
            tensors = iterate_weights(self._policy, dtype=self._dtype)
        else:
            tensors = iterate_adapter(self._policy.model, dtype=self._dtype)
        if not self._ranks.is_first:
            for _ in tensors:
                pass
        elif adapter is None:
            files.stage(directory, version, self._attempt, tensors)
        else:
            files.stage_adapter(directory, version, self._attempt, tensors, adapter.config_json(self._base))

    def loaded(self, version: int) -> None:
        """Engines hold `version`: what is older is not needed again, whichever life of the trainer staged it."""
        self._staged = [staged for staged in self._staged if staged >= version]
        if self._ranks.is_first:
            for path in self._directory.glob("v*"):
                if int(path.name[1:].split(".")[0]) < version:
                    files.discard(path)

    def _path(self, version: int) -> Path:
        """Each life has its own: engines may be reading what the one before has staged."""
        return self._directory / (f"v{version:06d}" + (f".{self._life}" if self._life else ""))

"""Stage the weights of a version for the engines, with a probe that proves their arrival."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from palestra.core.errors import InfrastructureError
from palestra.core.ledger import Ledger
from palestra.model.export import iterate_weights
from palestra.model.lora import iterate_adapter
from palestra.model.policy import Policy
from palestra.train.ranks import Ranks
from palestra.wire.weights import files
from palestra.wire.weights.manifest import KEPT_VERSIONS, MAX_CHAIN, Probe, Staged, WeightsManifest, chain, record

if TYPE_CHECKING:
    from palestra.wire.weights.handles import Copies
    from palestra.wire.weights.sender import Sender

Sends = Literal["whole", "changes", "shards"]
KEPT_COPIES = 2  # where each is a copy of the model in the GPU's memory: one that engines hold, one on its way


@dataclass
class Differences:
    """Which version the next one is told as a difference from.

    A version is whole where it is the first of the trainer's life, the `full_every`-th since a whole one, or where the
    differences since then come to `MAX_CHAIN` of it: what is put together from many parts takes long to load.
    """

    full_every: int
    newest: Path | None = None
    num_since_full: int = 0
    bytes_since_full: int = 0
    full_bytes: int = 0

    @property
    def previous(self) -> Path | None:
        """None: the next one is whole."""
        is_due = self.num_since_full + 1 >= self.full_every or self.bytes_since_full > MAX_CHAIN * self.full_bytes
        return None if is_due or self.newest is None or not self.newest.exists() else self.newest

    def staged(self, directory: Path, manifest: WeightsManifest) -> None:
        self.newest, self.full_bytes = directory, manifest.full_bytes
        self.num_since_full = self.num_since_full + 1 if manifest.previous else 0
        self.bytes_since_full = self.bytes_since_full + manifest.sent_bytes if manifest.previous else 0


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
        full_every: int = 1,
        local: str = "",
        by_handle: bool = False,
        base: str = "",
        send_from: str | None = None,
        sends: Sends = "whole",
    ):
        """`recorded_in`: where every version is kept beside being staged. `full_every`: 1 stages all of them whole.
        `by_handle`: not at all; the engine finds a copy in the memory of the GPU that both are on. `base`: the model
        that adapters belong to. `send_from`: this host's address, where versions after the first are sent: by the first
        rank, or only what changed, wherever that is little, or by all ranks from their shards."""
        self._base = base
        self._policy, self._ranks, self._directory = policy, ranks, directory
        self._attempt, self._life, self._dtype, self._recorded_in = attempt, life, dtype, recorded_in
        generator = torch.Generator().manual_seed(seed)
        self._probe_ids = torch.randint(policy.vocab_size, (probe_tokens,), generator=generator).to(ranks.device)
        self._probed: tuple[int, list[float]] | None = None  # the newest version, and its log-probabilities
        self._previous: list[float] | None = None  # those of the version before
        self._staged: list[int] = []
        self._differences, self._local = Differences(full_every), local
        self._send_from, self._has_staged = send_from, False
        self._sends: Sends = sends
        self._sender: Sender | None = None
        if sends == "shards":
            self._sender = self.sender  # what cannot be sent is told before a step is taken
        self._held: dict[int, Copies] | None = {} if by_handle else None
        self._spare: list[Copies] = []  # to be filled again

    @property
    def is_full(self) -> bool:
        """As many versions are staged as should ever lie there at once."""
        return len(self._staged) >= (KEPT_VERSIONS if self._held is None else KEPT_COPIES)

    def stage(self, version: int, ledger: Ledger, *, as_files: bool = False) -> Staged:
        """A collective; the first rank writes. Where versions are sent, the first one and those that are wanted
        `as_files` are written all the same: engines that join need one. Errors: InfrastructureError, if the disk is
        full."""
        if self._send_from is not None and self._has_staged and not as_files:
            offered = self._offer(version, ledger)
            if offered is not None:
                return offered
        self._has_staged = True
        directory, began = self._path(version), time.monotonic()
        with ledger.spend("stage"):
            self._staged = [*(staged for staged in self._staged if staged != version), version]
            manifest = self._write(directory, version)
        stage_s = time.monotonic() - began
        staged = Staged(
            version=version,
            directory=str(directory),
            probe=self._probe(version, ledger),
            sent_bytes=manifest.sent_bytes if manifest else 0,
            full_bytes=manifest.full_bytes if manifest else 0,
            stage_s=stage_s,
            local=self._local,
            is_adapter=self._policy.adapter is not None,
            mark=self._mark(version),
        )
        if self._recorded_in is not None and manifest is not None:
            with ledger.spend("record"):
                self._record(staged, manifest, self._recorded_in)
        return staged

    def _offer(self, version: int, ledger: Ledger) -> Staged | None:
        """Nothing leaves the trainer yet. None: it cannot be sent."""
        mark, began = self._mark(version), time.monotonic()
        with ledger.spend("stage"):
            offer = self.sender.prepare(mark)
        stage_s = time.monotonic() - began
        if offer is None:
            return None
        return Staged(
            version=version,
            directory="",
            probe=self._probe(version, ledger),
            sent_bytes=offer.sent_bytes,
            full_bytes=offer.full_bytes,
            stage_s=stage_s,
            is_sent=True,
            mark=mark,
            base=offer.base,
            shard_bytes=offer.shard_bytes,
        )

    @property
    def sender(self) -> "Sender":
        if self._sender is None:
            assert self._send_from is not None
            self._sender = _make_sender(
                self._sends, self._policy, dtype=self._dtype, ranks=self._ranks, host=self._send_from
            )
        return self._sender

    def _mark(self, version: int) -> str:
        """What is trained again, after a restart, is not what it was to the bit."""
        return f"{self._attempt}.{self._life}.{version}"

    def _probe(self, version: int, ledger: Ledger) -> Probe:
        """Once for each version, however often it is staged."""
        if self._probed is None or self._probed[0] != version:
            with ledger.spend("probe"):
                logprobs = self._policy.score(self._probe_ids).tolist()
            self._probed, self._previous = (version, logprobs), None if self._probed is None else self._probed[1]
        return Probe(token_ids=self._probe_ids.tolist(), logprobs=self._probed[1], previous_logprobs=self._previous)

    def _write(self, directory: Path, version: int) -> WeightsManifest | None:
        """On the first rank; the others only take part in what it gathers."""
        adapter, mark = self._policy.adapter, self._mark(version)
        if adapter is None:
            tensors = iterate_weights(self._policy, dtype=self._dtype)
        else:
            tensors = iterate_adapter(self._policy.model, dtype=self._dtype)
        if self._sends == "changes":
            tensors = self.sender.passing(tensors, mark)
        if not self._ranks.is_first:
            for _ in tensors:
                pass
            return None
        if adapter is not None:
            return files.stage_adapter(directory, version, self._attempt, tensors, adapter.config_json(self._base))
        if self._held is not None:
            return self._hand_out(directory, version, tensors, self._held)
        manifest = files.stage(
            directory, version, self._attempt, tensors, previous=self._differences.previous, mark=mark
        )
        self._differences.staged(directory, manifest)
        return manifest

    def _hand_out(
        self, directory: Path, version: int, tensors: Iterator[tuple[str, torch.Tensor]], held: dict[int, "Copies"]
    ) -> WeightsManifest:
        from palestra.wire.weights import handles  # vLLM's side of it: seconds to import, and nowhere else needed

        if self._spare:
            copies = self._spare.pop()
            copies.fill(tensors)
        else:
            copies = handles.Copies(tensors)
        if version in held:
            self._spare.append(held[version])
        held[version] = copies
        return handles.stage(directory, version, self._attempt, copies)

    def _record(self, staged: Staged, manifest: WeightsManifest, published: Path) -> None:
        def write_whole(target: Path) -> None:
            if self._held is None:
                tensors = files.read(staged.directory, manifest)
            else:
                tensors = self._held[staged.version].tensors
            files.stage(target, staged.version, 0, tensors)

        record(staged, published, write_whole if manifest.previous or self._held is not None else None)

    def loaded(self, version: int) -> None:
        """Engines hold `version`: what is older, and no part of it or of a later one, is not needed again, whichever
        life of the trainer staged it."""
        self._staged = [staged for staged in self._staged if staged >= version]
        if self._held is not None:
            self._spare += [self._held.pop(staged) for staged in list(self._held) if staged < version]
        if self._ranks.is_first:
            paths = {path: int(path.name[1:].split(".")[0]) for path in self._directory.glob("v*")}
            needed = {link for path, number in paths.items() if number >= version for link in _links(path)}
            for path in paths.keys() - needed:
                files.discard(path)

    def _path(self, version: int) -> Path:
        """Each life has its own: engines may be reading what the one before has staged."""
        return self._directory / (f"v{version:06d}" + (f".{self._life}" if self._life else ""))


def _make_sender(sends: Sends, policy: Policy, *, dtype: torch.dtype, ranks: Ranks, host: str) -> "Sender":
    """vLLM's side of it: as above."""
    if sends == "shards":
        from palestra.model.shards import ShardedWeights
        from palestra.wire.weights.shards_sender import MAX_PARTS, ShardsSender

        copies = ranks.meshes.root["replicate"].size()
        lying = ShardedWeights(policy, dtype, copies=copies, num_ranks=ranks.num, max_parts=MAX_PARTS)
        return ShardsSender(lying, ranks=ranks, host=host)
    if sends == "changes":
        from palestra.wire.weights.changes_sender import ChangesSender as kind
    else:
        from palestra.wire.weights.sender import Sender as kind

    return kind(lambda: iterate_weights(policy, dtype=dtype), ranks=ranks, host=host)


def _links(directory: Path) -> list[Path]:
    """What a version needs; of one that was broken off, only itself is left alone."""
    try:
        return chain(directory)
    except InfrastructureError:
        return [directory]

"""The trainer's side of changes that are sent, by vLLM's own `sparse_nccl` backend.

All ranks gather one layer after the other when a version is made, and note what changed; the first one has it all, and
broadcasts it when engines are ready.

This has never run on a GPU. Tests drive vLLM's classes with another process group in the place of NCCL's.
"""

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.sparse_nccl_engine import (
    SparseNCCLTrainerInitInfo,
    SparseNCCLTrainerWeightTransferEngine,
    SparseWeightPatch,
)

from palestra.wire.weights.changes import MAX_SHARE, Changes, Kinship, Past, Patch, Tensors, digest_of
from palestra.wire.weights.sender import Ask, Client, Offer, Pass, Ranks, Sender, free_port


class ChangesSender(Sender):
    """What changed since the version before, which its ranks keep among them in host memory.

    A version is staged where there is none before, or where changes come to more than `MAX_SHARE` of it.
    """

    def __init__(self, tensors: Callable[[], Tensors], *, ranks: Ranks, host: str):
        super().__init__(tensors, ranks=ranks, host=host)
        self._tensors = tensors
        self._past = Past(rank=ranks.rank, num_ranks=ranks.num)
        self._patches, self._kinship = list[Patch](), Kinship(base="", mark="", digest="")

    def prepare(self, mark: str) -> Offer | None:
        base, self._patches = self._past.mark, []
        if not base:
            return None
        changes = self._past.step(self._tensors(), mark)
        told = self._ranks.to_first((changes.is_whole, changes.sent_bytes))
        sent_bytes, is_whole = sum(size for _, size in told), any(whole for whole, _ in told)
        offer = None
        if not is_whole and sent_bytes <= MAX_SHARE * changes.full_bytes:
            offer = Offer(sent_bytes, changes.full_bytes, base)
        offer = self._ranks.from_first(offer)
        if offer is not None:
            self._gather(changes, base, mark)
        return offer

    def passing(self, tensors: Pass, mark: str) -> Pass:
        return self._past.keep(tensors, mark)

    def _gather(self, changes: Changes, base: str, mark: str) -> None:
        """All ranks' patches, in the order of tensors, on the first one."""
        gathered = self._ranks.to_first(changes.patches)
        if self._ranks.rank == 0:
            patches = sorted((patch for part in gathered for patch in part), key=lambda patch: patch.order)
            self._patches = patches or [self._past.still()]  # of nothing, vLLM says nothing to engines
            self._kinship = Kinship(base=base, mark=mark, digest=digest_of(self._patches))

    def _meet(self, client: "Client", num_workers: int) -> TrainerWeightTransferEngine:
        info = SparseNCCLTrainerInitInfo(
            rank=self._ranks.rank,
            master_address=self._host,
            master_port=free_port(self._host),
            world_size=1 + num_workers,
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=client)

    def _begin(self) -> None:
        """Everything was gathered when it was prepared."""

    def _transfer(self, engine: TrainerWeightTransferEngine) -> None:
        device = self._ranks.device
        patches = [
            SparseWeightPatch(patch.name, patch.at_C.to(device), patch.values_C.to(device), patch.shape)
            for patch in self._patches
        ]
        assert isinstance(engine, SparseNCCLTrainerWeightTransferEngine)
        engine.send_weights(patches)

    def _say(self, ask: Ask, what: Literal["init", "update"], info: dict[str, Any]) -> None:
        ask(what, {**info, **msgspec.structs.asdict(self._kinship)} if what == "update" else info)

    def _finish(self) -> None:
        """Nobody else was in it."""

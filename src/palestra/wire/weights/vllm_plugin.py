"""Entry point for vLLM (`vllm.general_plugins`): the `files` backends, and processes that die together."""

import os
from functools import cache

from palestra.core.process import die_with_parent

BACKEND = "files"
ADAPTER_BACKEND = "adapter-files"
SENT_BACKENDS = {"nccl": "files-or-nccl", "nccl_m2n": "files-or-shards", "sparse_nccl": "files-or-changes"}
"""By sync.kind."""
_SENT_ENGINES = {
    "nccl": ("vllm_sent", "SentEngine"),
    "nccl_m2n": ("vllm_shards", "ShardsEngine"),
    "sparse_nccl": ("vllm_changes", "ChangesEngine"),
}
TIE_PROCESSES = "PALESTRA_TIE_PROCESSES"  # set by palestra's own launcher only


@cache
def register() -> None:
    """vLLM calls this in each of its processes, in some more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(BACKEND, "palestra.wire.weights.vllm_engine", "FilesEngine")
    WeightTransferEngineFactory.register_engine(ADAPTER_BACKEND, "palestra.wire.weights.vllm_adapter", "AdapterEngine")
    for kind, (module, name) in _SENT_ENGINES.items():
        WeightTransferEngineFactory.register_engine(SENT_BACKENDS[kind], f"palestra.wire.weights.{module}", name)
    if TIE_PROCESSES in os.environ:
        die_with_parent(os.getppid())
        _Tie().to_every_fork()


class _Tie:
    """A server that is killed would leave its engine process behind, which it forks (a spawned one registers anew)."""

    def to_every_fork(self) -> None:
        os.register_at_fork(before=self._remember, after_in_child=self._hold)

    def _remember(self) -> None:
        self._parent = os.getpid()

    def _hold(self) -> None:
        die_with_parent(self._parent)

"""How long a step is held up by a checkpoint: waiting for its files, and writing them beside the steps.

`OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.dist.checkpoint_times DIR`
"""

import json
import statistics
import sys
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from palestra.config.schema import Log, Model, RunConfig, Train
from palestra.core.ledger import Ledger
from palestra.train import ranks as trainer_ranks
from palestra.train.trainer import Trainer
from tests.unit.model import tiny
from tests.unit.train.batches import make_batch

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "initializer_range": 0.02,
}
SAVES, STEPS_BETWEEN = 3, 4


def main(directory: Path) -> None:
    disable_progress_bar()
    ranks = trainer_ranks.join(Train(shard=2), deadline_s=300)
    if ranks.is_first:
        tiny.build(directory, **SHAPE)
    ranks.barrier()
    config = RunConfig(
        log=Log(name="run", outputs=directory),
        model=Model(path=str(directory / "Qwen3ForCausalLM"), dtype="float32"),
        train=Train(steps=100, lr=1e-4, shard=2),
    )
    trainer = Trainer(config, ranks, Ledger("times"))
    num_parameters = sum(parameter.numel() for parameter in trainer.policy.parameters())
    _steps(trainer, 2)
    alone = _steps(trainer, STEPS_BETWEEN)
    found: dict[str, list[float]] = {"sync": [], "async": [], "write": [], "steps_beside": []}
    for _ in range(SAVES):
        started = time.perf_counter()
        trainer.save(Ledger("times"))
        trainer.finish_save(Ledger("times"))
        found["sync"].append(time.perf_counter() - started)
        started = time.perf_counter()
        trainer.save(Ledger("times"))
        found["async"].append(time.perf_counter() - started)
        found["steps_beside"] += _steps(trainer, STEPS_BETWEEN)
        started = time.perf_counter()
        written = trainer.finish_save(Ledger("times"))
        found["async"][-1] += time.perf_counter() - started
        assert written is not None
        found["write"].append(written.write_s)
    if ranks.is_first:
        medians = {f"{name}_s": round(statistics.median(times), 3) for name, times in found.items()}
        size = {"parameters": num_parameters, "state_bytes": 12 * num_parameters}
        print(json.dumps(size | {"step_alone_s": round(statistics.median(alone), 3)} | medians))
        print(json.dumps({name: [round(one, 3) for one in times] for name, times in found.items()}))
    trainer_ranks.leave()


def _steps(trainer: Trainer, num: int) -> list[float]:
    times = []
    for _ in range(num):
        batch = make_batch([32] * 4, packs=[0, 0, 1, 1], step=trainer.version, seed=trainer.version)
        started = time.perf_counter()
        trainer.train(batch, Ledger("times"))
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main(Path(sys.argv[1]))

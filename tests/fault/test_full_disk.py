"""A disk that is full while a checkpoint is written: said in words, nothing lost, and the run can be resumed."""

import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from palestra.core.errors import InfrastructureError
from palestra.wire.rundir import read_manifests
from tests.fault.doomed import fill
from tests.fault.whole_run import small_disk
from tests.unit.orchestrate.scripted import Life, ScriptedTrainer, make_config, reward_by_seed

STEPS, SAVE_EVERY = 6, 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as directory:
        yield directory


class FillsTheDisk(ScriptedTrainer):
    """Its second checkpoint leaves no room for the orchestrator's part; the pages of the file `brimful` are full."""

    brimful = ""

    async def _train(self, step: int, publish: bool, save: bool) -> None:
        if save and step + 1 == 2 * SAVE_EVERY:
            if self.brimful:
                fill_page(self._run.path / self.brimful)
            fill(self._run.path.parent)
        await super()._train(step, publish, save)


def fill_page(path: Path) -> None:
    """With a line that says nothing, so that the next byte needs a page of its own."""
    with path.open("ab") as file:
        file.write(b" " * (-(file.tell() + 1) % mmap.PAGESIZE) + b"\n")


@pytest.mark.parametrize("brimful", ["", "metrics.jsonl", "ledger.jsonl", "spans/orchestrator.jsonl"])
async def test_a_full_disk_while_checkpointing_keeps_the_checkpoint_before_and_resumes(disk: Path, brimful: str):
    config = make_config(
        disk,
        train={"steps": STEPS, "max_pack_tokens": 64, "checkpoint_every": SAVE_EVERY, "batch_deadline_s": 60},
    )
    first = Life(config, reward=reward_by_seed, step_s=0.02)
    first.trainer.__class__ = FillsTheDisk
    first.trainer.brimful = brimful  # type: ignore[attr-defined]
    with pytest.raises(BaseExceptionGroup) as caught:
        await first.play()
    said = [error for error in caught.value.exceptions if isinstance(error, InfrastructureError)]
    assert said
    assert "free space and resume" in str(said[0])
    assert [manifest.version for manifest in read_manifests(first.run)] == [SAVE_EVERY]

    (disk / "ballast").unlink()
    second = Life(config, reward=reward_by_seed)
    assert second.attempt.resumed_from == SAVE_EVERY
    await second.play()
    assert [manifest.version for manifest in read_manifests(second.run)][-1] == STEPS
    kept = dict([*first.trainer.trained, *second.trainer.trained])
    assert sorted(kept) == list(range(STEPS))
    assert max(Counter(rollout for ids in kept.values() for rollout in ids).values()) == 1

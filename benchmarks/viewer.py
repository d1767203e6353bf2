"""How quick `palestra view` is on a run of any size: writes one in the true format, then asks the real command.

    python benchmarks/viewer.py make DIRECTORY --steps 1000 --rollouts 4096 [--seed 0]
    python benchmarks/viewer.py measure DIRECTORY

`make` writes DIRECTORY/synthetic: config, metrics, ledger, spans, restarts, curriculum, rollouts of every step, and the
batches of the last `--batches` steps. `measure` starts `palestra view DIRECTORY`, once without an index and once with
the one that it left, and tells seconds from the start of the process to an answer, memory at its highest (VmHWM), and
the milliseconds of each kind of page, in HTML, asked for the first time and at best of four more times.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import msgspec
import numpy as np

from palestra.config import RunConfig
from palestra.core.files import write_atomically
from palestra.core.ledger import LedgerEntry
from palestra.core.records import Ending, RolloutRecord, Sample, Seat, Span, Task, TurnSpan
from palestra.wire.batches import Batch, BatchFiles
from palestra.wire.rundir import RunDir
from palestra.wire.status import State, Status, write_status

NAME = "synthetic"
GROUP = 16
STEP_S = 60.0
BEGAN = 1_780_000_000.0
_DEADLINE_S = 1200


# --- a run


def make(directory: Path, *, steps: int, rollouts: int, seed: int, num_batches: int) -> RunDir:
    """`rollouts` is a multiple of 16. Errors: FileExistsError."""
    run = RunDir(directory / NAME)
    run.rollouts.mkdir(parents=True)
    run.config.write_text(_config(directory, steps, rollouts).model_dump_json())
    write_status(run, Status(state=State.FINISHED, attempt=1, pid=1, started_at=BEGAN, ended_at=BEGAN + steps * STEP_S))
    chance = random.Random(seed)
    rewards = []
    for step in range(steps):
        records = [_record(chance, step, steps, step * rollouts + i) for i in range(rollouts)]
        rewards.append(sum(record.reward for record in records) / rollouts)
        path = run.rollouts / f"step-{step:06d}.jsonl"
        path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
        if step >= steps - num_batches:
            _write_batch(run, step, records)
    _write_logs(run, chance, rewards)
    return run


def _config(directory: Path, steps: int, rollouts: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "log": {"name": NAME, "outputs": str(directory)},
            "model": {"path": "models/synthetic"},
            "algo": {"groups_per_step": rollouts // GROUP, "group_size": GROUP},
            "train": {"steps": steps},
            "env": {"mix": [{"id": "tool-calc", "name": "calc"}, {"id": "wordle", "name": "words"}]},
        }
    )


def _record(chance: random.Random, step: int, steps: int, rollout_id: int) -> RolloutRecord:
    """A question, a call of a tool and its answer, the reply: some 30 tokens of which half were sampled."""
    group = rollout_id // GROUP
    environment = "calc" if group % 3 else "words"
    left, right = group * 7919 % 997, group * 104729 % 991
    is_right = chance.random() < 0.15 + 0.75 * step / steps
    answer = left * right if is_right else left * right + chance.randrange(1, 99)
    ending = Ending.OK if chance.random() < 0.97 else Ending.TRUNCATED
    reward = float(is_right) if ending is Ending.OK else round(0.1 * chance.random(), 3)
    given, said = 10, chance.randrange(12, 28)
    sampled = [0] * given + [1] * said
    version = max(step - chance.choice((0, 1, 1, 2)), 0)
    sample = Sample(
        token_ids=[chance.randrange(3, 2000) for _ in sampled],
        logprobs=[0.0] * given + [-round(chance.expovariate(2.0), 4) for _ in range(said)],
        sampled=sampled,
        spans=(Span(version, given, given + said),),
        turns=(TurnSpan(0, given, given + said // 2), TurnSpan(1, given + said // 2, given + said)),
    )
    arguments = json.dumps({"expression": f"{left} * {right}"})
    call = {"id": "c0", "type": "function", "function": {"name": "calculate", "arguments": arguments}}
    return RolloutRecord(
        rollout_id=rollout_id,
        environment=environment,
        task=Task(prompt=f"How much is {left} times {right}?", answer=left * right, key=f"{left}*{right}"),
        ending=ending,
        reward=reward,
        rewards={"exact": reward},
        seats=(Seat(samples=(sample,)),),
        messages=[
            {"role": "user", "content": f"How much is {left} times {right}?"},
            {"role": "assistant", "content": "I use the calculator.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c0", "content": f"{left} * {right} = {left * right}"},
            {"role": "assistant", "content": f"The answer is {answer}."},
        ],
        num_turns=2,
        num_tokens=said,
        error="a reply of agent was cut off after 27 tokens" if ending is Ending.TRUNCATED else "",
        wall_s=round(chance.uniform(0.5, 20), 3),
        engine_s=0.4,
        ended_at=BEGAN + step * STEP_S,
    )


def _write_batch(run: RunDir, step: int, records: list[RolloutRecord]) -> None:
    samples = [record.seats[0].samples[0] for record in records]
    sampled = np.concatenate([np.asarray(sample.sampled, np.float32) for sample in samples])
    lengths = np.asarray([len(sample.token_ids) for sample in samples])
    reward = np.asarray([record.reward for record in records], np.float32)
    advantage = reward - np.repeat(reward.reshape(-1, GROUP).mean(1), GROUP)
    BatchFiles(run.batches.directory).write(
        Batch(
            step=step,
            attempt=1,
            num_packs=1,
            max_pack_tokens=int(lengths.sum()),
            token_ids=np.concatenate([np.asarray(sample.token_ids) for sample in samples]),
            engine_logprobs=np.concatenate([np.asarray(sample.logprobs, np.float32) for sample in samples]),
            advantage=np.repeat(advantage, lengths),
            rl_weight=sampled,
            ce_weight=np.zeros_like(sampled),
            ref_weight=np.zeros_like(sampled),
            reference_logprobs=np.zeros_like(sampled),
            lengths=lengths,
            rollout=np.asarray([record.rollout_id for record in records]),
            temperature=np.ones(len(records), np.float32),
            pack=np.zeros(len(records), np.int64),
            version=np.full(len(records), step),
        )
    )
    noise = np.random.default_rng(step)
    logprobs = [np.asarray(s.logprobs, np.float32)[np.asarray(s.sampled) > 0] for s in samples]
    heard = [of_sample + noise.normal(0, 0.02, len(of_sample)).astype(np.float32) for of_sample in logprobs]
    run.logprobs.write(step, 0, list(range(len(samples))), heard)


def _write_logs(run: RunDir, chance: random.Random, rewards: list[float]) -> None:
    metrics, ledger, spans = [], [], []
    for step, reward in enumerate(rewards):
        at = BEGAN + (step + 1) * STEP_S
        row = {"step": step, "time": at, "reward/trained": reward, "age/mean": 1 + chance.random()}
        row |= {"age/max": 4.0, "train/rl/entropy": 1.2 - step / len(rewards) + 0.1 * chance.random()}
        row |= {"train/rl/mismatch_abs": 0.004 * chance.random(), "rollout/tokens_per_s": 9e4 * chance.random()}
        metrics.append(row | {f"metric/calc/filler_{i}": chance.random() for i in range(80)})
        for process, parts in (("trainer", ("forward_backward", "wait_for_batch")), ("engine-0", ("generate", "idle"))):
            busy = STEP_S * chance.uniform(0.6, 0.9)
            parts_s = dict(zip(parts, (busy, STEP_S - busy), strict=True))
            ledger.append(LedgerEntry(process=process, started_at=at - STEP_S, wall_s=STEP_S, parts_s=parts_s))
        spans.append(
            {"process": "orchestrator", "name": "publish", "started_at": at, "wall_s": 2.0, "version": step + 1}
        )
    run.spans("orchestrator").parent.mkdir()
    for path, rows in ((run.metrics, metrics), (run.ledger, ledger), (run.spans("orchestrator"), spans)):
        write_atomically(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


# --- the command


class Viewer:
    """The real command; `seconds` since its process was started."""

    def __init__(self, directory: Path):
        self._began = time.perf_counter()
        command = [sys.executable, "-m", "palestra.launch.cli", "view", str(directory), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1].rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=_DEADLINE_S)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def ask(self, path: str) -> tuple[float, httpx.Response]:
        began = time.perf_counter()
        answer = self._http.get(path)
        answer.raise_for_status()
        return time.perf_counter() - began, answer

    def until_indexed(self) -> None:
        """A page waits for a second for the index, then answers with what there is."""
        while self.ask(f"/runs/{NAME}/rollouts.json?limit=1")[1].json()["indexed"]["share"] < 1:
            assert self.seconds < _DEADLINE_S

    @property
    def peak_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else 0.0

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


QUESTIONS = {
    "run": "",
    "curves": "/curves.json",
    "rollouts, newest": "/rollouts",
    "rollouts, by reward": "/rollouts?sort=-reward",
    "rollouts, longest of one environment": "/rollouts?environment=words&sort=-tokens",
    "rollouts, with an error, slowest": "/rollouts?error=any&sort=-wall_s",
    "rollouts, rare: reward 0.05 to 0.0502, 12 tokens": "/rollouts?min_reward=0.05&max_reward=0.0502&max_tokens=12",
    "rollouts, of a task": "/rollouts?task=48*8",
    "groups, newest": "/groups",
    "groups, widest spread": "/groups?sort=-spread&environment=calc",
    "task over versions": "/task?task=48*8",
}


def measure(directory: Path) -> None:
    run = RunDir(directory / NAME)
    last = run.batches.steps()[-1]
    questions = QUESTIONS | {"one rollout": f"/rollouts/step-{last:06d}/7"}
    (run.path / "view.index").unlink(missing_ok=True)
    files = sorted(run.rollouts.glob("*.jsonl"))
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} steps, {size / 1e9:.2f} GB of rollouts, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for text in ("without an index", "with the index that is there"):
        viewer = Viewer(directory)
        try:
            viewer.ask("/runs")
            print(f"\n{text}: list of runs after {viewer.seconds:.2f} s", end="")
            viewer.ask(f"/runs/{NAME}")
            print(f", the run's page after {viewer.seconds:.2f} s", end="")
            viewer.ask(f"/runs/{NAME}/rollouts")
            print(f", first page of rollouts after {viewer.seconds:.2f} s", end="")
            viewer.until_indexed()
            print(f", all indexed after {viewer.seconds:.1f} s, peak {viewer.peak_mib:.0f} MiB")
            for name, path in questions.items():
                took = [viewer.ask(f"/runs/{NAME}{path}")[0] for _ in range(5)]
                print(f"  {name:<50} first {1000 * took[0]:6.0f} ms, then {1000 * min(took[1:]):6.0f} ms")
            print(f"  peak {viewer.peak_mib:.0f} MiB")
        finally:
            viewer.close()
    print(f"index: {(run.path / 'view.index').stat().st_size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "measure"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rollouts", type=int, default=512, help="of each step")
    parser.add_argument("--batches", type=int, default=2, help="how many of the last steps have their batch")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "make":
        began = time.perf_counter()
        sizes = {"steps": arguments.steps, "rollouts": arguments.rollouts}
        make(arguments.directory, **sizes, seed=arguments.seed, num_batches=arguments.batches)
        print(f"made in {time.perf_counter() - began:.0f} s")
    else:
        measure(arguments.directory)


if __name__ == "__main__":
    main()

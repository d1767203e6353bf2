"""The soak: a long run in which something is killed at random, again and again.

    python -m tests.fault.soak --steps 60 --step-s 3 --env-every 5 --others-every 120 --seed 7

Environment workers die every `env-every` seconds; an engine, the trainer or the orchestrator every `others-every`.
Prints the seed, what was killed and how it came back, what the files of the run count, and how memory went. Exit code
1, if a count does not close or memory grows.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from palestra.wire.runlog import read_restarts, read_summary
from tests.fault.counts import Counts, count
from tests.fault.whole_run import FaultyRun, config_of, save_table

ENV, OTHERS = ("env-0", "env-1"), ("engine-0", "engine-1", "trainer", "orchestrator")
LOOK_S, SETTLED_S = 0.2, 10.0
MAX_GROWTH = 1.15  # median of the last quarter of the time over that of the second


@dataclass
class Soak:
    """One run under fire, and what was seen of it. `env_every`, `others_every`: seconds between kills, or steps that
    were trained, if `by_steps`: then there is progress between kills, however slow the machine is."""

    run: FaultyRun
    chance: random.Random
    env_every: float
    others_every: float
    by_steps: bool = False
    kills: Counter[str] = field(default_factory=Counter)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by process: seconds, MiB
    wall_s: float = 0.0
    _at_work: dict[str, tuple[int, float]] = field(default_factory=dict)  # by process: its pid, and since when

    def play(self, *, deadline_s: float) -> tuple[int, str]:
        """Exit code, and what the run said."""
        began = time.monotonic()
        every = {ENV: self.env_every, OTHERS: self.others_every}
        due = dict(every)
        with tempfile.TemporaryFile("w+") as said:
            process = self.run.start(output=said)
            while process.poll() is None and time.monotonic() - began < deadline_s:
                now = self._num_trained() if self.by_steps else time.monotonic() - began
                for kinds, at in due.items():
                    if now >= at and self._kill(self.chance.choice(kinds)):
                        due[kinds] = now + every[kinds]
                self._look(time.monotonic() - began)
                time.sleep(LOOK_S)
            if process.poll() is None:
                process.kill()
            code = process.wait(timeout=20)
            said.seek(0)
            self.wall_s = time.monotonic() - began
            self.run.require_gone()
            return code, said.read()

    def _num_trained(self) -> int:
        """Steps, each once."""
        return len({note["step"] for note in self.run.witness.read("trained")})

    def _kill(self, name: str) -> bool:
        """Whether it was there to be killed: at work, and back from the last time. The run must have begun to train."""
        back = sum(r.process == name and r.gone_s is not None for r in read_restarts(self.run.run))
        if back < self.kills[name] or not self.run.witness.read("trained"):
            return False
        try:
            os.kill(self.run.witness.pid(name), signal.SIGKILL)
        except ProcessLookupError:
            return False  # it is not back yet
        self.kills[name] += 1
        return True

    def _look(self, at_s: float) -> None:
        """What has been at work for a while: a process grows until it has loaded what it needs."""
        if not self.run.witness.read("trained"):
            return
        newest = {note["process"]: note for note in self.run.witness.read("pids")}
        restarted = Counter(row.process for row in read_restarts(self.run.run))  # noted when it is ready, or dies again
        for name, note in newest.items():
            if restarted[name] < note["life"]:
                continue  # it is only beginning
            pid, since_s = self._at_work.get(name, (0, at_s))
            if pid != note["pid"]:
                pid, since_s = self._at_work[name] = note["pid"], at_s
            if at_s - since_s > SETTLED_S and (mib := _resident_mib(pid)) is not None:
                self.memory.setdefault(name, []).append((at_s, mib))

    def growth(self, name: str) -> float:
        """Of what a process holds: the last quarter of the time over the second one, in the median."""
        seen = self.memory.get(name) or [(0.0, 0.0)]
        end = seen[-1][0]
        early = [mib for at_s, mib in seen if end / 4 <= at_s < end / 2]
        late = [mib for at_s, mib in seen if at_s >= 3 * end / 4]
        return statistics.median(late) / statistics.median(early) if early and late else 1.0

    def slope_mib_per_minute(self, name: str) -> float:
        """Least squares over everything after the first quarter."""
        all_seen = self.memory.get(name) or [(0.0, 0.0)]
        seen = [(at_s, mib) for at_s, mib in all_seen if at_s >= all_seen[-1][0] / 4]
        if len(seen) < 2:
            return 0.0
        return 60 * statistics.linear_regression([at_s for at_s, _ in seen], [mib for _, mib in seen]).slope


def _resident_mib(pid: int) -> float | None:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return None


def soak_in(
    directory: Path,
    *,
    seed: int,
    steps: int,
    step_s: float,
    env_every: float,
    others_every: float,
    by_steps: bool = False,
) -> Soak:
    config = config_of(
        directory / "outputs",
        save_table(directory / "model"),
        train={"steps": steps, "checkpoint_every": 2, "batch_deadline_s": 120},
        engine={"replicas": 2},
        env={"workers": 2},
        launch={"max_restarts": 1000},
    )
    run = FaultyRun(config, [], directory, step_s=step_s)
    return Soak(run, random.Random(seed), env_every, others_every, by_steps)


def failures(soak: Soak, counts: Counts, code: int) -> list[str]:
    """What a sound soak has none of."""
    config = soak.run.config
    grown = [f"{name} grew {soak.growth(name):.2f}-fold" for name in soak.memory if soak.growth(name) > MAX_GROWTH]
    found = {
        f"the run ended with exit code {code}": code != 0,
        f"lost: {counts.lost}": counts.lost,
        f"ended twice: {counts.ended_twice}": counts.ended_twice,
        f"trained twice: {counts.trained_twice}": counts.trained_twice,
        f"versions went back in {counts.went_back}": counts.went_back,
        f"steps {counts.steps} of {config.train.steps}": counts.steps != list(range(config.train.steps)),
        f"the last checkpoint has version {counts.final_version}": counts.final_version != config.train.steps,
    }
    return [what for what, is_so in found.items() if is_so] + grown


def report(soak: Soak, counts: Counts, say: Callable[[str], None]) -> None:
    restarts = read_restarts(soak.run.run)
    summary = read_summary(soak.run.run) or {}
    say(
        f"{soak.wall_s:.0f} s, {len(counts.steps)} steps, version {counts.final_version}; {counts.finished} rollouts "
        f"finished, {counts.trained} trained, {len(counts.lost)} lost, "
        f"{len(counts.trained_twice) + len(counts.ended_twice)} twice; ledgers close to {summary.get('ledger_closure')}"
    )
    say(f"{'process':<14}{'kills':>6}{'restarts':>9}{'back after':>11}{'MiB':>7}{'growth':>8}{'MiB/min':>9}")
    for name in sorted({*soak.memory, *soak.kills}):
        gone = [r.gone_s for r in restarts if r.process == name and r.gone_s is not None]
        back = f"{statistics.median(gone):.1f} s" if gone else ""
        median = statistics.median([mib for _, mib in soak.memory.get(name, [])] or [0.0])
        say(
            f"{name:<14}{soak.kills[name]:>6}{len(gone):>9}{back:>11}{median:>7.0f}{soak.growth(name):>8.2f}"
            f"{soak.slope_mib_per_minute(name):>9.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--step-s", type=float, default=3.0, help="how long the trainer takes over a step")
    parser.add_argument("--env-every", type=float, default=5.0, help="seconds between kills of an environment worker")
    parser.add_argument("--others-every", type=float, default=120.0, help="between kills of any other process")
    parser.add_argument("--deadline", type=float, default=3600.0)
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="palestra-soak-"))
    soak = soak_in(
        directory,
        seed=wanted.seed,
        steps=wanted.steps,
        step_s=wanted.step_s,
        env_every=wanted.env_every,
        others_every=wanted.others_every,
    )
    code, said = soak.play(deadline_s=wanted.deadline)
    counts = count(soak.run.run, soak.run.witness, max_age=soak.run.config.algo.max_age)
    report(soak, counts, print)
    if found := failures(soak, counts, code):
        print("\n".join([*found, said, f"the run is kept in {directory}"]), file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())

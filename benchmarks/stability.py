"""Does training stay stable with age, and without the right importance correction?

    python benchmarks/stability.py RECIPE --ages 0 2 4 8 --losses mis none gspo --seeds 0 1 2 \
        --eval-every 20 --budget-s 3600 [section.field=value ...]

The first loss is trained at every age, the others at the greatest one: a run per setting and seed, one after the other.
Finished runs are skipped, others are resumed; when the budget is used up, the run in progress is interrupted, to go on
next time. One that fails is told, left where it is, and shown as far as it went: a collapse may end a run. Settings
take turns within a seed, so that what is there after any budget can be compared.
Writes `stability.md` (a table) and `stability.png` (held-out reward against steps) into `--outputs`.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palestra.launch.outcome import MISTAKE
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_metrics, read_summary
from palestra.wire.status import State, read_status

_STOP_S = 30.0  # of the budget, kept for a run to end when it is interrupted
_ENDED = (State.FINISHED, State.FAILED)


@dataclass(frozen=True)
class Setting:
    """One line of the figure."""

    loss: str
    age: int

    @property
    def label(self) -> str:
        return f"{self.loss}, age {self.age}"

    def run_name(self, seed: int) -> str:
        return f"{self.loss}-age{self.age}-seed{seed}"

    def overrides(self, seed: int) -> list[str]:
        """Publishing is as rare, and dispatch as far ahead, as the age that is allowed bears: so it is reached.

        Rollouts of engines that get every `k`th version are up to `k - 1` steps old, and one or two more by the time
        they train.
        """
        return [
            f"log.name={self.run_name(seed)}",
            f"algo.loss={self.loss}",
            f"algo.max_age={self.age}",
            f"algo.pace_age={self.age}",
            f"sync.every={max(1, self.age - 1)}",
            f"train.seed={seed}",
        ]


@dataclass(frozen=True)
class Measured:
    """One run as far as it went. `rewards`: held-out reward by policy version."""

    setting: Setting
    seed: int
    rewards: dict[int, float] = field(default_factory=dict)
    mean_age: float | None = None
    oldest: float | None = None  # of a rollout that trained
    least_effective_share: float | None = None
    state: State | None = None

    @property
    def last(self) -> float | None:
        return self.rewards[max(self.rewards)] if self.rewards else None


def settings_of(losses: Sequence[str], ages: Sequence[int]) -> list[Setting]:
    """The first loss at every age, the others at the greatest."""
    return [Setting(losses[0], age) for age in ages] + [Setting(loss, max(ages)) for loss in losses[1:]]


# --- running


def run_all(
    settings: Sequence[Setting], seeds: Sequence[int], outputs: Path, *, budget_s: float, play: Callable[..., bool]
) -> None:
    """`play(setting, seed, left_s)` says whether the run ended by itself."""
    end = time.monotonic() + budget_s
    todo = [(setting, seed) for seed in seeds for setting in settings]
    for number, (setting, seed) in enumerate(todo, start=1):
        name = setting.run_name(seed)
        if read_summary(RunDir(outputs / name)) is not None:
            print(f"[{number}/{len(todo)}] {name} is finished", file=sys.stderr)
            continue
        left_s = end - time.monotonic() - _STOP_S
        if left_s <= 0:
            print(f"[{number}/{len(todo)}] the budget of {budget_s:.0f} s is used up", file=sys.stderr)
            return
        print(f"[{number}/{len(todo)}] {name}, {left_s:.0f} s left", file=sys.stderr)
        if not play(setting, seed, left_s):
            return


def player(recipe: Path, outputs: Path, overrides: Sequence[str]) -> Callable[[Setting, int, float], bool]:
    """Plays one run with the command line. Errors: CalledProcessError for a recipe or an override that is wrong."""

    def play(setting: Setting, seed: int, left_s: float) -> bool:
        run = RunDir(outputs / setting.run_name(seed))
        words = [*setting.overrides(seed), f"log.outputs={outputs}", *overrides]
        words += ["--resume"] if run.config.exists() else []
        process = subprocess.Popen([sys.executable, "-m", "palestra.launch.cli", "run", str(recipe), *words])
        try:
            code = process.wait(timeout=left_s)
        except subprocess.TimeoutExpired:
            _interrupt(process)
            return False
        if code == MISTAKE:
            raise subprocess.CalledProcessError(code, process.args)
        if code:
            print(f"{run.name} failed (exit code {code}); going on with the next", file=sys.stderr)
        return True

    return play


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would; what does not end by that is killed, and its guard ends the rest."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- reading


def measure(run: RunDir, setting: Setting, seed: int, eval_set: str | None) -> Measured:
    """`eval_set`: by default the first one that was measured. A step trained again counts once."""
    rewards: dict[int, float] = {}
    steps: dict[int, dict[str, Any]] = {}
    for row in read_metrics(run):
        phase = str(row.get("phase", ""))
        if not phase:
            steps[row["step"]] = row
        elif phase.startswith("eval-"):
            names = [name for name in row if name.startswith("eval/") and name.endswith("/reward")]
            eval_set = eval_set or names[0].split("/")[1]
            if f"eval/{eval_set}/reward" in row:
                rewards[row["step"]] = row[f"eval/{eval_set}/reward"]
    ages = [row["age/mean"] for row in steps.values() if "age/mean" in row]
    oldest = [row["age/max"] for row in steps.values() if "age/max" in row]
    shares = [row["train/rl/effective_share"] for row in steps.values() if "train/rl/effective_share" in row]
    status = read_status(run)
    return Measured(
        setting=setting,
        seed=seed,
        rewards=rewards,
        mean_age=statistics.fmean(ages) if ages else None,
        oldest=max(oldest, default=None),
        least_effective_share=min(shares, default=None),
        state=status.state if status else None,
    )


def ended_of(runs: Iterable[Measured], setting: Setting) -> list[Measured]:
    """Runs that finished or failed; one in progress is not compared."""
    return [run for run in runs if run.setting == setting and run.state in _ENDED and run.rewards]


def curve(runs: Sequence[Measured]) -> list[tuple[int, float, float, float]]:
    """(version, mean, least, greatest) over seeds, at the versions that every one of them has."""
    shared = set.intersection(*(set(run.rewards) for run in runs)) if runs else set()
    values = {version: [run.rewards[version] for run in runs] for version in sorted(shared)}
    return [(version, statistics.fmean(found), min(found), max(found)) for version, found in values.items()]


# --- telling


def table(settings: Sequence[Setting], runs: Sequence[Measured]) -> str:
    """A row per setting, over its seeds that ended; then how far the ages of the first loss are apart."""
    lines = [
        "| loss | age allowed | mean age | oldest | seeds | failed | reward | least to greatest | effective share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    means: dict[Setting, float] = {}
    for setting in settings:
        found = ended_of(runs, setting)
        if not found:
            lines.append(f"| {setting.loss} | {setting.age} | | | 0 | | | | |")
            continue
        last = [run.last for run in found if run.last is not None]
        means[setting] = statistics.fmean(last)
        age = statistics.fmean(run.mean_age for run in found if run.mean_age is not None)
        oldest = max((run.oldest or 0.0 for run in found), default=0.0)
        share = min((run.least_effective_share or 0.0 for run in found), default=0.0)
        failed = sum(run.state is State.FAILED for run in found)
        lines.append(
            f"| {setting.loss} | {setting.age} | {age:.2f} | {oldest:.0f} | {len(found)} | {failed} | "
            f"{means[setting]:.3f} | {min(last):.3f} to {max(last):.3f} | >= {share:.3f} |"
        )
    ages = [means[setting] for setting in means if setting.loss == settings[0].loss]
    if len(ages) > 1:
        lines += ["", f"Means of {settings[0].loss} over ages are at most {max(ages) - min(ages):.3f} apart."]
    return "\n".join(lines) + "\n"


def draw(settings: Sequence[Setting], runs: Sequence[Measured], path: Path) -> None:
    """Left the first loss at every age, right every loss at the greatest: mean over seeds, least to greatest shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, greatest = settings[0].loss, max(setting.age for setting in settings)
    panels = {
        f"{first}, by age allowed": [setting for setting in settings if setting.loss == first],
        f"age {greatest}, by loss": [setting for setting in settings if setting.age == greatest],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, (title, shown) in zip(axes, panels.items(), strict=True):
        for setting in shown:
            if points := curve(ended_of(runs, setting)):
                versions, mean, least, greatest_reward = zip(*points, strict=True)
                panel.plot(versions, mean, marker="o", markersize=3, label=setting.label)
                panel.fill_between(versions, least, greatest_reward, alpha=0.15)
        panel.set(title=title, xlabel="steps", ylim=(0, 1))
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    axes[0].set_ylabel("held-out reward")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for every run")
    parser.add_argument("--ages", type=int, nargs="+", default=[0, 2, 4, 8])
    parser.add_argument("--losses", nargs="+", default=["mis", "none", "gspo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--eval-set", help="whose reward is shown; default: the first")
    parser.add_argument("--budget-s", type=float, required=True, help="0: only read what is there")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/stability"))
    arguments = parser.parse_intermixed_args(argv)
    settings = settings_of(arguments.losses, arguments.ages)
    overrides = [f"eval.every={arguments.eval_every}", *arguments.overrides]
    play = player(arguments.recipe, arguments.outputs, overrides)
    run_all(settings, arguments.seeds, arguments.outputs, budget_s=arguments.budget_s, play=play)
    runs = [
        measure(RunDir(arguments.outputs / setting.run_name(seed)), setting, seed, arguments.eval_set)
        for seed in arguments.seeds
        for setting in settings
    ]
    arguments.outputs.mkdir(parents=True, exist_ok=True)
    text = table(settings, runs)
    (arguments.outputs / "stability.md").write_text(text)
    (arguments.outputs / "stability.json").write_text(
        json.dumps([{"run": run.setting.run_name(run.seed), "rewards": run.rewards} for run in runs], indent=1)
    )
    draw(settings, runs, arguments.outputs / "stability.png")
    print(text)


if __name__ == "__main__":
    main()

"""`palestra bench trainer`: the trainer's own step on random tokens, and what it would be with transformers alone.

tokens_per_s  tokens of the packs, without padding / seconds of a step: forward, backward, clipping and optimizer
mfu           FLOPs of the definition / seconds / peak FLOP/s of the ranks. FLOPs of a step = 3 x sum over documents of
              2 x (tokens x parameters that a token is multiplied by + scored tokens x head)
              + sum over layers of 2 x heads x (width of keys + width of values) x visible pairs;
              nothing that is computed again counts. The peak is the data sheet's where the device is known, otherwise
              what a large matrix product reaches there
peak_bytes    most that was in use during the steps, over what the process had before the model. On a GPU torch's, on a
              CPU that of a process of its own, whose allocator gives back what is free and is slower for it

Those that are compared take turns, so that what else the machine does falls on all of them.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import msgspec

from palestra.config import RunConfig
from palestra.config.load import load_tree
from palestra.core.errors import InfrastructureError, UserError
from palestra.launch.bench.report import say, tell_numbers
from palestra.launch.bench.shapes import SHAPES
from palestra.launch.child import ended_how
from palestra.launch.hardware import HARDWARE
from palestra.train.job import Job, Speed

_DEADLINE_S = 3600.0
_SPREAD = 0.7  # sigma of the log-normal law of lengths
_TURNS = 2  # of each that is compared
_OURS = "palestra"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the command line asks for. `overrides` are those of a recipe: train.shard=2 model.dtype=float32."""

    model: str = "smollm2-135m"
    config: Path | None = None
    tokens: int = 4096
    packs: int = 1
    documents: int = 8
    kind: Literal["rl", "sft"] = "rl"
    steps: int = 3
    against: str | None = None
    profile: Path | None = None
    overrides: list[str] = field(default_factory=list)


def show(wish: Wish, *, as_json: bool) -> None:
    """Errors: UserError; InfrastructureError, for a process that fails."""
    tell_numbers(measure(wish), as_json=as_json)


def measure(wish: Wish) -> dict[str, Any]:
    if wish.against not in (None, "transformers"):
        raise UserError(f"--against {wish.against} is not known; compare with transformers")
    with tempfile.TemporaryDirectory(prefix="palestra-bench-") as name:
        directory = Path(name)
        config = _config(wish, directory)
        if not is_given(config, directory):
            say("a model of random weights")
            build(_fields(wish), directory / "model", threads=config.train.threads)
        job = _job(wish, config)
        speeds = _speeds(_ways(wish, config), job, config, directory)
    numbers = _numbers(wish, speeds[_OURS], job.num_tokens)
    return numbers if wish.against is None else numbers | _compare(speeds)


def is_given(config: RunConfig, directory: Path) -> bool:
    """Whether the overrides name a model: model.path=DIR."""
    return Path(config.model_dir) != directory / "model"


def build(fields: dict[str, Any], directory: Path, *, threads: int = 1) -> None:
    """In a process of its own, so that the one that is measured has only its own memory."""
    _run([*_module("palestra.train.speed"), "build", json.dumps(fields), str(directory)], threads)


def _fields(wish: Wish) -> dict[str, Any]:
    if wish.config is not None:
        try:
            return json.loads(wish.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--config {wish.config} cannot be read: {error}; give a model's config.json") from error
    if wish.model not in SHAPES:
        raise UserError(f"--model {wish.model} is not known; take one of {', '.join(SHAPES)}, or --config FILE")
    return SHAPES[wish.model]


def _config(wish: Wish, directory: Path) -> RunConfig:
    tree: dict[str, Any] = {
        "log": {"name": "bench-trainer", "outputs": str(directory)},
        "model": {"path": str(directory / "model")},
        "data": {"sources": [{"path": "random.jsonl"}]},
        "train": {"max_pack_tokens": wish.tokens},
    }
    return load_tree(tree, wish.overrides).config


def _job(wish: Wish, config: RunConfig) -> Job:
    num_packs = wish.packs * config.train.num_data_ranks
    packs = [unequal_lengths(wish.tokens, wish.documents, seed=seed) for seed in range(num_packs)]
    return Job(
        config=config.model_dump(mode="json"),
        packs=packs,
        kind=wish.kind,
        prompt_share=0.25,
        steps=wish.steps,
        profile=str(wish.profile.absolute()) if wish.profile else "",
    )


def unequal_lengths(tokens: int, documents: int, *, seed: int) -> list[int]:
    """Log-normal lengths of at least 2 that add up to `tokens`. Errors: UserError, if they cannot."""
    if documents < 1 or tokens < 2 * documents:
        raise UserError(f"--tokens {tokens} do not make --documents {documents} of at least 2; lower --documents")
    chance = random.Random(seed)
    wishes = [chance.lognormvariate(0, _SPREAD) for _ in range(documents)]
    spare = tokens - 2 * documents
    lengths = [2 + int(spare * wish / sum(wishes)) for wish in wishes]
    lengths[lengths.index(max(lengths))] += tokens - sum(lengths)
    return lengths


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _launcher(config: RunConfig) -> list[str]:
    ranks = config.train.num_ranks
    if ranks == 1:
        return [sys.executable, "-m"]
    return [*_module("torch.distributed.run"), "--standalone", "--nproc-per-node", str(ranks), "-m"]


def _ways(wish: Wish, config: RunConfig) -> dict[str, list[str]]:
    """Names and commands; JOB stands for the job's file."""
    ours = {_OURS: [*_launcher(config), "palestra.train.speed", "JOB"]}
    if wish.against is None:
        return ours
    if config.train.num_ranks != 1:
        raise UserError("--against transformers compares one rank; leave train.shard and train.replicate at 1")
    return ours | {way: [*_module("palestra.train.plain"), "JOB", way] for way in ("padded", "masked")}


def _speeds(ways: dict[str, list[str]], job: Job, config: RunConfig, directory: Path) -> dict[str, Speed]:
    speeds: dict[str, Speed] = {}
    for _ in range(_TURNS if len(ways) > 1 else 1):
        for name, command in ways.items():
            say(f"{job.steps} steps of {_title(name)}")
            speed = _speed(command, job, config, directory)
            speeds[name] = _together(speeds[name], speed) if name in speeds else speed
    for name, command in ways.items():
        if speeds[name].device == "cpu":
            say(f"memory of {_title(name)}")
            short = msgspec.structs.replace(job, steps=1, profile="")
            lean = _speed(command, short, config, directory, is_lean=True)
            bytes_ = {field: getattr(lean, field) for field in ("bytes_before", "bytes_loaded", "bytes_peak")}
            speeds[name] = msgspec.structs.replace(speeds[name], **bytes_)
    return speeds


def _title(name: str) -> str:
    return name if name == _OURS else f"transformers, {name}"


def _together(one: Speed, other: Speed) -> Speed:
    steps = {"steps_s": one.steps_s + other.steps_s, "cpu_s": one.cpu_s + other.cpu_s}
    parts_s = {name: (seconds + other.parts_s[name]) / 2 for name, seconds in one.parts_s.items()}
    product_flops = max(one.product_flops, other.product_flops)
    return msgspec.structs.replace(one, **steps, parts_s=parts_s, product_flops=product_flops)


def _speed(command: list[str], job: Job, config: RunConfig, directory: Path, *, is_lean: bool = False) -> Speed:
    file = directory / "job.json"
    file.write_bytes(msgspec.json.encode(job))
    command = [str(file) if word == "JOB" else word for word in command]
    lines = _run(command, config.train.threads, is_lean=is_lean).splitlines()
    return msgspec.json.decode(lines[-1], type=Speed)


def _run(command: list[str], threads: int, *, is_lean: bool = False) -> bytes:
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if is_lean:  # large blocks go back to the system when they are free, so that a process has what it uses
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, env=env, timeout=_DEADLINE_S)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()[-2000:]
        kind = UserError if done.returncode == 2 else InfrastructureError
        raise kind(f"{command[2]}: {ended_how(done.returncode)}. {words}")
    return done.stdout


# --- numbers


def peak_flops(speed: Speed) -> tuple[float, str]:
    """Of one rank, and whose figure it is."""
    known = next((hardware for name, hardware in HARDWARE.items() if name in speed.device), None)
    if known is None:
        return speed.product_flops, "a large matrix product here"
    return known.flops, f"the data sheet of {known.name}"


def _numbers(wish: Wish, speed: Speed, num_tokens: int) -> dict[str, Any]:
    step_s, tokens = median(speed.steps_s), num_tokens
    peak, whose = peak_flops(speed)
    return {
        "model": str(wish.config or wish.model),
        "kind": wish.kind,
        "device": speed.device,
        "attention": ", ".join(speed.attention),
        "ranks": speed.ranks,
        "parameters": speed.parameters,
        "tokens_per_step": tokens,
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "flops_per_step": speed.flops,
        "tflops_per_rank": speed.flops / step_s / speed.ranks / 1e12,
        "mfu": speed.flops / step_s / speed.ranks / peak,
        "peak_flops": peak,
        "peak_flops_from": whose,
        "optimizer_share": speed.parts_s["optimizer"] / step_s,
        "state_bytes": speed.bytes_loaded - speed.bytes_before,
        "peak_bytes": _used(speed),
        "loss": speed.loss,
    }


def _used(speed: Speed) -> int:
    return speed.bytes_peak - speed.bytes_before


def _compare(speeds: dict[str, Speed]) -> dict[str, Any]:
    """With the faster way of transformers alone, and the one that needs less memory; both are told."""
    ours, ways = speeds[_OURS], {name: speed for name, speed in speeds.items() if name != _OURS}
    fastest = min(ways, key=lambda way: median(ways[way].steps_s))
    theirs = ways[fastest]
    numbers: dict[str, Any] = {}
    for way, speed in ways.items():
        numbers[f"transformers_{way}_step_s"] = median(speed.steps_s)
        numbers[f"transformers_{way}_peak_bytes"] = _used(speed)
    return numbers | {
        "transformers_way": fastest,
        "transformers_loss": theirs.loss,
        "throughput_over_transformers": median(theirs.steps_s) / median(ours.steps_s),
        "cpu_throughput_over_transformers": median(theirs.cpu_s) / median(ours.cpu_s),
        "memory_over_transformers": _used(ours) / min(map(_used, ways.values())),
    }

"""`palestra plan`: what a recipe asks of its devices, told without any of them."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from palestra.config import RunConfig, load
from palestra.config.schema import Model
from palestra.core.errors import UserError
from palestra.launch.asking import ask
from palestra.launch.budget import (
    CHANGED,
    Budget,
    Change,
    Work,
    budget_of,
    changes,
    difference_bytes,
    longest_pack,
    published_bytes,
    step_flops,
)
from palestra.launch.hardware import Hardware, hardware_of
from palestra.launch.layout import require_layout
from palestra.launch.machine import this_machine
from palestra.launch.memory import GIB, of_copies
from palestra.model.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the command line asks for. `mean_tokens` of a rollout, or of a supervised sample, with its prompt."""

    recipe: Path
    overrides: list[str]
    model_config: Path | None = None
    gpu: str = "H200"
    gpus_per_node: int = 8
    mean_tokens: int | None = None
    mfu: float | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    config: RunConfig
    origin: str  # where the model's shapes come from
    anatomy: Anatomy
    hardware: Hardware
    work: Work
    is_length_assumed: bool
    node_ranks: int
    budget: Budget
    changes: list[Change]
    longest_pack: int

    @property
    def num_nodes(self) -> int:
        return -(-self.config.train.num_ranks // self.node_ranks)


def show(wish: Wish, *, as_json: bool) -> None:
    """Errors: UserError. A plan that does not fit is a plan: `fits` says so, the exit code does not."""
    planned = plan(wish)
    if as_json:
        json.dump(as_dict(planned), sys.stdout, indent=2)
        print()
    else:
        _print(planned)


def plan(wish: Wish) -> Planned:
    config = load(wish.recipe, wish.overrides).config
    named, origin = _model_of(config.model, wish)
    with _in_directory(named) as model:
        require_layout(config.model_copy(update={"model": model}))
        anatomy = dissected(model)
    train = config.train
    machine = this_machine()
    hardware = hardware_of(
        wish.gpu, cpu_memory_bytes=machine.memory_bytes, threads=train.threads, ranks=train.num_ranks
    )
    if wish.mfu is not None:
        hardware = replace(hardware, mfu=wish.mfu)
    work = _work(config, wish.mean_tokens)
    settings = {
        "node_ranks": wish.gpus_per_node,
        "keeps_published": _sends_changes(config),
        "copies_bytes": of_copies(config, anatomy.parameters),
    }
    return Planned(
        config=config,
        origin=origin,
        anatomy=anatomy,
        hardware=hardware,
        work=work,
        is_length_assumed=wish.mean_tokens is None,
        node_ranks=wish.gpus_per_node,
        budget=budget_of(train, anatomy, hardware, work, **settings),
        changes=changes(train, anatomy, hardware, work, **settings),
        longest_pack=longest_pack(train, anatomy, hardware, work, **settings),
    )


def _sends_changes(config: RunConfig) -> bool:
    return config.is_rl and config.sync.kind == "sparse_nccl"


def _work(config: RunConfig, mean_tokens: int | None) -> Work:
    """Without a given mean half of the longest: it has to come from somewhere."""
    longest = config.engine.max_model_len if config.is_rl else min(config.data.max_tokens, config.train.max_pack_tokens)
    samples = config.algo.rollouts_per_step if config.is_rl else config.train.samples_per_step
    mean = mean_tokens or max(longest // 2, 1)
    return Work(tokens=samples * mean, document_tokens=mean)


def _model_of(model: Model, wish: Wish) -> tuple[Model, str]:
    """The model whose shapes are read, and where they come from: what is given, what lies beside the recipe under the
    name of a hub's model, or what the recipe names."""
    if model.path is None and wish.model_config is None:
        return model, "model.build"
    beside = wish.recipe.parent / f"{Path(model.path or '').name}.config.json"
    file = wish.model_config or (beside if beside.is_file() and not Path(model.path or "").is_dir() else None)
    if file is None:
        return model, str(model.path)
    if not file.is_file():
        raise UserError(f"--config {file} is not there; give the config.json of a model in Hugging Face layout")
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); give the config.json of a model") from error
    return model.model_copy(update={"path": str(file), "build": None}), str(file)


@contextmanager
def _in_directory(model: Model) -> Iterator[Model]:
    """Of a model whose path is that of a config.json: in a directory, where it is looked for."""
    if model.path is None or not Path(model.path).is_file():
        yield model
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_bytes(Path(model.path).read_bytes())
        yield model.model_copy(update={"path": directory})


def dissected(model: Model) -> Anatomy:
    """Errors: UserError, if the model cannot be read."""
    return msgspec.json.decode(ask("palestra.model.dissect", model.model_dump_json()).splitlines()[-1], type=Anatomy)


# --- told


def as_dict(planned: Planned) -> dict[str, Any]:
    anatomy, budget, train = planned.anatomy, planned.budget, planned.config.train
    return {
        "fits": budget.fits,
        "model": {
            "architecture": anatomy.architecture,
            "shapes_from": planned.origin,
            "parameters": anatomy.parameters,
            "trained_parameters": anatomy.adapters or anatomy.parameters,
            "active_parameters": anatomy.active,
            "layers": len(anatomy.layers),
            "experts": anatomy.num_experts,
            "experts_per_token": anatomy.num_experts_per_token,
        },
        "layout": {
            "ranks": train.num_ranks,
            "nodes": planned.num_nodes,
            "replicate": train.replicate,
            "shard": train.shard,
            "context_parallel": train.context_parallel,
            "tensor_parallel": train.tensor_parallel,
            "expert_parallel": train.expert_parallel,
        },
        "hardware": {
            "name": planned.hardware.name,
            "memory_bytes": planned.hardware.memory_bytes,
            "flops": planned.hardware.flops,
            "mfu_assumed": planned.hardware.mfu,
        },
        "device_bytes": budget.device_bytes,
        "device_parts_bytes": dict(budget.parts),
        "host_bytes_per_device": budget.host_bytes,
        "longest_pack_tokens": planned.longest_pack,
        "publish_bytes": published_bytes(anatomy),
        "publish_difference_bytes_expected": difference_bytes(anatomy, is_sent=_sends_changes(planned.config)),
        "step": _step_as_dict(planned),
        "changes": [
            {
                "settings": change.settings,
                "ranks": change.num_ranks,
                "device_bytes": change.budget.device_bytes,
                "frees_bytes": budget.device_bytes - change.budget.device_bytes,
                "host_bytes": change.budget.host_bytes,
                "fits": change.budget.fits,
                "step_s": change.budget.seconds.total,
            }
            for change in planned.changes
        ],
    }


def _step_as_dict(planned: Planned) -> dict[str, Any]:
    work, budget = planned.work, planned.budget
    return {
        "tokens": work.tokens,
        "document_tokens": work.document_tokens,
        "document_tokens_assumed": planned.is_length_assumed,
        "packs_per_rank": budget.packs,
        "flops_per_token": step_flops(planned.anatomy, work) / work.tokens,
        "compute_s": budget.seconds.compute,
        "communication_s": budget.seconds.communication,
        "offload_s": budget.seconds.offload,
        "to_experts_s": budget.seconds.to_experts,
        "tensor_s": budget.seconds.tensor,
        "optimizer_s": budget.seconds.optimizer,
        "step_s": budget.seconds.total,
    }


def _print(planned: Planned) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(planned):
        console.print(line)
    console.print()
    console.print(_parts_table(planned.budget))
    console.print(f"\n{_verdict(planned)}\n")
    console.print(_changes_table(planned))
    console.print(f"\n{_publish_words(planned)}\n{_step_words(planned)}")


def _lines(planned: Planned) -> list[str]:
    anatomy, train = planned.anatomy, planned.config.train
    experts = f", {anatomy.num_experts} experts of which a token meets {anatomy.num_experts_per_token}"
    layout = f"{planned.hardware.name}: replicate {train.replicate} x shard {train.shard}"
    layout += f" x context {train.context_parallel}" if train.context_parallel > 1 else ""
    layout += f" x tensor {train.tensor_parallel} ({_heads_words(planned)})" if train.tensor_parallel > 1 else ""
    if train.expert_parallel > 1:
        has_own = anatomy.num_experts > 0
        layout += f", experts over {train.expert_parallel}" if has_own else ", experts as FSDP shards all other weights"
    adapters = f"; trained: {anatomy.adapters / 1e6:.2f} M of adapters beside it" if anatomy.adapters else ""
    return [
        f"model:  {anatomy.architecture}, {anatomy.parameters / 1e9:.2f} B parameters, {anatomy.active / 1e9:.2f} B "
        f"active, {len(anatomy.layers)} layers{experts if anatomy.num_experts else ''} (from {planned.origin})"
        f"{adapters}",
        f"layout: {train.num_ranks} ranks on {planned.num_nodes} nodes of {planned.node_ranks} {layout}",
    ]


def _heads_words(planned: Planned) -> str:
    """What each rank of a tensor axis has."""
    size, anatomy = planned.config.train.tensor_parallel, planned.anatomy
    split = sum(layer.split for layer in anatomy.layers)
    heads = anatomy.layers[0].attention.heads
    by_head = f"{heads // size} of {heads} heads" if anatomy.are_heads_split else f"all {heads} heads"
    whole = sum(layer.whole for layer in anatomy.layers)
    parameters = f"{split / size / 1e9:.2f} of {split / 1e9:.2f} B split parameters, {whole / 1e9:.2f} B whole"
    return f"each {by_head} and {parameters}"


def _parts_table(budget: Budget) -> Table:
    table = Table("on each device, at the peak", "GiB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in budget.parts:
        table.add_row(name, _gib(size))
    table.add_row("in all", _gib(budget.device_bytes), style="bold")
    table.add_row("of", _gib(budget.limit_bytes))
    return table


def _verdict(planned: Planned) -> str:
    budget = planned.budget
    words = f"Fits, with {_gib(budget.limit_bytes - budget.device_bytes)} GiB to spare"
    if not budget.fits:
        over = max(budget.device_bytes - budget.limit_bytes, budget.host_bytes - budget.host_limit_bytes)
        where = "on the device" if budget.device_bytes > budget.limit_bytes else "in the host's memory"
        enough = [change for change in planned.changes if change.budget.fits]
        cure = " or ".join(_settings(change) for change in enough) or "no single setting below"
        words = f"DOES NOT FIT: {_gib(over)} GiB too much {where}; enough would be {cure}"
    if budget.host_bytes:
        words += f". In the host's memory: {_gib(budget.host_bytes)} GiB for each device"
    longest = f"{planned.longest_pack:,} tokens" if planned.longest_pack else "none"
    return f"{words}. Longest pack that fits: {longest}."


def _changes_table(planned: Planned) -> Table:
    table = Table(
        "with this instead, alone", "frees GiB", "needs GiB", "in host", "fits", "step", box=None, pad_edge=False
    )
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for change in planned.changes:
        needed = change.budget.device_bytes
        frees = _gib(planned.budget.device_bytes - needed)
        fits = "yes" if change.budget.fits else "NO"
        table.add_row(
            _settings(change),
            frees,
            _gib(needed),
            _gib(change.budget.host_bytes),
            fits,
            _seconds(change.budget.seconds.total),
        )
    return table


def _settings(change: Change) -> str:
    return " ".join(
        f"train.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in change.settings.items()
    )


def _publish_words(planned: Planned) -> str:
    anatomy = planned.anatomy
    size, difference = published_bytes(anatomy), difference_bytes(anatomy, is_sent=_sends_changes(planned.config))
    if difference is None:
        return f"publish: {size / 1024**2:,.1f} MiB of adapters, whole each time"
    low, high = map(_gib, difference)
    return (
        f"publish: {_gib(size)} GiB; the difference is about {low} to {high}, "
        f"if {CHANGED[0]:.0%} to {CHANGED[1]:.0%} of the weights change"
    )


def _step_words(planned: Planned) -> str:
    work, seconds = planned.work, planned.budget.seconds
    told = "assumed: half of the longest; --mean-tokens" if planned.is_length_assumed else "as given"
    flops = step_flops(planned.anatomy, work) / work.tokens
    hidden = f"{_seconds(seconds.communication)} of communication and {_seconds(seconds.offload)} of offload behind it"
    return (
        f"step:    about {_seconds(seconds.total)}: {work.tokens:,} tokens in documents of {work.document_tokens:,} "
        f"({told}), packs for each rank: {planned.budget.packs}, {flops / 1e9:.1f} GFLOP a token; computing "
        f"{_seconds(seconds.compute)} at {planned.hardware.mfu:.0%} of {planned.hardware.flops / 1e12:,.3g} TFLOP/s "
        f"(assumed; --mfu), with {hidden}, to experts {_seconds(seconds.to_experts)}, sums over the "
        f"tensor axis {_seconds(seconds.tensor)}, optimizer "
        f"{_seconds(seconds.optimizer)}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if abs(size) < 10 * GIB else f"{size / GIB:,.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"

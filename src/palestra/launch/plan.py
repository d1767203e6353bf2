"""The plan of a run: its processes, with command, devices, threads and memory. A pure function of its arguments."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from palestra.config import RunConfig
from palestra.config.schema import Train
from palestra.core.errors import UserError
from palestra.launch import memory
from palestra.launch.machine import Machine
from palestra.launch.memory import GIB, Memory

_PREPARE_S = 900.0
_FIRST_MESSAGE_S = 60.0  # beyond engine.healthy_s: the leader may wait for its engines first


class Role(StrEnum):
    PREPARE = "prepare"  # runs to its end before the others start
    LEAD = "lead"  # the run ends when it has said Done and exited
    MEMBER = "member"  # serves the leader


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process (or one torchrun with its ranks). `name` is how it calls itself, and its log's name.

    `start_s` is how long it may take to be ready: an engine to answer at its address (`engine` is its index), the
    leader to say its first word, a preparation to end.
    """

    name: str
    role: Role
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    engine: int | None = None
    start_s: float = _PREPARE_S
    threads: int = 1
    devices: tuple[int, ...] = ()  # GPUs
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`staging_bytes` is the room for weights on their way; `notes` are for people."""

    programs: tuple[Program, ...]
    parameters: int | None = None
    staging_bytes: int = 0
    notes: tuple[str, ...] = ()

    def of_role(self, role: Role) -> tuple[Program, ...]:
        return tuple(program for program in self.programs if program.role is role)

    @property
    def lead(self) -> Program:
        return self.of_role(Role.LEAD)[0]

    @property
    def engines(self) -> tuple[Program, ...]:
        return tuple(program for program in self.programs if program.engine is not None)

    @property
    def host_bytes(self) -> int:
        """Estimated memory of the processes that compute on the CPU, and of staging."""
        return self.staging_bytes + sum(program.memory.total for program in self.programs if not program.devices)


def make_plan(config: RunConfig, machine: Machine, *, is_model_built: bool = False) -> Plan:
    """Errors: UserError, if the config has nothing to train on, or asks for GPUs that are not there."""
    if not config.is_rl and not config.data.sources and not config.is_eval:
        raise UserError(
            "there is nothing to train on: give env.mix (reinforcement learning) or data.sources (supervised)"
        )
    parameters = memory.count_parameters(config)
    engine_devices, trainer_devices, notes = _deal_gpus(config, machine)
    prepare = () if config.model.build is None or is_model_built else (_preparation(config),)
    if config.is_rl or config.is_eval:
        names = [f"engine-{index}" for index in range(config.engine.replicas)]
        names = [*names, *(f"{name}-0" for name in config.algo.frozen)][: config.num_engines]
        dealt = enumerate(zip(names, engine_devices, strict=True))
        engines = [_engine(config, index, name, devices) for index, (name, devices) in dealt]
        workers = [_env_worker(config, index) for index in range(config.num_workers)]
        trainers = [] if config.is_eval else [_trainer(config, parameters, trainer_devices, Role.MEMBER)]
        running = [*engines, _orchestrator(config), *workers, *trainers]
    else:
        running = [_trainer(config, parameters, trainer_devices, Role.LEAD)]
    return Plan(
        programs=(*prepare, *running),
        parameters=parameters,
        staging_bytes=memory.of_staging(config, parameters) if config.is_rl else 0,
        notes=notes,
    )


def require_fit(plan: Plan, machine: Machine) -> None:
    """Errors: UserError, if what is known of the plan needs more memory than the machine has."""
    if plan.host_bytes > machine.memory_bytes:
        largest = max(plan.programs, key=lambda program: program.memory.total)
        parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in largest.memory.parts if size)
        raise UserError(
            f"the run needs about {plan.host_bytes / GIB:.1f} GiB of memory and this machine has "
            f"{machine.memory_bytes / GIB:.1f}; the largest process is {largest.name} ({parts} GiB): take a smaller "
            "model, lower engine.kv_cache_gib or engine.replicas, or use a larger machine (`--dry-run` prints the plan)"
        )
    room = {gpu.index: gpu.memory_bytes for gpu in machine.gpus}
    for program in plan.programs:
        share = program.memory.total // max(len(program.devices), 1)
        for device in program.devices:
            if share > room.get(device, share):
                raise UserError(
                    f"{program.name} needs about {share / GIB:.1f} GiB on GPU {device}, which has "
                    f"{room[device] / GIB:.1f}: raise train.shard or engine.tensor_parallel, or take a smaller model"
                )


def _deal_gpus(config: RunConfig, machine: Machine) -> tuple[list[tuple[int, ...]], tuple[int, ...], tuple[str, ...]]:
    """GPUs of every engine and of the trainer: apart from each other where there are enough, else shared."""
    replicas = config.num_engines
    width, ranks = config.engine.tensor_parallel, 0 if config.is_eval else config.train.num_ranks
    gpus = [gpu.index for gpu in machine.gpus]
    if config.engine.device == "cuda" and not gpus and replicas:
        raise UserError(
            "engine.device=cuda, but this machine shows no GPU; use engine.device=auto, or see `palestra doctor`"
        )
    if not gpus and replicas and config.replays_routers:
        raise UserError(
            "train.router_replay=true needs engines on GPUs, as vLLM returns routed experts by its second model runner "
            "alone, and this machine shows no GPU; set train.router_replay=false"
        )
    if not gpus:
        return [()] * replicas, (), ()
    on_gpu = config.engine.device != "cpu"
    needed = replicas * width if on_gpu else 0
    if on_gpu and replicas and width > len(gpus):
        raise UserError(
            f"engine.tensor_parallel={width} needs as many GPUs, this machine has {len(gpus)}; set it to {len(gpus)} "
            "or less"
        )
    if ranks > len(gpus):
        raise UserError(_too_many_ranks(config.train, len(gpus)))
    if config.takes_turns and on_gpu:
        return [(gpus[0],)], (gpus[0],), (_turns_note(config, machine),)
    dealt = [gpus[place % len(gpus)] for place in range(needed + ranks)]
    engines = [tuple(dealt[i * width : (i + 1) * width]) if on_gpu else () for i in range(replicas)]
    notes = ()
    if needed + ranks > len(gpus):
        notes = (
            f"engines and trainer ask for {needed + ranks} GPUs and share {len(gpus)}: give engines a part of the "
            "memory, e.g. engine.args.gpu-memory-utilization=0.4",
        )
    return engines, tuple(dealt[needed:]), notes


def _too_many_ranks(train: Train, num_gpus: int) -> str:
    factors = ("shard", "replicate", "context_parallel", "tensor_parallel")
    product = " x ".join(f"train.{name}={getattr(train, name)}" for name in factors)
    beside, sharing = train.num_ranks // train.shard, train.num_sharing // train.shard
    fitting = [n for n in range(1, num_gpus // beside + 1) if n * sharing % train.expert_parallel == 0]
    owned = f" with train.expert_parallel={train.expert_parallel}" if train.expert_parallel > 1 else ""
    cure = f"set train.shard to {fitting[-1]}" if fitting else f"no train.shard fits{owned}: lower the others, too"
    return f"{product} need {train.num_ranks} GPUs, this machine has {num_gpus}; {cure}"


def _turns_note(config: RunConfig, machine: Machine) -> str:
    """What turns come to on the first GPU. The trainer decides by what it really has (`train/belongings.py`)."""
    gpu, parameters = machine.gpus[0], memory.count_parameters(config)
    room = (1 - config.engine.gpu_share) * gpu.memory_bytes
    state = None if parameters is None else memory.of_state(config, parameters)
    copies = memory.of_copies(config, parameters or 0)
    where = "where there is room" if state is None else "there" if state + copies <= room else "in host memory"
    size = "" if state is None else f"about {state / GIB:.1f} GiB, "
    kept = f"; copies for the engine ({copies / GIB:.1f} GiB) stay there" if copies else ""
    kept += ", for which engine.args.gpu-memory-utilization has to be lower" if copies > room else ""
    others = f"; the other {len(machine.gpus) - 1} GPUs are left alone" if len(machine.gpus) > 1 else ""
    return (
        f"engine and trainer take turns on GPU {gpu.index}: in the engine's turn the trainer's weights and moments "
        f"({size}with {room / GIB:.1f} GiB beside the engine) are kept {where}{kept}{others}"
    )


def _preparation(config: RunConfig) -> Program:
    return Program(
        name="model",
        role=Role.PREPARE,
        argv=_python("palestra.model", config),
        env=_environment(threads=1, devices=()),
        memory=memory.of_python(),
    )


def _engine(config: RunConfig, index: int, name: str, devices: tuple[int, ...]) -> Program:
    is_policy = index < config.engine.replicas
    parameters = memory.count_parameters(config) if is_policy else memory.parameters_in(config.engine_model(index))
    return Program(
        name=name,
        role=Role.MEMBER,
        argv=_python("palestra.infer", config),
        env=_environment(threads=config.engine.threads, devices=devices, index=index),
        engine=index,
        start_s=config.engine_start_s,
        threads=config.engine.threads,
        devices=devices,
        memory=memory.of_engine(config, parameters),
    )


def _orchestrator(config: RunConfig) -> Program:
    return Program(
        name="orchestrator",
        role=Role.LEAD,
        argv=_python("palestra.orchestrate", config),
        env=_environment(threads=1, devices=()),
        start_s=config.engine_start_s + _FIRST_MESSAGE_S,
        memory=memory.of_python(),
    )


def _env_worker(config: RunConfig, index: int) -> Program:
    return Program(
        name=f"env-{index}",
        role=Role.MEMBER,
        argv=_python("palestra.env", config, python=config.python_of_worker(index)),
        env=_environment(threads=1, devices=(), index=index),
        memory=memory.of_python(),
    )


def _trainer(config: RunConfig, parameters: int | None, devices: tuple[int, ...], role: Role) -> Program:
    ranks = config.train.num_ranks
    if ranks == 1:
        argv = _python("palestra.train", config)
    else:
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "palestra.train")
        argv = (sys.executable, "-m", *launcher, str(config_path(config)))
    return Program(
        name="trainer",
        role=role,
        argv=argv,
        env=_environment(threads=config.train.threads, devices=devices),
        start_s=config.train.batch_deadline_s + (config.engine.healthy_s if config.takes_turns else 0),
        threads=config.train.threads * ranks,
        devices=devices,
        memory=memory.of_trainer(config, parameters, on_gpu=bool(devices)),
    )


def config_path(config: RunConfig) -> str:
    return str(config.run_dir / "config.json")


def _python(module: str, config: RunConfig, *, python: Path | None = None) -> tuple[str, ...]:
    return (sys.executable if python is None else str(python.absolute()), "-m", module, config_path(config))


def _environment(*, threads: int, devices: tuple[int, ...], index: int | None = None) -> tuple[tuple[str, str], ...]:
    """What a process finds in its environment beside what the supervisor has in its own."""
    variables = {
        "PYTHONUNBUFFERED": "1",  # a log ends with the last words of its process
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",  # a task that depends on the order of a set is the same in every worker
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
    }
    for library in ("OMP", "MKL", "OPENBLAS", "RAYON"):
        variables[f"{library}_NUM_THREADS"] = str(threads)
    if index is not None:
        variables["PALESTRA_INDEX"] = str(index)
    return tuple(variables.items())

"""`python -m palestra.infer CONFIG_JSON`: become the vLLM server of one engine of a run.

Environment: PALESTRA_INDEX, which engine (default 0); PALESTRA_PORT, where it listens. Dies with its parent.
"""

import os
import sys
from typing import Any, NoReturn

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import UserError
from palestra.core.process import die_with_parent
from palestra.infer.launch import device_of, engine_argv, engine_environment, require_dense
from palestra.infer.turn import wait_for_turn

_SCORED_TOKENS = 2048


def main(argv: list[str]) -> NoReturn:
    """Errors: SystemExit with code 2, if the config or the environment is wrong."""
    die_with_parent(os.getppid())
    try:
        command, environment = _command(argv)
        wait_for_turn(argv[1])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    os.execve(command[0], command, {**os.environ, **environment})


def _command(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    if len(argv) != 2:
        raise UserError("usage: python -m palestra.infer CONFIG_JSON")
    index, port = _environment_integer("PALESTRA_INDEX", "0"), _environment_integer("PALESTRA_PORT", None)
    return engine_command(read_resolved(argv[1]), index=index, port=port)


def engine_command(config: RunConfig, *, index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Command line and additional environment of engine `index` of a run."""
    engine, device, model = config.engine, device_of(config.engine.device), config.engine_model(index)
    lora = config.model.lora if index < engine.replicas and config.is_rl else None
    if lora is not None and device == "cpu":
        require_dense(model)
    is_frozen_on_gpu = index >= engine.replicas and device == "cuda"
    command = engine_argv(
        model=model,
        host=config.launch.host,
        port=port,
        dtype=config.engine_dtype,
        device=device,
        max_model_len=engine.max_model_len,
        tensor_parallel=engine.tensor_parallel,
        max_in_flight=config.in_flight_of(index),
        kv_cache_gib=engine.kv_cache_gib,
        seed=config.train.seed + index,
        lora=lora,
        sleeps=config.takes_turns and device == "cuda",
        sent_by=config.sync.kind if config.sync.is_sent and config.is_rl and index < engine.replicas else None,
        returns_routes=config.replays_routers and index < engine.replicas,
        args={**(_scoring(config.in_flight_of(index)) if is_frozen_on_gpu else {}), **engine.args},
    )
    environment = engine_environment(
        model=model,
        device=device,
        tensor_parallel=engine.tensor_parallel,
        threads=engine.threads,
        loads_adapters=lora is not None,
    )
    return command, environment


def _scoring(max_in_flight: int) -> dict[str, Any]:
    """The logits of a whole chunk of a scored prompt exist at once, beside what vLLM takes of a GPU's memory. It wants
    room for a token of every request."""
    return {"max-num-batched-tokens": max(_SCORED_TOKENS, max_in_flight)}


def _environment_integer(name: str, default: str | None) -> int:
    text = os.environ.get(name, default)
    if text is None or not text.isdigit():
        raise UserError(f"{name}={text!r} is not a number; the supervisor sets it when it starts an engine")
    return int(text)


if __name__ == "__main__":
    main(sys.argv)

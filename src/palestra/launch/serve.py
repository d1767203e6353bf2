"""`palestra serve`: one engine alone, as a run starts it; programs answered by one, and recorded."""

import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from palestra.config.load import load_tree
from palestra.core.errors import UserError
from palestra.infer.__main__ import engine_command
from palestra.launch.model_path import require_model
from palestra.launch.ports import require_free


def proxy(model: str, engine_url: str, overrides: list[str], *, port: int, to: Path, idle_s: float) -> None:
    """Answer programs until it is told to end. Errors: UserError, for a model, a port or a setting that cannot work."""
    from palestra.launch.proxy import serve

    config = load_tree({"log": {"name": "proxy"}, "model": {"path": model}}, overrides).config
    require_model(config.model.path)
    require_free(config.launch.host, port, field="--port")
    if idle_s <= 0:
        raise UserError(f"--idle-s={idle_s:g} must be above 0; a session is written when it asked nothing for so long")
    serve(engine_url, config, port=port, to=to, idle_s=idle_s)


def engine(model: str, overrides: list[str], *, port: int) -> NoReturn:
    """Become the engine's server. Errors: UserError, for a model, a port or a setting that cannot work."""
    config = load_tree({"log": {"name": "serve"}, "model": {"path": model}}, overrides).config
    require_model(config.model.path)
    require_free(config.launch.host, port, field="--port")
    command, environment = engine_command(config, index=0, port=port)
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execve(command[0], command, {**os.environ, **environment})

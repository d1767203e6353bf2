"""Whether a model can be loaded, told before any process starts."""

import os
import re
from pathlib import Path

from palestra.config.model_fields import model_fields
from palestra.core.errors import UserError

FETCHED = Path("models")  # where `palestra fetch` puts models
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def require_model(path: str | None, *, field: str = "model.path") -> None:
    """A directory must hold a model; a hub name must have been downloaded, if downloads are switched off.

    Errors: UserError naming the fix.
    """
    if path is None:
        return
    directory = Path(path).expanduser()
    if directory.is_dir():
        _require_files(directory, field)
    elif directory.parts[0] == FETCHED.name:
        raise UserError(f"{field}={path} is not there; `palestra fetch {directory.name}` prepares it")
    elif not _HUB_NAME.match(path):
        raise UserError(
            f"{field}={path} is not a directory; give one in Hugging Face layout, or a hub name such as org/name"
        )
    elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not _cached(path).is_dir():
        raise UserError(
            f"{field}={path} is neither a directory nor in the cache {_hub_cache()}, and HF_HUB_OFFLINE is set; "
            "unset it, or give a directory in Hugging Face layout"
        )


def directory_of(path: str) -> Path:
    """Where a model's config.json is to be found: its directory; of a hub's model that was downloaded, in the cache."""
    directory, cached = Path(path).expanduser(), _cached(path)
    try:
        return directory if directory.is_dir() else cached / "snapshots" / (cached / "refs/main").read_text().strip()
    except OSError:
        return directory


def max_positions(directory: Path) -> int | None:
    """The longest context of the model in a directory, if its configuration says one."""
    found = (model_fields(directory) or {}).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def _require_files(directory: Path, field: str) -> None:
    if not (directory / "config.json").exists():
        raise UserError(f"{field}={directory} has no config.json; give a directory in Hugging Face layout")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{field}={directory} has no *.safetensors; save the model with save_pretrained")


def _hub_cache() -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _cached(name: str) -> Path:
    return _hub_cache() / f"models--{name.replace('/', '--')}"

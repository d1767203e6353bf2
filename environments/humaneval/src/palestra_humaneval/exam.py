"""What runs in the sandbox: one solution against the tests of its problem. `exam.py < PAPER`, standard library only.

Two processes. The examiner reads the paper (JSON: the tests, a password, the solution), runs the tests, and says the
password when they are through. The solver has nothing but the solution's text, and what the tests call it with: plain
values, by a pipe. It is another process, made before the paper is read, so that the tests and the password are never in
its memory; and the kernel keeps it out of the examiner's (PR_SET_DUMPABLE 0).
"""

import builtins
import ctypes
import json
import os
import sys
import types

UNFIT = 97  # exit code, before the solution is known: of the machine, not of it
_MOST_ANSWER = 2**26  # characters
_SET_DUMPABLE = 4
_KINDS = {"l": list, "t": tuple, "s": set, "f": frozenset}


class Opaque:
    """A value that is not plain; it equals nothing."""


def encode(value):
    """As JSON has it: containers are pairs of their kind and what is in them."""
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    for kind, container in _KINDS.items():
        if isinstance(value, container):
            return [kind, [encode(item) for item in value]]
    if isinstance(value, dict):
        return ["d", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["b", list(value)]
    return ["o", []]


def decode(value):
    """Errors: any, for what `encode` does not make."""
    if not isinstance(value, list):
        return value
    kind, items = value
    if kind in _KINDS:
        return _KINDS[kind](decode(item) for item in items)
    if kind == "d":
        return {decode(key): decode(item) for key, item in items}
    return {"c": lambda: complex(*items), "b": lambda: bytes(items), "o": Opaque}[kind]()


def say(stream, *words):
    stream.write(json.dumps(words) + "\n")
    stream.flush()


# --- the solver


def solve(questions, answers):
    """Until the examiner is through. Whatever ends it is a wrong answer."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    code, name = json.loads(questions.readline())
    module = sys.modules["solution"] = types.ModuleType("solution")
    exec(compile(code, "solution.py", "exec"), module.__dict__)
    function = module.__dict__[name]
    for line in questions:
        args, kwargs = map(decode, json.loads(line))
        try:
            answer = ["returned", encode(function(*args, **kwargs))]
        except Exception as error:
            answer = ["raised", type(error).__name__]
        say(answers, *answer)


# --- the examiner


def examine(questions, answers, paper):
    def candidate(*args, **kwargs):
        say(questions, encode(args), encode(kwargs))
        line = answers.readline(_MOST_ANSWER)
        if not line.endswith("\n"):
            raise AssertionError("the solution gives no answer")
        how, value = json.loads(line)
        if how == "returned":
            return decode(value)
        raised = getattr(builtins, str(value), None)
        is_error = isinstance(raised, type) and issubclass(raised, Exception)
        raise raised() if is_error else Exception(value)

    say(questions, paper["code"], paper["entry_point"])
    names = {"__name__": "tests"}
    exec(compile(paper["preamble"], "problem.py", "exec"), names)
    names[paper["entry_point"]] = candidate  # tests may call it by its name, too
    exec(compile(paper["test"], "tests.py", "exec"), names)
    names["check"](candidate)
    print("\n" + paper["password"], flush=True)


def begin():
    """Both processes, connected; the examiner's ends. It imports nothing from where the solver can write."""
    (asked, ask), (told, tell) = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            os.close(ask)
            os.close(told)
            solve(os.fdopen(asked), os.fdopen(tell, "w"))
        finally:
            os._exit(0)
    os.close(asked)
    os.close(tell)
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")
    here = os.path.realpath(os.getcwd())
    sys.path[:] = [place for place in sys.path if place and os.path.realpath(place) != here]
    return os.fdopen(ask, "w"), os.fdopen(told)


def main():
    sys.set_int_max_str_digits(0)
    try:
        questions, answers = begin()
        paper = json.load(sys.stdin)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(UNFIT)
    examine(questions, answers, paper)


if __name__ == "__main__":
    main()

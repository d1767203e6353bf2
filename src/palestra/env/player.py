"""An environment that is asked line by line: `python -m palestra.env.player ID`. The other side is `subject.Boxed`.

Consumes: questions on its input. Produces: an answer to each on its output; what the environment prints goes to
stderr. Waits for: the next question. Ends when: its input does.
"""

import argparse
import asyncio
import json
import os
import sys
from typing import Any

import msgspec

from palestra.core.errors import UserError
from palestra.env.check import Here
from palestra.env.sandbox import Sandboxes
from palestra.env.subject import Answer, Question


async def answered(here: Here, question: Question) -> Any:
    match question.do:
        case "about":
            return await here.about()
        case "tasks":
            return await here.tasks(question.split)
        case "score" if question.task is not None:
            return await here.score(question.split, question.task, question.replies)
        case "mutants" if question.task is not None:
            return await here.mutants(question.split, question.task)
    raise UserError(f"{question.do!r} is no question")


async def _play(here: Here) -> None:
    """Its programs run as it does itself: the walls are those of the sandbox around it."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    async with Sandboxes("unsafe"):
        for line in sys.stdin.buffer:
            question = msgspec.json.decode(line, type=Question)
            try:
                answer = Answer(number=question.number, value=msgspec.to_builtins(await answered(here, question)))
            except Exception as error:  # an environment may raise anything
                words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                answer = Answer(number=question.number, error=words or "?")
            out.write(msgspec.json.encode(answer) + b"\n")
            out.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m palestra.env.player")
    parser.add_argument("id")
    parser.add_argument("--args", type=json.loads, default={})
    parser.add_argument("--num-tasks", type=int)
    asked = parser.parse_args()
    try:
        asyncio.run(_play(Here(asked.id, asked.args, num_tasks=asked.num_tasks)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

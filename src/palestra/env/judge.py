"""Models that grade: `await judge(template, Verdict, question=..., answer=...)`."""

import asyncio
import hashlib
import json
import string
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.core.records import ChatReply, Sampling
from palestra.env.rewards import json_reply
from palestra.wire.chat import ChatClient

T = TypeVar("T")

_KEPT = 100_000  # verdicts in memory
_ASKED_AGAIN = 2  # where what a judge says does not fit


class BudgetError(InfrastructureError):
    """The judge has been asked as often as it may: rollouts that need it have no reward."""


class Judge:
    """A model behind an OpenAI-compatible endpoint that answers with values of a type.

    Answers to the same question are kept, in memory and in `cache`, if that is given: a directory. `budget` bounds the
    questions that are really asked by one process.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = None,
        max_tokens: int = 1024,
        at_once: int = 16,
        call_s: float = 120,
        budget: int | None = None,
        cache: Path | None = None,
    ):
        """Errors: UserError, if `key_env` names no variable of the environment."""
        self._client = ChatClient(url, model, key_env=key_env, call_s=call_s)
        self._sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
        self._slots = asyncio.Semaphore(at_once)
        self._budget, self._cache = budget, cache
        self._asking: dict[str, asyncio.Task[Any]] = {}
        self._verdicts: dict[str, Any] = {}
        self.num_asked = 0

    async def __call__(self, template: str, schema: type[T], **fields: str) -> T:
        """Fill `{name}` in the template with the fields, ask, and read the last JSON value of the answer as `schema`.

        Errors: ValueError, if a field is empty, or stands nowhere in the template: a judge that does not see the whole
        question grades something else. BudgetError; InfrastructureError, if it gives no answer that fits.
        """
        question = filled(template, fields)
        key = self._key(question, schema)
        if key in self._verdicts:
            return self._verdicts[key]
        if key not in self._asking:
            self._asking[key] = asking = asyncio.ensure_future(self._ask(question, schema, key))
            asking.add_done_callback(lambda asking: self._asked(key, asking))
        return await asyncio.shield(self._asking[key])

    def _asked(self, key: str, asking: asyncio.Task[Any]) -> None:
        """One that failed is asked again next time, also where nobody waits for it any more."""
        del self._asking[key]
        if not asking.cancelled() and asking.exception() is None:
            self._verdicts[key] = asking.result()
            while len(self._verdicts) > _KEPT:
                del self._verdicts[next(iter(self._verdicts))]

    async def _ask(self, question: str, schema: type[T], key: str) -> T:
        if (kept := self._kept(key)) is not None:
            return msgspec.convert(kept, schema)
        messages = [{"role": "user", "content": f"{question}\n\n{_told(schema)}"}]
        problem = ""
        for _ in range(1 + _ASKED_AGAIN):
            reply = await self._answer(messages)
            try:
                if reply.finish_reason != "stop":
                    raise msgspec.ValidationError("the answer was cut off")
                verdict = msgspec.convert(_value(reply.message["content"]), schema)
            except msgspec.ValidationError as error:
                problem = str(error)
                correction = f"That was no such JSON value: {problem}. Answer with the JSON value alone."
                messages = [*messages, reply.message, {"role": "user", "content": correction}]
            else:
                self._keep(key, question, verdict)
                return verdict
        raise InfrastructureError(f"the judge {self._client.model} gave no answer that fits {schema}: {problem}")

    async def _answer(self, messages: list[dict[str, Any]]) -> ChatReply:
        if self._budget is not None and self.num_asked >= self._budget:
            raise BudgetError(f"the judge {self._client.model} was asked budget={self._budget} times; raise the budget")
        self.num_asked += 1
        async with self._slots:
            return await self._client.ask(messages, (), self._sampling, seed=0)

    def _key(self, question: str, schema: type) -> str:
        parts = json.dumps([self._client.url, self._client.model, question, _told(schema)])
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def _kept(self, key: str) -> Any:
        """None, if nobody asked, or what was kept cannot be read."""
        try:
            return json.loads((self._cache / f"{key}.json").read_bytes())["verdict"] if self._cache else None
        except (OSError, ValueError, KeyError):
            return None

    def _keep(self, key: str, question: str, verdict: Any) -> None:
        if self._cache is not None:
            self._cache.mkdir(parents=True, exist_ok=True)
            told = {"model": self._client.model, "question": question, "verdict": msgspec.to_builtins(verdict)}
            write_atomically(self._cache / f"{key}.json", json.dumps(told).encode())


def _value(text: str) -> Any:
    """The whole answer as JSON, or the last object or array in it."""
    try:
        return json.loads(text)
    except ValueError:
        return json_reply(text)


def filled(template: str, fields: dict[str, str]) -> str:
    """Every field whole in its place; braces in a field stay as they are. Errors: ValueError, naming the field."""
    wanted = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if missing := wanted - fields.keys():
        raise ValueError(f"the judge's template has {{{min(missing)}}}, which it was not given")
    for name, text in fields.items():
        if name not in wanted:
            raise ValueError(f"the judge was given {name}, but its template has no {{{name}}}")
        if not text.strip():
            raise ValueError(f"the judge was given an empty {name}: there is nothing to grade")
    return template.format(**fields)


def _told(schema: type) -> str:
    shape = json.dumps(msgspec.json.schema(schema))
    return f"Answer with a JSON value of this schema, and nothing after it:\n{shape}"

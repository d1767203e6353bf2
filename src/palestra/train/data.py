"""Supervised batches: sources mixed by weight, rendered with the model's chat template, packed like any other batch.

Everything follows from the seed and the number of rows drawn so far: that number is the whole state, and a resumed
stream draws the rows before it again without rendering them.
"""

import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np

from palestra.algo.packing import pack
from palestra.config.schema import SftSource
from palestra.core.errors import UserError
from palestra.env.chat import ChatTokenizer, SftRow, TemplateError, render_completion, render_sft
from palestra.train.rows import RawRow, endless
from palestra.wire.batches import Batch

_TODAY = datetime(2026, 1, 1)  # for templates that show a date: rows of a resumed run are the same
_GIVE_UP = 10_000  # rows in a row that cannot be used


class SftStream:
    """Draws rendered rows from the mix, for ever. Rows that are too long or teach nothing are dropped and counted."""

    def __init__(
        self, sources: Sequence[SftSource], tokenizer: ChatTokenizer, *, max_tokens: int, shuffle_rows: int, seed: int
    ):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._rows = _mix(sources, shuffle_rows=shuffle_rows, seed=seed)
        self._num_drawn = self._num_dropped = 0

    def take(self, num: int) -> list[SftRow]:
        """Errors: UserError naming file and line of a row that cannot be rendered, or if no row can be used."""
        taken: list[SftRow] = []
        unusable = 0
        while len(taken) < num:
            raw = next(self._rows)
            self._num_drawn += 1
            row = render(raw, self._tokenizer)
            if len(row.token_ids) <= self._max_tokens and any(row.mask[1:]):
                taken.append(row)
                unusable = 0
                continue
            self._num_dropped += 1
            unusable += 1
            if unusable == _GIVE_UP:
                raise UserError(
                    f"{_GIVE_UP} rows in a row are longer than {self._max_tokens} tokens or have nothing to learn; "
                    f"the last is {raw.origin} with {len(row.token_ids)} tokens; raise data.max_tokens and "
                    "train.max_pack_tokens"
                )
        return taken

    def take_dropped(self) -> int:
        """Rows dropped since the last call."""
        dropped, self._num_dropped = self._num_dropped, 0
        return dropped

    def state(self) -> dict[str, Any]:
        return {"num_drawn": self._num_drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Only for a stream that nothing was drawn from yet."""
        for _ in islice(self._rows, state["num_drawn"]):
            pass
        self._num_drawn = state["num_drawn"]


def _mix(sources: Sequence[SftSource], *, shuffle_rows: int, seed: int) -> Iterator[RawRow]:
    """The next row is from a source drawn by weight."""
    rng = random.Random(seed)
    streams = [endless(source, shuffle_rows=shuffle_rows, seed=seed + index) for index, source in enumerate(sources)]
    weights = [source.weight for source in sources]
    while True:
        yield next(rng.choices(streams, weights)[0])


def render(raw: RawRow, tokenizer: ChatTokenizer) -> SftRow:
    """Errors: UserError naming file and line."""
    fields = raw.fields
    try:
        if "messages" in fields:
            row = render_sft(tokenizer, _messages(fields["messages"], "messages"), fields.get("tools"), now=_TODAY)
        elif "prompt" in fields and "completion" in fields:
            prompt, completion = (_messages(fields[name], name) for name in ("prompt", "completion"))
            row = render_completion(tokenizer, prompt, completion, fields.get("tools"), now=_TODAY)
        else:
            raise ValueError(
                f"needs `messages`, or `prompt` and `completion`; it has {', '.join(sorted(fields)) or 'nothing'}"
            )
    except (ValueError, TemplateError) as error:
        raise UserError(f"{raw.origin}: {error}") from error
    except Exception as error:  # the tokenizer raises bare exceptions
        raise UserError(f"{raw.origin}: cannot be written in tokens of this model: {error}") from error
    return row


def _messages(value: Any, name: str) -> Any:
    """A text, or messages without the empty fields that Parquet gives to all rows."""
    if isinstance(value, str) and name != "messages":
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) and "role" in message for message in value):
        raise ValueError(f"`{name}` must be a list of messages with `role` and `content`, got {str(value)[:80]!r}")
    return [{key: field for key, field in message.items() if field is not None} for message in value]


def sft_batch(rows: Sequence[SftRow], *, step: int, attempt: int, max_pack_tokens: int, num_ranks: int) -> Batch:
    """Rows as the samples of one step: every token of the mask has `ce_weight` 1, at temperature 1."""
    lengths = np.array([len(row.token_ids) for row in rows])
    packing = pack(lengths, max_tokens=max_pack_tokens, num_ranks=num_ranks)
    nothing = np.zeros(int(lengths.sum()), np.float32)
    mask = np.concatenate([[0, *row.mask[1:]] for row in rows]).astype(np.float32)
    return Batch(
        step=step,
        attempt=attempt,
        num_packs=packing.num_packs,
        max_pack_tokens=max_pack_tokens,
        token_ids=np.concatenate([row.token_ids for row in rows]),
        engine_logprobs=nothing,
        advantage=nothing,
        rl_weight=nothing,
        ce_weight=mask,
        ref_weight=nothing,
        reference_logprobs=nothing,
        lengths=lengths,
        rollout=np.arange(len(rows)),
        temperature=np.ones(len(rows), np.float32),
        pack=packing.pack_of_sample,
        version=np.full(len(rows), step),
    )

"""One rollout as its files tell it: the line of its record, the batch that trained it, what the trainer said of it."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from palestra.core.errors import PalestraError, UserError
from palestra.core.records import RolloutRecord, Sample
from palestra.hub.answers import RolloutRow, Tokens
from palestra.hub.columns import Part, first_line
from palestra.wire.batches import BatchSample, read_samples
from palestra.wire.rundir import RunDir

MOST_TOKENS = 3000  # of a page
_SAID_CHARS = 160
_decode = msgspec.json.Decoder(RolloutRecord).decode


@dataclass(frozen=True)
class Paths:
    """Where the files of a run are."""

    run: RunDir

    def of(self, part: Part) -> Path:
        return self.run.results if part.name == self.run.results.stem else self.run.rollouts / f"{part.name}.jsonl"


def record_at(run: RunDir, part: Part, line: int) -> RolloutRecord:
    """Errors: UserError, if the file is not any more what the index was made of."""
    with Paths(run).of(part).open("rb") as file:
        file.seek(int(part.columns["offset"][line]))
        data = file.read(int(part.columns["size"][line]))
    try:
        return _decode(data)
    except msgspec.DecodeError as error:
        raise UserError(
            f"line {line} of {part.name} was written anew or is no rollout ({error}); load it again"
        ) from None


def row_of(record: RolloutRecord, part: Part, line: int, group_size: int) -> RolloutRow:
    version = min(record.versions, default=None)
    is_training = part.is_training
    return RolloutRow(
        file=part.name,
        line=line,
        kind="training" if is_training else "evaluation",
        step=part.step,
        rollout_id=record.rollout_id,
        group=record.rollout_id // group_size if is_training else None,
        environment=record.environment,
        task=record.task.key,
        ending=record.ending.value,
        reward=record.reward,
        num_turns=record.num_turns,
        num_tokens=record.num_tokens,
        version=version,
        age=part.step - version if version is not None and is_training else None,
        wall_s=record.wall_s,
        error=first_line(record.error) if record.error else "",
        said=_said(record.messages),
    )


def _said(messages: list[dict[str, Any]]) -> str:
    """The end of the last thing that the policy said, in one line."""
    for message in reversed(messages):
        if message.get("role") == "assistant":
            text = " ".join(text_of(message.get("content")).split()) or " ".join(map(str, calls_of(message)))
            return text if len(text) <= _SAID_CHARS else "…" + text[-_SAID_CHARS:]
    return ""


def calls_of(message: dict[str, Any]) -> list[str]:
    """Its tool calls as people write them: name(arguments)."""
    said = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        said.append(f"{function.get('name', '?')}({arguments})")
    return said


def text_of(content: Any) -> str:
    """Texts of a message's content, without its images."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return "" if content is None else str(content)
    return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict) and "text" in part)


# --- tokens


def tokens_of(
    run: RunDir, part: Part, record: RolloutRecord, number: int, first: int, model: Path | None
) -> Tokens | None:
    """Sample `number` over all seats, from token `first` on; None for a rollout without any."""
    samples = [(seat.name, sample) for seat in record.seats for sample in seat.samples]
    if not samples:
        return None
    number = min(number, len(samples) - 1)
    seat, sample = samples[number]
    first = min(first, max(len(sample.token_ids) - 1, 0))
    shown = slice(first, first + MOST_TOKENS)
    trained, notes = _trained(run, part, record, number, sample)
    return Tokens(
        seat=seat,
        sample=number,
        num_samples=len(samples),
        first=first,
        num_tokens=len(sample.token_ids),
        ids=sample.token_ids[shown],
        texts=texts(model, sample.token_ids[shown]),
        sampled=sample.sampled[shown],
        turns=_spread([(turn.turn, turn.start, turn.end) for turn in sample.turns], sample)[shown],
        versions=_spread([(span.version, span.start, span.end) for span in sample.spans], sample)[shown],
        engine_logprobs=[x if s else None for x, s in zip(sample.logprobs, sample.sampled, strict=True)][shown],
        notes=notes,
        **{name: stream[shown] for name, stream in trained.items()},
    )


def _spread(spans: list[tuple[int, int, int]], sample: Sample) -> list[int | None]:
    found: list[int | None] = [None] * len(sample.token_ids)
    for value, start, end in spans:
        found[start:end] = [value] * (end - start)
    return found


def _trained(
    run: RunDir, part: Part, record: RolloutRecord, number: int, sample: Sample
) -> tuple[dict[str, list[float | None]], list[str]]:
    """What its batch and the trainer add, and in words what is missing of that."""
    nothing: list[float | None] = [None] * len(sample.token_ids)
    streams: dict[str, list[float | None]] = {"trainer_logprobs": nothing, "advantages": nothing, "weights": nothing}
    if not part.is_training:
        return streams, ["An evaluation does not train: there is no advantage, and no trainer said anything."]
    try:
        of_rollout = read_samples(run.batches.path(part.step), record.rollout_id)
    except FileNotFoundError:
        return streams, ["The batch of this step is not there: advantages and weights need log.keep_batches."]
    except (PalestraError, OSError, ValueError) as error:
        return streams, [f"The batch of this step cannot be read: {error}"]
    if number >= len(of_rollout) or of_rollout[number].token_ids.tolist() != sample.token_ids:
        return streams, [
            "The batch of this step does not hold this sample: it was made anew after the file was written."
        ]
    found = of_rollout[number]
    weights = np.sum(list(found.weights.values()), axis=0)
    streams["weights"] = weights.tolist()
    streams["advantages"] = [a if w else None for a, w in zip(found.advantage.tolist(), weights.tolist(), strict=True)]
    said = run.logprobs.read(part.step, [found.index]).get(found.index)
    if said is None or len(said) != int(found.is_trained.sum()):
        return streams, ["The trainer's log-probabilities were not kept: set log.keep_logprobs."]
    streams["trainer_logprobs"] = _at(found, said)
    return streams, []


def _at(found: BatchSample, said: np.ndarray) -> list[float | None]:
    stream: list[float | None] = [None] * len(found.token_ids)
    for position, value in zip(np.flatnonzero(found.is_trained).tolist(), said.tolist(), strict=True):
        stream[position] = value
    return stream


# --- text of tokens


@lru_cache(maxsize=4)
def _tokenizer(path: Path, _mtime_ns: int) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # whatever a file says that is not ours; tokens are shown as numbers then
        return None


def texts(model: Path | None, ids: list[int]) -> list[str]:
    """Of each token alone; its number in angle brackets, where nobody knows its text."""
    path = model / "tokenizer.json" if model else None
    tokenizer = _tokenizer(path, path.stat().st_mtime_ns) if path is not None and path.is_file() else None
    if tokenizer is None:
        return [f"<{token}>" for token in ids]
    known: dict[int, str] = {}
    for token in set(ids):
        known[token] = _text(tokenizer, token)
    return [known[token] for token in ids]


def _text(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.id_to_token(token)
    if piece is None:
        return f"<{token}>"
    text = tokenizer.decode([token], skip_special_tokens=False)
    if piece.startswith("▁") and not text.startswith(" "):
        return " " + text
    return text or piece

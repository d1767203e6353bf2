"""A model's tokenizer and chat template, loaded from its Hugging Face directory without torch and transformers.

Encoding, special tokens and template variables are those of transformers' `AutoTokenizer(...).apply_chat_template`.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import WordLevel

from palestra.core.errors import UserError
from palestra.env.chat.frame import Frames
from palestra.env.chat.reply import MARKERS, THINKING_TAGS, AssistantMessage, parse_text
from palestra.env.chat.template import ChatTemplate, Message, TemplateError, plain_template

_STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NOON = datetime(2024, 7, 26, 12)


class ChatTokenizer:
    """Text to ids and back, messages to text, replies to messages. Immutable after loading; share one per model.

    `stop_ids` end a turn: the tokenizer's eos and those of generation_config.json.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, stop_ids: Sequence[int]):
        self.tokenizer, self.template = tokenizer, template
        self.stop_ids = tuple(stop_ids)
        self.frames = Frames(self)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        special = (index for index, token in added.items() if token.special)
        self._hidden = frozenset(index for index in special if self._added[index] not in MARKERS)
        self._unknown = _unknown_word(tokenizer)
        self._num_ids = max([tokenizer.get_vocab_size(with_added_tokens=False), *(index + 1 for index in added)])

    @property
    def where(self) -> str:
        """The model's directory, for errors."""
        return self.template.where

    @property
    def eos_id(self) -> int | None:
        return self._named("eos_token")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it become special ids, and nothing is added around it.

        Errors: TemplateError if the vocabulary cannot express it.
        """
        return self._encode(text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [start, end) of `text` it covers."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included; ids outside the vocabulary and broken bytes never raise."""
        return self.tokenizer.decode([i for i in ids if 0 <= i < self._num_ids], skip_special_tokens=False)

    def is_added(self, token_id: int) -> bool:
        """Whether the token is cut out of a text before anything else: it never merges with its neighbours."""
        return token_id in self._added

    def is_special(self, token_id: int) -> bool:
        """Whether the token is no part of what a reply says: a special token that structures nothing inside it."""
        return token_id in self._hidden or token_id in self.stop_ids

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        generation: bool = False,
        now: datetime | None = None,
    ) -> str:
        """The conversation as the model's chat template writes it."""
        return self.template.render(messages, tools, generation=generation, now=now or datetime.now())

    def parse_reply(
        self, ids: Sequence[int], *, inside_thinking: bool | None = None, tools: bool = True
    ) -> AssistantMessage:
        """What the model wrote, taken apart; never raises.

        `inside_thinking`: whether the prompt had opened a thought; by default, whether the generation prompt does.
        `tools`: whether text that looks like a tool call is one.
        """
        text = self.decode([i for i in ids if i not in self._hidden])
        inside = self.opens_thinking if inside_thinking is None else inside_thinking
        return parse_text(text, inside_thinking=inside, tags=self.thinking_tags, tools=tools)

    def tokens_up_to(self, ids: Sequence[int], piece: str) -> int | None:
        """How many of the first `ids` it takes to write `piece`, where it stands last, to its end; None if it is not
        written. A token that says the end of it and more is one of them."""
        places = [place for place, token_id in enumerate(ids) if token_id not in self._hidden]
        shown = [ids[place] for place in places]
        whole = self.decode(shown)
        start = whole.rfind(piece)
        if start < 0 or not piece:
            return None
        head = whole[: start + len(piece)]
        count = bisect_left(range(len(shown)), True, key=lambda count: self.decode(shown[:count]).startswith(head))
        return places[count - 1] + 1

    @cached_property
    def thinking_tags(self) -> tuple[str, str]:
        """The pair that this model writes around its reasoning."""
        known = [*self.template.sources.values(), *self._added.values()]
        for tags in THINKING_TAGS:
            if any(tags[1] in text for text in known):
                return tags
        return THINKING_TAGS[0]

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the generation prompt itself opens a thought."""
        prompt = self.render([{"role": "user", "content": "?"}], generation=True, now=_NOON)
        return self.ends_inside_thinking(prompt)

    def ends_inside_thinking(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.thinking_tags[0])

    def _encode(self, text: str) -> Encoding:
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise TemplateError(
                f"{self.where}: the vocabulary cannot express {text[-80:]!r}: {error}; "
                "leave out what it lacks, or give the tokenizer an unknown token"
            ) from error
        if self._unknown is not None and self._unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(self._unknown)]
            raise TemplateError(
                f"{self.where}: {text[start:end]!r} in {text[-80:]!r} is not in the model's vocabulary; "
                "leave it out, or build the model with an alphabet that has it"
            )
        return encoding

    def _named(self, name: str) -> int | None:
        token = self.template.variables.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)


def _unknown_word(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what a vocabulary of whole words or characters lacks; others fall back to bytes."""
    if not isinstance(tokenizer.model, WordLevel):
        return None
    return tokenizer.token_to_id(tokenizer.model.unk_token)


def load_tokenizer(path: str | Path, *, options: Mapping[str, Any] | None = None) -> ChatTokenizer:
    """Load tokenizer.json, tokenizer_config.json, the chat template and the stop ids of a model directory.

    `options` are further template variables, such as `enable_thinking`.
    Errors: UserError naming the missing or unreadable file.
    """
    directory = Path(path)
    config = _tokenizer_config(directory)
    tokenizer = _tokenizer(directory, config)
    named = {name: str(token) for name, token in _named_tokens(config).items()}
    sources = _template_sources(directory, config)
    if not sources:
        sources = {"default": plain_template(add_bos=_adds_bos(tokenizer, named))}
    template = ChatTemplate(sources, {**named, **(options or {})}, where=str(directory))
    return ChatTokenizer(tokenizer, template, stop_ids=_stop_ids(directory, tokenizer, named))


def _tokenizer(directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{directory}: no tokenizer.json; save the model's tokenizer there with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file}: not a tokenizer: {error}; save it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add_tokens(tokenizer, config)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not, in transformers' order."""
    present = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    listed = sorted((int(index), token) for index, token in config.get("added_tokens_decoder", {}).items())
    missing = [token for _, entry in listed if repr(token := AddedToken(**entry)) not in present]
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *missing)}
    named = _named_tokens(config)
    for token in (*named.values(), *_extra_tokens(config)):
        if str(token) not in known:
            missing.append(token if isinstance(token, AddedToken) else AddedToken(token, special=True))
            known.add(str(token))
    names = {str(token) for token in named.values()}
    for token in missing:
        token.special = token.special or token.content in names
    if missing:
        tokenizer.add_tokens(missing)


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    config = _read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_json(directory / "special_tokens_map.json")
    if not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.get("additional_special_tokens") or []
    return config


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str | AddedToken]:
    """Special tokens by the name under which a template sees them."""
    own = [name for name in config if name.endswith("_token") and name not in _STANDARD_TOKENS]
    entries = {name: config.get(name) for name in (*_STANDARD_TOKENS, *own)}
    extra = config.get("extra_special_tokens")
    entries |= extra if isinstance(extra, dict) else {}
    return {name: _token(entry) for name, entry in entries.items() if isinstance(entry, str | dict)}


def _extra_tokens(config: Mapping[str, Any]) -> list[str | AddedToken]:
    extra = config.get("extra_special_tokens")
    return [_token(entry) for entry in extra] if isinstance(extra, list) else []


def _token(entry: str | dict[str, Any]) -> str | AddedToken:
    if isinstance(entry, str):
        return entry
    flags = {key: value for key, value in entry.items() if key not in ("__type", "special")}
    return AddedToken(**flags, special=True)


def _template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; files win over tokenizer_config.json, as in transformers."""
    files = {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {"default": template} if isinstance(template, str) else {}


def _stop_ids(directory: Path, tokenizer: Tokenizer, named: Mapping[str, str]) -> list[int]:
    configured = _read_json(directory / "generation_config.json").get("eos_token_id")
    if configured is None:
        configured = _read_json(directory / "config.json").get("eos_token_id")
    eos = tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token_id for token_id in (eos, *ids) if token_id is not None})


def _adds_bos(tokenizer: Tokenizer, named: Mapping[str, str]) -> bool:
    """Whether the tokenizer puts its bos before plain text."""
    bos = tokenizer.token_to_id(named["bos_token"]) if "bos_token" in named else None
    return bos is not None and tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}; save it again") from error

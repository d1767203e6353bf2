"""Make a new model from a configuration class of transformers, with a tokenizer of characters."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from palestra.config.schema import Build
from palestra.core.errors import UserError

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"  # ids 0 to 3
# Every message begins with <bos>, the assistant's also ends with <eos>: later turns extend the earlier tokens.
# Of tools the model is told the names; calls are written as Hermes and Qwen do.
CHAT_TEMPLATE = (
    "{% if tools %}{{ bos_token }}{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ bos_token + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>"
    "{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}"
    "</tool_call>{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)


def build_model(build: Build, directory: Path) -> None:
    """Write model, tokenizer and generation config to `directory`, whole or not at all; the same bits for a seed.

    Errors: UserError for an architecture or field that transformers does not know, or a value it refuses.
    """
    model = _new_model(build)
    beside = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    GenerationConfig(**_special_ids()).save_pretrained(beside)
    write_tokenizer(build, beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)


def new_config(build: Build) -> PretrainedConfig:
    """Errors: as `build_model`."""
    return _config(_model_class(build.architecture).config_class, build)


def _new_model(build: Build) -> PreTrainedModel:
    model_class, config = _model_class(build.architecture), new_config(build)
    torch.manual_seed(build.seed)
    try:
        return model_class(config).float()
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(f"model.build.config is refused by {build.architecture}: {error}") from error


def _model_class(architecture: str) -> Any:
    model_class = getattr(transformers, architecture, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if not is_model or not architecture.endswith("ForCausalLM"):
        raise UserError(
            f"model.build.architecture={architecture!r} is not a causal language model of transformers "
            f"{transformers.__version__}; for example Qwen3ForCausalLM or Glm4MoeForCausalLM"
        )
    return model_class


def _config(config_class: type[PretrainedConfig], build: Build) -> PretrainedConfig:
    given = {"vocab_size": len(tokens(build)), **_special_ids()}
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    known.add("head_dim")  # families read it whether or not their configuration declares it
    for key in build.config:
        if key in given:
            raise UserError(f"model.build.config.{key} follows from model.build.alphabet and words; remove it")
        if key not in known:
            raise UserError(
                f"model.build.config.{key} is not a field of {config_class.__name__}; it has {', '.join(sorted(known))}"
            )
    try:
        return config_class(**given, **build.config)
    except Exception as error:  # transformers validates with exceptions of its own
        raise UserError(f"model.build.config is refused by {config_class.__name__}: {error}") from error


def _special_ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(build: Build) -> list[str]:
    """The vocabulary in order of ids. Errors: UserError for a character or word that is there twice."""
    known = [*build.alphabet, *build.words]
    for token in known:
        if known.count(token) > 1 or token in ("", PAD, BOS, EOS, UNK):
            raise UserError(
                f"model.build.alphabet and words have {token!r} {known.count(token)} times; give each once, and none "
                f"that is empty or special"
            )
    return [PAD, BOS, EOS, UNK, *known]


def write_tokenizer(build: Build, directory: Path) -> None:
    """A character outside the alphabet is `<unk>`: vLLM encodes words of its own when it starts, so all must pass."""
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens(build))}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS, UNK)])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in build.words])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

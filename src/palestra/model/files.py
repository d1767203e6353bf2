"""The files of a model's directory or of a name on the hub, and the names of the tensors in them."""

import re
from pathlib import Path

_LAYER = re.compile(r".*?\.\d+\.")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)


def model_directory(source: str) -> Path:
    """Where the weights of `source` lie: the directory itself, or the hub's cache after a download."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"]))


def tokenizer_directory(source: str) -> Path:
    """Where the tokenizer of `source` lies: the directory itself, or the hub's cache after a download."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # a second to import, and a local model does not need it

    return Path(snapshot_download(source, allow_patterns=[*TOKENIZER_FILES, "config.json"]))


def layer_of(name: str) -> str:
    """What a tensor's name has in common with those of its layer; the whole name, where it is in none.

    What a conversion of names joins or splits lies within one layer.
    """
    found = _LAYER.match(name)
    return found[0] if found else name

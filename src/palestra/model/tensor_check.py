"""Whether a tensor axis divides a model: `python -m palestra.model.tensor_check MODEL SIZE ULYSSES`.

A module apart from `tensor_plan`, which registers with transformers what must be there once.
"""

from transformers.utils.logging import set_verbosity_error

from palestra.config.schema import Model
from palestra.core.process import exit_with
from palestra.model.dissect import config_of
from palestra.model.tensor_plan import require_heads, split_of


def main(model_json: str, size: str, ulysses: str) -> int:
    """MODEL is the `model` section of a run, as JSON; SIZE and ULYSSES are ranks. Says nothing if all is well."""
    set_verbosity_error()
    require_heads(split_of(config_of(Model.model_validate_json(model_json)), int(size)), int(ulysses))
    return 0


if __name__ == "__main__":
    exit_with(main)

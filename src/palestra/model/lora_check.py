"""Whether a model has the layers that are to be adapted: `python -m palestra.model.lora_check MODEL`."""

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import set_verbosity_error

from palestra.config.schema import Model
from palestra.core.process import exit_with
from palestra.model.dissect import config_of
from palestra.model.lora import targets_of


def main(model_json: str) -> int:
    """MODEL is the `model` section of a run, as JSON. Says nothing if all is well."""
    set_verbosity_error()
    model = Model.model_validate_json(model_json)
    assert model.lora is not None
    with torch.device("meta"):
        targets_of(AutoModelForCausalLM.from_config(config_of(model)), model.lora)
    return 0


if __name__ == "__main__":
    exit_with(main)

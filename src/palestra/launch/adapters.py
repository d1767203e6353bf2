"""Whether adapters can be trained and served as a recipe says, told before any process starts."""

from palestra.config import RunConfig
from palestra.config.model_fields import model_fields
from palestra.infer.launch import device_of, require_dense
from palestra.launch.asking import ask
from palestra.launch.model_path import directory_of


def require_adapters(config: RunConfig) -> None:
    """Of a built model or one that is on this machine; of any other the processes say so themselves, when they have it.

    Errors: UserError for layers that the model does not have, and for experts beside adapters on engines of CPUs.
    """
    build, lora = config.model.build, config.model.lora
    fields = model_fields(directory_of(config.model.path or "")) if build is None else build.config
    if lora is None or fields is None:
        return
    if config.is_rl and device_of(config.engine.device) == "cpu":
        require_dense(config.model.path or "the model of model.build", fields)
    if lora.targets != "all-linear":
        ask("palestra.model.lora_check", config.model.model_dump_json())

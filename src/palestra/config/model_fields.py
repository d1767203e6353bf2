"""What a model's config.json says, read without transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def model_fields(directory: Path) -> dict[str, Any] | None:
    """Those of its text model before those of the whole; None where there is no object: who loads it says so."""
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {**fields, **(fields.get("text_config") or {})} if isinstance(fields, dict) else None


def experts_field(fields: Mapping[str, Any]) -> str | None:
    """Which field says how many routed experts there are; None for a model without."""
    return next((name for name in _EXPERTS if fields.get(name)), None)

"""Where programs that a model wrote run: `from palestra.sandbox import Sandbox, run_code`.

What is named here is loaded when it is asked for: the zygote imports this package too, and stays small.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palestra.sandbox.box import Process, Sandbox
    from palestra.sandbox.host import Host, Options, close_hosts, run_code
    from palestra.sandbox.records import (
        File,
        Isolation,
        IsolationError,
        Limits,
        Port,
        Result,
        SandboxError,
        SandboxFullError,
        SandboxGoneError,
        SandboxStartError,
        SandboxUnreachableError,
        UnsupportedError,
    )

_PLACES = {
    "box": ("Process", "Sandbox"),
    "host": ("Host", "Options", "close_hosts", "run_code"),
    "records": (
        *("File", "Isolation", "IsolationError", "Limits", "Port", "Result", "SandboxError"),
        *("SandboxFullError", "SandboxGoneError", "SandboxStartError", "SandboxUnreachableError", "UnsupportedError"),
    ),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "File",
    "Host",
    "Isolation",
    "IsolationError",
    "Limits",
    "Options",
    "Port",
    "Process",
    "Result",
    "Sandbox",
    "SandboxError",
    "SandboxFullError",
    "SandboxGoneError",
    "SandboxStartError",
    "SandboxUnreachableError",
    "UnsupportedError",
    "close_hosts",
    "run_code",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACE_OF[name]}"), name)

"""The viewer of runs: pages, their JSON twins, and the client of these."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palestra.hub.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    """The client is loaded when it is asked for: a server starts sooner without it."""
    if name == "Client":
        from palestra.hub.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

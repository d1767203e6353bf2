"""The viewer of runs: pages, their JSON twins, and the client of these."""

from palestra.hub.client import Client

__all__ = ["Client"]

"""What every request of the hub shares: the database, the blobs, the settings, the counts that wait to be written."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from palestra.hub.evals.opened import Cache
from palestra.hub.registry import blobs as kept
from palestra.hub.registry.artefact import Bounds
from palestra.hub.registry.blobs import Blobs, Directory
from palestra.hub.registry.counts import Counts
from palestra.hub.registry.database import Database, sqlite_url
from palestra.hub.registry.schema import checks, evaluations, files

_ORPHAN_AGE_S = 24 * 3600.0  # older than any push takes


@dataclass(frozen=True)
class Settings:
    """Bounds of what is taken, and where things lie."""

    data: Path
    url: str = ""  # what browsers and pip call this hub, where a proxy stands before it; "" is as they asked
    max_upload_bytes: int = 100 << 20
    max_pushes: int = 64  # at once; more are told to come again
    push_s: float = 1800.0  # the longest that a push may take
    bounds: Bounds = field(default_factory=Bounds)

    @property
    def incoming(self) -> Path:
        return self.data / "incoming"


class Hub:
    """Thread-safe. Several processes may have one each, on the same database and blobs."""

    def __init__(self, database: Database, blobs: Blobs, settings: Settings):
        self.database, self.blobs, self.settings = database, blobs, settings
        self.counts = Counts(database)
        self.unpacked = Cache(blobs, settings.data / "unpacked")
        self.on_pushed: Callable[[], None] = lambda: None  # from any thread, after files were added to a version
        settings.incoming.mkdir(parents=True, exist_ok=True)

    @classmethod
    def open(cls, settings: Settings, database: str = "", blobs: Blobs | None = None) -> "Hub":
        """Brings the schema up to date. Errors: UserError, InfrastructureError."""
        settings.data.mkdir(parents=True, exist_ok=True)
        opened = Database(database or sqlite_url(settings.data / "hub.db"))
        opened.migrate()
        return cls(opened, blobs or Directory(settings.data / "blobs"), settings)

    def sweep(self, *, blobs_older_than_s: float = _ORPHAN_AGE_S, incoming_older_than_s: float | None = None) -> int:
        """Remove what pushes that were killed have left; how many files."""
        age_s = 2 * self.settings.push_s if incoming_older_than_s is None else incoming_older_than_s
        num = kept.sweep_incoming(self.settings.incoming, older_than_s=age_s)
        return num + kept.sweep(self.blobs, self.named_blobs, older_than_s=blobs_older_than_s)

    def named_blobs(self) -> set[str]:
        """Every blob that a row names."""
        columns = (files.c.sha256, files.c.metadata_sha256, evaluations.c.blob_sha256, checks.c.log_sha256)
        found: set[str] = set()
        with self.database.read() as connection:
            for column in columns:
                found.update(connection.execute(select(column).distinct()).scalars())
        return found - {""}

    def close(self) -> None:
        self.counts.flush()
        self.database.close()


def now() -> float:
    return time.time()

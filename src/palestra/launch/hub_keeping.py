"""`palestra hub backup | restore | check`: what keeps a hub, and what it says of an environment."""

import json
import sys
import time
from pathlib import Path

from palestra.core.errors import UserError
from palestra.launch.hub import parts
from palestra.launch.hub_account import account
from palestra.launch.hub_serving import bucket

_LOOK_S = 1.0


def backup(directory: Path, *, data: Path, database: str, storage: str) -> None:
    """Beside a running hub. Errors: UserError, InfrastructureError."""
    from palestra.hub.operation import backup as copies
    from palestra.hub.registry.blobs import Directory

    if not database and not (data / "hub.db").is_file():
        raise UserError(f"{data} has no hub.db; name the hub's directory by --data, or its --database")
    opened = _database(data, database)
    made = copies.backup(opened, bucket(storage) or Directory(data / "blobs"), directory)
    opened.close()
    rows = sum(table.rows for table in made.tables.values())
    print(f"{directory}: {rows} rows, {len(made.blobs)} contents, schema {made.revision}", file=sys.stderr)


def restore(directory: Path, *, data: Path, database: str, storage: str) -> None:
    """Into an empty hub. Errors: UserError, InfrastructureError."""
    from palestra.hub.operation import backup as copies
    from palestra.hub.registry.blobs import Directory

    data.mkdir(parents=True, exist_ok=True)
    opened = _database(data, database)
    made = copies.restore(directory, opened, bucket(storage) or Directory(data / "blobs"))
    opened.close()
    print(f"{data}: the hub of {time.strftime('%F %T', time.localtime(made.made_at))} is there", file=sys.stderr)


def _database(data: Path, url: str):
    from palestra.hub.registry.database import Database, sqlite_url

    return Database(url or sqlite_url(data / "hub.db"))


def check(environment: str, *, hub: str, deadline_s: float, again: bool, as_json: bool) -> int:
    """Shows what the hub's examination says, and waits for it; 0 where it passed, else 2. Errors: UserError."""
    owner, name, version = parts(environment)
    with account(hub).client() as client:
        version = version or client.environment(owner, name).version
        if again:
            client.check(owner, name, version)
        ends = time.monotonic() + deadline_s
        while (row := client.checked(owner, name, version)) is None or row.status in ("waiting", "running"):
            if time.monotonic() > ends:
                raise UserError(f"{owner}/{name}=={version} is not checked after {deadline_s:g} s; look again later")
            time.sleep(_LOOK_S)
        found = client.check_of(owner, name, row.id)
    if as_json:
        import msgspec

        print(json.dumps(msgspec.to_builtins(found)))
    else:
        print(found.log.rstrip())
        print(f"{owner}/{name}=={version} with palestra {row.library}: {row.status}", file=sys.stderr)
    return 0 if row.status == "passed" else 2

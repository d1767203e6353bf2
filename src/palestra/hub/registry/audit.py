"""Who did what, when and from where: rows that are only ever added, in the transaction of what they tell."""

import json
import time
from typing import Any

from sqlalchemy import Connection, insert

from palestra.hub.registry import schema
from palestra.hub.registry.rights import Who


def record(connection: Connection, who: Who, action: str, subject: str, **details: Any) -> None:
    """`action` is such as `version.push`, `subject` such as `alice/wordle==0.1.0`. Never a secret among `details`."""
    connection.execute(
        insert(schema.audit).values(
            at=time.time(),
            actor_id=who.id,
            actor=who.name,
            action=action,
            subject=subject,
            address=who.address,
            details=json.dumps(details),
        )
    )

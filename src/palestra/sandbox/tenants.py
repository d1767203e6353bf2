"""Who may use the service, and how much: a TOML file of tenants, each with the SHA-256 of a token, never the token.

[tenants.alice]
token_sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
most_sandboxes = 64
most_memory_mb = 65536
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from palestra.core.errors import UserError

ONLY = "default"  # the tenant where no file names any
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_MOST_TOKEN = 512


class Tenant(BaseModel):
    """`most_memory_mb` counts what its sandboxes may use, memory and disk, as their disk is in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=f"^{_NAME.pattern}$")
    token_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    most_sandboxes: int = Field(default=256, ge=0)
    most_memory_mb: int = Field(default=262_144, ge=0)


class Tenants:
    """Those that there are."""

    def __init__(self, tenants: Sequence[Tenant]):
        self._known = [(bytes.fromhex(tenant.token_sha256), tenant) for tenant in tenants]

    @classmethod
    def read(cls, path: Path) -> "Tenants":
        """Errors: UserError, for a file that is not there, or says something else."""
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--tokens={path} cannot be read: {error.strerror}; {_HOW}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"--tokens={path} is no TOML: {error}; {_HOW}") from error
        tables = tree.get("tenants")
        if set(tree) != {"tenants"} or not isinstance(tables, dict) or not tables:
            raise UserError(f"--tokens={path} must hold [tenants.NAME] tables and nothing else; {_HOW}")
        known = [_tenant(path, name, table) for name, table in tables.items()]
        if len({tenant.token_sha256 for tenant in known}) < len(known):
            raise UserError(f"--tokens={path}: two tenants have the same token; {_HOW}")
        return cls(known)

    def of(self, authorization: str) -> Tenant | None:
        """Whose token a header `Authorization` shows; every tenant's is compared, in a time that tells nothing."""
        kind, _, token = authorization.partition(" ")
        digest = hashlib.sha256(token[:_MOST_TOKEN].encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, tenant in self._known:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found if kind.lower() == "bearer" else None


def _tenant(path: Path, name: str, table: object) -> Tenant:
    try:
        return Tenant.model_validate({**(table if isinstance(table, dict) else {}), "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"--tokens={path}: tenants.{name}.{where}={first['input']!r}: {first['msg'].lower()}; {_HOW}"
        ) from None


_HOW = "`palestra serve sandbox --token-for NAME` prints a token and its lines"


def only(**limits: int) -> tuple[Tenants, str]:
    """One tenant, and its token, which nobody has seen before."""
    token = _fresh()
    return Tenants([Tenant(name=ONLY, token_sha256=digest_of(token), **limits)]), token


def lines_for(name: str) -> tuple[str, str]:
    """A fresh token, and its lines of the file. Errors: UserError, for a name that no tenant may have."""
    if not _NAME.fullmatch(name):
        raise UserError(f"--token-for={name!r}: a tenant's name is small letters, digits, - and _, at most 63")
    token = _fresh()
    tenant = Tenant(name=name, token_sha256=digest_of(token))
    rows = [f"[tenants.{name}]", f'token_sha256 = "{tenant.token_sha256}"']
    rows += [f"{field} = {getattr(tenant, field)}" for field in ("most_sandboxes", "most_memory_mb")]
    return token, "\n".join(rows) + "\n"


def _fresh() -> str:
    return secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

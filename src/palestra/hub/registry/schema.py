"""The tables. Migrations make them; a test holds both together.

Times are seconds since 1970. JSON is kept as text: both databases read it the same way.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[Any]:
    return Column("id", Integer, primary_key=True)


def _of(name: str, table: str, *, null: bool = False, on_delete: str = "CASCADE") -> Column[Any]:
    return Column(name, Integer, ForeignKey(f"{table}.id", ondelete=on_delete), nullable=null)


def _time(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, Float(53), nullable=null)


def _json(name: str, empty: str = "{}") -> Column[Any]:
    return Column(name, Text, nullable=False, server_default=text(f"'{empty}'"))


def _text(name: str) -> Column[Any]:
    return Column(name, Text, nullable=False, server_default=text("''"))


owners = Table(
    "owners",
    metadata,
    _id(),
    Column("name", String(40), nullable=False, unique=True),  # small letters, digits, -
    Column("kind", String(12), nullable=False),  # person, organisation
    Column("is_admin", Boolean, nullable=False, server_default=text("false")),  # of the whole hub; persons alone
    _time("created"),
    CheckConstraint("kind IN ('person', 'organisation')", name="kind"),
)

members = Table(
    "members",
    metadata,
    _of("organisation_id", "owners"),
    _of("person_id", "owners"),
    Column("role", String(8), nullable=False),  # read: sees what is private; write: uploads; admin: the rest
    UniqueConstraint("organisation_id", "person_id"),
    Index(None, "person_id"),
    CheckConstraint("role IN ('read', 'write', 'admin')", name="role"),
)

tokens = Table(
    "tokens",
    metadata,
    _id(),
    Column("prefix", String(16), nullable=False, unique=True),  # what it is found by; the rest is secret
    Column("hash", String(64), nullable=False),  # SHA-256 of the whole; it is random, so no slow hash is needed
    _of("owner_id", "owners"),  # the person who acts
    _text("name"),
    Column("scope", String(8), nullable=False),  # read, write, admin; never more than the person may
    _of("only_owner_id", "owners", null=True),  # restricts it to environments of this owner
    _of("only_environment_id", "environments", null=True),
    _time("created"),
    _time("expires", null=True),
    _time("last_used", null=True),
    _time("revoked", null=True),
    Index(None, "owner_id"),
    CheckConstraint("scope IN ('read', 'write', 'admin')", name="scope"),
)

sessions = Table(  # of browsers
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),  # SHA-256 of the cookie
    _of("token_id", "tokens"),  # who was logged in by it; a revoked one ends the session
    Column("csrf", String(64), nullable=False),
    _time("expires"),
)

environments = Table(
    "environments",
    metadata,
    _id(),
    _of("owner_id", "owners"),
    Column("name", String(100), nullable=False),  # normalised (PEP 503): small letters, digits, -
    Column("project", String(120), nullable=False, server_default=text("''")),  # of its distributions; "" before one
    Column("visibility", String(8), nullable=False),  # public, private
    _text("summary"),
    _json("tags", "[]"),
    Column("latest", String(100), nullable=False, server_default=text("''")),  # newest version that is not yanked
    Column("num_downloads", BigInteger, nullable=False, server_default=text("0")),
    Column("revision", Integer, nullable=False, server_default=text("0")),  # grows with every change of its index
    _time("created"),
    _time("updated"),
    UniqueConstraint("owner_id", "name"),
    Index(None, "name"),
    Index(None, "updated"),
    CheckConstraint("visibility IN ('public', 'private')", name="visibility"),
)

versions = Table(  # immutable, but for `yanked`
    "versions",
    metadata,
    _id(),
    _of("environment_id", "environments"),
    Column("version", String(100), nullable=False),  # normalised (PEP 440)
    _text("requires_python"),
    _json("metadata"),  # core metadata, field by field
    _text("readme"),
    _text("readme_type"),
    Column("yanked", Boolean, nullable=False, server_default=text("false")),
    _text("yanked_reason"),
    _of("uploaded_by", "owners", null=True, on_delete="SET NULL"),
    _time("created"),
    UniqueConstraint("environment_id", "version"),
)

files = Table(
    "files",
    metadata,
    _id(),
    _of("environment_id", "environments"),
    _of("version_id", "versions"),
    Column("filename", String(255), nullable=False),
    Column("kind", String(8), nullable=False),  # wheel, sdist
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),  # of the blob
    Column("metadata_sha256", String(64), nullable=False),  # METADATA or PKG-INFO, a blob too
    _time("created"),
    UniqueConstraint("environment_id", "filename"),
    Index(None, "version_id"),
    Index(None, "sha256"),
    Index(None, "metadata_sha256"),
)

dependencies = Table(
    "dependencies",
    metadata,
    _id(),
    _of("version_id", "versions"),
    Column("name", String(200), nullable=False),  # normalised
    _text("requirement"),  # as written
    Index(None, "version_id"),
    Index(None, "name"),
)

downloads = Table(
    "downloads",
    metadata,
    _of("file_id", "files"),
    Column("day", String(10), nullable=False),  # 2026-01-31, UTC
    Column("count", BigInteger, nullable=False),
    UniqueConstraint("file_id", "day"),
)

audit = Table(  # only ever added to
    "audit",
    metadata,
    _id(),
    _time("at"),
    _of("actor_id", "owners", null=True, on_delete="SET NULL"),
    _text("actor"),  # its name then
    Column("action", String(40), nullable=False),  # such as version.push
    _text("subject"),  # such as alice/wordle==0.1.0
    _text("address"),  # where from
    _json("details"),
    Index(None, "at"),
    Index(None, "subject"),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", String(32), primary_key=True),
    _of("environment_id", "environments"),
    _of("version_id", "versions", null=True, on_delete="SET NULL"),
    _of("owner_id", "owners"),
    _text("model"),
    Column("library", String(100), nullable=False, server_default=text("''")),  # version of palestra
    _json("settings"),
    _json("numbers"),
    Column("status", String(16), nullable=False),
    Column("verified", Boolean, nullable=False, server_default=text("false")),
    Column("blob_sha256", String(64), nullable=False, server_default=text("''")),  # rollouts; "" for none
    _time("created"),
    Index(None, "environment_id", "created"),
    Index(None, "blob_sha256"),
)

checks = Table(  # an environment's version with a library's version
    "checks",
    metadata,
    _id(),
    _of("version_id", "versions"),
    Column("library", String(100), nullable=False),  # version of palestra
    Column("status", String(16), nullable=False),  # waiting, running, passed, failed, error
    _text("worker"),  # who does it
    _time("claimed_until", null=True),  # then another may take it over
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    _json("result"),
    Column("log_sha256", String(64), nullable=False, server_default=text("''")),  # a blob; "" for none
    _time("created"),
    _time("ended", null=True),
    UniqueConstraint("version_id", "library"),
    Index(None, "status", "created"),
    Index(None, "log_sha256"),
)

# `search`, an index of words, differs between the databases: migrations/versions/0001_registry.py and finding.py.
SEARCH_TABLE = "search"

"""The tables of the registry, and the index of words, which each database has its own kind of."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _people()
    _environments()
    _versions()
    _counts()
    _results()
    _search()


def downgrade() -> None:
    raise NotImplementedError("restore a backup instead: data would be lost")


def _people() -> None:
    op.create_table(
        "owners",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("is_admin", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created", sa.Float(precision=53), nullable=False),
        sa.CheckConstraint("kind IN ('person', 'organisation')", name="ck_owners_kind"),
        sa.PrimaryKeyConstraint("id", name="pk_owners"),
        sa.UniqueConstraint("name", name="uq_owners_name"),
    )
    op.create_table(
        "members",
        sa.Column("organisation_id", sa.Integer(), nullable=False),
        sa.Column("person_id", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=8), nullable=False),
        sa.CheckConstraint("role IN ('read', 'write', 'admin')", name="ck_members_role"),
        sa.ForeignKeyConstraint(
            ["organisation_id"], ["owners.id"], name="fk_members_organisation_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["person_id"], ["owners.id"], name="fk_members_person_id", ondelete="CASCADE"),
        sa.UniqueConstraint("organisation_id", "person_id", name="uq_members_organisation_id_person_id"),
    )
    op.create_index("ix_members_person_id", "members", ["person_id"], unique=False)


def _environments() -> None:
    op.create_table(
        "environments",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("owner_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("project", sa.String(length=120), server_default=sa.text("''"), nullable=False),
        sa.Column("visibility", sa.String(length=8), nullable=False),
        sa.Column("summary", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("tags", sa.Text(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("latest", sa.String(length=100), server_default=sa.text("''"), nullable=False),
        sa.Column("num_downloads", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("revision", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created", sa.Float(precision=53), nullable=False),
        sa.Column("updated", sa.Float(precision=53), nullable=False),
        sa.CheckConstraint("visibility IN ('public', 'private')", name="ck_environments_visibility"),
        sa.ForeignKeyConstraint(["owner_id"], ["owners.id"], name="fk_environments_owner_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_environments"),
        sa.UniqueConstraint("owner_id", "name", name="uq_environments_owner_id_name"),
    )
    op.create_index("ix_environments_name", "environments", ["name"], unique=False)
    op.create_index("ix_environments_updated", "environments", ["updated"], unique=False)
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("owner_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("scope", sa.String(length=8), nullable=False),
        sa.Column("only_owner_id", sa.Integer(), nullable=True),
        sa.Column("only_environment_id", sa.Integer(), nullable=True),
        sa.Column("created", sa.Float(precision=53), nullable=False),
        sa.Column("expires", sa.Float(precision=53), nullable=True),
        sa.Column("last_used", sa.Float(precision=53), nullable=True),
        sa.Column("revoked", sa.Float(precision=53), nullable=True),
        sa.CheckConstraint("scope IN ('read', 'write', 'admin')", name="ck_tokens_scope"),
        sa.ForeignKeyConstraint(
            ["only_environment_id"], ["environments.id"], name="fk_tokens_only_environment_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["only_owner_id"], ["owners.id"], name="fk_tokens_only_owner_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["owner_id"], ["owners.id"], name="fk_tokens_owner_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.UniqueConstraint("prefix", name="uq_tokens_prefix"),
    )
    op.create_index("ix_tokens_owner_id", "tokens", ["owner_id"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("csrf", sa.String(length=64), nullable=False),
        sa.Column("expires", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="fk_sessions_token_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("hash", name="pk_sessions"),
    )


def _versions() -> None:
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("environment_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(length=100), nullable=False),
        sa.Column("requires_python", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("metadata", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("readme", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("readme_type", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("yanked", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("yanked_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("uploaded_by", sa.Integer(), nullable=True),
        sa.Column("created", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environments.id"], name="fk_versions_environment_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["uploaded_by"], ["owners.id"], name="fk_versions_uploaded_by", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.UniqueConstraint("environment_id", "version", name="uq_versions_environment_id_version"),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("environment_id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("metadata_sha256", sa.String(length=64), nullable=False),
        sa.Column("created", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environments.id"], name="fk_files_environment_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_files_version_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.UniqueConstraint("environment_id", "filename", name="uq_files_environment_id_filename"),
    )
    op.create_index("ix_files_metadata_sha256", "files", ["metadata_sha256"], unique=False)
    op.create_index("ix_files_sha256", "files", ["sha256"], unique=False)
    op.create_index("ix_files_version_id", "files", ["version_id"], unique=False)


def _counts() -> None:
    op.create_table(
        "dependencies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("requirement", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_dependencies_version_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_dependencies"),
    )
    op.create_index("ix_dependencies_name", "dependencies", ["name"], unique=False)
    op.create_index("ix_dependencies_version_id", "dependencies", ["version_id"], unique=False)
    op.create_table(
        "downloads",
        sa.Column("file_id", sa.Integer(), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name="fk_downloads_file_id", ondelete="CASCADE"),
        sa.UniqueConstraint("file_id", "day", name="uq_downloads_file_id_day"),
    )


def _results() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(precision=53), nullable=False),
        sa.Column("actor_id", sa.Integer(), nullable=True),
        sa.Column("actor", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("address", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("details", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.ForeignKeyConstraint(["actor_id"], ["owners.id"], name="fk_audit_actor_id", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"], unique=False)
    op.create_index("ix_audit_subject", "audit", ["subject"], unique=False)
    op.create_table(
        "evaluations",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("environment_id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=True),
        sa.Column("owner_id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("library", sa.String(length=100), server_default=sa.text("''"), nullable=False),
        sa.Column("settings", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("numbers", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("verified", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("blob_sha256", sa.String(length=64), server_default=sa.text("''"), nullable=False),
        sa.Column("created", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environments.id"], name="fk_evaluations_environment_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["owner_id"], ["owners.id"], name="fk_evaluations_owner_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_evaluations_version_id", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
    )
    op.create_index("ix_evaluations_blob_sha256", "evaluations", ["blob_sha256"], unique=False)
    op.create_index("ix_evaluations_environment_id_created", "evaluations", ["environment_id", "created"], unique=False)
    op.create_table(
        "checks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("library", sa.String(length=100), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("worker", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("claimed_until", sa.Float(precision=53), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("result", sa.Text(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("log_sha256", sa.String(length=64), server_default=sa.text("''"), nullable=False),
        sa.Column("created", sa.Float(precision=53), nullable=False),
        sa.Column("ended", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_checks_version_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_checks"),
        sa.UniqueConstraint("version_id", "library", name="uq_checks_version_id_library"),
    )
    op.create_index("ix_checks_log_sha256", "checks", ["log_sha256"], unique=False)
    op.create_index("ix_checks_status_created", "checks", ["status", "created"], unique=False)


def _search() -> None:
    """A row an environment: `environment_id` is the rowid of SQLite's."""
    if op.get_bind().dialect.name == "sqlite":
        columns = "name, owner, tags, summary, readme"
        op.execute(f"CREATE VIRTUAL TABLE search USING fts5({columns}, tokenize='porter unicode61', prefix='2 3')")
    else:
        op.execute(
            "CREATE TABLE search (environment_id integer PRIMARY KEY REFERENCES environments (id) ON DELETE CASCADE, "
            "words tsvector NOT NULL)"
        )
        op.execute("CREATE INDEX ix_search_words ON search USING gin (words)")

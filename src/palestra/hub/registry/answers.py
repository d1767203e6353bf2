"""What pages and their JSON twins answer. Times are seconds since 1970."""

from typing import Any

from msgspec import Struct


class EnvironmentRow(Struct):
    owner: str
    name: str
    project: str
    visibility: str
    summary: str
    tags: list[str]
    latest: str
    num_downloads: int
    updated: float


class Environments(Struct):
    environments: list[EnvironmentRow]
    num_matching: int
    page: int
    is_last: bool


class Member(Struct):
    name: str
    role: str


class Owner(Struct):
    """`members` of an organisation, for those who are among them; `role` is that of who asks."""

    name: str
    kind: str
    created: float
    environments: list[EnvironmentRow]
    members: list[Member]
    role: str


class FileRow(Struct):
    filename: str
    kind: str
    size: int
    sha256: str
    created: float
    num_downloads: int
    url: str


class VersionRow(Struct):
    version: str
    requires_python: str
    yanked: bool
    yanked_reason: str
    created: float
    uploaded_by: str
    files: list[FileRow]


class Dependency(Struct):
    """`hub` is the environment of this hub that it is, such as `alice/words`, or empty."""

    name: str
    requirement: str
    hub: str


class Environment(Struct):
    """`version` is the one that is shown: what was asked for, or the newest. `role` is that of who asks. `badges`:
    what examinations said, by version."""

    row: EnvironmentRow
    created: float
    version: str
    readme: str
    readme_type: str
    readme_html: str
    requires_python: str
    license: str
    links: dict[str, str]
    versions: list[VersionRow]
    dependencies: list[Dependency]
    dependants: list[EnvironmentRow]
    downloads: list[tuple[str, int]]
    badges: dict[str, str]
    index_url: str
    role: str


class SourceMember(Struct):
    name: str
    size: int


class Source(Struct):
    """`text` of the member at `path`, or the list of members, if `path` is empty."""

    owner: str
    name: str
    version: str
    filename: str
    filenames: list[str]
    path: str
    members: list[SourceMember]
    text: str
    size: int
    is_cut: bool
    is_binary: bool


class TokenRow(Struct):
    id: int
    prefix: str
    name: str
    scope: str
    only: str
    created: float
    expires: float | None
    last_used: float | None


class Account(Struct):
    name: str
    is_admin: bool
    scope: str
    tokens: list[TokenRow]
    organisations: list[Member]


class Login(Struct):
    """The page with the field for a token."""

    name: str


class AuditRow(Struct):
    at: float
    actor: str
    action: str
    subject: str
    address: str
    details: dict[str, Any]


class Audit(Struct):
    rows: list[AuditRow]
    before: int


class Token(Struct):
    """The only answer that a token is in."""

    token: str
    id: int
    name: str
    scope: str


class Done(Struct):
    """What was asked for is so now; `subject` is what it is about."""

    subject: str


class Pushed(Struct):
    owner: str
    environment: str
    version: str
    filename: str
    sha256: str
    is_new: bool

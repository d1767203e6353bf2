"""The pages of the registry: what each is asked, what it answers. HTML and the JSON twin show the same answer."""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from packaging.version import Version
from sqlalchemy import Connection, Row, Select, func, or_, select

from palestra.hub.evals.pages import PAGES as OF_EVALUATIONS
from palestra.hub.registry import answers, artefact, queries, readme, rights, wordindex
from palestra.hub.registry.ask import Ask, Page
from palestra.hub.registry.rights import NotAllowedError, NotFoundError, Role, Who, visible
from palestra.hub.registry.schema import (
    audit,
    dependencies,
    downloads,
    environments,
    files,
    members,
    owners,
    tokens,
    versions,
)
from palestra.hub.trust import pages as trust

_MOST_SHOWN = 100
_MOST_VERSIONS = 1000
_MOST_TEXT = 256 << 10
_DAYS = 30


# --- lists of environments


def _rows(who: Who) -> Select[Any]:
    columns = (environments, owners.c.name.label("owner"))
    return select(*columns).join(owners, owners.c.id == environments.c.owner_id).where(visible(who))


def _row(row: Row[Any]) -> answers.EnvironmentRow:
    return answers.EnvironmentRow(
        owner=row.owner,
        name=row.name,
        project=row.project,
        visibility=row.visibility,
        summary=row.summary,
        tags=json.loads(row.tags),
        latest=row.latest,
        num_downloads=row.num_downloads,
        updated=row.updated,
    )


def environments_page(ask: Ask) -> answers.Environments:
    query: queries.Environments = ask.query
    found = _rows(ask.who)
    if query.tag:
        found = found.where(environments.c.tags.contains(json.dumps(query.tag), autoescape=True))
    if query.owner:
        found = found.where(owners.c.name == query.owner)
    if query.words.strip():
        found = wordindex.matching(found, query.words, is_sqlite=ask.hub.database.is_sqlite)
    else:
        found = found.order_by(environments.c.updated.desc(), environments.c.id.desc())
    first = (query.page - 1) * query.limit
    with ask.hub.database.read() as connection:
        count = select(func.count()).select_from(found.order_by(None).with_only_columns(environments.c.id).subquery())
        num = connection.execute(count).scalar_one()
        rows = connection.execute(found.offset(first).limit(query.limit)).all()
    return answers.Environments(
        environments=[_row(row) for row in rows],
        num_matching=num,
        page=query.page,
        is_last=first + len(rows) >= num,
    )


def owner(ask: Ask) -> answers.Owner:
    with ask.hub.database.read() as connection:
        found = rights.owner(connection, ask.who, ask.path["owner"])
        role = rights.role(connection, ask.who, found.id)
        theirs = _rows(ask.who).where(environments.c.owner_id == found.id).order_by(environments.c.name)
        rows = connection.execute(theirs.limit(queries.Environments.model_fields["limit"].default * 20)).all()
        named = _members(connection, found.id) if role >= Role.READ else []
    return answers.Owner(
        name=found.name,
        kind=found.kind,
        created=found.created,
        environments=[_row(row) for row in rows],
        members=named,
        role=role.name.lower(),
    )


def _members(connection: Connection, organisation_id: int) -> list[answers.Member]:
    found = select(owners.c.name, members.c.role).join(owners, owners.c.id == members.c.person_id)
    rows = connection.execute(found.where(members.c.organisation_id == organisation_id).order_by(owners.c.name))
    return [answers.Member(name=row.name, role=row.role) for row in rows]


# --- one environment


def environment(ask: Ask) -> answers.Environment:
    query: queries.Environment = ask.query
    with ask.hub.database.read() as connection:
        row = rights.environment(connection, ask.who, ask.path["owner"], ask.path["environment"])
        role = rights.role(connection, ask.who, row.owner_id, row.id)
        shown = _version(connection, row, query.version or row.latest) if query.version or row.latest else None
        listed = _versions(connection, row, f"/{row.owner}/{row.name}")
        needs = _dependencies(connection, ask.who, shown.id) if shown is not None else []
        needed_by = _dependants(connection, ask.who, row)
        by_day = _downloads(connection, row.id)
        badges = trust.badges(connection, row.id)
    core = json.loads(shown.metadata) if shown is not None else {}
    text, kind = (shown.readme, shown.readme_type) if shown is not None else ("", "")
    return answers.Environment(
        row=_row(row),
        created=row.created,
        version=shown.version if shown is not None else "",
        readme=text,
        readme_type=kind,
        readme_html=readme.render(text, kind),
        requires_python=shown.requires_python if shown is not None else "",
        license=str(core.get("license_expression") or core.get("license") or "")[:200],
        links=_links(core),
        versions=listed,
        dependencies=needs,
        dependants=needed_by,
        downloads=by_day,
        badges=badges,
        index_url=f"{ask.url}/{row.owner}/{row.name}/simple/",
        role=role.name.lower(),
    )


def _version(connection: Connection, row: Row[Any], version: str) -> Row[Any]:
    where = (versions.c.environment_id == row.id, versions.c.version == version)
    found = connection.execute(select(versions).where(*where)).first()
    if found is None:
        raise NotFoundError(f"there is no version {version} of {row.owner}/{row.name}")
    return found


def _links(core: dict[str, Any]) -> dict[str, str]:
    """Only to the web: what an author writes is no program."""
    found = dict(core.get("project_urls") or {})
    if home := core.get("home_page"):
        found.setdefault("Homepage", home)
    named = {str(name)[:60]: str(url) for name, url in found.items()}
    return {name: url for name, url in named.items() if url.startswith(("https://", "http://"))}


def _versions(connection: Connection, row: Row[Any], base: str) -> list[answers.VersionRow]:
    """The highest first."""
    columns = (versions, owners.c.name.label("uploader"))
    found = select(*columns).outerjoin(owners, owners.c.id == versions.c.uploaded_by)
    rows = connection.execute(found.where(versions.c.environment_id == row.id).limit(_MOST_VERSIONS)).all()
    of_version = _files(connection, row.id, base)
    listed = [
        answers.VersionRow(
            version=one.version,
            requires_python=one.requires_python,
            yanked=one.yanked,
            yanked_reason=one.yanked_reason,
            created=one.created,
            uploaded_by=one.uploader or "",
            files=of_version.get(one.id, []),
        )
        for one in rows
    ]
    return sorted(listed, key=lambda one: Version(one.version), reverse=True)


def _files(connection: Connection, environment_id: int, base: str) -> dict[int, list[answers.FileRow]]:
    counts = select(downloads.c.file_id, func.sum(downloads.c.count).label("num")).group_by(downloads.c.file_id)
    counted = counts.subquery()
    query = select(files, counted.c.num).outerjoin(counted, counted.c.file_id == files.c.id)
    found: dict[int, list[answers.FileRow]] = {}
    for one in connection.execute(query.where(files.c.environment_id == environment_id).order_by(files.c.filename)):
        file = answers.FileRow(
            filename=one.filename,
            kind=one.kind,
            size=one.size,
            sha256=one.sha256,
            created=one.created,
            num_downloads=int(one.num or 0),
            url=f"{base}/files/{one.sha256}/{one.filename}",
        )
        found.setdefault(one.version_id, []).append(file)
    return found


def _dependencies(connection: Connection, who: Who, version_id: int) -> list[answers.Dependency]:
    query = select(dependencies).where(dependencies.c.version_id == version_id).order_by(dependencies.c.id)
    rows = connection.execute(query).all()
    names = {row.name for row in rows}
    here = _rows(who).where(environments.c.project.in_(names)).order_by(environments.c.num_downloads)
    known = {row.project: f"{row.owner}/{row.name}" for row in connection.execute(here)}
    return [answers.Dependency(name=row.name, requirement=row.requirement, hub=known.get(row.name, "")) for row in rows]


def _dependants(connection: Connection, who: Who, row: Row[Any]) -> list[answers.EnvironmentRow]:
    """Those whose newest version names this distribution."""
    if not row.project:
        return []
    newest = (versions.c.environment_id == environments.c.id) & (versions.c.version == environments.c.latest)
    query = _rows(who).join(versions, newest).join(dependencies, dependencies.c.version_id == versions.c.id)
    query = query.where(dependencies.c.name == row.project, environments.c.id != row.id).distinct()
    return [_row(one) for one in connection.execute(query.order_by(environments.c.name).limit(_MOST_SHOWN))]


def _downloads(connection: Connection, environment_id: int) -> list[tuple[str, int]]:
    """By day, of the last 30."""
    since = (datetime.now(UTC) - timedelta(days=_DAYS)).date().isoformat()
    query = select(downloads.c.day, func.sum(downloads.c.count)).join(files, files.c.id == downloads.c.file_id)
    query = query.where(files.c.environment_id == environment_id, downloads.c.day >= since)
    return [
        (day, int(num)) for day, num in connection.execute(query.group_by(downloads.c.day).order_by(downloads.c.day))
    ]


def source(ask: Ask) -> answers.Source:
    query: queries.Source = ask.query
    with ask.hub.database.read() as connection:
        row = rights.environment(connection, ask.who, ask.path["owner"], ask.path["environment"])
        columns = (files, versions.c.version)
        found = select(*columns).join(versions, versions.c.id == files.c.version_id)
        rows = list(connection.execute(found.where(files.c.environment_id == row.id)))
    if not rows:
        raise NotFoundError(f"{row.owner}/{row.name} has no files yet")
    rows.sort(key=lambda one: (Version(one.version), one.kind), reverse=True)
    newest = [one for one in rows if one.version == row.latest] or rows
    chosen = next((one for one in rows if one.filename == query.file), None) if query.file else newest[0]
    if chosen is None:
        raise NotFoundError(f"{row.owner}/{row.name} has no file {query.file}")
    answer = answers.Source(
        owner=row.owner,
        name=row.name,
        version=chosen.version,
        filename=chosen.filename,
        filenames=[one.filename for one in rows][:_MOST_SHOWN],
        path=query.path,
        members=[],
        text="",
        size=0,
        is_cut=False,
        is_binary=False,
    )
    _look_inside(ask, chosen, answer)
    return answer


def _look_inside(ask: Ask, file: Row[Any], answer: answers.Source) -> None:
    with ask.hub.blobs.open(file.sha256) as content:
        if not answer.path:
            answer.members = [answers.SourceMember(one.name, one.size) for one in artefact.members(file.kind, content)]
            return
        found = artefact.member(file.kind, content, answer.path, _MOST_TEXT + 1)
    if found is None:
        raise NotFoundError(f"{file.filename} has no member {answer.path}")
    answer.size, answer.is_cut, answer.is_binary = len(found), len(found) > _MOST_TEXT, b"\0" in found[:8192]
    answer.text = "" if answer.is_binary else found[:_MOST_TEXT].decode(errors="replace")


# --- oneself


def account(ask: Ask) -> answers.Account:
    if not ask.who.is_known:
        raise NotAllowedError("log in first")
    with ask.hub.database.read() as connection:
        only = owners.alias()
        columns = (tokens, only.c.name.label("only_owner"), environments.c.name.label("only_environment"))
        found = select(*columns).outerjoin(only, only.c.id == tokens.c.only_owner_id)
        found = found.outerjoin(environments, environments.c.id == tokens.c.only_environment_id)
        is_over = or_(tokens.c.expires.is_(None), tokens.c.expires > time.time())
        where = (tokens.c.owner_id == ask.who.id, tokens.c.revoked.is_(None), is_over)
        rows = connection.execute(found.where(*where).order_by(tokens.c.id.desc())).all()
        named = select(owners.c.name, members.c.role).join(owners, owners.c.id == members.c.organisation_id)
        orgs = connection.execute(named.where(members.c.person_id == ask.who.id).order_by(owners.c.name)).all()
    return answers.Account(
        name=ask.who.name,
        is_admin=ask.who.is_admin,
        scope=ask.who.scope.name.lower(),
        tokens=[_token(row) for row in rows],
        organisations=[answers.Member(name=row.name, role=row.role) for row in orgs],
    )


def _token(row: Row[Any]) -> answers.TokenRow:
    only = "/".join(part for part in (row.only_owner, row.only_environment) if part)
    return answers.TokenRow(
        id=row.id,
        prefix=row.prefix,
        name=row.name,
        scope=row.scope,
        only=only,
        created=row.created,
        expires=row.expires,
        last_used=row.last_used,
    )


def login(ask: Ask) -> answers.Login:
    return answers.Login(name=ask.who.name)


def audit_page(ask: Ask) -> answers.Audit:
    """For administrators of the hub."""
    rights.require_admin(ask.who)
    query: queries.Audit = ask.query
    found = select(audit).order_by(audit.c.id.desc()).limit(query.limit)
    if query.subject:
        found = found.where(audit.c.subject.startswith(query.subject, autoescape=True))
    if query.before:
        found = found.where(audit.c.id < query.before)
    with ask.hub.database.read() as connection:
        rows = connection.execute(found).all()
    return answers.Audit(
        rows=[
            answers.AuditRow(row.at, row.actor, row.action, row.subject, row.address, json.loads(row.details))
            for row in rows
        ],
        before=rows[-1].id if len(rows) == query.limit else 0,
    )


# The first that fits is taken: what has a name of its own stands before owners.
PAGES: list[Page] = [
    Page(
        "/environments",
        "Environments",
        queries.Environments,
        answers.Environments,
        environments_page,
        "hub/environments.html",
    ),
    Page("/login", "Log in", queries.Nothing, answers.Login, login, "hub/login.html"),
    Page("/account", "Account", queries.Nothing, answers.Account, account, "hub/account.html"),
    Page("/audit", "Audit log", queries.Audit, answers.Audit, audit_page, "hub/audit.html"),
    Page("/{owner}", "Owner", queries.Nothing, answers.Owner, owner, "hub/owner.html"),
    Page(
        "/{owner}/{environment}",
        "Environment",
        queries.Environment,
        answers.Environment,
        environment,
        "hub/environment.html",
    ),
    Page(
        "/{owner}/{environment}/source",
        "Source",
        queries.Source,
        answers.Source,
        source,
        "hub/source.html",
    ),
    *OF_EVALUATIONS,
    *trust.PAGES,
]

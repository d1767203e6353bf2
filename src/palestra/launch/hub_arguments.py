"""The arguments of `palestra serve hub` and `palestra hub ...`. The commands themselves are in `launch/hub.py`."""

import argparse
from collections.abc import Callable
from pathlib import Path


def add_serve(services, add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(services, "hub", _serve, "a hub of environments, for a team")
    parser.add_argument("--data", type=Path, default=Path("hub"), metavar="DIR", help="what it keeps (default: hub)")
    parser.add_argument("--database", default="", metavar="URL", help="postgresql://... (default: SQLite in DIR)")
    parser.add_argument("--storage", default="", metavar="URL", help="s3://bucket/prefix (default: DIR/blobs)")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8004, help="0: a free one, which is said (default: 8004)")
    parser.add_argument("--url", default="", help="what it is called from outside, where a proxy stands before it")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="what it may be called")
    parser.add_argument("--max-upload-mb", type=int, default=100, help="of a wheel or an sdist (default: 100)")
    parser.add_argument("--no-checks", action="store_true", help="examine nothing in this process; others may")
    parser.add_argument("--sandbox", metavar="BACKEND", help="where it examines (default: the best that works here)")
    text = "where what an environment depends on may come from, when it is examined (default: what is here)"
    parser.add_argument("--check-index", default="", metavar="URL", help=text)
    text = "a proxy whose X-Forwarded-For is believed"
    parser.add_argument("--proxy", action="append", default=[], metavar="ADDRESS", help=text)
    text = "told to end, it answers on for so long while /ready says no (default: 0)"
    parser.add_argument("--drain-s", type=float, default=0.0, metavar="S", help=text)
    text = "name of the first administrator, whose token is said once (default: hub-admin)"
    parser.add_argument("--admin", default="hub-admin", metavar="NAME", help=text)


def add_hub(commands, add: Callable[..., argparse.ArgumentParser], add_json: Callable[..., None]) -> None:
    hub = commands.add_parser("hub", help="share environments", description="Share environments by a hub.")
    inner = hub.add_subparsers(metavar="COMMAND", required=True)
    login = add(inner, "login", _login, "keep a token of a hub, which is asked for or read from stdin")
    login.add_argument("url", help="such as http://host:8004")
    push = add(inner, "push", _push, "build an environment, and bring it to the hub")
    push.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a project, a wheel or an sdist")
    push.add_argument("--owner", default="", metavar="NAME", help="a person or an organisation (default: you)")
    push.add_argument("--private", action="store_true", help="a new environment is seen by its owner alone")
    pull = add(inner, "pull", _pull, "install an environment; what that would change is shown and asked for")
    pull.add_argument("environment", metavar="OWNER/NAME[==VERSION]")
    pull.add_argument("--yes", action="store_true", help="do not ask")
    search = add(inner, "search", _search, "find environments by words")
    search.add_argument("words", nargs="*")
    yank = add(inner, "yank", _yank, "let nobody install a version who does not name it exactly")
    yank.add_argument("environment", metavar="OWNER/NAME==VERSION")
    yank.add_argument("--reason", default="", help="is shown to those who install it all the same")
    yank.add_argument("--undo", action="store_true", help="take a yank back")
    _add_evaluations(inner, add, add_json)
    user = inner.add_parser("user", help="people of a hub", description="People of a hub.")
    people = user.add_subparsers(metavar="COMMAND", required=True)
    person = add(people, "add", _add_user, "add a person, whose token is said once")
    person.add_argument("name")
    person.add_argument("--days", type=float, default=90, help="until the token expires (default: 90)")
    check = add(inner, "check", _check, "what the hub's examination of an environment says; it is waited for")
    check.add_argument("environment", metavar="OWNER/NAME[==VERSION]")
    check.add_argument("--again", action="store_true", help="have it examined anew, with the hub's library")
    check.add_argument("--deadline-s", type=float, default=900, metavar="S", help="how long to wait (default: 900)")
    for name, run, text in (
        ("backup", _backup, "copy a hub into a directory, also while it runs"),
        ("restore", _restore, "make an empty hub from a copy"),
    ):
        keeping = add(inner, name, run, text)
        keeping.add_argument("directory", type=Path, metavar="DIR")
        keeping.add_argument("--data", type=Path, default=Path("hub"), metavar="DIR", help="the hub's (default: hub)")
        keeping.add_argument("--database", default="", metavar="URL", help="postgresql://... (default: SQLite in it)")
        keeping.add_argument("--storage", default="", metavar="URL", help="s3://bucket/prefix (default: blobs/ in it)")
    for parser in (push, pull, search, check):
        add_json(parser)
    for parser in (push, pull, search, yank, person, check):
        parser.add_argument("--hub", default="", metavar="URL", help="default: the one logged in at last")


def _add_evaluations(inner, add: Callable[..., argparse.ArgumentParser], add_json: Callable[..., None]) -> None:
    pushed = add(inner, "push-eval", _push_eval, "bring evaluations to the leaderboards of their environments")
    pushed.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="what `palestra eval` wrote")
    pushed.add_argument("--owner", default="", metavar="NAME", help="of the environments (default: you)")
    pushed.add_argument("--hub", default="", metavar="URL", help="default: the one logged in at last")
    add_json(pushed)
    verify = add(inner, "verify", _verify, "score evaluations of a hub again, in sandboxes, on its own machine")
    verify.add_argument("evaluations", nargs="*", metavar="ID", help="default: all that nobody has scored again")
    verify.add_argument("--data", type=Path, default=Path("hub"), metavar="DIR", help="of the hub (default: hub)")
    verify.add_argument("--database", default="", metavar="URL", help="as the hub was served with")
    verify.add_argument("--storage", default="", metavar="URL", help="as the hub was served with")
    verify.add_argument("--sandbox", metavar="NAME", help="default: the best that works here")


def _push_eval(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub_evals

    hub_evals.push(arguments.directories, hub=arguments.hub, owner=arguments.owner, as_json=arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    from palestra.launch import hub_evals

    return hub_evals.verify(
        arguments.evaluations,
        data=arguments.data,
        database=arguments.database,
        storage=arguments.storage,
        sandbox=arguments.sandbox,
    )


def _serve(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub_serving

    hub_serving.serve(
        hub_serving.Wish(
            data=arguments.data,
            database=arguments.database,
            storage=arguments.storage,
            host=arguments.host,
            port=arguments.port,
            url=arguments.url,
            names=tuple(arguments.allow_host),
            max_upload_mb=arguments.max_upload_mb,
            admin=arguments.admin,
            checks=not arguments.no_checks,
            sandbox=arguments.sandbox,
            index=arguments.check_index,
            proxies=tuple(arguments.proxy),
            drain_s=arguments.drain_s,
        )
    )


def _login(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub

    hub.login(arguments.url)


def _push(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub

    hub.push(
        arguments.paths,
        hub=arguments.hub,
        owner=arguments.owner,
        is_private=arguments.private,
        as_json=arguments.json,
    )


def _pull(arguments: argparse.Namespace) -> int:
    from palestra.launch import hub_pull

    return hub_pull.pull(arguments.environment, hub=arguments.hub, yes=arguments.yes, as_json=arguments.json)


def _search(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub

    hub.search(" ".join(arguments.words), hub=arguments.hub, as_json=arguments.json)


def _yank(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub

    hub.yank(arguments.environment, hub=arguments.hub, reason=arguments.reason, undo=arguments.undo)


def _add_user(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub

    hub.add_user(arguments.name, hub=arguments.hub, days=arguments.days)


def _check(arguments: argparse.Namespace) -> int:
    from palestra.launch import hub_keeping

    return hub_keeping.check(
        arguments.environment,
        hub=arguments.hub,
        deadline_s=arguments.deadline_s,
        again=arguments.again,
        as_json=arguments.json,
    )


def _backup(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub_keeping

    hub_keeping.backup(arguments.directory, data=arguments.data, database=arguments.database, storage=arguments.storage)


def _restore(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub_keeping

    hub_keeping.restore(
        arguments.directory, data=arguments.data, database=arguments.database, storage=arguments.storage
    )

"""The arguments of `palestra serve hub` and `palestra hub ...`. The commands themselves are in `launch/hub.py`."""

import argparse
from collections.abc import Callable
from pathlib import Path


def add_serve(services, add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(services, "hub", _serve, "a hub of environments, for a team")
    parser.add_argument("--data", type=Path, default=Path("hub"), metavar="DIR", help="what it keeps (default: hub)")
    parser.add_argument("--database", default="", metavar="URL", help="postgresql://... (default: SQLite in DIR)")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8004, help="0: a free one, which is said (default: 8004)")
    parser.add_argument("--url", default="", help="what it is called from outside, where a proxy stands before it")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="what it may be called")
    parser.add_argument("--max-upload-mb", type=int, default=100, help="of a wheel or an sdist (default: 100)")
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
    user = inner.add_parser("user", help="people of a hub", description="People of a hub.")
    people = user.add_subparsers(metavar="COMMAND", required=True)
    person = add(people, "add", _add_user, "add a person, whose token is said once")
    person.add_argument("name")
    person.add_argument("--days", type=float, default=90, help="until the token expires (default: 90)")
    for parser in (push, pull, search):
        add_json(parser)
    for parser in (push, pull, search, yank, person):
        parser.add_argument("--hub", default="", metavar="URL", help="default: the one logged in at last")


def _serve(arguments: argparse.Namespace) -> None:
    from palestra.launch import hub_serving

    hub_serving.serve(
        hub_serving.Wish(
            data=arguments.data,
            database=arguments.database,
            host=arguments.host,
            port=arguments.port,
            url=arguments.url,
            names=tuple(arguments.allow_host),
            max_upload_mb=arguments.max_upload_mb,
            admin=arguments.admin,
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

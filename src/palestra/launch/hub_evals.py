"""`palestra hub push-eval | verify`, and `palestra eval --push`."""

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from palestra.core.errors import InfrastructureError, UserError
from palestra.hub.client import Client
from palestra.hub.evals.answers import EvaluationPushed
from palestra.hub.evals.archive import check, pack
from palestra.launch.hub_account import Account, account
from palestra.launch.hub_serving import bucket
from palestra.launch.telling import ToPush, told_by

_PREFIX = "palestra-"


def require_account(hub: str = "") -> Account:
    """Errors: UserError, where nobody has logged in: before hours are measured that could not be pushed."""
    at = account(hub)
    if not at.token:
        raise UserError(f"nobody has logged in at {at.url}: palestra hub login {at.url}")
    return at


def push(directories: Sequence[Path], *, hub: str, owner: str, as_json: bool) -> None:
    """One evaluation for each environment. What was pushed before is found, not doubled. Errors: UserError."""
    at = require_account(hub)
    with at.client() as client:
        owner = owner or client.account().name
        for directory in directories:
            for one in told_by(directory):
                _say(at, _pushed(client, owner, one, directory), as_json=as_json)


def _pushed(client: Client, owner: str, one: ToPush, directory: Path) -> EvaluationPushed:
    """It is read as the hub will read it, before it is sent."""
    name = environment_of(one.told.environment)
    with tempfile.TemporaryDirectory(prefix="palestra-push-") as temporary:
        archive = Path(temporary) / "evaluation.zip"
        pack(one.told, one.records, archive)
        check(archive)
        try:
            return client.push_evaluation(owner, name, archive)
        except (UserError, InfrastructureError):
            print(f"push it later by: palestra hub push-eval {directory} --owner {owner}", file=sys.stderr)
            raise


def environment_of(id: str) -> str:
    """How the hub calls it. Errors: UserError, for a class in a file or module, which is no package."""
    if ":" in id or "/" in id:
        raise UserError(f"{id} is no installed environment: push its package to the hub, and evaluate that")
    name = id.lower().replace("_", "-").replace(".", "-")
    return name.removeprefix(_PREFIX) or name


def _say(at: Account, pushed: EvaluationPushed, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(pushed).decode())
        return
    reward, what = pushed.standing.reward, "" if pushed.is_new else " (was there already)"
    bounds = "" if reward.low is None or reward.high is None else f" ({reward.low:.3f} to {reward.high:.3f})"
    print(f"{pushed.owner}/{pushed.environment}: reward {reward.value:.3f}{bounds}{what}", file=sys.stderr)
    print(f"{at.url}{pushed.url}")


def verify(ids: Sequence[str], *, data: Path, database: str, storage: str, sandbox: str | None) -> int:
    """On the machine of the hub, beside its server. 1, if one came out otherwise. Errors: UserError."""
    try:
        from palestra.hub.evals import board
        from palestra.hub.evals import verify as verifying
        from palestra.hub.registry.hub import Hub, Settings
    except ModuleNotFoundError as error:
        raise UserError(f"the hub needs {error.name}: pip install 'palestra[hub]'") from None
    if not data.is_dir():
        raise UserError(f"there is no hub in {data}; name its directory by --data")
    hub = Hub.open(Settings(data=data), database, bucket(storage))

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        if ids:
            found = [asyncio.run(verifying.verify(hub, id, backend=sandbox, say=say)) for id in ids]
            return int(any(status == board.DIFFERS for status in found))
        num = asyncio.run(verifying.verify_waiting(hub, backend=sandbox, say=say))
        print(f"{num} evaluations were waiting", file=sys.stderr)
        return 0
    finally:
        hub.close()

"""Which hub the commands speak with, and by which token: from the environment, or from what `login` has kept."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.core.errors import UserError
from palestra.hub.client import Client

URL, TOKEN = "PALESTRA_HUB", "PALESTRA_HUB_TOKEN"


@dataclass(frozen=True)
class Account:
    """`token` is empty for a hub where nobody has logged in."""

    url: str
    token: str = ""

    def client(self) -> Client:
        return Client(self.url, token=self.token)


def place() -> Path:
    """Only its owner can read it."""
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "palestra" / "hub.json"


def account(url: str = "") -> Account:
    """Of the hub at `url`; "" is that of the environment, or where one has logged in last. Errors: UserError."""
    kept = _kept()
    url = (url or os.environ.get(URL, "") or str(kept.get("last", ""))).rstrip("/")
    if not url:
        raise UserError(f"no hub is known: palestra hub login URL, or name one by --hub or {URL}")
    return Account(url, os.environ.get(TOKEN, "") or str(kept.get("tokens", {}).get(url, "")))


def keep(account: Account) -> None:
    """For the next commands; in a file of mode 0600, replaced in one step."""
    kept, file = _kept(), place()
    kept["last"] = account.url
    kept.setdefault("tokens", {})[account.url] = account.token
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:  # made with mode 0600
        json.dump(kept, written, indent=2)
    Path(written.name).replace(file)


def _kept() -> dict[str, Any]:
    file = place()
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it, and log in again") from None
    return found if isinstance(found, dict) else {}

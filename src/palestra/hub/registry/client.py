"""The part of the client that speaks with a registry."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from palestra.core.errors import InfrastructureError, UserError
from palestra.hub.asking import Asking, segment
from palestra.hub.registry import answers

if TYPE_CHECKING:  # they need the server's libraries
    from palestra.hub.trust.pages import Checked, CheckRow, Checks

_PUSH_S = 1800.0
_PIECE = 1 << 20


class RegistryClient(Asking):
    """Errors: as `Asking`."""

    def account(self) -> answers.Account:
        return self._ask("/account.json", answers.Account)

    def environments(self, words: str = "", *, tag: str = "", owner: str = "") -> Iterator[answers.EnvironmentRow]:
        """All that match, a page at a time: the best first, or without words what changed last."""
        number = 1
        while True:
            given = {"words": words, "tag": tag, "owner": owner, "page": number, "limit": 200}
            page = self._ask("/environments.json", answers.Environments, given)
            yield from page.environments
            if page.is_last:
                return
            number += 1

    def owner(self, owner: str) -> answers.Owner:
        return self._ask(f"/{segment(owner)}.json", answers.Owner)

    def environment(self, owner: str, environment: str, *, version: str = "") -> answers.Environment:
        return self._ask(f"/{segment(owner)}/{segment(environment)}.json", answers.Environment, {"version": version})

    def check(self, owner: str, environment: str, version: str) -> None:
        """Have a version examined again, with the hub's library."""
        place = f"/api/environments/{segment(owner)}/{segment(environment)}/versions/{segment(version)}/check"
        self._answered("POST", place, answers.Done, json={})

    def checks(self, owner: str, environment: str) -> "Checks":
        """Of all versions, with all versions of the library that it was examined with."""
        from palestra.hub.trust.pages import Checks

        return self._ask(f"/{segment(owner)}/{segment(environment)}/checks.json", Checks)

    def checked(self, owner: str, environment: str, version: str) -> "CheckRow | None":
        """The newest of a version."""
        rows = [row for row in self.checks(owner, environment).rows if row.version == version]
        return max(rows, key=lambda row: row.id, default=None)

    def check_of(self, owner: str, environment: str, id: int) -> "Checked":
        """One examination, with its log."""
        from palestra.hub.trust.pages import Checked

        return self._ask(f"/{segment(owner)}/{segment(environment)}/checks/{id}.json", Checked)

    def source(self, owner: str, environment: str, *, file: str = "", path: str = "") -> answers.Source:
        address = f"/{segment(owner)}/{segment(environment)}/source.json"
        return self._ask(address, answers.Source, {"file": file, "path": path})

    def push(self, owner: str, file: Path, *, environment: str = "", is_private: bool = False) -> answers.Pushed:
        """A wheel or an sdist. `environment` is by default what the name of the distribution says."""
        place = f"/{segment(owner)}/{segment(environment)}" if environment else f"/{segment(owner)}"
        fields = {":action": "file_upload", "protocol_version": "1"}
        if is_private:
            fields["palestra_visibility"] = "private"
        try:
            with file.open("rb") as content:
                return self._answered(
                    "POST",
                    f"{place}/legacy/",
                    answers.Pushed,
                    data=fields,
                    files={"content": (file.name, content, "application/octet-stream")},
                    timeout=_PUSH_S,
                )
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None

    def download(self, file: answers.FileRow, to: Path) -> None:
        """Errors: also UserError, for an answer that is not there."""
        try:
            with self._http.stream("GET", file.url) as response, to.open("wb") as written:
                if not response.is_success:
                    raise UserError(f"{self.url} refused {file.url}: {response.status_code}")
                for piece in response.iter_bytes(_PIECE):
                    written.write(piece)
        except httpx.TransportError as error:
            raise InfrastructureError(f"{self.url} does not answer: {error}") from error

    def new_environment(self, owner: str, name: str, *, visibility: str = "public") -> None:
        body = {"name": name, "visibility": visibility}
        self._tell(f"/api/environments/{segment(owner)}", answers.Done, body)

    def set_visibility(self, owner: str, environment: str, visibility: str) -> None:
        self._tell(f"{_api(owner, environment)}/visibility", answers.Done, {"visibility": visibility})

    def delete_environment(self, owner: str, environment: str) -> None:
        self._tell(f"{_api(owner, environment)}/delete", answers.Done)

    def yank(self, owner: str, environment: str, version: str, *, reason: str = "") -> None:
        address = f"{_api(owner, environment)}/versions/{segment(version)}/yank"
        self._tell(address, answers.Done, {"reason": reason})

    def unyank(self, owner: str, environment: str, version: str) -> None:
        self._tell(f"{_api(owner, environment)}/versions/{segment(version)}/unyank", answers.Done)

    def new_owner(self, name: str, *, kind: str = "organisation") -> None:
        self._tell("/api/owners", answers.Done, {"name": name, "kind": kind})

    def set_member(self, organisation: str, person: str, role: str) -> None:
        self._tell(f"/api/owners/{segment(organisation)}/members/{segment(person)}", answers.Done, {"role": role})

    def remove_member(self, organisation: str, person: str) -> None:
        self._tell(f"/api/owners/{segment(organisation)}/members/{segment(person)}/remove", answers.Done)

    def new_token(self, **wish: Any) -> answers.Token:
        """`wish`: `name`, `scope`, `days`, `only`, `person`."""
        return self._tell("/api/tokens", answers.Token, wish)

    def revoke_token(self, id: int) -> None:
        self._tell(f"/api/tokens/{id}/revoke", answers.Done)


def _api(owner: str, environment: str) -> str:
    return f"/api/environments/{segment(owner)}/{segment(environment)}"

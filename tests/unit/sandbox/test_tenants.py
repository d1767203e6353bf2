"""Tenants: whose token it is, and what is refused of their file."""

import hashlib
import tomllib
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.sandbox.tenants import Tenant, Tenants, lines_for, only


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def test_a_token_is_its_tenants_and_nobody_elses():
    tenants = Tenants([Tenant(name=name, token_sha256=digest(f"token of {name}")) for name in ("a", "b")])
    found = [tenants.of(f"Bearer token of {name}") for name in ("a", "b")]
    assert [tenant.name for tenant in found if tenant] == ["a", "b"]
    for wrong in (
        "",
        "Bearer ",
        "Bearer token of c",
        "token of a",
        "Basic token of a",
        f"Bearer {digest('token of a')}",
    ):
        assert tenants.of(wrong) is None, wrong
    assert tenants.of("Bearer \udcff") is None


def test_the_only_token_is_random():
    (tenants, one), (_, other) = only(most_sandboxes=3), only()
    found = tenants.of(f"Bearer {one}")
    assert found is not None
    assert found.most_sandboxes == 3
    assert one != other
    assert tenants.of(f"Bearer {other}") is None


def test_the_lines_for_a_tenant_are_a_file_that_knows_its_token(tmp_path: Path):
    token, lines = lines_for("bob")
    path = tmp_path / "tokens.toml"
    path.write_text(lines)
    tenant = Tenants.read(path).of(f"Bearer {token}")
    assert tenant is not None
    assert tenant.name == "bob"
    assert token not in lines
    assert tomllib.loads(lines)["tenants"]["bob"]["token_sha256"] == digest(token)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tenants = 1", "[tenants.NAME]"),
        ("", "[tenants.NAME]"),
        ("[tenants.a]\n", "tenants.a.token_sha256"),
        ('[tenants.a]\ntoken_sha256 = "abc"\n', "tenants.a.token_sha256='abc'"),
        (f'[tenants.a]\ntoken = "x"\ntoken_sha256 = "{digest("x")}"\n', "tenants.a.token"),
        (f'[tenants."A b"]\ntoken_sha256 = "{digest("x")}"\n', "tenants.A b.name"),
        (f'[tenants.a]\ntoken_sha256 = "{digest("x")}"\nmost_sandboxes = -1\n', "tenants.a.most_sandboxes=-1"),
        ("".join(f'[tenants.{n}]\ntoken_sha256 = "{digest("x")}"\n' for n in "ab"), "the same token"),
        ("[", "is no TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_fix(tmp_path: Path, text: str, words: str):
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        Tenants.read(path)
    assert words in str(refused.value)
    assert "--token-for NAME" in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere.toml cannot be read: No such file"):
        Tenants.read(tmp_path / "nowhere.toml")


def test_a_tenants_name_is_plain():
    for name in ("", "A", "a b", "../a", "a" * 64, "[a]"):
        with pytest.raises(UserError, match="--token-for"):
            lines_for(name)

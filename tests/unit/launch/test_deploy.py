"""What `deploy/` says fits the command line. Docker itself is not run here."""

import re
from pathlib import Path

import pytest
import yaml

from palestra.launch import cli

HUB = Path(__file__).parents[3] / "deploy/hub"
SERVICES = yaml.safe_load((HUB / "compose.yaml").read_text())["services"]


def entrypoint() -> list[str]:
    (found,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (HUB / "Dockerfile").read_text(), re.MULTILINE)
    return yaml.safe_load(found)


@pytest.mark.parametrize("name", ["hub", "second", "examiner"])
def test_what_a_service_is_started_with_is_known(name: str):
    program, *words = [*entrypoint(), *SERVICES[name]["command"]]
    assert program == "palestra"
    asked = cli._parse([re.sub(r"\$\{.*?\}", "x", word) for word in words])
    assert asked.no_checks == (name != "examiner")
    assert asked.database.startswith("postgresql://hub:")


def test_an_option_that_there_is_not_is_seen():
    with pytest.raises(SystemExit):
        cli._parse([*entrypoint()[1:], "--no-such-option"])


def test_what_is_under_way_has_its_time():
    drain_s = next(float(word.split("=")[1]) for word in SERVICES["hub"]["command"] if word.startswith("--drain-s"))
    assert float(SERVICES["hub"]["stop_grace_period"].removesuffix("s")) > drain_s + 30


def test_what_the_dockerfile_copies_is_there():
    for line in re.findall(r"^COPY (.*)$", (HUB / "Dockerfile").read_text(), re.MULTILINE):
        *sources, _ = line.split()
        assert all((HUB.parents[1] / source).exists() for source in sources)

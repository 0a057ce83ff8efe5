"""docs/operations.md, "Two hosts, step by step": every line of it, in order, on two hosts."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts.world import Host, World

pytestmark = pytest.mark.timeout(300)

PAGE = Path(__file__).parents[2] / "docs/operations.md"
TITLE = "## Two hosts, step by step"
PROMPT = re.compile(r"([ab])# ")
COPY = re.compile(r"scp (?:-r )?(\S+) b:(\S+)")
STEP_S = 120.0


def steps(page: str) -> Iterator[tuple[str, str]]:
    """Host and command, which may be several lines."""
    section = page.partition(f"{TITLE}\n")[2].partition("\n## ")[0]
    host, lines = "", list[str]()
    for line in [*section.splitlines(), ""]:
        if line.startswith("    ") and not PROMPT.match(line[4:]):
            lines.append(line[4:])
            continue
        if lines:
            yield host, "\n".join(lines)
            lines = []
        if line.startswith("    "):
            host, lines = line[4], [line[7:]]


def copy(source: Host, target: Host, command: str, parcel: Path) -> None:
    """``scp`` of the page: these hosts have no sshd, so the way between them is a directory that both see."""
    found = COPY.fullmatch(command)
    assert found is not None, command
    source.inside.do("cp", "-r", found[1], str(parcel))
    target.inside.do("cp", "-r", str(parcel), found[2])


def test_the_page_is_read_as_it_is_written() -> None:
    found = list(steps(PAGE.read_text()))
    assert len(found) > 12
    assert {host for host, _ in found} == {"a", "b"}
    assert any("door_address" in command and command.endswith("END") for _, command in found)


def test_every_line_of_the_page_works(tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with World(tmp_path, ["a", "b"]) as world:
        for host in world.hosts.values():
            host.inside.do("cp", "-r", str(tiny_model), "/srv/model")
        said = ""
        for number, (name, command) in enumerate(steps(PAGE.read_text())):
            host = world[name]
            if command.startswith("scp "):
                copy(host, world["b"], command, tmp_path / f"parcel-{number}")
                continue
            log = tmp_path / "said"
            with log.open("w") as sink:  # what runs on in the background keeps it open
                process = host.inside.start(["sh", "-ec", command], sink=sink, environment=environment)
                code = process.wait(STEP_S)
            said += f"{name}# {command}\n{log.read_text()}"
            assert code == 0, said
    assert "engine e1 has left" in said

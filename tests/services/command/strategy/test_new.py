"""``microserve strategy new``: what it writes passes its own test, the check and mypy, as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from microserve.services.command.main import main
from tests.test_packaging import ROOT

AUTHOR = '''
"""Everything that the door has, by somebody who is strict about types."""

from __future__ import annotations

from microserve.services.router.authoring import (
    Annotated, CapacityError, Chunks, Engine, EngineFacts, Entrant, Generating, GrantHandle, Load,
    Mesh, MeshView, Meta, NoEngines, Outcome, PeerError, PlanMesh, QueueFull, Request, SamplingParams,
    Scorer, Sending, Split, Tokens, alone_s, cheapest_split, scorer, strategy,
)


def measure(mesh: Mesh, engine: Engine, request: Request) -> float:
    load: Load = mesh.load(engine)
    return float(load.uncached_tokens + load.sequences) + alone_s(mesh, request, engine)


def told(mesh: MeshView, request: Request, outcome: Outcome, *, most: int) -> None:
    if outcome.ttft_s is not None:
        mesh.state["ttft_s"] = min(outcome.ttft_s, float(most))


async def plan(mesh: PlanMesh, *, most: int) -> None:
    facts: list[EngineFacts] = [*mesh.engines()]
    async with mesh.request([1, 2, 3]) as (inner, request):
        grant: GrantHandle = await inner.pick(None, request).prep_recv(request)
        assert grant.end <= most + len(facts)


@strategy(plan=plan, on_end=told)
async def mine(mesh: Mesh, request: Request, *, most: Annotated[int, Meta(ge=1)] = 8) -> Chunks:
    reasons: dict[Scorer, float] = {scorer.load: 1.0, measure: 0.5, scorer.labelled("big"): 0.1}
    sampling: SamplingParams = request.sampling
    if sampling.max_tokens > 10_000:
        raise QueueFull("too much", retry_after_s=1.0)
    try:
        engine: Engine = mesh.pick("big", request, strict=True, scorers=reasons)
    except NoEngines:
        split: Split = cheapest_split(mesh, request)
        engine = split.decode
    try:
        grant = await engine.prep_recv(request, end=-1)
    except (CapacityError, PeerError):
        generation: Generating = engine.start_generate(request)
        async for tokens in generation:
            chunk: Tokens = tokens
            yield chunk
        return
    sending: Sending = mesh.pick(None, request, exclude=[engine]).remote_send(request, grant, end=-1)
    entrants: list[Entrant] = [lambda: engine.start_generate(request, begin=-1, after=sending)]
    yield await mesh.race(request, *entrants, after_s=0.5)
'''


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("author")
    done = CliRunner().invoke(main, ["strategy", "new", "nearest", "--dir", str(directory)])
    assert done.exit_code == 0, done.output
    return directory


def run(directory: Path, *words: str) -> str:
    """In the author's folder, which knows nothing of this checkout but what is installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".src"), "MYPYPATH": ""}
    done = subprocess.run(
        [sys.executable, *words], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_its_test_passes_as_it_stands(written: Path) -> None:
    told = run(written, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_nearest.py")
    assert "3 passed" in told


@pytest.mark.slow
def test_it_passes_the_check(written: Path) -> None:
    done = CliRunner().invoke(main, ["strategy", "check", str(written / "nearest.py")])
    assert (done.exit_code, done.stderr) == (0, "")
    assert "no mistake found" in done.stdout


@pytest.mark.slow
def test_types_are_complete_for_a_strict_author_outside_of_the_checkout(written: Path) -> None:
    (written / "strict.py").write_text(AUTHOR)
    files = ["nearest.py", "test_nearest.py", "strict.py"]
    flags = [
        "--strict",
        "--no-incremental",
        "--disallow-any-explicit",
        "--config-file=",
        "--follow-imports=silent",
    ]
    run(written, "-m", "mypy", *flags, *files)


def test_nothing_is_written_over_and_a_name_is_one(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("mine")
    for name in ("mine", "no-name", "class", "test_it"):
        assert CliRunner().invoke(main, ["strategy", "new", name, "--dir", str(tmp_path)]).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]

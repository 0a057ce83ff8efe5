"""``microserve strategy new``: a strategy to begin with, and its test, as files that work as they stand.

Owns what is in them. Needs no mesh. Exit code 0: written; 2: the name is none, or a file is there already.
"""

from __future__ import annotations

import keyword
from pathlib import Path

import click

from microserve.services.command.shared.flags import WrongFlag
from microserve.services.command.shared.terminal import echo

STRATEGY = '''"""A prompt goes where its prefix is cached, while that engine is not too busy.

    microserve strategy check NAME.py                            without a mesh: mistakes, with their lines
    pytest test_NAME.py                                          in a mesh in memory
    microserve strategy publish NAME.py --name auto --shadow     decides about live requests, serves none
    microserve strategy publish NAME.py --share 10%              serves a tenth of those that ask for NAME

What there is to call: docs/authoring.md; how strategies are written: docs/strategies.md.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy


@strategy
async def NAME(
    mesh: Mesh,
    request: Request,
    *,
    # A parameter has a type and a default: `--set most=16` changes it, on a living mesh, too.
    most: Annotated[int, Meta(ge=1)] = 32,
) -> Chunks:
    """Elsewhere when the engine with the longest prefix has ``most`` sequences."""
    # This runs in the router, once for each request; between two `await` nobody else is served. Engines come
    # and go, so they are picked anew each time. A label is a preference: mesh.pick("decode", request).
    engine = mesh.pick(None, request, prefix=True)
    sequences = mesh.load(engine).sequences
    if sequences >= most:
        mesh.note("its prefix is where too much runs", sequences=sequences)  # for `microserve explain`
        engine = mesh.pick(None, request)
    # What start_generate returns is yielded, and all that comes goes to the client. When an engine fails, the
    # router calls this again, with what has been answered so far as a part of request.tokens.
    yield engine.start_generate(request)
'''
TEST = '''"""What NAME decides, in a mesh in memory: engines, requests and faults as the test wants them."""

from __future__ import annotations

from microserve.testing import Engine, MeshInMemory, in_memory

ENGINES = Engine("a"), Engine("b")


@in_memory("NAME.py", *ENGINES)
async def test_a_prompt_goes_where_its_prefix_is(mesh: MeshInMemory) -> None:
    prompt = mesh.prompt(200)
    await mesh.warm("b", prompt)
    answer = await mesh.ask(prompt=[*prompt, *mesh.prompt(50)])
    assert answer.plan.generated_on == "b"
    assert answer.num_cached_tokens == 192  # whole blocks of 16 tokens


@in_memory("NAME.py", *ENGINES, parameters={"most": 2})
async def test_it_goes_elsewhere_when_that_engine_is_busy(mesh: MeshInMemory) -> None:
    prompt = mesh.prompt(200)
    await mesh.warm("b", prompt)
    await mesh.occupy("b", num_requests=2)
    answer = await mesh.ask(prompt=prompt)
    assert answer.plan.generated_on == "a"
    assert answer.plan.notes == [("its prefix is where too much runs", {"sequences": 2})]


@in_memory("NAME.py", *ENGINES)
async def test_an_answer_goes_on_when_its_engine_is_lost(mesh: MeshInMemory) -> None:
    prompt = mesh.prompt(200)
    await mesh.warm("b", prompt)
    mesh.kill("b")  # the routers do not know yet
    answer = await mesh.ask(prompt=prompt, max_tokens=20)
    assert answer.is_good
    assert answer.plan.generated_on == "a"
'''


@click.command()
@click.argument("name")
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="Where.  [default: here]",
)
def new(name: str, directory: Path) -> None:
    """Write NAME.py, a strategy to begin with, and test_NAME.py, its test."""
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("test_"):
        raise WrongFlag(f"{name!r} cannot be the name of a function")
    files = {directory / f"{name}.py": STRATEGY, directory / f"test_{name}.py": TEST}
    for path in files:
        if path.exists():
            raise WrongFlag(f"{path} is there already")
    for path, text in files.items():
        path.write_text(text.replace("NAME", name), encoding="utf-8")
        echo(f"wrote {path}")
    echo(f"next: microserve strategy check {directory / name}.py; pytest {directory / f'test_{name}.py'}")

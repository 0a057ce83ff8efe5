"""Every mistake of docs/authoring.md as a strategy that makes it; the line to be named ends with HERE."""

from __future__ import annotations

from typing import NamedTuple

HERE = "# here"
HEAD = """
import asyncio, collections, contextlib, random, sys, time
from microserve.services.router.authoring import Tokens, strategy

kept = []

@strategy
async def mine(mesh, request, *, ratio: float = 0.1):
"""
SERVE = "    yield mesh.pick(None, request).start_generate(request)\n"
TWO = (
    "    decode = mesh.pick('decode', request)\n"
    "    prefill = mesh.pick('prefill', request, exclude=[decode])\n"
    "    split = request.num_tokens // 2\n"
)
STREAM = "    async for tokens in mesh.pick(None, request).start_generate(request):\n"


class Mistaken(NamedTuple):
    mistake: str
    source: str
    says: str
    """A part of the sentence."""
    is_loadable: bool = True

    @property
    def line(self) -> int:
        lines = self.source.splitlines()
        return next((number for number, line in enumerate(lines, start=1) if line.endswith(HERE)), 0)


def of(mistake: str, body: str, says: str) -> Mistaken:
    return Mistaken(mistake, HEAD + body, says)


SAMPLES: dict[str, Mistaken] = {
    "a file with an error": Mistaken(
        "unloadable", HEAD + SERVE + f"def broken(:  {HERE}\n", "SyntaxError", is_loadable=False
    ),
    "a module that is not there": Mistaken(
        "unloadable", f"import no_such_module  {HERE}\n" + HEAD + SERVE, "no_such_module", is_loadable=False
    ),
    "no generator": Mistaken(
        "shape",
        "from microserve.services.router.authoring import strategy\n"
        f"@strategy  {HERE}\nasync def mine(mesh, request):\n    return mesh.pick(None, request)\n",
        "must be an 'async def' with 'yield'",
        is_loadable=False,
    ),
    "a parameter without a type": Mistaken(
        "shape",
        "from microserve.services.router.authoring import strategy\n"
        f"@strategy  {HERE}\nasync def mine(mesh, request, *, ratio=0.1):\n" + SERVE,
        "needs a type and a default",
        is_loadable=False,
    ),
    "an await that is forgotten": of(
        "forgotten-await",
        TWO + f"    grant = decode.prep_recv(request, end=split)  {HERE}\n"
        "    prefill.remote_send(request, grant, end=split)\n"
        "    yield decode.start_generate(request, begin=split, grant=grant)\n",
        "write `await decode.prep_recv(...)`",
    ),
    "an await that is forgotten, where only running shows it": of(
        "forgotten-await",
        TWO + "    ask = decode.prep_recv\n    grant = ask(request, end=split)\n"
        f"    prefill.remote_send(request, grant, end=split)  {HERE}\n"
        "    yield decode.start_generate(request, begin=split, grant=grant)\n",
        "`await` what `prep_recv`",
    ),
    "texts instead of tokens": of("wrong-yield", f"    yield 'tokens'  {HERE}\n" + SERVE, "str, not Tokens"),
    "tokens that are changed": of(
        "tokens",
        STREAM + "        changed = [token + 1 for token in tokens.token_ids]\n"
        f"        yield Tokens(tokens.offset, changed, [], tokens.finished)  {HERE}\n",
        "that no engine gave",
    ),
    "tokens that are left out": of(
        "tokens", STREAM + f"        if tokens.offset != 1: yield tokens  {HERE}\n", "`yield` every chunk"
    ),
    "a stream that is left": of(
        "tokens",
        STREAM + "        yield tokens\n        if tokens.offset > 1: break\n",
        "ended before its stream did",
    ),
    "two generations": of(
        "two-generations",
        "    mesh.pick(None, request).start_generate(request)\n"
        f"    yield mesh.pick(None, request).start_generate(request)  {HERE}\n",
        "`yield await mesh.race(request, first, second)`",
    ),
    "a gap between intervals": of(
        "gap",
        TWO + "    grant = await decode.prep_recv(request, end=split)\n"
        "    prefill.remote_send(request, grant, end=split // 2)\n"
        f"    yield decode.start_generate(request, begin=split, grant=grant)  {HERE}\n",
        "no send covers",
    ),
    "an interval that only long prompts have": of(
        "gap",
        "    begin = 10 if request.num_tokens > 1000 else 0\n"
        f"    yield mesh.pick(None, request).start_generate(request, begin=begin)  {HERE}\n",
        "with prompts of up to 8192 tokens",
    ),
    "a grant that is used twice": of(
        "grant-twice",
        TWO + "    grant = await decode.prep_recv(request, end=split)\n"
        "    await decode.release(request, grant)\n"
        f"    await decode.release(request, grant)  {HERE}\n" + SERVE,
        "a grant is used once",
    ),
    "a grant that is forgotten": of(
        "grant-forgotten",
        f"    await mesh.pick(None, request).prep_recv(request)  {HERE}\n" + SERVE,
        "await engine.release(request, grant)",
    ),
    "an engine that is kept": of(
        "kept-handle",
        "    engine = mesh.state.setdefault('engine', mesh.pick(None, request))\n"
        f"    yield engine.start_generate(request)  {HERE}\n",
        "keep `engine.id`",
    ),
    "a label that nobody has": of(
        "nobodys-label",
        f"    yield mesh.pick('prefil', request).start_generate(request)  {HERE}\n",
        "is 'prefill' meant?",
    ),
    "an attribute that not all send": of(
        "absent-attribute",
        f"    mesh.note('who', n=len(request.attributes['user']))  {HERE}\n" + SERVE,
        "request.attributes.get",
    ),
    "a number of engines": of(
        "absent-engine",
        f"    [first, second, third] = mesh.engines()  {HERE}\n    yield first.start_generate(request)\n",
        "engines come and go",
    ),
    "a clock": of(
        "other-clock", f"    mesh.note('now', now=time.monotonic())  {HERE}\n" + SERVE, "use `mesh.now`"
    ),
    "lots": of(
        "other-clock",
        f"    yield random.choice(mesh.engines()).start_generate(request)  {HERE}\n",
        "use `mesh.rng`",
    ),
    "a sleep that blocks": of(
        "blocking-call", f"    time.sleep(0.05)  {HERE}\n" + SERVE, "await asyncio.sleep"
    ),
    "a file that is read by a library": of(
        "blocking-call",
        "    import pathlib\n"
        f"    mesh.note('host', name=pathlib.Path('/etc/hostname').read_text())  {HERE}\n" + SERVE,
        "stops the whole router",
    ),
    "a loop without an end": of(
        "endless-loop", f"    while True: pass  {HERE}\n" + SERVE, "never ends and never waits"
    ),
    "a loop that running shows": of(
        "endless-loop",
        f"    count = 1\n    while count: count += 1  {HERE}\n" + SERVE,
        "held the router for 0.5 s",
    ),
    "a wait for nothing": of(
        "waits-for-nothing", f"    await asyncio.Event().wait()  {HERE}\n" + SERVE, "waited for no engine"
    ),
    "a loop that spins": of(
        "waits-for-nothing",
        f"    while not mesh.state.get('go'): await asyncio.sleep(0)  {HERE}\n" + SERVE,
        "spins",
    ),
    "a memory without a bound": of(
        "memory",
        f"    mesh.state.setdefault('seen', []).append(request.request_id)  {HERE}\n" + SERVE,
        "grows",
    ),
    "a module's memory without a bound": of(
        "memory", f"    kept.append(request.num_tokens)  {HERE}\n" + SERVE, "grows with every request"
    ),
    "much memory at a time": of("memory", f"    block = bytearray(1 << 43)  {HERE}\n" + SERVE, "MemoryError"),
    "a cancellation that is caught": of(
        "swallowed-cancellation",
        "    try:\n        async for tokens in mesh.pick(None, request).start_generate(request):\n"
        f"            yield tokens\n    except BaseException:  {HERE}\n        pass\n",
        "catch `Exception`",
    ),
    "a cancellation that is suppressed": of(
        "swallowed-cancellation",
        f"    with contextlib.suppress(asyncio.CancelledError):  {HERE}\n"
        "        async for tokens in mesh.pick(None, request).start_generate(request):\n"
        "            yield tokens\n",
        "the client has left",
    ),
    "a name that is private": of(
        "not-the-door",
        f"    mesh.note('address', at=mesh.pick(None, request)._connection.info.address)  {HERE}\n" + SERVE,
        "private name",
    ),
    "a module of the router's": Mistaken(
        "not-the-door",
        f"from microserve.services.router.engines.load import LoadBook  {HERE}\n" + HEAD + SERVE,
        "import from `microserve.services.router.authoring`",
    ),
    "an exception": of("raises", f"    raise ValueError('boo')  {HERE}\n" + SERVE, "ValueError: boo"),
    "an exception while an engine is lost": of(
        "raises",
        "    if len(mesh.engines()) < mesh.state.setdefault('all', len(mesh.engines())):\n"
        f"        raise RuntimeError('one is gone')  {HERE}\n" + SERVE,
        "while an engine was lost",
    ),
    "an end of the router": of("raises", f"    sys.exit(3)  {HERE}\n" + SERVE, "would end the router"),
}

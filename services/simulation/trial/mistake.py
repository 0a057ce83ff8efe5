"""The mistakes that authors make: their names, what each is, and one that was found, in a sentence.

The table of docs/authoring.md is made of :data:`MISTAKES` (tooling/reference.py). Names are an interface:
``microserve strategy check --json`` prints them.
"""

from __future__ import annotations

import msgspec

MISTAKES = {
    "unloadable": ("the source cannot be run", "the error of Python, at its line"),
    "shape": (
        "no strategy, no async generator, or a parameter without a type or a default",
        "`async def name(mesh, request, *, parameter: type = default)` with `yield`",
    ),
    "forgotten-await": ("a coroutine that nobody awaits", "`await` before `prep_recv`, `commit`, `hold` ..."),
    "wrong-yield": (
        "what is yielded is no chunk of this request's generation",
        "`yield` what `start_generate` returns, or its chunks",
    ),
    "tokens": (
        "tokens changed, left out, made up, or a stream left before its end",
        "every chunk of the generation, as it came",
    ),
    "two-generations": (
        "a request that generates twice at a time",
        "`await mesh.race(...)`, or `engine.abort(request)` first",
    ),
    "gap": (
        "intervals with a gap, an overlap, or outside of the prompt or the grant",
        "half-open intervals that meet; `begin` of the generation is the grant's end",
    ),
    "grant-twice": (
        "a grant used twice, or at another engine than its own",
        "a grant of one's own for each use: `await engine.prep_recv(...)`",
    ),
    "grant-forgotten": (
        "a grant that is neither generated from, committed nor released",
        "`grant=` for `start_generate`, or `await engine.release(request, grant)`",
    ),
    "kept-handle": (
        "an engine, a grant or a mesh of another request",
        "keep `engine.id`; take the engine from `mesh.engines()` or `mesh.pick()` each time",
    ),
    "nobodys-label": (
        "a label that no engine has",
        "one of those that engines have; `strict` raises `NoEngines` where nobody has it",
    ),
    "absent-attribute": (
        "an attribute that a client need not send",
        '`request.attributes.get("user")`, and a way for who has none',
    ),
    "absent-engine": (
        "an engine that need not be there: a fixed number, place or id",
        "`mesh.pick(...)`, or a loop over `mesh.engines()`, which may be one",
    ),
    "other-clock": (
        "a clock or lots that a simulation cannot repeat",
        "`mesh.now` and `mesh.rng`",
    ),
    "blocking-call": (
        "a call that stops the whole router",
        "`await` a library of asyncio, or `await asyncio.to_thread(...)` in the plan",
    ),
    "endless-loop": (
        "code that holds the router without waiting",
        "an `await` in the loop, an end of it, or less to do at a time",
    ),
    "waits-for-nothing": (
        "a strategy that waits for no engine, or spins",
        "`asyncio.timeout`, `mesh.hold(...)`, or a plan for what takes long",
    ),
    "memory": (
        "memory that grows with every request, or much at a time",
        "forget what is old: a bound, `deque(maxlen=...)`",
    ),
    "swallowed-cancellation": (
        "a cancellation that is caught and not raised again",
        "`except Exception`; or `raise` at the handler's end",
    ),
    "not-the-door": (
        "names that are the router's own",
        "what `microserve.services.router.authoring` has, and public names",
    ),
    "raises": (
        "any other exception, `sys.exit` among them",
        "what may fail is caught where it fails",
    ),
}
"""By name: what it is, and how it is mended."""


class Found(msgspec.Struct, frozen=True):
    """One mistake at one place."""

    mistake: str
    """A name of :data:`MISTAKES`."""
    file: str
    """Of the source's files; empty: of the whole."""
    line: int
    """0: of the whole file."""
    text: str
    """One sentence: what is wrong and what mends it."""

    def told(self, path: str) -> str:
        """A line for people; ``path`` is where the source lies."""
        where = path if self.file in ("", "__init__.py") and not path.endswith("/") else f"{path}{self.file}"
        return f"{where}:{self.line}: {self.text}" if self.line else f"{where}: {self.text}"

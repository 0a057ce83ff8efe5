"""Sources of strategies that are good, and of some that are not: why, and what is said of it."""

from __future__ import annotations

HEAD = """
import asyncio, os, sys, time
from microserve.services.router.authoring import strategy

@strategy
async def mine(mesh, request, *, ratio: float = 0.1):
"""
SERVE = "    async for tokens in mesh.pick(None, request).start_generate(request):\n        yield tokens\n"
GOOD = HEAD + SERVE

HOSTILE = {
    "exception": (HEAD + "    raise ValueError('boo')\n" + SERVE, "ValueError: boo"),
    "exception after tokens": (GOOD + "        raise ValueError('boo')\n", "ValueError: boo"),
    "never yields": (HEAD + "    await asyncio.sleep(1e6)\n" + SERVE, "waited for no engine"),
    "ends early": (HEAD + "    if False: yield\n", "ended before its stream did"),
    "wrong interval": (HEAD + SERVE.replace("(request):", "(request, begin=10**6):"), "InvalidInterval"),
    "forgotten grant": (
        HEAD + "    await mesh.pick(None, request).prep_recv(request)\n" + SERVE,
        "forgotten",
    ),
    "wrong type": (HEAD + "    yield 'tokens'\n", "not Tokens"),
    "spins": (HEAD + "    while True: await asyncio.sleep(0)\n" + SERVE, "spins"),
    "exits": (HEAD + "    sys.exit(3)\n" + SERVE, "wanted to end the router"),
}

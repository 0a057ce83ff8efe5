"""A gateway whose engine says given tokens, as a process of its own: what a user asks it to say, it says.

    python tests/support/clients/talker.py DIR FILE     prints its address; ends with its input

Behind a real gateway stands a router that answers by one rule. A user's last message ``... say: TEXT`` is
answered by TEXT, with the model's markers as tokens; the result of a tool by ``The tool said RESULT.``. So a
client's loop of calls and results can be tried, and what it makes of thoughts, with no need of sense.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import uvloop
from tokenizers import Tokenizer

from tests.support.gateway.gateway_world import Served, gateway_world

NAME = "talker"
CONTEXT = 16_384
SAY = "say: "
TURN, END = "<|im_start|>", "<|im_end|>"


def answer_to(prompt: str) -> str:
    """``prompt``: rendered; its last turn is the assistant's, which has begun."""
    role, _, content = prompt.split(TURN)[-2].rpartition(END)[0].partition("\n")
    if role == "tool":
        return f"The tool said {content}."
    return content.partition(SAY)[2] or "Nothing was asked of me."


def answering(tokenizer: Tokenizer) -> Callable[[Served], None]:
    """One token a message, as an engine's steps bring them; cut where the client wants no more."""

    def answer(served: Served) -> None:
        text = answer_to(tokenizer.decode(served.tokens, skip_special_tokens=False))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        room = served.message.sampling.max_tokens
        for token_id in ids[:room]:
            served.send([token_id])
        served.end("stop" if len(ids) <= room else "length")

    return answer


async def serve(directory: Path, kept: Path, told: TextIO) -> None:
    """``kept``: file of responses."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    settings = (f"model.name={NAME}", "bus.insecure=true", f"gateway.responses_path={kept}")
    async with gateway_world(
        directory, *settings, model=NAME, max_model_len=CONTEXT, vocab_size=tokenizer.get_vocab_size()
    ) as world:
        world.router.answer = answering(tokenizer)
        print(world.address, file=told, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextmanager
def talker(directory: Path, log: Path) -> Iterator[str]:
    """Its base address."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", __name__, str(directory), str(log.with_suffix(".sqlite"))]
    with (
        log.open("w") as sink,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, env=environment, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, log.read_text()
        yield address
        process.stdin.close()


if __name__ == "__main__":
    address = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is its log
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]), Path(sys.argv[2]), address))

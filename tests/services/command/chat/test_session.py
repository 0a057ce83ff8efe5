"""A chat at a terminal with a served gateway: typed, shown, stopped, and nothing obeyed that a model says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from microserve.protocol.messages import router as wire
from tests.services.command.shared.test_terminal import HOSTILE
from tests.support.command.scripted_server import Asked, say_all, scripted_server
from tests.support.command.terminal import CONTROL_C, CONTROL_D, Terminal, microserve_at_terminal
from tests.support.gateway.gateway_world import (
    GatewayWorld,
    Served,
    gateway_world,
    make_model,
    make_tokenizer,
    run,
)
from tests.support.gateway.talking_model import TOOLS, call, make_talking_model, talking_tokenizer

TOKENIZER = make_tokenizer()
TIMEOUT_S = 120.0

pytestmark = pytest.mark.slow


def say(served: Served, text: str) -> None:
    served.send(TOKENIZER.encode(text).ids)


def prompt_of(served: Served) -> str:
    return str(TOKENIZER.decode(served.tokens, skip_special_tokens=False))


@asynccontextmanager
async def chat(tmp_path: Path, *words: str) -> AsyncIterator[tuple[GatewayWorld, Terminal]]:
    async with (
        gateway_world(make_model(tmp_path / "model"), vocab_size=TOKENIZER.get_vocab_size()) as world,
        microserve_at_terminal("chat", "--url", world.address, *words, home=tmp_path) as terminal,
    ):
        await terminal.expect("tiny at http://127.0.0.1:")
        await terminal.expect("> ")
        yield world, terminal


async def answered(world: GatewayWorld, terminal: Terminal, question: str, answer: str) -> Served:
    terminal.type(f"{question}\r")
    served = await world.router.request()
    say(served, answer)
    served.end("stop")
    await terminal.expect(answer.splitlines()[-1])
    await terminal.expect("> ")
    return served


def test_a_conversation(tmp_path: Path) -> None:
    async def main() -> None:
        async with chat(tmp_path, "--system", "be brief") as (world, terminal):
            terminal.type("hello\r")
            served = await world.router.request()
            assert "system\nbe brief<|im_end|>" in prompt_of(served)
            by = wire.Served("auto", 3, ["e0", "e1"])
            served.send(TOKENIZER.encode("good").ids, served=by)
            await terminal.expect("good")  # as it comes: the answer has not ended
            say(served, " day")
            served.end("stop")
            await terminal.expect(" day")
            await terminal.expect("TTFT ")
            await terminal.expect("; auto 3 on e0,e1")
            await terminal.expect("> ")
            served = await answered(world, terminal, "and you?", "fine")
            assert "user\nhello<|im_end|>\n<|im_start|>assistant\ngood day<|im_end|>" in prompt_of(served)
            terminal.type("/undo\r")
            await terminal.expect("(taken back: and you?)")
            terminal.type("/retry\r")
            served = await world.router.request()
            assert prompt_of(served).count("hello") == 1 and "good day" not in prompt_of(served)
            say(served, "again")
            served.end("stop")
            await terminal.expect("again")
            terminal.type("/tokens\r")
            await terminal.expect(" of 512 that fit")
            terminal.type(f"/save {tmp_path}/c.json\r")
            await terminal.expect("(2 messages in ")
            terminal.type("/clear\r")
            await terminal.expect("(forgotten)")
            terminal.type(f"/load {tmp_path}/c.json\r")
            await terminal.expect("(2 messages)")
            terminal.type("/quit\r")
            assert await terminal.end() == 0
        saved = json.loads((tmp_path / "c.json").read_text())
        assert [each["content"] for each in saved["messages"]] == ["hello", "again"]
        assert saved["wishes"]["system"] == "be brief"
        history = tmp_path / "state/microserve/chat_history"
        assert json.loads(history.read_text().splitlines()[0]) == "hello"
        assert history.stat().st_mode & 0o777 == 0o600

    run(main(), timeout_s=TIMEOUT_S)


def test_control_c_stops_the_answer_and_not_the_chat(tmp_path: Path) -> None:
    async def main() -> None:
        async with chat(tmp_path) as (world, terminal):
            terminal.type("count\r")
            served = await world.router.request()
            say(served, "one two")
            await terminal.expect("one two")
            terminal.type(CONTROL_C)
            await served.cancelled.wait()
            await terminal.expect("(stopped)")
            await terminal.expect("> ")
            served = await answered(world, terminal, "go on", "three")
            assert "assistant\none two<|im_end|>" in prompt_of(served), "what came stays"
            terminal.type("half a li")
            await terminal.expect("half a li")
            await terminal.interrupt("> ")
            served = await answered(world, terminal, "whole", "four")
            assert "half" not in prompt_of(served)
            terminal.type(CONTROL_D)
            assert await terminal.end() == 0

    run(main(), timeout_s=TIMEOUT_S)


def test_texts_of_several_lines(tmp_path: Path) -> None:
    async def main() -> None:
        async with chat(tmp_path) as (world, terminal):
            served = await answered(world, terminal, "one\\\rtwo", "yes")
            assert "user\none\ntwo<|im_end|>" in prompt_of(served)
            served = await answered(world, terminal, '"""a\rb\r"""', "yes")
            assert "user\na\nb<|im_end|>" in prompt_of(served)
            served = await answered(world, terminal, "\x1b[200~pasted 1\rpasted 2\x1b[201~", "yes")
            assert "user\npasted 1\npasted 2<|im_end|>" in prompt_of(served)

    run(main(), timeout_s=TIMEOUT_S)


def test_a_model_commands_no_terminal(tmp_path: Path) -> None:
    async def main() -> None:
        async with chat(tmp_path) as (world, terminal):
            terminal.type("x\r")
            served = await world.router.request()
            say(served, f"a {HOSTILE} b")
            served.end("stop")
            await terminal.expect("a \\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e\\u2066\\x7f\\x00\\u200b b")
            assert b"\x1b]0;" not in terminal.shown and "\u202e".encode() not in terminal.shown

    run(main(), timeout_s=TIMEOUT_S)


def test_orders(tmp_path: Path) -> None:
    async def main() -> None:
        async with chat(tmp_path) as (world, terminal):
            for typed, told in (
                ("/help", "/temperature [NUMBER|-]"),
                ("/modle", "did you mean /model?"),
                ("/model", "* tiny"),
                ("/model other", "no model 'other' (there are: tiny)"),
                ("/temperature 3", "a number from 0 to 2"),
                ("/temperature 0.5", "temperature: 0.5"),
                ("/max_tokens 9", "max_tokens: 9"),
                ("/strategy two words", "'two words' is not the name of a strategy"),
                ("/strategy nope", "strategy: nope"),
                ("/undo", "(nothing to take back)"),
                ("/retry", "(nothing to ask again)"),
                ("/load absent", "absent: No such file"),
                ("/save", "/save FILE"),
                ("/tokens", "last: prompt 0 + answer 0"),
            ):
                terminal.type(f"{typed}\r")
                await terminal.expect(told)
                await terminal.expect("> ")
            terminal.type("hello\r")
            served = await world.router.request()
            assert (served.message.strategy, served.message.sampling.temperature) == ("nope", 0.5)
            assert served.message.sampling.max_tokens == 9
            served.end("stop")
            await terminal.expect("> ")
            terminal.type("/strategy -\r")
            await terminal.expect("strategy: (not set)")
            served = await answered(world, terminal, "//path", "yes")
            assert "user\n/path<|im_end|>" in prompt_of(served)

    run(main(), timeout_s=TIMEOUT_S)


def test_a_stream_that_breaks_says_what_came(tmp_path: Path) -> None:
    async def main() -> None:
        number = 0

        async def answer(asked: Asked) -> None:
            nonlocal number
            number += 1
            if number == 1:
                await asked.begin()
                await asked.say("half of")
                asked.cut()
            elif number == 2:
                await asked.reply(503, {"error": {"message": "no engine is there"}})
            else:
                await say_all(asked, "whole")

        async with (
            scripted_server(answer) as server,
            microserve_at_terminal("chat", "--url", server.endpoint.url, home=tmp_path) as terminal,
        ):
            await terminal.expect("> ")
            terminal.type("first\r")
            await terminal.expect("half of")
            await terminal.expect(
                "Error: the answer is cut off after 7 characters: the connection was closed"
            )
            terminal.type("second\r")
            await terminal.expect("Error: no engine is there")
            terminal.type("/retry\r")
            await terminal.expect("> second")
            await terminal.expect("whole")
            said = [(each["role"], each["content"]) for each in server.asked[-1].body["messages"]]
            assert said == [("user", "first"), ("assistant", "half of"), ("user", "second")]

    run(main(), timeout_s=TIMEOUT_S)


def test_thoughts_are_dim_and_tools_are_answered_by_hand(tmp_path: Path) -> None:
    tokenizer = talking_tokenizer()
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))

    async def main() -> None:
        model = make_talking_model(tmp_path / "model")
        words = ("--tools", str(tmp_path / "tools.json"))
        async with (
            gateway_world(model, vocab_size=tokenizer.get_vocab_size()) as world,
            microserve_at_terminal("chat", "--url", world.address, *words, home=tmp_path) as terminal,
        ):
            await terminal.expect("> ")
            terminal.type("weather?\r")
            served = await world.router.request()
            text = f"<think>\nlook outside\n</think>\n\n{call('weather', city='Bern')}"
            served.send(tokenizer.encode(text).ids)
            served.end("stop")
            await terminal.expect("\x1b[2ml")
            await terminal.expect("weather({")
            await terminal.expect('"city": "Bern"')
            await terminal.expect("weather= ")
            terminal.type("sunny\r")
            served = await world.router.request()
            assert "sunny" in tokenizer.decode(served.tokens)
            served.send(tokenizer.encode("It is sunny.").ids)
            served.end("stop")
            await terminal.expect("It is sunny.")
            await terminal.expect("> ")
            terminal.type("again?\r")
            served = await world.router.request()
            served.send(tokenizer.encode(call("now")).ids)
            served.end("stop")
            await terminal.expect("now= ")
            await terminal.interrupt("the question is taken back")

    run(main(), timeout_s=TIMEOUT_S)


def test_nothing_answers(tmp_path: Path) -> None:
    async def main() -> None:
        async with microserve_at_terminal("chat", "--url", "http://127.0.0.1:9", home=tmp_path) as terminal:
            await terminal.expect("Error: cannot connect to http://127.0.0.1:9: Connection refused")
            assert await terminal.end() == 1

    run(main(), timeout_s=TIMEOUT_S)


def test_two_at_once_keep_one_history(tmp_path: Path) -> None:
    async def main() -> None:
        async with chat(tmp_path) as (world, terminal):
            await answered(world, terminal, "first", "yes")
            other = microserve_at_terminal("chat", "--url", world.address, home=tmp_path)
            async with other as second:
                await second.expect("> ")
                await answered(world, second, "second", "yes")
                second.type("\x1b[A\x1b[A")  # up, up
                await second.expect("first")
            await asyncio.sleep(0)
        lines = (tmp_path / "state/microserve/chat_history").read_text().splitlines()
        assert [json.loads(line) for line in lines] == ["first", "second"]

    run(main(), timeout_s=TIMEOUT_S)

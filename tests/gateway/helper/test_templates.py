"""A template that takes too much costs its own conversation a refusal, and nobody else anything."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from microserve.gateway.helper.helper import Helpers
from microserve.gateway.helper.jobs import Setup
from microserve.gateway.text.prompt.chat_template import ChatTemplate
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol import log
from microserve.protocol.errors import CapacityError, Draining, InvalidRequest, MeshError
from tests.support.gateway.gateway_world import make_model, run

USER = [{"role": "user", "content": "hi"}]
HUNGRY = {
    "format by percent": "{{ '%2000000000d' % 1 }}",
    "format by method": "{{ '{:2000000000d}'.format(1) }}",
    "product": "{{ 'a' * 10**9 * 10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of a variable": "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "width": "{{ messages[0].content | center(4000000000) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "doubling": "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "long output": "{% for a in range(99999) %}{% for b in range(999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
}


@asynccontextmanager
async def helpers_of(
    directory: Path, template: str | None = None, *, template_cpu_s: float = 0.5
) -> AsyncIterator[Helpers]:
    """``template`` goes for a conversation that begins with the user's "hi"; others have the usual one."""
    make_model(directory)
    if template is not None:
        plain = "{{ messages[0].content }}"
        source = f"{{% if messages[0].content == 'hi' %}}{template}{{% else %}}{plain}{{% endif %}}"
        (directory / "chat_template.jinja").write_text(source)
    helpers = Helpers(Setup(str(directory), "tiny", template_cpu_s, 1 << 20, 64))
    try:
        yield helpers
    finally:
        await helpers.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", HUNGRY)
def test_a_hungry_template_is_refused_and_the_next_conversation_served(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        async with helpers_of(tmp_path / "m", HUNGRY[name]) as helpers:
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    await asyncio.sleep(0.001)
                    turns += 1

            turning = asyncio.create_task(turn())
            with pytest.raises(InvalidRequest) as caught:
                await helpers.render(USER)
            assert caught.value.field in ("messages", None)
            assert turns > 20  # the loop went on meanwhile
            turning.cancel()
            if name not in ("format by percent", "product", "power"):  # those are evaluated when compiled
                assert await helpers.render([{"role": "user", "content": "x"}]) == "x"

    run(main())


@pytest.mark.parametrize("template", HUNGRY.values())
def test_a_template_is_not_run_where_it_is_only_read(template: str) -> None:
    ChatTemplate(template, {})


def seen_of(pid: int) -> tuple[bytes, str, str]:
    """A process's environment, its limits, and how soon the kernel ends it when memory is short."""
    process = Path(f"/proc/{pid}")
    limits, score = (process / "limits").read_text(), (process / "oom_score_adj").read_text()
    return (process / "environ").read_bytes(), limits, score.strip()


def test_what_a_template_may_see_and_do(tmp_path: Path) -> None:
    """Should one leave its sandbox: no key of the gateway's is there, and no file can be written."""
    os.environ["MICROSERVE_GATEWAY__API_KEYS"] = '["secret"]'

    async def main() -> None:
        async with helpers_of(tmp_path / "m") as helpers:
            assert await helpers.render(USER) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            [pid] = helpers.pids
            environment, limits, score = seen_of(pid)
            assert b"secret" not in environment and b"MICROSERVE" not in environment
            assert re.search(r"Max file size +0 +0", limits)
            assert re.search(rf"Max data size +{256 << 20} +{256 << 20}", limits)
            assert score == "1000"
            # A stop of the gateway's whole group is no end of the helper's: its end is the gateway's.
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
            await helpers.render(USER)
            assert helpers.pids == [pid]

    try:
        run(main())
    finally:
        del os.environ["MICROSERVE_GATEWAY__API_KEYS"]


def test_a_helper_that_is_killed_is_replaced_and_its_job_may_be_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with helpers_of(tmp_path / "m") as helpers:
            await helpers.render(USER)
            [pid] = helpers.pids
            os.kill(pid, signal.SIGSTOP)
            rendering = asyncio.create_task(helpers.render(USER))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            with capture_logs() as events, pytest.raises(CapacityError):
                await rendering
            assert [(e["reason"], e["pid"]) for e in events if e["event"] == log.HELPER_ENDED] == [
                ("SIGKILL", pid)
            ]
            assert await helpers.render(USER)
            assert helpers.pids != [pid]

    run(main())


def test_who_waits_for_a_helper_when_it_ends_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with helpers_of(tmp_path / "m", HUNGRY["loops"], template_cpu_s=60.0) as helpers:
            waiting = [asyncio.create_task(helpers.render(USER)) for _ in range(3)]
            while not helpers.pids:
                await asyncio.sleep(0.001)
            helpers.end(Draining("bye"))
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(each) for each in outcomes] == [Draining] * 3
            with pytest.raises(Draining):
                await helpers.render(USER)

    run(main())


def test_a_cancelled_job_leaves_no_answer_for_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with helpers_of(tmp_path / "m") as helpers:
            await helpers.render(USER)
            [pid] = helpers.pids
            os.kill(pid, signal.SIGSTOP)
            cancelled = asyncio.create_task(helpers.render([{"role": "user", "content": "first"}]))
            await asyncio.sleep(0.01)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert "second" in await helpers.render([{"role": "user", "content": "second"}])

    run(main())


def test_the_helpers_text_is_what_the_template_makes(tmp_path: Path, model: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "é 😀 <b>"},
        {"role": "assistant", "content": ""},
    ]
    here = run(ModelTokenizer.load(model).encode_chat(messages, max_tokens=1000))

    async def main() -> Sequence[int]:
        async with helpers_of(tmp_path / "m") as helpers:
            tokenizer = ModelTokenizer.load(tmp_path / "m", renderer=helpers.render)
            return await tokenizer.encode_chat(messages, max_tokens=1000)

    assert run(main()) == here


def test_no_process_is_an_answer_that_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: Any, **options: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)

    async def main() -> None:
        async with helpers_of(tmp_path / "m") as helpers:
            with pytest.raises(MeshError) as caught:
                await helpers.render(USER)
            assert isinstance(caught.value, CapacityError)

    run(main())


@pytest.mark.slow
def test_a_long_conversation_does_not_hold_up_a_short_one(tmp_path: Path) -> None:
    """Its template loops over all pairs of messages: it waits with what is long as well."""
    pairs = "{% for a in messages %}{% for b in messages %}{{ a.role[0] }}{% endfor %}{% endfor %}"

    async def main() -> None:
        async with helpers_of(tmp_path / "m", pairs, template_cpu_s=20.0) as helpers:
            await helpers.render([{"role": "user", "content": "x"}])  # both kinds have a process by now
            await helpers.render([{"role": "user", "content": "x"}] * 65)
            long = asyncio.create_task(helpers.render([{"role": "user", "content": "hi"}] * 1500))
            await asyncio.sleep(0)
            assert await helpers.render([{"role": "user", "content": "x"}]) == "x"
            assert not long.done()
            assert await long == "u" * 1500 * 1500

    run(main())

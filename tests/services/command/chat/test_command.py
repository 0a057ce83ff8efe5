"""One question, where nobody sits at a terminal: the plain answer, one sentence of what is wrong, an exit
code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.services.command.main import main
from tests.services.command.shared.test_terminal import HOSTILE, is_harmless
from tests.support.command.scripted_server import Answer, Asked, say_all, served_aside


def chat(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["chat", *words], input=stdin)


def ask(answer: Answer, *words: str, stdin: str | None = None) -> tuple[Result, list[Asked]]:
    with served_aside(answer) as server:
        result = chat("--url", server.endpoint.url, *words, stdin=stdin)
        return result, server.asked


async def hello(asked: Asked) -> None:
    await say_all(asked, "good ", "day")


@pytest.mark.parametrize("words", [["how", "are you"], ["-"], []])
def test_the_plain_answer(words: list[str]) -> None:
    done, asked = ask(hello, *words, "--system", "brief", "--temperature", "0", stdin="how are you\n")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "good day\n", "")
    body = asked[-1].body
    assert body["messages"] == [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "how are you"},
    ]
    assert (body["model"], body["temperature"]) == ("scripted", 0)
    assert "x-microserve-strategy" not in asked[-1].headers


def test_nothing_that_a_server_says_is_obeyed() -> None:
    async def answer(asked: Asked) -> None:
        await say_all(asked, f"a {HOSTILE}", "\r\n\x1b[2J", "\U0001f468\u200d\U0001f469")

    async def refuse(asked: Asked) -> None:
        await asked.reply(400, {"error": {"message": f"no {HOSTILE}"}})

    done, _ = ask(answer, "q")
    assert "owned" in done.stdout and "\U0001f468\u200d\U0001f469" in done.stdout
    assert is_harmless(done.stdout.replace("\u200d", ""))
    done, _ = ask(answer, "q", "--markdown")
    assert is_harmless(done.stdout.replace("\u200d", ""))
    done, _ = ask(refuse, "q")
    assert done.exit_code == 1 and done.stderr.startswith("Error: no ")
    assert is_harmless(done.output)


def test_thoughts_are_not_the_answer_and_calls_are(tmp_path: Path) -> None:
    async def answer(asked: Asked) -> None:
        await asked.begin()
        await asked.say(reasoning="hm", reasoning_content="hm")
        function = {"name": "weather", "arguments": '{"city": "Bern"}'}
        await asked.say(tool_calls=[{"index": 0, "id": "c", "type": "function", "function": function}])
        await asked.say(finish="tool_calls")
        await asked.usage(3, 4)
        await asked.done()

    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"name": "weather"}]))
    done, asked = ask(answer, "q", "--tools", str(file), "--strategy", "auto")
    assert (done.exit_code, done.stdout) == (0, 'weather({\n  "city": "Bern"\n})\n')
    assert asked[-1].body["tools"] == [{"type": "function", "function": {"name": "weather"}}]
    assert asked[-1].headers["x-microserve-strategy"] == "auto"


def test_an_answer_that_is_cut_is_shown_and_is_no_success() -> None:
    async def answer(asked: Asked) -> None:
        await asked.begin()
        await asked.say("half")
        await asked.event({"error": {"message": "deadline exceeded"}})
        await asked.done()

    done, _ = ask(answer, "q")
    assert (done.exit_code, done.stdout) == (1, "half\n")
    assert done.stderr == "Error: the answer is cut off after 4 characters: deadline exceeded\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["q", "--model", "other"], 1, "no model 'other' (there are: scripted)"),
        (["q", "--strategy", "a b"], 2, "x-microserve-strategy"),
        (["q", "--tools", "absent.json"], 2, "absent.json"),
        (["-"], 2, "there is no question"),
        (["q", "--temperature", "3"], 2, "--temperature"),
    ],
)
def test_wrong_words(words: list[str], code: int, told: str) -> None:
    done, _ = ask(hello, *words)
    assert done.exit_code == code and told in done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1


def test_what_is_no_text_is_sent_as_far_as_it_is() -> None:
    with served_aside(hello) as server:
        flags = ["chat", "--url", server.endpoint.url, "--system", "s\udcff"]
        for question, stdin in (("-", b"a\xff b"), ("a\udcff b", b"")):
            done = CliRunner().invoke(main, [*flags, question], input=stdin)
            assert (done.exit_code, done.stdout) == (0, "good day\n"), done.output
            said = [each["content"] for each in server.asked[-1].body["messages"]]
            assert said == ["s\ufffd", "a\ufffd b"]


def test_no_server() -> None:
    done = chat("q", "--url", "http://127.0.0.1:9")
    assert (done.exit_code, done.stderr) == (
        1,
        "Error: cannot connect to http://127.0.0.1:9: Connection refused\n",
    )


def test_a_key_is_shown_to_its_own_server_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-theirs")
    monkeypatch.setenv("MICROSERVE_GATEWAY__API_KEYS", '["sk-ours"]')
    _, asked = ask(hello, "q")
    assert asked[-1].headers["authorization"] == "Bearer sk-theirs"
    _, asked = ask(hello, "q", "--api-key", "sk-given")
    assert asked[-1].headers["authorization"] == "Bearer sk-given"
    with served_aside(hello) as server:
        monkeypatch.setenv("MICROSERVE_GATEWAY__PORT", str(server.port))
        assert chat("q").exit_code == 0
        assert server.asked[-1].headers["authorization"] == "Bearer sk-ours"

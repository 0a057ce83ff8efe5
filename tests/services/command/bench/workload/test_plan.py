"""What is sent: as many tokens as asked, prefixes shared where they are to be and nowhere else."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError
from microserve.services.command.bench.task import CHAT, COMPLETIONS, Load, Words
from microserve.services.command.bench.workload.plan import plan
from microserve.services.command.bench.workload.prompts import NUM_SPELT, Writer

IDS = Words(ids=list(range(100, 400)), tokens_per_word=1.5, is_measured=True)


def prompts(load: Load, words: Words = IDS) -> list[Any]:
    writer = Writer(load, words)
    bodies = [msgspec.json.decode(writer.body(each)) for each in islice(plan(load), 12)]
    return [body.get("prompt", body.get("messages")) for body in bodies]


def common(one: list[int], other: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


@given(
    num_tokens=st.integers(1, 40_000),
    prefix_len=st.integers(0, 3000),
    num_prefixes=st.integers(1, 4),
    seed=st.integers(0, 1 << 40),
)
@settings(max_examples=20, deadline=None)
def test_prompts_are_as_long_as_asked_and_share_their_prefix(
    num_tokens: int, prefix_len: int, num_prefixes: int, seed: int
) -> None:
    load = Load(
        endpoint=COMPLETIONS,
        input_len=num_tokens,
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
        seed=seed,
        num_requests=8,
    )
    written = prompts(load)
    assert written == prompts(load)
    writer = Writer(load, IDS)
    assert {writer.expected_input(each) for each in plan(load)} == {num_tokens + prefix_len}
    for number, prompt in enumerate(written):
        assert len(prompt) == num_tokens + prefix_len
        assert set(prompt) <= set(IDS.ids)
        for other in range(number):
            shared = common(prompt, written[other])
            is_shared = number % num_prefixes == other % num_prefixes
            assert shared >= prefix_len * is_shared
            if num_tokens >= NUM_SPELT and (is_shared or prefix_len == 0 or prefix_len >= NUM_SPELT):
                assert shared < prefix_len * is_shared + NUM_SPELT


def test_a_warm_up_shares_nothing_with_the_run() -> None:
    load = Load(endpoint=COMPLETIONS, prefix_len=100, num_requests=3)
    writer = Writer(load, IDS)
    own = [writer.prompt(each.parts) for each in plan(load)]
    warm = [writer.prompt(each.parts) for each in plan(load, "warm-up ")]
    assert all(common(a, b) < NUM_SPELT for a in own for b in warm)  # type: ignore[arg-type]


def test_a_chat_is_words_of_about_so_many_tokens() -> None:
    load = Load(endpoint=CHAT, input_len=300, num_requests=1)
    [[message]] = prompts(load)
    assert message["role"] == "user"
    assert len(message["content"].split()) == 200, "1.5 tokens each"
    assert Writer(load, IDS).expected_input(next(plan(load))) is None
    [text] = prompts(Load(endpoint=COMPLETIONS, input_len=300, num_requests=1), Words())
    assert len(text.split()) == 300


def test_what_a_body_asks_for() -> None:
    load = Load(model="m", output_len=9, temperature=0.5)
    body = msgspec.json.decode(Writer(load, IDS).body(next(plan(load))))
    assert body["stream_options"] == {"include_usage": True} and body["stream"] is True
    assert (body["model"], body["max_tokens"], body["temperature"], body["ignore_eos"]) == ("m", 9, 0.5, True)
    free = msgspec.structs.replace(load, ignore_eos=False)
    assert "ignore_eos" not in msgspec.json.decode(Writer(free, IDS).body(next(plan(free))))


# --- files -------------------------------------------------------------------------------------------


def mooncake(*lines: tuple[int, int, list[int]]) -> str:
    return "\n".join(
        json.dumps({"timestamp": at, "input_length": size, "output_length": 5, "hash_ids": ids})
        for at, size, ids in lines
    )


def test_mooncake_s_blocks_become_prefixes_at_their_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(mooncake((1000, 1100, [1, 2, 3]), (1500, 1200, [1, 2, 4]), (4000, 600, [9, 2])))
    load = Load(endpoint=COMPLETIONS, trace=str(file), speed=2.0)
    planned = list(plan(load))
    assert [each.at_s for each in planned] == [0.0, 0.25, 1.5]
    assert [each.max_tokens for each in planned] == [5, 5, 5]
    first, second, third = prompts(load)
    assert [len(each) for each in (first, second, third)] == [1100, 1200, 600]
    assert 1024 <= common(first, second) < 1024 + NUM_SPELT
    assert common(first, third) < NUM_SPELT
    at_rate = [each.at_s for each in plan(msgspec.structs.replace(load, rate=1.0))]
    assert at_rate[0] == 0 or (at_rate[0] or 0) < 3
    assert len(list(plan(msgspec.structs.replace(load, longest=700)))) == 1
    assert len(list(plan(msgspec.structs.replace(load, num_requests=2)))) == 2


def test_azure_s_rows(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,0\n"
        "2023-11-16 18:15:51.2224670,879,55\n"
    )
    planned = list(plan(Load(endpoint=COMPLETIONS, trace=str(file), longest=600)))
    assert [each.at_s for each in planned] == [0.0, pytest.approx(4.314579)]
    assert [each.max_tokens for each in planned] == [44, 1]
    assert [sum(size for _, size in each.parts) for each in planned] == [374, 396]
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:01+00:00,2399,6\n"
    )
    assert [each.at_s for each in plan(Load(trace=str(file)))] == [0.0, pytest.approx(0.99007)]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10,0,1\n", "line 2: tokens must be"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10,1\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10,1,1\n2024-05-09,1,1\n", "line 3"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no such requests"),
        ("a.jsonl", "{}", "line 1"),
    ],
)
def test_a_wrong_trace_is_told_with_its_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=told):
        next(plan(Load(trace=str(tmp_path / name))))


def test_a_file_of_prompts_is_asked_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "there?"}]
    file.write_text(
        json.dumps({"prompt": "hello", "max_tokens": 3}) + "\n\n" + json.dumps({"messages": messages})
    )
    load = Load(file=str(file), num_requests=3, output_len=77)
    planned = list(plan(load))
    assert [each.max_tokens for each in planned] == [3, 77, 3]
    assert prompts(load) == [
        [{"role": "user", "content": "hello"}],
        messages,
        [{"role": "user", "content": "hello"}],
    ]
    with pytest.raises(ConfigError, match="--endpoint chat"):
        list(plan(msgspec.structs.replace(load, endpoint=COMPLETIONS)))


@pytest.mark.parametrize(
    "text", ["", '{"prompt": 3}', "{", "{}", '{"prompt": "a", "messages": [{}]}', '{"promt": ""}']
)
def test_a_wrong_file_of_prompts(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.jsonl"):
        next(plan(Load(file=str(tmp_path / "p.jsonl"))))
    with pytest.raises(ConfigError, match="cannot read"):
        next(plan(Load(file=str(tmp_path / "absent"))))

"""What an engine counts for its metrics: of generations, sends, steps, blocks and grants."""

from __future__ import annotations

from microserve.protocol.metrics.family import Family
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table import engine as table
from tests.support.engine.core_mesh import GREEDY, Engine, Mesh, generate, grant_for, prompt_of, receive, send


def read(engine: Engine) -> dict[tuple[Family, tuple[str, ...]], float | Histogram]:
    readings = Readings()
    engine.core.read(readings)
    return {(family, labels): value for family, series in readings for labels, value in series}


def numbers(engine: Engine, family: Family) -> dict[str, float]:
    """By the value of its only label; of histograms how often."""
    return {
        labels[0]: sum(value.counts) if isinstance(value, Histogram) else value
        for (each, labels), value in read(engine).items()
        if each is family
    }


def seen(engine: Engine, family: Family, *labels: str) -> tuple[int, float]:
    """How often a histogram was added to, and the sum of it."""
    value = read(engine)[family, labels]
    assert isinstance(value, Histogram)
    return sum(value.counts), value.total


def test_a_generation_is_counted_by_its_tokens_and_its_times() -> None:
    mesh = Mesh()
    prompt = prompt_of(20)
    generate(mesh.a, "r1", prompt)
    assert numbers(mesh.a, table.WAITING_FOR) == {"capacity": 1, "kv": 0, "grammar": 0}
    mesh.now += 2.0
    assert read(mesh.a)[table.OLDEST_WAIT, ()] == 2.0
    mesh.run()
    generate(mesh.a, "r2", prompt)
    mesh.run()
    found = read(mesh.a)
    tokens = GREEDY.max_tokens
    assert numbers(mesh.a, table.FINISHED) == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert found[table.GENERATED, ()] == 2 * tokens
    cached = numbers(mesh.a, table.PROMPT_SOURCES)["local_cache_hit"]
    assert cached == 20
    assert numbers(mesh.a, table.PROMPT_SOURCES) == {
        "local_compute": 40 - cached,
        "local_cache_hit": cached,
        "external_kv_transfer": 0,
    }
    assert (found[table.PREFIX_QUERIES, ()], found[table.PREFIX_HITS, ()]) == (40, cached)
    assert seen(mesh.a, table.INTER_TOKEN)[0] == 2 * (tokens - 1)
    assert seen(mesh.a, table.PROMPT_LENGTH) == (2, 40)
    assert seen(mesh.a, table.MAX_TOKENS) == (2, 2 * tokens)
    whole = seen(mesh.a, table.E2E)[1]
    parts = [seen(mesh.a, each)[1] for each in (table.QUEUE_TIME, table.PREFILL_TIME, table.DECODE_TIME)]
    assert abs(whole - sum(parts)) < 1e-9 and whole > 2.0
    steps = numbers(mesh.a, table.STEP_SECONDS)
    assert steps["send"] == steps["mixed"] == 0 and steps["prefill"] > 0 and steps["decode"] > 0
    assert seen(mesh.a, table.STEP_TOKENS)[0] == sum(steps.values())
    mesh.close()


def test_what_is_sent_is_counted_on_both_sides() -> None:
    mesh = Mesh()
    prompt = prompt_of(24)
    granted = grant_for(mesh.b, "r", prompt, 24)
    mesh.now += 1.0
    assert numbers(mesh.b, table.GRANTS) == {"open": 1, "sealed": 0, "quarantined": 0}
    assert read(mesh.b)[table.OLDEST_LEASE, ()] == 1.0
    assert numbers(mesh.b, table.BLOCKS) == {
        "free": 58,
        "cached": 0,
        "granted": 6,
        "quarantined": 0,
        "used": 0,
    }
    send(mesh.a, "r", prompt, granted, 0, 24, sampling=GREEDY)
    receive(mesh.b, "r", granted, 24, await_first=True)
    assert numbers(mesh.b, table.WAITING_FOR)["kv"] == 1
    mesh.run()
    [kind] = numbers(mesh.a, table.SEND_NBYTES)
    assert seen(mesh.a, table.SEND_NBYTES, kind) == seen(mesh.b, table.RECEIVE_NBYTES, kind)
    assert seen(mesh.b, table.RECEIVE_SECONDS, kind)[1] > 1.0
    assert numbers(mesh.a, table.PROMPT_SOURCES)["local_compute"] == 24
    assert numbers(mesh.b, table.PROMPT_SOURCES)["external_kv_transfer"] == 24
    assert read(mesh.b)[table.GENERATED, ()] == GREEDY.max_tokens, "the sender's first token too"
    assert read(mesh.a)[table.GENERATED, ()] == 0
    mesh.close()


def test_what_fails_is_counted_by_why() -> None:
    mesh = Mesh()
    prompt = prompt_of(24)
    granted = grant_for(mesh.b, "r", prompt, 24)
    mesh.now += 10.0  # its lease is over
    mesh.run()
    send(mesh.a, "r", prompt, granted, 0, 24)
    mesh.run()
    assert read(mesh.b)[table.GRANTS_EXPIRED, ()] == 1
    [(code, count)] = numbers(mesh.a, table.SENDS_FAILED).items()
    assert (code, count) == ("transfer_failed", 1)
    mesh.close()

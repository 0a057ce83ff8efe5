"""What front and connector say to each other: asks, notices, words."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError, InvalidRequest
from microserve.protocol.messages.kv.grant import HeapAddress
from microserve.services.engine.vllm.link import (
    DROP,
    KEY,
    START,
    TAKE,
    WAIT,
    Allocated,
    Arrived,
    Ask,
    Freed,
    Generate,
    NotArrived,
    Notice,
    Ready,
    Receive,
    Received,
    Refused,
    Send,
    SendFailed,
    Sent,
    ask_of,
    params_of,
)
from microserve.services.engine.vllm.link_ends import End, Front, address_of

LAYOUT = KvLayout(
    model="m", num_layers=2, num_blocks=9, block_size=32, num_kv_heads=3, head_dim=64, dtype="bfloat16"
)


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front(incarnation=7, model="m", revision="r", num_receives=2, grant_slots=8, checksums=True)
    yield front
    front.close()


@pytest.mark.parametrize(
    "ask",
    [
        Receive(id=1 << 40, end=65),
        Generate(after=3),
        Send(id=4, begin=32, end=70, lane=1, grant=b"\x00\xff", leave_first=True),
    ],
)
def test_an_ask_comes_back_from_a_requests_parameters(ask: Ask) -> None:
    assert ask_of({"do_remote_prefill": True, **params_of(ask)}) == ask


def test_a_request_that_asks_nothing_of_us() -> None:
    assert ask_of(None) is None
    assert ask_of({"do_remote_prefill": True}) is None


@pytest.mark.parametrize(
    "params", [None, {"op": "steal"}, {"op": "receive", "id": "x", "end": 1}, {"op": "send"}]
)
def test_an_ask_that_does_not_decode_names_its_field(params: object) -> None:
    with pytest.raises(InvalidRequest, match="kv_transfer_params"):
        ask_of({KEY: params})


def test_notices_of_both_sides_come_whole_and_in_order(front: Front) -> None:
    address = address_of(front.extra_config)
    assert address == front.address
    heap = HeapAddress("shm", "boot", os.getpid(), 9, 4096, 7)
    worker: list[Notice] = [
        Ready(heap, LAYOUT, 9),
        Sent(1, 10, 0.5),
        SendFailed(2, "transfer_failed", "closed"),
    ]
    scheduler: list[Notice] = [
        *(Refused("x", "y"), Allocated(1, 64, [3, 1]), Received(1), Freed(1)),
        *(Arrived(1), NotArrived(2, "closed")),
    ]
    with End(address, "scheduler") as one, End(address, "worker") as other:
        for notice in worker:
            other.tell(notice)
        for notice in scheduler:
            one.tell(notice)
        assert front.read() == scheduler + worker
        assert front.read() == []


def test_what_does_not_fit_into_the_pipe_waits_and_never_blocks(front: Front) -> None:
    """A front that stands still holds no step up."""
    notices: list[Notice] = [Allocated(i, 0, list(range(10_000))) for i in range(100)]
    with End(front.address, "scheduler") as end:
        for notice in notices:
            end.tell(notice)
        heard = front.read()
        assert 0 < len(heard) < len(notices)
        while len(heard) < len(notices):
            end.flush()
            heard += front.read()
    assert heard == notices


def test_a_words_older_use_means_nothing(front: Front) -> None:
    with End(front.address, "worker") as end:
        first, second = front.page.begin(), front.page.begin()
        assert first is not None and second is not None
        assert front.page.begin() is None, "every slot is in use"
        assert end.page.fate(first) == WAIT
        front.page.take(first)
        front.page.drop(second)
        assert (end.page.fate(first), end.page.fate(second)) == (TAKE, DROP)
        front.page.retire(first)
        third = front.page.begin()
        assert third is not None and third != first
        assert (end.page.fate(first), end.page.fate(third)) == (WAIT, WAIT)
        assert [end.page.fate(stranger) for stranger in (-1, 0, 5 << 16 | 60_000)] == [WAIT, WAIT, WAIT]


def test_an_early_start_says_under_which_grant(front: Front) -> None:
    with End(front.address, "worker") as end:
        receive = front.page.begin()
        assert receive is not None and end.page.started(receive) is None
        front.page.start(receive, 65_535, (1 << 30) - 1)
        assert (end.page.fate(receive), end.page.started(receive)) == (START, (65_535, (1 << 30) - 1))
        front.page.drop(receive)
        assert (end.page.fate(receive), end.page.started(receive)) == (DROP, (65_535, (1 << 30) - 1))
        front.page.retire(receive)
        front.page.begin()
        again = front.page.begin()
        assert again is not None and end.page.started(again) is None


def test_progress_is_seen_by_the_front(front: Front) -> None:
    with End(front.address, "scheduler") as one, End(front.address, "worker") as other:
        one.page.count_step(free_blocks=5, running=2, waiting=1)
        other.page.count_layer()
        other.page.count_layer()
        assert front.page.progress() == (1, 2, 5, 2, 1)


def test_a_front_that_is_gone_is_a_clear_error(front: Front) -> None:
    address = front.address
    with End(address, "worker"):
        pass
    with pytest.raises(ConfigError, match="out of reach"):
        End(
            type(address)(**{**{f: getattr(address, f) for f in address.__struct_fields__}, "pid": 1 << 22}),
            "worker",
        )
    with pytest.raises(ConfigError, match="kv_connector_extra_config"):
        address_of({})

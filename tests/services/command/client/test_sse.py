"""Events, wherever their bytes are cut and however their lines end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.command.client import sse
from microserve.services.command.client.sse import EventReader, EventTooLong

datas = st.lists(st.binary(max_size=20).filter(lambda data: not {10, 13} & set(data)), max_size=6)
line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
noise = st.sampled_from([b": ping", b"event: message", b"id: 7", b"retry: 10"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """Bytes and the data in them: events of several lines, with other fields, comments alone between."""
    written, expected = b"", []
    for data in draw(datas):
        end = draw(line_ends)
        extra = draw(st.lists(noise, max_size=2))
        lines = draw(st.permutations([*extra, b"data: " + data]))
        if draw(st.booleans()):
            lines = [*lines, b"data:" + data.lstrip(b" ")]
            expected.append(data + b"\n" + data.lstrip(b" "))
        else:
            expected.append(data)
        written += b"".join(line + end for line in lines) + end
        if draw(st.booleans()):
            written += b": ping" + end + end
    return written, expected


@given(streams(), st.data())
def test_every_event_comes_out_whole_wherever_it_is_cut(
    stream: tuple[bytes, list[bytes]], data: st.DataObject
) -> None:
    written, expected = stream
    reader, found = EventReader(), []
    while written:
        size = data.draw(st.integers(1, len(written)))
        found += reader.push(written[:size])
        written = written[size:]
    assert found == expected
    assert reader.is_between_events


def test_half_an_event_is_not_one() -> None:
    reader = EventReader()
    assert reader.push(b"data: a\n\ndata: b\n") == [b"a"]
    assert not reader.is_between_events
    assert reader.push(b"\n") == [b"b"]


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_NBYTES", 100)
    with pytest.raises(EventTooLong):
        EventReader().push(b"x" * 101)

"""Fetches that break off, are ended, or bring something damaged: gone on with, or thrown away and told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from microserve.services.local.hub import client
from microserve.services.local.hub.fetch import Wish, fetch
from microserve.services.local.hub.name import HubError, NotReached
from microserve.services.local.hub.place import Place, usable, whole
from tests.support.hub.server import Hub, digest_of
from tests.support.hub.small_model import FILES, NAME, WEIGHTS, blob, refusal


def test_a_fetch_that_breaks_off_is_gone_on_with(hub: Hub, place: Place) -> None:
    """Within one call, as long as something comes."""
    hub.break_after = 30_000
    directory = fetch(place, NAME, Wish())
    assert (directory / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    digest = digest_of(WEIGHTS, FILES[WEIGHTS])
    assert hub.sent[f"/store/{digest}"] == len(FILES[WEIGHTS]), "no byte came twice"


def test_a_fetch_that_was_ended_is_gone_on_with_by_the_next(hub: Hub, place: Place) -> None:
    partial = blob(place, WEIGHTS, FILES[WEIGHTS]).with_suffix(".incomplete")

    def stop(what: str, part: float | None) -> None:
        if what.startswith(f"Fetching {WEIGHTS}") and part is not None and part > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(place, NAME, Wish(), stop)
    here = partial.stat().st_size
    assert len(FILES[WEIGHTS]) // 2 < here < len(FILES[WEIGHTS])
    assert whole(place, NAME) is None and usable(place, NAME) is None
    hub.asked.clear()
    directory = fetch(place, NAME, Wish())
    assert (directory / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    digest = digest_of(WEIGHTS, FILES[WEIGHTS])
    assert [line for line in hub.asked if "/store/" in line and line.startswith("GET")] == [
        f"GET /store/{digest} bytes={here}-"
    ]


def test_a_client_that_another_thread_has_closed_is_made_anew(hub: Hub, place: Place) -> None:
    """As huggingface_hub does where a thread cannot connect."""
    closed: list[float] = []

    def report(what: str, part: float | None) -> None:
        if what.startswith(f"Fetching {WEIGHTS}") and part is not None and part > 0.5 and not closed:
            closed.append(part)
            close_session()

    assert (fetch(place, NAME, Wish(), report) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert closed


def test_a_fetch_that_is_ended_before_its_first_piece_leaves_no_file_open(hub: Hub, place: Place) -> None:
    def stop(what: str, part: float | None) -> None:
        if what.startswith(f"Fetching {WEIGHTS}"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(place, NAME, Wish(), stop)
    open_files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir() if file.exists()]
    assert not [file for file in open_files if file.endswith(".incomplete")]


def test_a_server_that_does_not_go_on_begins_anew(hub: Hub, place: Place) -> None:
    partial = blob(place, WEIGHTS, FILES[WEIGHTS]).with_suffix(".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(FILES[WEIGHTS][:5000])
    hub.ignores_range = True
    assert (fetch(place, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_a_link_that_has_grown_old_is_asked_for_anew(hub: Hub, place: Place) -> None:
    hub.break_after, hub.expires = 60_000, 1
    assert (fetch(place, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert hub.expires == 0


def test_a_store_that_is_gone_leaves_what_has_come(hub: Hub, place: Place) -> None:
    hub.break_after = 0
    assert "cannot be reached" in refusal(place) and "is kept" in refusal(place)
    hub.break_after = None
    fetch(place, NAME, Wish())


def test_a_store_that_falls_silent_is_given_up_and_gone_on_with(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(place, NAME, Wish(weights=False))
    hub.held = threading.Event()
    with monkeypatch.context() as hurried:
        hurried.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
        with pytest.raises(NotReached, match="cannot be reached"):
            fetch(place, NAME, Wish())
    assert hub.reached.wait(60)
    hub.held.set()
    assert (fetch(place, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


@pytest.mark.parametrize("has_xet", [False, True])
def test_a_file_comes_by_http_also_where_xet_is_spoken(hub: Hub, place: Place, has_xet: bool) -> None:
    hub.has_xet = has_xet
    assert (fetch(place, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert not any("xet" in line for line in hub.asked)


@pytest.mark.parametrize("is_partial", [False, True])
def test_damaged_content_is_seen_and_thrown_away(hub: Hub, place: Place, is_partial: bool) -> None:
    if is_partial:  # what was here already is a part of the digest
        partial = blob(place, WEIGHTS, FILES[WEIGHTS]).with_suffix(".incomplete")
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"x" * 5000)
        told = refusal(place)
    else:
        hub.damages = True
        told = refusal(place)
        hub.damages = False
    assert "came damaged" in told and "ask again" in told
    assert (fetch(place, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_a_store_that_does_not_end_fills_no_disk(hub: Hub, place: Place) -> None:
    fetch(place, NAME, Wish(weights=False))
    hub.flood_nbytes = 64 << 20
    with pytest.raises(HubError, match="came damaged"):
        fetch(place, NAME, Wish())
    digest = digest_of(WEIGHTS, FILES[WEIGHTS])
    assert hub.sent.get(f"/store/{digest}", 0) < hub.flood_nbytes
    hub.flood_nbytes = 0
    assert (fetch(place, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_damage_that_came_later_is_seen_by_a_check_and_mended(hub: Hub, place: Place) -> None:
    directory = fetch(place, NAME, Wish())
    content = bytearray(FILES[WEIGHTS])
    content[7] ^= 1
    (directory / WEIGHTS).resolve().write_bytes(content)
    fetch(place, NAME, Wish(verify=True))
    assert (directory / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    hub.asked.clear()
    fetch(place, NAME, Wish(verify=True))
    assert hub.fetched() == []


def test_a_file_that_is_cut_short_is_not_taken_for_whole(hub: Hub, place: Place) -> None:
    directory = fetch(place, NAME, Wish())
    (directory / WEIGHTS).resolve().write_bytes(FILES[WEIGHTS][:-1])
    assert whole(place, NAME) is None
    fetch(place, NAME, Wish(verify=True))
    assert whole(place, NAME) == directory


def test_a_shard_that_is_damaged_ends_the_others_and_leaves_what_has_come(hub: Hub, place: Place) -> None:
    shards = {f"model-0000{n}-of-00006.safetensors": bytes([n]) * 100_000 for n in range(6)}
    shards["model-00005-of-00006.safetensors"] = shards["model-00004-of-00006.safetensors"]  # the same twice
    index = json.dumps({"weight_map": {name: name for name in shards}}).encode()
    files = {name: content for name, content in FILES.items() if name != WEIGHTS}
    hub.add("org/tiny", {**files, **shards, "model.safetensors.index.json": index})
    fetch(place, NAME, Wish(weights=False))
    shutil.rmtree(place.repo(NAME) / "refs")
    bad = "model-00002-of-00006.safetensors"
    partial = blob(place, bad, shards[bad]).with_suffix(".incomplete")
    partial.write_bytes(b"x" * 5000)
    assert f"{bad} of org/tiny came damaged" in refusal(place)
    told: list[float | None] = []
    directory = fetch(
        place, NAME, Wish(), lambda what, part: told.append(part) if "6 files" in what else None
    )
    assert {name: (directory / name).read_bytes() for name in shards} == shards
    assert told[-1] == 1.0
    assert not list(place.cache.rglob("*.incomplete"))


def test_a_full_disk_is_told_and_what_has_come_is_kept(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = blob(place, WEIGHTS, FILES[WEIGHTS]).with_suffix(".incomplete")
    write = client._Partial.write

    def fill(self: client._Partial, chunk: bytes) -> None:
        if self.nbytes > 40_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, chunk)

    with monkeypatch.context() as full:
        full.setattr(client._Partial, "write", fill)
        assert "is full; what has come of org/tiny is kept" in refusal(place)
    assert partial.stat().st_size > 40_000
    assert (fetch(place, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


@pytest.mark.parametrize("damaged", ["config.json", "tokenizer_config.json"])
def test_small_files_that_are_damaged_are_mended_too(hub: Hub, place: Place, damaged: str) -> None:
    directory = fetch(place, NAME, Wish())
    (directory / damaged).resolve().write_bytes(b"x" * len(FILES[damaged]))
    fetch(place, NAME, Wish(verify=True))
    assert (directory / damaged).read_bytes() == FILES[damaged]


def test_two_at_once_fetch_it_once(hub: Hub, place: Place) -> None:
    hub.held = threading.Event()
    told: list[str] = []
    found: list[Path] = []
    waits = threading.Event()

    def report(what: str, part: float | None) -> None:
        told.append(what)
        if what.startswith("Waiting for another process"):
            waits.set()

    def run() -> None:
        found.append(fetch(place, NAME, Wish(), report))

    first = threading.Thread(target=run)
    first.start()
    assert hub.reached.wait(60)
    second = threading.Thread(target=run)
    second.start()
    assert waits.wait(60)
    hub.held.set()
    first.join(60)
    second.join(60)
    assert len(found) == 2 and found[0] == found[1]
    digest = digest_of(WEIGHTS, FILES[WEIGHTS])
    assert hub.sent[f"/store/{digest}"] == len(FILES[WEIGHTS])

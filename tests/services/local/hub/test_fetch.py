"""huggingface_hub itself against a server of the Hub's API on loopback: whole, broken off, refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from microserve.protocol.settings import Settings
from microserve.services.engine.room import unpromised_room
from microserve.services.local.hub import client
from microserve.services.local.hub import fetch as fetching
from microserve.services.local.hub.fetch import Wish, fetch
from microserve.services.local.hub.name import HubError, NotReached, parse_name
from microserve.services.local.hub.place import Place, usable, whole
from microserve.services.local.hub.sizes import DISK_MARGIN_NBYTES
from tests.support.hub.server import Hub, digest_of, files_of, serving

NAME = parse_name("org/tiny")
ALL = Wish()
WEIGHTS = "model.safetensors"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float32",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b'{"version": "1.0"}' + b" " * 5000,
    "tokenizer_config.json": b"{}",
    WEIGHTS: bytes(range(256)) * 400,
    "pytorch_model.bin": b"never",
    "README.md": b"# never",
}
NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(tokens={"hf_member": {"org/tiny"}, "hf_stranger": set()})
    hub.add("org/tiny", dict(FILES))
    with serving(hub):
        yield hub


@pytest.fixture
def place(hub: Hub, tmp_path: Path) -> Place:
    return Place(tmp_path / "hub", tmp_path / "records", hub.endpoint)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 100 kB comes in many pieces; a broken connection is tried again at once."""
    monkeypatch.setattr(client, "CHUNK_NBYTES", 1000)
    monkeypatch.setattr(client.HubClient.__init__, "__defaults__", (0.0,))


def blob(place: Place, path: str, content: bytes) -> Path:
    return place.repo(NAME) / "blobs" / digest_of(path, content)


def refusal(place: Place, wish: Wish = ALL, name: str = "org/tiny") -> str:
    """What is said; one sentence, and the revision stands for nothing."""
    with pytest.raises(HubError) as caught:
        fetch(place, parse_name(name), wish)
    assert "\n" not in str(caught.value)
    assert whole(place, parse_name(name)) is None
    assert not list(place.cache.rglob("refs/*"))
    return str(caught.value)


def test_a_model_comes_whole_and_nothing_else_with_it(hub: Hub, place: Place) -> None:
    told: list[tuple[str, float | None]] = []
    directory = fetch(place, NAME, Wish(), lambda what, part: told.append((what, part)))
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == {
        name: FILES[name] for name in NEEDED
    }
    assert whole(place, NAME) == directory
    assert (
        (place.repo(NAME) / "refs" / "main").read_text()
        == directory.name
        == hub.repos["org/tiny"].refs["main"]
    )
    assert not list(place.cache.rglob("*.incomplete"))
    parts = [part for what, part in told if what == f"Fetching {WEIGHTS} (102.40 kB)"]
    assert len(parts) > 50 and parts == sorted(parts) and parts[-1] == 1.0  # type: ignore[type-var]
    assert any("in memory 51.20 kB of weights in bfloat16 and" in what for what, _ in told)


def test_what_is_there_is_not_fetched_again(hub: Hub, place: Place) -> None:
    fetch(place, NAME, Wish())
    hub.asked.clear()
    fetch(place, NAME, Wish())
    assert hub.fetched() == []


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


def test_what_changes_at_the_hub_is_another_commit(hub: Hub, place: Place) -> None:
    first = fetch(place, NAME, Wish())
    hub.repos["org/tiny"].commit({**FILES, WEIGHTS: b"other weights" * 100})
    assert whole(place, NAME) == first, "what is here goes on being it until somebody asks"
    hub.asked.clear()
    second = fetch(place, NAME, Wish())
    assert second != first and (second / WEIGHTS).read_bytes() == b"other weights" * 100
    assert whole(place, NAME) == second
    assert (first / WEIGHTS).read_bytes() == FILES[WEIGHTS], "who serves it goes on"
    assert all("tokenizer" not in path for path in hub.fetched()), "what both have is there once"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, place: Place) -> None:
    main = hub.repos["org/tiny"].refs["main"]
    tagged = hub.repos["org/tiny"].commit({**FILES, WEIGHTS: b"v2"}, "v2")
    for revision, commit in (("v2", tagged), (main, main), (tagged, tagged)):
        name = parse_name(f"org/tiny@{revision}")
        assert fetch(place, name, Wish()).name == commit
        assert whole(place, name) == place.snapshot(name, commit)
    assert whole(place, NAME) is None, "main was not asked for"


def test_a_revision_that_is_not_there_is_told(place: Place) -> None:
    assert refusal(place, name="org/tiny@v3") == "org/tiny has no revision 'v3'"


def test_a_model_that_is_not_there_is_told(hub: Hub, place: Place) -> None:
    told = refusal(place, name="org/absent")
    assert told == f"{hub.endpoint} has no model org/absent, or a private one needs HF_TOKEN"
    told = refusal(replace(place, token="hf_member"), name="org/absent")
    assert told.endswith("or the token of HF_TOKEN may not see it")


def test_a_gated_model_says_where_its_terms_are(hub: Hub, place: Place) -> None:
    hub.repos["org/tiny"].is_gated = True
    told = refusal(place)
    assert told.startswith(f"org/tiny is gated: accept its terms at {hub.endpoint}/org/tiny")
    assert told.endswith("(set HF_TOKEN)")
    assert "has no access" in refusal(replace(place, token="hf_stranger"))
    assert "hf_stranger" not in refusal(replace(place, token="hf_stranger"))
    member = replace(place, token="hf_member")
    assert (fetch(member, NAME, Wish()) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert "hf_member" not in repr(member)


def test_a_private_model_needs_a_token_and_a_token_must_be_known(hub: Hub, place: Place) -> None:
    hub.repos["org/tiny"].is_private = True
    assert "a private one needs HF_TOKEN" in refusal(place)
    assert "does not know the token" in refusal(replace(place, token="hf_made_up"))
    fetch(replace(place, token="hf_member"), NAME, Wish())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_broken_is_told(hub: Hub, place: Place, status: int) -> None:
    hub.status = status
    assert f"is busy or broken ({status})" in refusal(place)


def test_no_network_is_told(hub: Hub, place: Place) -> None:
    nobody = replace(place, endpoint="http://127.0.0.1:1")
    with pytest.raises(NotReached, match=r"http://127.0.0.1:1 cannot be reached for org/tiny"):
        fetch(nobody, NAME, Wish())
    with pytest.raises(NotReached, match="HF_HUB_OFFLINE forbids"):
        fetch(replace(place, is_offline=True), NAME, Wish())
    assert hub.asked == []


def test_a_family_that_is_not_served_is_refused_before_its_weights_come(hub: Hub, place: Place) -> None:
    config = {**CONFIG, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    hub.add("org/tiny", {**FILES, "config.json": json.dumps(config).encode()})
    assert "latent instead of K and V (MLA)" in refusal(place)
    assert all(path.endswith("config.json") for path in hub.fetched())


def test_a_model_that_does_not_fit_is_refused_before_its_weights_come(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = unpromised_room()
    monkeypatch.setattr(fetching, "unpromised_room", lambda: replace(room, nbytes=room.margin_nbytes + 100))
    assert "does not fit here: there is no room for this model" in refusal(place, Wish(settings=Settings()))
    monkeypatch.setattr(Place, "free_nbytes", DISK_MARGIN_NBYTES + 50_000)
    assert "more in" in refusal(place)
    assert all(path.endswith("config.json") for path in hub.fetched())


def test_a_gateway_fetches_no_weights(hub: Hub, place: Place) -> None:
    directory = fetch(place, NAME, Wish(weights=False))
    assert {file.name for file in directory.iterdir()} == NEEDED - {WEIGHTS}
    assert whole(place, NAME, weights=False) == directory and whole(place, NAME) is None
    fetch(place, NAME, Wish())
    assert whole(place, NAME) == directory


def test_shards_come_by_their_index(hub: Hub, place: Place) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 3000 for n in (1, 2)}
    index = {"weight_map": {name: name for name in shards}}
    files = {name: content for name, content in FILES.items() if name != WEIGHTS}
    hub.add("org/tiny", {**files, **shards, "model.safetensors.index.json": json.dumps(index).encode()})
    directory = fetch(place, NAME, Wish())
    assert {name: (directory / name).read_bytes() for name in shards} == shards
    assert whole(place, NAME) == directory == usable(place, NAME)


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


def test_a_cache_that_cannot_be_written_is_told(place: Place) -> None:
    place.cache.parent.mkdir(exist_ok=True)
    place.cache.write_text("a file where the directory should be")
    with pytest.raises(HubError, match=r"org/tiny cannot be kept in .*HF_HOME=DIR"):
        fetch(place, NAME, Wish())


def test_the_files_of_a_directory_are_what_a_server_serves(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.json").write_text("{}")
    assert files_of(tmp_path) == {"a/b.json": b"{}"}

"""huggingface_hub itself against a server of the Hub's API on loopback: whole, refused, changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from microserve.protocol.settings.settings import Settings
from microserve.services.engine.room import unpromised_room
from microserve.services.local.hub import fetch as fetching
from microserve.services.local.hub.fetch import Wish, fetch
from microserve.services.local.hub.name import HubError, NotReached, parse_name
from microserve.services.local.hub.place import Place, usable, whole
from microserve.services.local.hub.sizes import DISK_MARGIN_NBYTES
from tests.support.hub.server import Hub, files_of
from tests.support.hub.small_model import CONFIG, FILES, NAME, NEEDED, WEIGHTS, refusal


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
    assert not place.repo(NAME).exists(), "nothing is left of it"
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


def test_a_cache_that_cannot_be_written_is_told(place: Place) -> None:
    place.cache.parent.mkdir(exist_ok=True)
    place.cache.write_text("a file where the directory should be")
    with pytest.raises(HubError, match=r"org/tiny cannot be kept in .*HF_HOME=DIR"):
        fetch(place, NAME, Wish())


def test_the_files_of_a_directory_are_what_a_server_serves(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.json").write_text("{}")
    assert files_of(tmp_path) == {"a/b.json": b"{}"}

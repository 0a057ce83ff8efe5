"""The keys' file: what it may say, and that a mistake is named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.gateway.keys.key import (
    ANONYMOUS,
    NAME,
    PREFIX,
    ApiKey,
    digest_of,
    entry_of,
    make_key,
    parse_keys,
    plain_keys,
)
from microserve.gateway.keys.ring import KeyRing, Unauthorized
from microserve.gateway.keys.salt import cache_salt
from microserve.protocol.errors import ConfigError

names = st.from_regex(NAME, fullmatch=True).filter(lambda name: not name.startswith("api_keys."))
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
limits = st.integers(0, 1 << 53)
keys = st.builds(
    ApiKey,
    name=names,
    sha256=st.lists(digests, min_size=1, max_size=3, unique=True).map(tuple),
    requests_per_minute=limits,
    tokens_per_minute=limits,
    concurrent_streams=limits,
    daily_token_budget=limits,
    models=st.lists(st.text(), max_size=2).map(tuple),
    strategies=st.lists(st.text(), max_size=2).map(tuple),
    priority=st.integers(-100, 100),
    operator=st.booleans(),
    lossy=st.booleans(),
)  # fmt: skip


@settings(deadline=None)
@given(key=keys)
def test_what_is_written_is_read(key: ApiKey) -> None:
    assert parse_keys(entry_of(key), "file") == [key]


def test_one_hash_may_stand_alone_and_names_may_have_dots() -> None:
    digest = "ab" * 32
    [key] = parse_keys(f'[keys."team.a"]\nsha256 = "{digest}"\n', "file")
    assert (key.name, key.sha256) == ("team.a", (digest,))
    assert parse_keys("", "file") == []


GOOD = f'sha256 = "{"ab" * 32}"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[keys.a", "file"),
        ("[keys.a]", "keys.a: sha256"),
        ('[keys.a]\nsha256 = "abc"', "keys.a: sha256"),
        (f"[keys.a]\n{GOOD}\nrequest_per_minute = 1", "unknown field, did you mean requests_per_minute"),
        (f"[keys.a]\n{GOOD}\nrequests_per_minute = -1", "requests_per_minute"),
        (
            f"[keys.a]\n{GOOD}\nrequests_per_minute = 1.5",
            "requests_per_minute must be a whole number from 0 to",
        ),
        (f"[keys.a]\n{GOOD}\npriority = 101", "priority"),
        (f"[keys.a]\n{GOOD}\nname = 'b'", "name"),
        (f'[keys."a b"]\n{GOOD}', "a name has"),
        (f'[keys."api_keys.0"]\n{GOOD}', "api_keys"),
        (f"[keys.a]\n{GOOD}\n[keys.b]\n{GOOD}", "keys.b: has the same key as 'a'"),
        (f"[key.a]\n{GOOD}", "unknown field"),
        ("a = " + "[" * 5000, "file"),
    ],
)
def test_a_mistake_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + says.replace(".", r"\.")):
        parse_keys(text, "file")


# --- which key ---------------------------------------------------------------------------------------


def test_the_key_behind_a_header() -> None:
    assert KeyRing(None).check(None).name == ""
    one, two = (ApiKey(name=name, sha256=(digest_of(name),)) for name in ("one", "two"))
    ring = KeyRing([one, two])
    for good in (b"Bearer one", b"bearer one", b"BEARER  one "):
        assert ring.check(good) is one
    assert ring.check(None, b" two ") is two
    assert ring.check(b"Basic dXNlcg==", b"two") is two
    assert ring.check(b"Bearer ", b"two") is two


@settings(deadline=None)
@given(
    authorization=st.none() | st.binary() | st.binary().map(b"Bearer ".__add__), other=st.none() | st.binary()
)
def test_any_bytes_are_a_key_or_none(authorization: bytes | None, other: bytes | None) -> None:
    with pytest.raises(Unauthorized):
        KeyRing([ApiKey(name="a", sha256=(digest_of(make_key()),))]).check(authorization, other)


def test_a_ring_without_keys_lets_nobody_in() -> None:
    ring = KeyRing([])
    assert not ring.is_open
    for given_ in (None, b"Bearer x"):
        with pytest.raises(Unauthorized):
            ring.check(given_)


def test_a_key_is_new_each_time_and_known_by_its_hash() -> None:
    made = {make_key() for _ in range(100)}
    assert len(made) == 100 and all(key.startswith(PREFIX) and len(key) > 40 for key in made)
    key = made.pop()
    ring = KeyRing([ApiKey(name="a", sha256=(digest_of("old"), digest_of(key)))])
    assert ring.check(b"Bearer " + key.encode()).name == ring.check(b"Bearer old").name == "a"
    ring.replace([])
    with pytest.raises(Unauthorized):
        ring.check(b"Bearer old")


def test_keys_of_the_settings_are_the_operators() -> None:
    found = plain_keys(["x", "ü"])
    assert [(key.name, key.operator) for key in found] == [("api_keys.0", True), ("api_keys.1", True)]
    moved = plain_keys(["another", "x", "ü"])
    assert {key.owner for key in found} == {key.owner for key in moved[1:]}  # what is kept is still theirs
    assert moved[0].owner not in {key.owner for key in found}
    assert KeyRing(found).check("Bearer ü".encode()).name == "api_keys.1"
    for empty in ("", " "):
        with pytest.raises(ConfigError):
            plain_keys(["x", empty])


# --- their caches --------------------------------------------------------------------------------------


holders = st.one_of(st.just(""), names)
salts = st.text(max_size=8) | st.sampled_from(["key/a/", "salt/", "salt/key/a/", "/"])


@settings(deadline=None)
@given(first=st.tuples(holders, salts), second=st.tuples(holders, salts))
def test_no_two_names_and_salts_meet(first: tuple[str, str], second: tuple[str, str]) -> None:
    a, b = (cache_salt(ApiKey(name=name), salt, shared=False) for name, salt in (first, second))
    assert (a == b) == (first == second)


@settings(deadline=None)
@given(name=names, salt=st.text(max_size=8))
def test_a_shared_cache_is_that_of_a_gateway_without_keys(name: str, salt: str) -> None:
    key = ApiKey(name=name)
    assert cache_salt(key, salt, shared=True) == cache_salt(ANONYMOUS, salt, shared=False)
    assert cache_salt(key, "", shared=True) == ""

"""The timing model: more work never takes less time, and what data sheets say comes out of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError
from microserve.services.simulation.load.timing import (
    A100,
    H200,
    LLAMA_8B,
    PROFILES,
    Profile,
    profile_of,
    roofline,
)

profiles = st.sampled_from(sorted(PROFILES.values(), key=lambda profile: profile.name))
prefills = st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 100_000)), max_size=4)
contexts = st.lists(st.integers(1, 100_000), max_size=64)


@given(profiles, prefills, contexts, st.integers(1, 64), st.data())
def test_more_work_never_takes_less_time(
    profile: Profile,
    prefills: list[tuple[int, int]],
    contexts: list[int],
    num_passes: int,
    data: st.DataObject,
) -> None:
    base = profile.step_s(prefills, contexts, num_passes)
    tolerance = 1 + 1e-9
    assert base > 0.0
    assert profile.step_s([*prefills, (1, 0)], contexts, num_passes) * tolerance >= base
    assert profile.step_s(prefills, [*contexts, 1], num_passes) * tolerance >= base
    assert profile.step_s(prefills, contexts, num_passes + 1) * tolerance >= base
    longer = [(length + data.draw(st.integers(0, 512)), start) for length, start in prefills]
    assert profile.step_s(longer, contexts, num_passes) * tolerance >= base
    later = [(length, start + data.draw(st.integers(0, 512))) for length, start in prefills]
    assert profile.step_s(later, contexts, num_passes) * tolerance >= base
    older = [context + data.draw(st.integers(0, 512)) for context in contexts]
    assert profile.step_s(prefills, older, num_passes) * tolerance >= base


@given(profiles, st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_a_longer_put_takes_longer(profile: Profile, num_tokens: int, more: int) -> None:
    assert profile.link_latency_s < profile.put_s(num_tokens) < profile.put_s(num_tokens + more)


@given(profiles, st.integers(1, 64), st.lists(st.integers(1, 10_000), min_size=1, max_size=16))
def test_passes_without_prefill_are_so_many_steps(
    profile: Profile, num_passes: int, contexts: list[int]
) -> None:
    whole = profile.step_s([], contexts, num_passes)
    assert whole == pytest.approx(num_passes * profile.step_s([], contexts))


@given(profiles, st.integers(1, 2048), st.integers(1, 2048))
def test_a_prompt_in_two_chunks_has_the_pairs_of_the_whole(profile: Profile, first: int, second: int) -> None:
    def pairs_s(*prefills: tuple[int, int]) -> float:
        return sum(
            profile.step_s([(length, start)], [])
            - profile.step_s([(length, 0)], [])
            + length * (length + 1) / 2 * profile.pair_s
            for length, start in prefills
        )

    assert pairs_s((first, 0), (second, first)) == pytest.approx(pairs_s((first + second, 0)))


def test_what_the_data_sheets_say_comes_out() -> None:
    profile = roofline("x", LLAMA_8B, H200)
    assert profile.kv_nbytes_per_token == 128 << 10  # as the model is known to have
    # One stream decodes at most as fast as all weights can be read.
    assert profile.step_s([], [1]) > 2 * (LLAMA_8B.num_params - LLAMA_8B.num_embedding_params) / 4.8e12
    # A prefill of 8,192 tokens is no faster than the peak allows.
    assert profile.step_s([(8192, 0)], []) > 8192 * 2 * 7.5e9 / 989e12
    # The smaller device is slower at everything and holds less.
    small = roofline("y", LLAMA_8B, A100)
    assert small.step_s([(512, 0)], [1000]) > profile.step_s([(512, 0)], [1000])
    assert small.put_s(100) > profile.put_s(100)
    assert small.num_kv_tokens < profile.num_kv_tokens


def test_a_profile_says_what_it_is_from() -> None:
    for name, profile in PROFILES.items():
        assert profile_of(name) is profile
        assert "measure" in profile.source
    with pytest.raises(ConfigError, match=r"no profile .h300.*h200-8b"):
        profile_of("h300")

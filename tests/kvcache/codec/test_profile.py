from __future__ import annotations

import msgspec
import numpy as np
import pytest

from microserve.kvcache.codec.codec import SUPPORTED, Codec
from microserve.kvcache.codec.profile import LOSSLESS, NONE, Levels, Profile
from microserve.protocol.errors import ConfigError
from tests.support.kvcache.codec import geometry, profiles, random_rows


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("transform", {"transform": "fourier"}),
        ("transform", {"transform": "hadamard"}),
        ("quantiser", {"quantiser": "vector"}),
        ("coder", {"coder": "zip"}),
        ("coder", {"coder": "pack"}),
        ("keys.high", {"quantiser": "uniform", "values": Levels(4)}),
        ("values.high", {"quantiser": "uniform", "keys": Levels(4), "values": Levels(257)}),
        ("keys.low", {"quantiser": "uniform", "keys": Levels(4, 2), "values": Levels(4)}),
        ("values.low", {"quantiser": "mixed_head", "keys": Levels(4, 2), "values": Levels(4)}),
        ("keys.high", {"keys": Levels(4)}),
        ("low_ratio", {"low_ratio": 0.5}),
        ("low_ratio", {"low_ratio": float("nan")}),
    ],
)
def test_a_profile_that_there_is_not_names_the_field(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as told:
        Profile("it", **arguments)  # type: ignore[arg-type]
    assert told.value.field == field


@pytest.mark.parametrize("profile", profiles(), ids=lambda each: each.name)
def test_profiles_go_through_json_and_say_what_a_decoder_needs(profile: Profile) -> None:
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile
    assert profile.needs in SUPPORTED
    assert profile.is_lossy == (profile.quantiser != "none")


def test_what_is_known_without_a_library_is_exact() -> None:
    assert not any(profile.is_lossy for profile in (NONE, *LOSSLESS))


MIXED = Profile("it", quantiser="mixed_head", keys=Levels(8, 4), values=Levels(8, 4), low_ratio=0.25)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("dtype", {"dtype": "int8"}),
        ("dtype", {"dtype": ""}),
        ("quantization", {"quantization": "fp8"}),
        ("order", {"order": "vllm"}),
        ("num_kv_heads", {"num_kv_heads": 0}),
        ("head_dim", {"head_dim": 1 << 16}),
    ],
)
def test_a_geometry_that_it_is_not_for_names_the_field(field: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as told:
        Codec(MIXED, msgspec.structs.replace(geometry(), **changes), head_scores=np.zeros((4, 3), np.float32))
    assert told.value.field == field


@pytest.mark.parametrize("scores", [None, np.zeros((3, 4), np.float32), np.full((4, 3), np.nan, np.float32)])
def test_heads_that_are_to_be_low_need_scores(scores: np.ndarray | None) -> None:
    with pytest.raises(ConfigError) as told:
        Codec(MIXED, geometry(), head_scores=scores)
    assert told.value.field == "head_scores"


def test_rows_that_are_none_name_the_field() -> None:
    codec, out = Codec(MIXED, geometry(), head_scores=np.zeros((4, 3), np.float32)), np.empty(4096, np.uint8)
    keys, values = random_rows(geometry(), 16)
    for layer, k, v, field in (
        (4, keys, values, "layer"),
        (0, keys[:8], values, "keys"),
        (0, keys[:0], values[:0], "keys"),
        (0, keys, np.ascontiguousarray(values[:, :16]), "values"),
    ):
        with pytest.raises(ConfigError) as told:
            codec.encode(layer, k, v, out)
        assert told.value.field == field

from __future__ import annotations

import msgspec
import pytest

from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.engine_info import ABILITIES, PREP_RECV, REMOTE_SEND
from microserve.protocol.messages.kv.geometry import UNSAID, Geometry, difference
from tests.support.bus.wire_parts import INFO

OURS = Geometry("bfloat16", "rows", 16, 30, 3, 64, rope="default theta=10000", layers="d")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "dtype: bfloat16 here, float32 there"),
        ({"order": "blocks of x"}, "order: rows here, blocks of x there"),
        ({"block_size": 32}, "block_size: 16 here, 32 there"),
        ({"num_layers": 29}, "num_layers: 30 here, 29 there"),
        ({"num_kv_heads": 1}, "num_kv_heads: 3 here, 1 there"),
        ({"head_dim": 128}, "head_dim: 64 here, 128 there"),
        ({"quantization": "fp8"}, "quantization: none here, fp8 there"),
        ({"rope": "default theta=500000"}, "rope: default theta=10000 here, default theta=500000 there"),
        ({"layers": "e"}, "layers: d here, e there"),
        ({"block_size": 32, "num_layers": 29}, "block_size: 16 here, 32 there"),
    ],
)
def test_the_first_field_that_differs_is_named_with_both_values(change: dict[str, object], said: str) -> None:
    theirs = msgspec.structs.replace(OURS, **change)

    assert difference(OURS, theirs) == said
    assert difference(theirs, OURS).partition(":")[0] == said.partition(":")[0]


def test_every_field_counts() -> None:
    for field in msgspec.structs.fields(Geometry):
        other = "x" if field.type is str else 999
        assert difference(OURS, msgspec.structs.replace(OURS, **{field.name: other})), field.name


def test_equal_ones_fit_and_so_does_one_that_says_nothing() -> None:
    assert difference(OURS, OURS) == ""
    assert difference(OURS, UNSAID) == difference(UNSAID, OURS) == ""
    for unsaid in ("rope", "layers"):
        assert difference(OURS, msgspec.structs.replace(OURS, **{unsaid: ""})) == ""


def test_whose_values_they_are_may_be_said() -> None:
    theirs = msgspec.structs.replace(OURS, dtype="float16")

    assert difference(OURS, theirs, ours="at e1", theirs="at e2") == "dtype: bfloat16 at e1, float16 at e2"


def test_a_layout_says_its_geometry() -> None:
    layout = KvLayout("m", 30, 99, 16, 3, 64, "bfloat16", rope="default theta=10000")

    assert difference(layout.geometry, msgspec.structs.replace(OURS, layers="")) == ""
    assert layout.geometry.is_said


def test_an_engine_that_does_not_say_what_it_can_can_everything() -> None:
    older = msgspec.structs.replace(INFO, can=None)

    assert all(map(older.does, ABILITIES))
    assert older.exchanges_kv


def test_an_engine_can_what_it_says_and_no_more() -> None:
    assert [each for each in ABILITIES if INFO.does(each)] == INFO.can
    assert not msgspec.structs.replace(INFO, can=[]).exchanges_kv
    for one in (PREP_RECV, REMOTE_SEND):
        assert msgspec.structs.replace(INFO, can=[one]).exchanges_kv


def test_an_older_engines_info_is_read_with_defaults() -> None:
    older = {name: value for name, value in msgspec.to_builtins(INFO).items() if name not in _APPENDED}
    info = msgspec.msgpack.decode(msgspec.msgpack.encode(older), type=EngineInfo)

    assert (info.can, info.geometry, info.split_tokens, info.recompute_tokens) == (None, UNSAID, 1, 0)
    assert info.all_heaps == [info.heap]


_APPENDED = {"backend", "backend_version", "can", "geometry", "heaps", "split_tokens", "recompute_tokens"}

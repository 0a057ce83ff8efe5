"""Whether a model fits, by its config.json and the lengths of its files alone."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from microserve.protocol.settings.settings import Settings
from microserve.services.engine.room import Room
from microserve.services.local.hub.name import HubError
from microserve.services.local.hub.sizes import check_disk, check_memory, in_bytes, sizes_of

GIB = 1 << 30
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
SETTINGS = Settings()


def settings(*, engines: int = 2, **model: Any) -> Settings:
    return replace(
        SETTINGS,
        model=replace(SETTINGS.model, **model),
        mesh=replace(SETTINGS.mesh, engines=engines),
    )


def test_weights_count_in_the_dtype_that_is_asked_for() -> None:
    assert sizes_of("n", CONFIG, 1000, "bfloat16").weights_nbytes == 1000
    assert sizes_of("n", CONFIG, 1000, "float32").weights_nbytes == 2000
    newer = {**CONFIG, "torch_dtype": None, "dtype": "float32"}
    assert sizes_of("n", newer, 1000, "bfloat16").weights_nbytes == 500
    assert sizes_of("n", {}, 1000, "bfloat16").weights_nbytes == 1000  # nobody says


def test_kv_of_a_token_is_that_of_all_layers() -> None:
    """Of Qwen3-0.6B: 2 x 28 layers x 8 heads x 128 x 2 bytes."""
    assert sizes_of("n", CONFIG, 1, "bfloat16").kv_token_nbytes == 114_688
    assert sizes_of("n", CONFIG, 1, "float32").kv_token_nbytes == 229_376
    assert sizes_of("n", {"model_type": "qwen3"}, 1, "bfloat16").kv_token_nbytes == 0


def test_a_model_that_fits_is_let_through() -> None:
    check_memory("n", CONFIG, GIB, settings(), Room(8 * GIB, 8 * GIB, "this machine"))


@pytest.mark.parametrize(
    ("file_gib", "changed", "told", "fits"),
    [
        (9, settings(), "there is no room for this model: this machine has 8.00 GiB left", None),
        (5, settings(dtype="float32"), "there is no room", "model.dtype bfloat16"),
        # Each engine has its own weights where no packed ones are mapped.
        (5, settings(packed_cache_mb=0), "10.00 GiB are for weights", "one engine"),
        (5, settings(), None, None),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_figures_and_what_would(
    file_gib: int, changed: Settings, told: str | None, fits: str | None
) -> None:
    room = Room(8 * GIB, 8 * GIB, "this machine")
    if told is None:
        check_memory("org/n", CONFIG, file_gib * GIB, changed, room)
        return
    with pytest.raises(HubError) as caught:
        check_memory("org/n", CONFIG, file_gib * GIB, changed, room)
    text = str(caught.value)
    assert text.startswith("org/n does not fit here: ") and told in text
    assert ("it would fit with" in text) == (fits is not None)
    assert fits is None or text.endswith(fits)


def test_a_pool_that_does_not_fit_says_how_many_blocks_would() -> None:
    cache = replace(SETTINGS.kvcache, num_blocks=1_000_000)
    with pytest.raises(HubError, match=r"at most \d+ blocks fit; it would fit with kvcache.num_blocks 0"):
        check_memory("n", CONFIG, GIB, replace(settings(), kvcache=cache), Room(8 * GIB, 8 * GIB, "m"))


def test_a_config_that_leaves_much_open_is_judged_by_its_weights() -> None:
    room = Room(8 * GIB, 8 * GIB, "this machine")
    check_memory("n", {"model_type": "qwen3"}, 2 * GIB, settings(), room)
    with pytest.raises(HubError, match="its weights take"):
        check_memory("n", {"model_type": "qwen3"}, 8 * GIB, settings(), room)


def test_the_memory_of_a_gpu_is_for_its_engine_to_say() -> None:
    on_gpu = replace(settings(), engine=replace(SETTINGS.engine, device="cuda:0"))
    check_memory("n", CONFIG, 100 * GIB, on_gpu, Room(8 * GIB, 8 * GIB, "this machine"))


def test_a_disk_without_room_is_told_before_anything_comes() -> None:
    check_disk("n", 10**9, 2 * 10**9, "/cache")
    check_disk("n", 0, 0, "/cache")  # all of it is there
    with pytest.raises(HubError, match=r"org/n needs 1.50 GB more in /cache, of whose disk 1.00 GB"):
        check_disk("org/n", 15 * 10**8, 10**9, "/cache")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.50 kB"), (93_000_000, "93.00 MB")]
)
def test_sizes_in_words(nbytes: int, text: str) -> None:
    assert in_bytes(nbytes) == text

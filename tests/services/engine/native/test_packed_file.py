"""A file of packed weights is whole, or it is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from microserve.kernels.cpu.library import library
from microserve.protocol import log
from microserve.services.engine.native import packed_file
from tests.support.engine.model.packed_models import files, is_mapped, load, loading
from tests.support.engine.model.tiny_model import make_tiny_model


def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def cut_a_little(content: bytearray) -> None:
    del content[-1]


def empty(content: bytearray) -> None:
    content.clear()


def lengthen(content: bytearray) -> None:
    content += bytes(8)


def flip_in_weights(content: bytearray) -> None:
    content[5000] ^= 4


def lose_a_page(content: bytearray) -> None:
    content[4096:8192] = bytes(4096)


def swap_pages(content: bytearray) -> None:
    content[:8192] = content[4096:8192] + content[:4096]


def flip_in_description(content: bytearray) -> None:
    content[-100] ^= 1


def flip_in_trailer(content: bytearray) -> None:
    content[-50] ^= 0x80


@pytest.mark.parametrize(
    "damage",
    [
        *(cut, cut_a_little, empty, lengthen, flip_in_weights, lose_a_page, swap_pages),
        *(flip_in_description, flip_in_trailer),
    ],
)
def test_a_file_that_is_not_whole_is_told_and_made_anew(
    tmp_path: Path, cache: Path, damage: Callable[[bytearray], None]
) -> None:
    directory = make_tiny_model(tmp_path / "model")
    expected = load(directory).weights.memory.tobytes()
    (file,) = files(cache)
    content = bytearray(file.read_bytes())
    damage(content)
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o400)

    with capture_logs() as logs:
        found = load(directory)
    assert is_mapped(found) and found.weights.memory.tobytes() == expected
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == [log.WEIGHTS_NOT_KEPT]
    assert loading(directory).find() is not None


def test_what_others_could_have_written_is_not_taken(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    load(directory)
    (file,) = files(cache)
    file.chmod(0o666)
    assert loading(directory).find() is None


def test_nothing_is_followed_out_of_the_cache(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    load(directory)
    (file,) = files(cache)
    elsewhere = tmp_path / "elsewhere"
    os.rename(file, elsewhere)
    os.symlink(elsewhere, file)
    assert loading(directory).find() is None and elsewhere.exists()


def test_a_description_of_what_is_none_is_refused(tmp_path: Path, cache: Path) -> None:
    """Whole by its sums, and made by another version perhaps."""
    model = load(make_tiny_model(tmp_path / "model"))
    odd = replace(model, shape=replace(model.shape, hidden=model.shape.hidden * 2))
    packed_file.write(odd, tmp_path / "odd")
    with pytest.raises(packed_file.NotWhole, match="have to be"):
        packed_file.read(tmp_path / "odd", library(), "tiny")

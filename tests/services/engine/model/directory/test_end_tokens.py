"""What ends a sequence is what ``transformers.generate`` would stop at."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from transformers import AutoModelForCausalLM

from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.services.engine.model.directory.end_tokens import eos_of
from microserve.services.engine.model.model import load_model
from tests.support.engine.model.tiny_model import make_tiny_model

ABSENT = "absent"
DECLARED = [ABSENT, 5, [5, 6], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def write(directory: Path, name: str, **settings: Any) -> dict[str, Any]:
    present = {key: value for key, value in settings.items() if value != ABSENT}
    (directory / name).write_text(json.dumps(present))
    return present


def declare(directory: Path, config: Any, generation: Any, tokenizer: Any = ABSENT) -> dict[str, Any]:
    """What each file says; ``no file``: it is not there. Returns config.json's content."""
    (directory / "generation_config.json").unlink(missing_ok=True)
    raw = json.loads((directory / "config.json").read_text())
    raw = write(directory, "config.json", **{**raw, "eos_token_id": config})
    if generation != "no file":
        write(directory, "generation_config.json", eos_token_id=generation)
    write(directory, "tokenizer_config.json", eos_token=tokenizer)
    return raw


@pytest.mark.parametrize(
    ("config", "generation"), list(itertools.product(DECLARED, ["no file", ABSENT, 7, [7, 8], None]))
)
def test_as_transformers(model: Path, config: Any, generation: Any) -> None:
    raw = declare(model, config, generation)
    expected = AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id
    ids = expected if isinstance(expected, list) else [] if expected is None else [expected]
    assert eos_of(model, raw) == frozenset(ids)
    for load_format in ("auto", "random"):
        assert load_model(model, dtype="float32", load_format=load_format).spec.eos_token_ids == set(ids)


@pytest.mark.parametrize(
    ("tokenizer", "warned"),
    [
        ("<|im_end|>", {"tokenizer_eos_token": "<|im_end|>", "tokenizer_eos_token_id": 2}),
        ({"content": "<|im_start|>"}, {"tokenizer_eos_token_id": 1}),
        ("<|endoftext|>", None),  # 0: among them
        ("unheard of", None),
        (None, None),
    ],
)
def test_a_tokenizer_of_another_opinion_is_told(model: Path, tokenizer: Any, warned: Any) -> None:
    """Different in all three: the first decides, and an operator hears of the last."""
    raw = declare(model, 5, [7, 0], tokenizer)
    with structlog.testing.capture_logs() as logs:
        assert eos_of(model, raw) == {0, 7}
    told = [each for each in logs if each["event"] == log.EOS_MISMATCHED]
    assert len(told) == (warned is not None)
    for each in told:
        assert each.items() >= warned.items()
        assert (each["eos_token_ids"], each["source"]) == ([7, 0], "generation_config.json")


def test_a_tokenizer_alone_decides_nothing(model: Path) -> None:
    raw = declare(model, ABSENT, "no file", "<|im_end|>")
    with structlog.testing.capture_logs() as logs:
        assert eos_of(model, raw) == frozenset()
    assert [each["event"] for each in logs] == [log.EOS_MISMATCHED]


@pytest.mark.parametrize("wrong", ["2", [1, "2"], 1.5, True, -1])
def test_what_is_no_id_is_refused_with_its_file(model: Path, wrong: Any) -> None:
    raw = declare(model, 5, wrong)
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id") as caught:
        eos_of(model, raw)
    assert caught.value.field == "model.path"

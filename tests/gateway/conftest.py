"""What the gateway's tests share: a model directory made on the fly, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from microserve.gateway.text.tokenizer import ModelTokenizer
from tests.support.gateway.gateway_world import make_model, make_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def raw_tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> ModelTokenizer:
    return ModelTokenizer.load(model)

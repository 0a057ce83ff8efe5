"""A model that knows tools and thoughts, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.support.gateway.talking_model import make_talking_model, talking_tokenizer


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_model(tmp_path_factory.mktemp("model") / "talker")


@pytest.fixture(scope="session")
def tokens() -> Tokenizer:
    return talking_tokenizer()

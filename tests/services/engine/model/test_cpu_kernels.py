"""``engine.cpu_kernels``: what serves where the native step can be had, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from microserve.kernels.cpu import library as libraries
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import Settings
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.native import choose_step


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), dtype="float32")


def settings(cpu_kernels: str) -> Settings:
    return msgspec.convert({"engine": {"cpu_kernels": cpu_kernels}}, Settings)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler, and with nothing that one has made."""
    monkeypatch.setattr("microserve.kernels.cpu.compiler.find_zig", lambda: None)
    monkeypatch.setattr("microserve.kernels.cpu.objects.PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(libraries, "_loaded", [])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("MICROSERVE_KERNEL_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("bare")
def test_without_a_compiler_transformers_serves_and_one_warning_says_what_is_missing(
    model: LoadedModel,
) -> None:
    with capture_logs() as logs:
        assert choose_step(settings("auto"), model) is None
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("kernel.missing", "warning")
    assert (line["kernel"], line["instead"]) == ("cpu_step", "transformers")
    assert line["detail"] == "no C++ compiler: install g++ or clang++, or the package ziglang"


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("wanted", ["portable", "avx2", "avx512", "amx"])
def test_what_was_asked_for_by_name_and_cannot_be_had_is_an_error(model: LoadedModel, wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{wanted}' cannot be had: no C\+\+ compiler") as raised:
        choose_step(settings(wanted), model)
    assert raised.value.field == "engine.cpu_kernels"


def test_an_old_cpu_has_what_it_can_run_and_nothing_else(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries.Library, "supports", lambda _, variant: variant == "portable")
    with capture_logs() as logs:
        assert choose_step(settings("auto"), model) is not None
        assert choose_step(settings("portable"), model) is not None
    assert [line for line in logs if line["log_level"] != "info"] == []
    for wanted in ("avx2", "avx512", "amx"):
        with pytest.raises(ConfigError, match=f"cannot run the variant {wanted}: it has portable") as raised:
            choose_step(settings(wanted), model)
        assert raised.value.field == "engine.cpu_kernels"


@pytest.mark.usefixtures("bare")
def test_transformers_can_be_asked_for_without_a_word(model: LoadedModel) -> None:
    with capture_logs() as logs:
        assert choose_step(settings("transformers"), model) is None
    assert logs == []

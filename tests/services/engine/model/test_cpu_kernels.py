"""``engine.cpu_kernels``: what serves where the native step can be had, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from microserve.kernels.cpu import library as libraries
from microserve.kernels.cpu.step import CpuStep
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import Settings
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.native import choose_step
from microserve.services.engine.model.runner import MakeStep, ModelRunner


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), dtype="float32")


def settings(cpu_kernels: str, threads: int = 1) -> Settings:
    return msgspec.convert({"engine": {"cpu_kernels": cpu_kernels, "threads": threads}}, Settings)


def runner(model: LoadedModel, chosen: MakeStep | None) -> ModelRunner:
    spec = model.spec
    layout = KvLayout("m", spec.num_layers, 8, 16, spec.num_kv_heads, spec.head_dim, spec.dtype)
    return ModelRunner(model, np.zeros(layout.data_nbytes, np.uint8), 8, 16, make_step=chosen)


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
@pytest.mark.parametrize("wanted", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_what_was_asked_for_by_name_and_cannot_be_had_is_an_error(model: LoadedModel, wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{wanted}' cannot be had: no C\+\+ compiler") as raised:
        choose_step(settings(wanted), model)
    assert raised.value.field == "engine.cpu_kernels"


def test_an_old_cpu_has_what_it_can_run_and_nothing_else(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries.Library, "supports", lambda _, variant, *dtype: variant == "portable")
    with capture_logs() as logs:
        assert choose_step(settings("auto"), model) is not None
        assert choose_step(settings("portable"), model) is not None
    assert [line for line in logs if line["log_level"] != "info"] == []
    for wanted in ("avx2", "avx512", "avx512bf16", "amx"):
        with pytest.raises(ConfigError, match=f"cannot run the variant {wanted}: it has portable") as raised:
            choose_step(settings(wanted), model)
        assert raised.value.field == "engine.cpu_kernels"


@pytest.mark.usefixtures("bare")
def test_transformers_can_be_asked_for_without_a_word(model: LoadedModel) -> None:
    with capture_logs() as logs:
        assert choose_step(settings("transformers"), model) is None
    assert logs == []


def no_memory(*_: object) -> None:
    raise KernelUnavailable("no memory for the native step")


@pytest.mark.parametrize("call", ["__init__", "set_layer", "set_model"])
def test_where_there_is_no_memory_for_the_step_transformers_serves(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(CpuStep, call, no_memory)
    with capture_logs() as logs:
        assert runner(model, choose_step(settings("auto"), model)).kernels == "transformers"
    (line,) = [line for line in logs if line["log_level"] != "info"]
    assert (line["event"], line["detail"]) == ("kernel.missing", "no memory for the native step")
    with pytest.raises(ConfigError, match="'portable' cannot be had: no memory") as raised:
        runner(model, choose_step(settings("portable"), model))
    assert raised.value.field == "engine.cpu_kernels"


def test_more_threads_than_the_step_can_have_are_as_many_as_it_can(model: LoadedModel) -> None:
    assert runner(model, choose_step(settings("auto", threads=100), model)).kernels != "transformers"

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
from microserve.protocol.settings.settings import Settings
from microserve.services.engine.loading import make_runner
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner
from microserve.services.engine.native.kernels import choose_kernels
from microserve.services.engine.native.packed_model import PackedModel
from microserve.services.engine.native.packing import pack_model
from microserve.services.engine.native.runner import NativeRunner
from tests.support.engine.model.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PackedModel:
    return pack_model(load_model(str(tiny_model), dtype="float32"), libraries.library())


def settings(cpu_kernels: str, threads: int = 1, path: Path | str = "") -> Settings:
    own = {"engine": {"cpu_kernels": cpu_kernels, "threads": threads}}
    return msgspec.convert({**own, "model": {"path": str(path), "dtype": "float32"}}, Settings)


def runner_of(model: PackedModel, settings: Settings) -> NativeRunner | ModelRunner:
    spec = model.spec
    layout = KvLayout("m", spec.num_layers, 8, 16, spec.num_kv_heads, spec.head_dim, spec.dtype)
    return make_runner(settings, model, np.zeros(layout.data_nbytes, np.uint8), 8, None)


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
def test_without_a_compiler_transformers_serves_and_one_warning_says_what_is_missing() -> None:
    with capture_logs() as logs:
        assert choose_kernels(settings("auto")) is None
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("kernel.missing", "warning")
    assert (line["kernel"], line["instead"]) == ("cpu_step", "transformers")
    assert line["detail"] == "no C++ compiler: install g++ or clang++, or the package ziglang"


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("wanted", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_what_was_asked_for_by_name_and_cannot_be_had_is_an_error(wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{wanted}' cannot be had: no C\+\+ compiler") as raised:
        choose_kernels(settings(wanted))
    assert raised.value.field == "engine.cpu_kernels"


@pytest.mark.usefixtures("bare")
def test_int8_weights_that_cannot_be_had_are_an_error() -> None:
    asked = msgspec.convert({"model": {"weights": "int8"}}, Settings)
    with pytest.raises(ConfigError, match=r"model.weights 'int8' cannot be had: no C\+\+ compiler") as raised:
        choose_kernels(asked)
    assert raised.value.field == "model.weights"


@pytest.mark.parametrize("own", [{"cpu_kernels": "transformers"}, {"device": "cuda:0"}])
def test_int8_weights_are_the_native_steps_alone(own: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="needs the native CPU step") as raised:
        msgspec.convert({"model": {"weights": "int8"}, "engine": own}, Settings).check()
    assert raised.value.field == "model.weights"


def test_an_old_cpu_has_what_it_can_run_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.Library, "supports", lambda _, variant, *dtype: variant == "portable")
    with capture_logs() as logs:
        assert choose_kernels(settings("auto")) is not None
        assert choose_kernels(settings("portable")) is not None
    assert [line for line in logs if line["log_level"] != "info"] == []
    for wanted in ("avx2", "avx512", "avx512bf16", "amx"):
        with pytest.raises(ConfigError, match=f"cannot run the variant {wanted}: it has portable") as raised:
            choose_kernels(settings(wanted))
        assert raised.value.field == "engine.cpu_kernels"


@pytest.mark.usefixtures("bare")
def test_transformers_can_be_asked_for_without_a_word() -> None:
    with capture_logs() as logs:
        assert choose_kernels(settings("transformers")) is None
    assert logs == []


def no_memory(*_: object) -> None:
    raise KernelUnavailable("no memory for the native step")


def test_where_there_is_no_memory_for_the_step_transformers_serves(
    model: PackedModel, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuStep, "__init__", no_memory)
    with capture_logs() as logs:
        runner = runner_of(model, settings("auto", path=tiny_model))
    assert runner.kernels == "transformers"
    (line,) = [line for line in logs if line["log_level"] != "info"]
    assert (line["event"], line["detail"]) == ("kernel.missing", "no memory for the native step")
    with pytest.raises(ConfigError, match="'portable' cannot be had: no memory") as raised:
        runner_of(model, settings("portable", path=tiny_model))
    assert raised.value.field == "engine.cpu_kernels"


def test_transformers_does_not_go_on_for_a_model_that_is_another_one_meanwhile(
    model: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuStep, "__init__", no_memory)
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="have changed meanwhile") as raised:
        runner_of(model, settings("auto", path=other))
    assert raised.value.field == "model.path"


def test_more_threads_than_the_step_can_have_are_as_many_as_it_can(model: PackedModel) -> None:
    assert runner_of(model, settings("auto", threads=100)).kernels != "transformers"

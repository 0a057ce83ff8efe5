"""A name that means nothing is refused with the one that was meant; a wrong value with what would be right.

Alike for files, the environment and flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings, variable

PATHS = [
    f"{section.name}.{field.name}"
    for section in msgspec.structs.fields(Settings)
    for field in msgspec.structs.fields(section.type)
]


def refused(**sources: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        load_settings(**sources)
    return error.value


def refused_file(directory: Path, content: str | bytes) -> ConfigError:
    file = directory / "mesh.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return refused(file=file)


# --- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("engine.thread", "engine.threads"),
        ("gateway.prot", "gateway.port"),
        ("buss.credit", "bus.credit"),
        ("router.port", "gateway.port"),
        ("max_streams", "gateway.max_streams"),
        ("Gateway.Port", "gateway.port"),
        ("gateway.max-n", "gateway.max_n"),
        ("kvcache.blocksize", "kvcache.block_size"),
        ("index.adress", "index.address"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_the_one_that_was_meant(
    wrong: str, meant: str, tmp_path: Path
) -> None:
    by_flag = refused(overrides=[f"{wrong}=1"])
    assert by_flag.detail == f"{wrong}: unknown field, did you mean {meant}?"

    section, _, name = wrong.rpartition(".")
    by_file = refused_file(tmp_path, f"{f'[{section}]' if section else ''}\n{name} = 1\n")
    assert by_file.detail == f"{wrong}: unknown field, did you mean {meant}? ({tmp_path / 'mesh.toml'})"

    if (name := variable(wrong)) == variable(meant):
        return  # capitals are all alike there
    by_environment = refused(environment={name: "1"})
    assert f"did you mean {variable(meant)}?" in by_environment.detail
    assert name in by_environment.detail


def test_where_nothing_is_alike_all_that_there_are_are_named() -> None:
    assert refused(overrides=["mesh.zzz=1"]).detail == (
        "mesh.zzz: unknown field; there are engines, metrics, ready_timeout_s, max_restarts, "
        "restart_window_s, watchdog_s"
    )
    assert "sections are bus, model, engine" in refused(overrides=["zzz.zzz=1"]).detail
    assert refused(overrides=["buss=3"]).detail == "buss: unknown field, did you mean bus?"


@settings(deadline=None)
@given(st.sampled_from(PATHS), st.data())
def test_every_setting_with_one_slip_is_refused_and_named(path: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(path) - 1))
    wrong = path[:place] + path[place + 1 :]
    if wrong in PATHS or "" in wrong.split("."):
        return
    assert "did you mean " in refused(overrides=[f"{wrong}=1"]).detail, wrong


@pytest.mark.parametrize("path", PATHS)
def test_one_underscore_too_few_is_refused_with_the_right_name(path: str) -> None:
    name = variable(path).replace("__", "_")
    error = refused(environment={name: "1"})
    assert (error.field, error.detail) == (name, f"{name} is no setting, did you mean {variable(path)}?")


def test_no_variable_of_ours_is_ignored() -> None:
    assert "MICROSERVE_GATEWAY__PORT" in refused(environment={"MICROSERVE_PORT": "1"}).detail
    assert "MICROSERVE_GATEWAY__PORT" in refused(environment={"microserve_gateway__port": "1"}).detail
    assert "MICROSERVE_MESH__ENGINES" in refused(environment={"MICROSERVE_ENGINES": "3"}).detail
    assert "is no setting" in refused(environment={"MICROSERVE_HOME": "/"}).detail
    assert "is no setting" in refused(environment={"MICROSERVE_": ""}).detail


def test_a_variable_that_is_no_setting_of_ours_is_left_alone() -> None:
    supervisord = {"MICROSERVE_BIN": "b", "MICROSERVE_LOGS": "l", "MICROSERVE_ENGINES": "2"}
    kubernetes = {  # what a service named microserve-gateway puts into every container
        "MICROSERVE_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "MICROSERVE_GATEWAY_SERVICE_PORT_HTTP": "8000",
        "MICROSERVE_GATEWAY_PORT": "tcp://10.0.0.1:8000",
        "MICROSERVE_GATEWAY_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    own = {
        "MICROSERVE_CONFIG": "f",
        "MICROSERVE_KERNEL_CACHE": "k",
        "MICROSERVE_PACKED_CACHE": "p",
        "MICROSERVE_TEST_SEEDS": "3",
    }
    others = {**supervisord, **kubernetes, **own, "MICROSERVER": "1"}
    assert load_settings(environment=others) == Settings()


def test_one_setting_by_two_variables_is_refused() -> None:
    twice = {"MICROSERVE_GATEWAY__PORT": "1", "MICROSERVE_gateway__port": "2"}
    assert "gateway.port is given twice" in refused(environment=twice).detail


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("gateway.max_body_mb=32MB", "a whole number above 0 (megabytes), is '32MB'"),
        ("bus.linger_s=5s", "a number of 0 or more (seconds), is '5s'"),
        ("gateway.port=1.5", "a whole number from 0 to 65535, is 1.5"),
        ("gateway.port=true", "a whole number from 0 to 65535, is true"),
        ("gateway.port=", "a whole number from 0 to 65535, is ''"),
        ("gateway.port={a=1}", "a whole number from 0 to 65535, is {'a': 1}"),
        ("kvcache.checksums=yes", "true or false, is 'yes'"),
        ("kvcache.checksums=", "true or false, is ''"),
        ("engine.labels=a", "a list [\"...\", ...] of texts, is 'a'"),
        ("engine.labels=['a',1]", "a list [\"...\", ...] of texts, is ['a', 1]"),
        ("router.strategies.balanced=3", "a table of tables ([section.name]), is {'balanced': 3}"),
        ("model.dtype=fp32", "'float32', 'bfloat16' or 'float16', is 'fp32'"),
        ("model.load_format=gguf", "'auto' or 'random', is 'gguf'"),
        ("log.level=loud", "'debug', 'info', 'warning', 'error' or 'critical', is 'loud'"),
        ("index.address=", "tcp://HOST:PORT, [HOST] for IPv6, or ipc://PATH, is ''"),
        ("index.address=127.0.0.1:7100", "or ipc://PATH, is '127.0.0.1:7100'"),
        ("router.address=tcp://127.0.0.1", "or ipc://PATH, is 'tcp://127.0.0.1'"),
        ("engine.address=tcp://127.0.0.1:70000", "or ipc://PATH, is 'tcp://127.0.0.1:70000'"),
        ("engine.address=tcp://::1:7100", "or ipc://PATH, is 'tcp://::1:7100'"),
        ("gateway.routers=['tcp://a:1', 'b']", "or ipc://PATH, is 'b'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(override: str, right: str) -> None:
    path, _, raw = override.partition("=")
    field = path if path.count(".") == 1 else path.rpartition(".")[0]
    error = refused(overrides=[override])
    assert error.field == field
    assert error.detail.startswith(f"{field} must be ") and right in error.detail
    if "{" not in raw and path == field:
        by_environment = refused(environment={variable(path): raw})
        assert right in by_environment.detail


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", ["a\0b", "\udcff"])
def test_text_that_is_none_is_refused_by_name(path: str, value: str) -> None:
    for raw in (value, f'["{value}"]'):
        assert refused(overrides=[f"{path}={raw}"]).field == path
        assert refused(environment={variable(path): raw}).detail.isprintable()


def test_no_secret_is_shown(tmp_path: Path) -> None:
    for error in (
        refused(overrides=["gateway.api_keys=sk-secret"]),
        refused(environment={"MICROSERVE_GATEWAY__API_KEYS": "sk-secret"}),
        refused_file(tmp_path, "[gateway]\napi_keys = sk-secret\n"),
        refused_file(tmp_path, "[gateway]\napi_keys = 'sk-secret'\n"),
    ):
        assert error.field == "gateway.api_keys"
        assert "sk-" not in error.detail


def test_the_environment_names_its_variable_and_a_file_its_name(tmp_path: Path) -> None:
    error = refused(environment={"MICROSERVE_GATEWAY__PORT": "x"})
    assert error.detail.endswith("is 'x' (MICROSERVE_GATEWAY__PORT)")
    error = refused_file(tmp_path, "[gateway]\nport = 'x'\n")
    assert error.detail.endswith(f"is 'x' ({tmp_path / 'mesh.toml'})")


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "field", "detail"),
    [
        ("[gateway]\nport = 1\nport = 2\n", "gateway.port", "line 3: gateway.port: given twice"),
        ("[bus]\n[gateway]\n[bus]\n", "bus", "line 3: bus: a section stands twice"),
        (
            "[model]\npath = /srv/model\n",
            "model.path",
            "line 2: model.path: no value of TOML; text stands in",
        ),
        ("[gateway]\nport =\n", "gateway.port", "line 2: gateway.port: no value of TOML"),
        ("[gateway\n", None, "line 1: "),
        (b"[model]\nname = '\xff'\n", None, "line 2 is not UTF-8"),
        ("x = " + "[" * 5000, None, "nested too deep"),
        (
            "[[gateway]]\nport = 1\n",
            "gateway",
            "gateway must be a section ([gateway] with fields), is [{'port'",
        ),
        ("gateway = 3\n", "gateway", "gateway must be a section ([gateway] with fields), is 3"),
    ],
)
def test_a_file_that_says_nothing_right_is_refused_by_field_and_line(
    content: str | bytes, field: str | None, detail: str, tmp_path: Path
) -> None:
    error = refused_file(tmp_path, content)
    assert error.field == (field or str(tmp_path / "mesh.toml"))
    assert detail in error.detail
    assert str(tmp_path / "mesh.toml") in error.detail


def test_what_is_no_file_of_settings_is_refused_at_once(tmp_path: Path) -> None:
    assert "Is a directory" in refused(file=tmp_path).detail
    assert "No such file" in refused(file="").detail
    assert "null byte" in refused(file="a\0b").detail
    assert "more than 4 MB" in refused(file="/dev/zero").detail
    assert refused(file=f"{tmp_path}/\udcff").detail.isprintable()

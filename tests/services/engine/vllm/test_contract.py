"""vLLM's signatures and order of calls, in every version that we say we know.

What a version has was read from its files (contract/*.json, by tooling/vllm_contract.py), so this runs
everywhere; where vLLM is installed, and where its wheel can be had, the files are held against it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.vllm import version
from microserve.services.engine.vllm.arguments import arguments_of

ROOT = Path(__file__).parents[4]
CONTRACT = Path(__file__).with_name("contract")
CONNECTOR = ROOT / "services/engine/vllm/connector/connector.py"
BASE = "distributed/kv_transfer/kv_connector/v1/base.py"
WHEEL = "vllm==0.33.0"

each_version = pytest.mark.parametrize("minor", version.HELD)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tooling_contract", ROOT / "tooling/vllm_contract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(minor: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONTRACT / f"{minor}.json").read_text())
    return content


def hooks(tool: ModuleType) -> dict[str, Any]:
    """Parameters of our connector's methods, without those of our own."""
    connector = next(
        each
        for each in ast.parse(CONNECTOR.read_text()).body
        if isinstance(each, ast.ClassDef)
        and any("KVConnectorBase" in ast.unparse(base) for base in each.bases)
    )
    return {name: each for name, each in tool._members(connector) if isinstance(each, dict)}


def fits(ours: list[str], theirs: list[str]) -> bool:
    """Whether a caller of theirs may call ours: the same names in the same order; ours may want less."""
    plain = [[each.rstrip("=") for each in names if each != "*"] for names in (ours, theirs)]
    takes_more = any(each.startswith("**") for each in ours)
    return plain[0] == plain[1] or (takes_more and plain[0][:-1] == plain[1][: len(plain[0]) - 1])


def test_there_is_one_for_each_version() -> None:
    assert {path.stem for path in CONTRACT.glob("*.json")} == set(version.HELD)
    for minor in version.HELD:
        assert kept(minor)["version"].startswith(f"{minor}.")
        assert kept(minor)["classes"].keys() == {f"{path}:{name}" for path, name, _ in _uses()}


def _uses() -> list[tuple[str, str, tuple[str, ...]]]:
    return [(path, name, used) for path, classes in version.USES.items() for name, used in classes.items()]


@each_version
def test_everything_that_we_use_is_there(minor: str) -> None:
    for path, name, used in _uses():
        assert kept(minor)["classes"][f"{path}:{name}"].keys() >= set(used), name


@each_version
def test_our_hooks_are_vllms_by_name_and_parameters(minor: str, tool: ModuleType) -> None:
    classes = kept(minor)["classes"]
    base = {**classes[f"{BASE}:SupportsHMA"], **classes[f"{BASE}:KVConnectorBase_V1"]}
    ours = hooks(tool)
    assert len(ours) > 10
    for name, each in ours.items():
        if name.startswith("_") and name != "__init__":
            continue
        assert name in base, f"vLLM {minor} has no {name}"
        assert fits(each["parameters"], base[name]["parameters"]), (name, each, base[name])
        assert ("classmethod" in each["kinds"]) == ("classmethod" in base[name]["kinds"]), name
        assert ("property" in each["kinds"]) == ("property" in base[name]["kinds"]), name
    abstract = {
        name for name, each in base.items() if isinstance(each, dict) and "abstractmethod" in each["kinds"]
    }
    assert abstract <= ours.keys()


@each_version
def test_our_arguments_are_vllms(minor: str) -> None:
    settings = load_settings(
        overrides=[
            "kvcache.block_size=32",
            "vllm.kv_cache_mb=1",
            "engine.max_model_len=9",
        ]
    )
    fields = kept(minor)["classes"]["engine/arg_utils.py:EngineArgs"]
    assert arguments_of(settings, None).keys() <= fields.keys()


@each_version
def test_calls_come_in_the_order_that_we_need(minor: str) -> None:
    assert {place: tuple(calls) for place, calls in kept(minor)["orders"].items()} == version.ORDERS


def test_a_version_that_nothing_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "version", lambda _: "0.33.1")
    assert version.installed() == "0.33.1"
    monkeypatch.setattr(version, "version", lambda _: "0.34.0")
    with pytest.raises(ConfigError, match=r"vLLM 0\.34\.0 is installed, .* knows 0\.32 and 0\.33"):
        version.installed()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="not installed"):  # none is where these tests run
        version.installed()


def test_a_name_that_is_gone_or_calls_in_another_order_are_seen(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm"
    for path in {place.partition(":")[0] for place in version.ORDERS} | version.USES.keys():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text("")
    with pytest.raises(LookupError, match=r"base\.py: no KVConnectorBase_V1"):
        tool.contract_of(package)
    texts = {"f.py": "class A:\n def g(self, b, *, c=1, **d):\n  self.two()\n  self.one()\n  x.two()\n"}
    monkeypatch.setattr(tool, "ORDERS", {"f.py:A.g": ("one", "two")})
    assert tool._order(texts.__getitem__, "f.py:A.g") == ["one", "two"]  # by the last place of each
    texts["f.py"] = texts["f.py"].replace("x.two", "x.three")
    assert tool._order(texts.__getitem__, "f.py:A.g") == ["two", "one"]
    assert tool._class_of(texts.__getitem__, "f.py", "A", ("g",))["g"]["parameters"] == [
        "self",
        "b",
        "*",
        "c=",
        "**d",
    ]
    with pytest.raises(LookupError, match=r"A has no h"):
        tool._class_of(texts.__getitem__, "f.py", "A", ("h",))


# --- vLLM itself -------------------------------------------------------------------------------------

_ASK = """
import importlib, inspect, json, sys
import vllm
used = json.loads(sys.argv[1])
kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
def shown(function):
    found, starred = [], False
    for each in inspect.signature(function).parameters.values():
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            found.append("*")
        starred = starred or each.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        prefix = stars.get(each.kind, "")
        found.append(prefix + each.name + "=" * (each.default is not inspect.Parameter.empty))
    return found
answer = {"version": vllm.__version__, "methods": {}}
for module, name, method in used:
    found = inspect.getattr_static(getattr(importlib.import_module(module), name), method)
    function = getattr(found, "__func__", getattr(found, "fget", found))
    answer["methods"][f"{name}.{method}"] = shown(function)
print(json.dumps(answer))
"""


@pytest.mark.vllm
def test_the_installed_vllm_is_as_its_file_says(vllm_python: Path, tool: ModuleType) -> None:
    """Read anew, and imported: what Python calls is what the file has."""
    program = "import importlib.util as u; print(*u.find_spec('vllm').submodule_search_locations)"
    [package] = subprocess.check_output([vllm_python, "-P", "-c", program], text=True).split()
    assert tool.contract_of(Path(package)) == kept("0.32")
    methods = {
        (f"vllm.{path.removesuffix('.py').replace('/', '.')}", name, method): each["parameters"]
        for place, members in kept("0.32")["classes"].items()
        for path, name in [place.split(":")]
        for method, each in members.items()
        if isinstance(each, dict)
    }
    command = [str(vllm_python), "-P", "-c", _ASK, json.dumps(list(methods))]
    told = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    assert told["version"] == "0.32.0"
    assert told["methods"] == {f"{name}.{method}": found for (_, name, method), found in methods.items()}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_of_the_next_version_is_as_its_file_says(tool: ModuleType) -> None:
    """Of a build for GPUs, which this machine could not run; from the package index, once."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microserve/vllm/wheels"
    wheels = list(home.glob("vllm-0.33.0-*.whl"))
    if not wheels:
        home.mkdir(parents=True, exist_ok=True)
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(home), WHEEL]
        fetched = subprocess.run(
            [sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False
        )
        if fetched.returncode != 0:
            pytest.skip(f"the package index has no {WHEEL}: {fetched.stderr.strip()[-200:]}")
        wheels = list(home.glob("vllm-0.33.0-*.whl"))
    assert tool.contract_of(wheels[0]) == kept("0.33")

"""A package of several files is a strategy: read from a folder, packed into one text, loaded, forgotten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError
from microserve.protocol.strategy_source import MAX_FILES, packed, unpacked
from microserve.services.router.authoring.definition import load_file
from microserve.services.router.rollout.control import load_source
from microserve.services.router.source.files import read_files, read_source
from microserve.services.router.source.module import forget
from tests.support.router.router_world import expected_output, in_loop, router_world

TOP = """
from microserve.services.router.authoring import strategy
from .cost import least
from .deep import depth

@strategy
async def mine(mesh, request):
    from . import late
    assert (late.NUMBER, depth.DEPTH) == (7, 2)
    yield mesh.pick(None, request, cost=lambda engine: least(mesh, engine)).start_generate(request)
"""
FILES = {
    "__init__.py": TOP,
    "cost.py": "def least(mesh, engine):\n    return mesh.load(engine).sequences\n",
    "deep/__init__.py": "",
    "deep/depth.py": "from ..late import NUMBER\nDEPTH = NUMBER - 5",
    "late.py": "NUMBER = 7\n",
}


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory / "mine"


def test_a_package_serves_from_a_folder_and_as_it_is_published(tmp_path: Path) -> None:
    folder = write(tmp_path, {**FILES, "test_mine.py": "boo", "conftest.py": "boo"})
    assert set(read_files(folder)) == set(FILES)
    [own] = load_file(str(folder))
    published = load_source(read_source(folder), "mine")

    @in_loop
    async def main() -> None:
        async with router_world("d", "p") as world:
            for number, item in enumerate((own, published)):
                name = f"mine_{number}"
                world.router.strategies.add(type(item)(name, item.function, {}, {}, ""))
                answer = await world.gateway.generate([1, 2, 3], strategy=name)
                assert answer.token_ids == expected_output(4), answer.result

    main()
    module = published.function.__module__
    assert f"{module}.deep.depth" in sys.modules
    forget(module)
    assert not [name for name in sys.modules if name.startswith(module)]


def test_a_mistake_in_a_file_of_it_is_told_with_that_file(tmp_path: Path) -> None:
    folder, before = write(tmp_path, {**FILES, "cost.py": "least = 1 / 0\n"}), set(sys.modules)
    with pytest.raises(ConfigError, match="ZeroDivisionError") as raised:
        load_source(read_source(folder), "mine")
    trace = raised.value.__cause__.__traceback__  # type: ignore[union-attr]
    files = []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    assert files[-1].endswith("/cost.py>")
    assert not [name for name in set(sys.modules) - before if name.startswith("microserve_published.")]


@given(
    st.dictionaries(
        st.sampled_from(["a.py", "b/c.py", "b/__init__.py", "z.py"]),
        st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40),
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40),
)
def test_what_is_packed_is_what_is_unpacked(others: dict[str, str], top: str) -> None:
    files = {"__init__.py": top, **others}
    whole = {name: text if text.endswith("\n") or not text else text + "\n" for name, text in files.items()}
    assert unpacked(packed(files)) == (whole if others else files)
    assert unpacked(packed({**files, "x.py": packed(files)}))["x.py"].startswith(packed(files))


@pytest.mark.parametrize(
    "source",
    [
        "# microserve package abc\nx = 1\n",
        "# microserve package abc\n# abc a.py\nx = 1\n",
        "# microserve package abc\n# abc __init__.py\n# abc ../a.py\n",
        "# microserve package abc\n# abc __init__.py\n# abc a.txt\n",
        "# microserve package abc\n# abc __init__.py\n# abc __init__.py\n",
        "# microserve package abc\n# abc __init__.py\n"
        + "".join(f"# abc a{n}.py\n" for n in range(MAX_FILES)),
    ],
)
def test_what_is_no_package_is_refused(source: str) -> None:
    with pytest.raises(ConfigError):
        load_source(source, "mine")


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.py", write(tmp_path, {"a.py": ""})):
        with pytest.raises(ConfigError):
            load_file(str(path))

"""The page's files: open to everybody, under a policy that lets nothing else in; ours, or named others'."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import httpx
import pytest

from microserve.gateway.route import page_routes
from tests.gateway.test_view import keys_file
from tests.support.gateway.gateway_world import gateway_world, run

VENDOR = page_routes.FOLDER / "vendor"


def test_the_page_is_open_and_says_nothing_of_the_mesh(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        keys = f"gateway.api_keys_file={keys_file(tmp_path)}"
        async with gateway_world(model, keys) as world, httpx.AsyncClient(base_url=world.address) as http:
            for path in ("/", *(f"/page/{name}" for name in page_routes.files())):
                answer = await http.get(path)
                assert answer.status_code == 200, path
                assert answer.headers["content-security-policy"].startswith("default-src 'self';")
                assert answer.headers["x-content-type-options"] == "nosniff"
                again = await http.get(path, headers={"if-none-match": answer.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")
                assert (await http.head(path)).content == b""
            for path in (
                "/page/",
                "/page/nothing.js",
                "/page/..%2fapp.py",
                "/page/vendor/SHA256SUMS",
                "/page/__init__.py",
            ):
                assert (await http.get(path)).status_code == 404, path
            assert (await http.post("/page/main.js", content=b"{}")).status_code == 405
            assert (await http.get("/view/health")).status_code == 401

    run(main())


def test_what_others_wrote_is_as_they_published_it() -> None:
    sums = dict(line.split("  ")[::-1] for line in (VENDOR / "SHA256SUMS").read_text().splitlines())
    files = {path.name: path.read_bytes() for path in VENDOR.iterdir() if path.name != "SHA256SUMS"}
    assert {name: hashlib.sha256(body).hexdigest() for name, body in files.items()} == sums
    assert {name for name in files if name.startswith("LICENSE.")} == {
        f"LICENSE.{each}" for each in ("htm", "preact", "uPlot")
    }


OURS = sorted(name for name in page_routes.files() if not name.startswith("vendor/"))


@pytest.mark.parametrize("name", OURS)
def test_our_files_keep_to_the_policy(name: str) -> None:
    text = page_routes.files()[name].body.decode()
    assert len(text.splitlines()) < 250
    assert not re.search(
        r"innerHTML|dangerouslySetInnerHTML|\beval\(|new Function|document\.write|insertAdjacentHTML", text
    )
    assert not re.search(r"https?://(?!www\.w3\.org/)", text), "nothing of elsewhere"
    if name.endswith(".html"):
        assert "<style" not in text and not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", text)


def test_everything_that_the_page_asks_for_is_there() -> None:
    for name, file in page_routes.files().items():
        if name in OURS and name.endswith(".js"):
            folder = (page_routes.FOLDER / name).parent
            for wanted in re.findall(r'from "(\.[^"]+)"', file.body.decode()):
                path = (folder / wanted).resolve().relative_to(page_routes.FOLDER.resolve())
                assert path.as_posix() in page_routes.files()
    html = page_routes.files()["index.html"].body.decode()
    for wanted in re.findall(r'(?:src|href)="/page/([^"]+)"', html):
        assert wanted in page_routes.files()

"""Who is picked to work with an engine that exchanges no KV with some."""

from __future__ import annotations

import pytest

from microserve.protocol.errors import TransferFailed
from tests.support.router.paper_mesh import PaperEngine, by_id, paper_mesh


def test_who_exchanges_no_kv_with_the_excluded_is_passed_over() -> None:
    with paper_mesh(PaperEngine("a"), PaperEngine("b", barred=("a", "b")), PaperEngine("c")) as (mesh, asked):
        engines = by_id(mesh)
        for role in ("prefill", "decode", None):
            assert mesh.pick(role, asked, exclude=[engines["a"]]).id == "c"
        assert {mesh.pick(None, asked).id for _ in range(50)} == {"a", "b", "c"}, "alone it serves"


def test_where_nobody_is_left_one_engine_does_it_alone() -> None:
    with paper_mesh(PaperEngine("a"), PaperEngine("b", barred=("a", "b"))) as (mesh, asked):
        engines = by_id(mesh)
        for role in ("prefill", "decode"):
            assert mesh.pick(role, asked, exclude=[engines["a"]]).id == "a"
            with pytest.raises(TransferFailed) as failed:  # b sends none to itself either
                mesh.pick(role, asked, exclude=[engines["b"]])
            assert failed.value.suspect == "b", "another attempt goes by it"
        assert mesh.pick(None, asked, exclude=[engines["b"]]).id == "a", "who says no role may want no KV"


def test_no_kv_is_kept_of_who_may_send_none() -> None:
    with paper_mesh(PaperEngine("a", barred=("b", "a")), PaperEngine("b")) as (mesh, _):
        engines = by_id(mesh)
        assert not engines["b"].keeps_kv_of(engines["a"])
        assert engines["a"].keeps_kv_of(engines["b"])

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.kvcache.heap.choice import Reach, choose_kind
from microserve.protocol.errors import TransferFailed

ALL = frozenset({"nvshmem", "cuda_ipc", "shm"})
REACHES = st.builds(
    Reach,
    kinds=st.frozensets(st.sampled_from([*ALL, "memory"])),
    host=st.sampled_from(["a", "b"]),
    world=st.sampled_from(["", "w", "v"]),
)


@pytest.mark.parametrize(
    ("mine", "theirs", "kind"),
    [
        (Reach(ALL, "a", "w"), Reach(ALL, "b", "w"), "nvshmem"),
        (Reach(ALL, "a", "w"), Reach(ALL, "a", "w"), "nvshmem"),
        (Reach(ALL, "a", "w"), Reach(ALL, "a", "v"), "cuda_ipc"),
        (Reach(ALL, "a", "w"), Reach(ALL, "a"), "cuda_ipc"),
        (Reach(ALL, "a"), Reach(frozenset({"shm"}), "a"), "shm"),
    ],
)
def test_the_fastest_that_reaches_is_chosen(mine: Reach, theirs: Reach, kind: str) -> None:
    assert choose_kind(mine, theirs) == kind
    assert choose_kind(theirs, mine) == kind


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (Reach(ALL, "a"), Reach(ALL, "b")),
        (Reach(ALL, "a", "w"), Reach(ALL, "b", "v")),
        (Reach(frozenset({"cuda_ipc"}), "a"), Reach(frozenset({"shm"}), "a")),
        (Reach(frozenset({"memory"}), "a"), Reach(frozenset({"memory"}), "a")),
    ],
)
def test_out_of_reach_is_refused_and_says_why(mine: Reach, theirs: Reach) -> None:
    with pytest.raises(TransferFailed, match=rf"host {mine.host}.* host {theirs.host}"):
        choose_kind(mine, theirs)


@given(REACHES, REACHES)
def test_what_is_chosen_is_had_by_both_and_reaches(mine: Reach, theirs: Reach) -> None:
    try:
        kind = choose_kind(mine, theirs)
    except TransferFailed:
        return
    assert kind in mine.kinds & theirs.kinds
    if kind == "nvshmem":
        assert mine.world == theirs.world != ""
    else:
        assert mine.host == theirs.host

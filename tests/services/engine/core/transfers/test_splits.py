"""Every split is exact: on every kind of heap, at every border, with prefix-cache hits on both sides."""

from __future__ import annotations

import pytest

from tests.support.engine.core_mesh import Mesh, prompt_of
from tests.support.engine.device.device_mesh import DeviceMesh
from tests.support.engine.split_conformance import check_split
from tests.support.index.world_mesh import WorldMesh

SMALL, BLOCK = 4, 16
OPTIONS = {"block_size": BLOCK, "num_blocks": 280, "max_model_len": 1200, "max_num_batched_tokens": 512}


def make_mesh(heap: str, seed: int) -> Mesh:
    if heap == "local":
        return Mesh()
    return DeviceMesh(seed=seed) if heap == "cuda_ipc" else WorldMesh(seed=seed)


@pytest.mark.parametrize("heap", ["local", "cuda_ipc", "nvshmem"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 50])
def test_every_split_is_exact_on_every_heap(heap: str, length: int) -> None:
    prompt = prompt_of(length)
    amounts = {0, length // 2 // SMALL * SMALL, length // 4 * SMALL}
    for end in sorted({0, 1, 3, 4, 5, 7, 8, 9, length - 1, length} & set(range(length + 1))):
        for here in amounts:
            for there in amounts:
                mesh = make_mesh(heap, seed=end)
                check_split(mesh, prompt, end, here=here, there=there, block_size=SMALL)
                mesh.close()


def borders(length: int, is_whole: bool = True) -> list[int]:
    """0, length - 1, length and +-1 around every block edge, or the first, a middle and the last edges."""
    edges = list(range(0, length + 1, BLOCK))
    if not is_whole and len(edges) > 8:
        edges = [*edges[:3], edges[len(edges) // 2], *edges[-2:]]
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    return sorted(b for b in near | {0, length - 1, length} if 0 <= b <= length)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 257, 1023])
@pytest.mark.parametrize("here", ["none", "part", "all"])
@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_every_border_of_a_long_prompt_is_exact(length: int, here: str, is_whole: bool) -> None:
    """At the usual block size, one mesh for all borders: what one split left must not help the next."""
    prompt, whole = prompt_of(length), length // BLOCK * BLOCK
    amounts = {"none": 0, "part": whole // 2 // BLOCK * BLOCK, "all": whole}
    # The long prompt meets each state of the sender with one state of the receiver, the others with all.
    senders = {amounts[here]} if length > 300 else set(amounts.values())
    for there in senders:
        mesh = Mesh(**OPTIONS)
        for end in borders(length, is_whole):
            check_split(mesh, prompt, end, here=amounts[here], there=there, block_size=BLOCK)
        mesh.close()

"""The worker's wait for layers that are on their way, without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.connector.loading import Loading
from microserve.services.engine.vllm.connector.orders import Started
from microserve.services.engine.vllm.link import Arrived, NotArrived, Notice
from tests.support.engine.vllm_front import SOURCE_BLOCKS, FrontRig

pytestmark = pytest.mark.quick

PROMPT = list(range(3, 17))


class World:
    """A receive of eight tokens that is started early; two layers."""

    def __init__(self) -> None:
        self.rig = FrontRig()
        self.heard: list[Notice] = []
        self.pauses: list[Callable[[], object]] = []
        """What happens while the worker waits, one thing a look."""
        self.loading = Loading(
            *(self.rig.heap, self.rig.front.page, self.heard.append), checksums=True, pause=self.pause
        )
        self.grant: Grant = self.rig.granted("r", PROMPT, 8)
        receive = self.rig.launched[0].receive_id
        assert receive is not None
        self.receive = receive
        self.writer: LaneWriter = self.rig.writer(self.grant)
        self.rig.front.page.start(receive, self.grant.slot, self.grant.generation)
        self.started = Started(receive, 0, 8, self.grant.blocks)

    def pause(self) -> None:
        assert self.pauses, "it would wait for ever"
        self.pauses.pop(0)()

    def put(self, layer: int) -> None:
        self.writer.put_layer(layer, SOURCE_BLOCKS, 0, 8)

    def close(self) -> None:
        self.rig.receives.grants.close(self.grant.grant_id, 0.0)

    def step(self) -> None:
        self.loading.begin_step([self.started])
        for layer in range(2):
            self.loading.require_loaded(layer)
            self.loading.computed(layer)
        self.loading.end_step()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.rig.close()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_layer_is_waited_for_behind_the_one_before(world: World, first: int) -> None:
    for layer in range(first):
        world.put(layer)
    world.pauses = [partial(world.put, layer) for layer in range(first, 2)]
    world.step()
    assert world.heard == [Arrived(world.receive)] and not world.pauses
    assert world.loading.take_invalid() == set()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_grant_that_is_closed_ends_the_wait(world: World, layer: int) -> None:
    world.pauses = [*([lambda: world.put(0)] if layer else []), world.close]
    world.step()
    assert world.heard == [NotArrived(world.receive, f"the grant was closed before layer {layer} was in")]
    assert world.loading.take_invalid() == set(world.grant.blocks)
    assert world.loading.take_invalid() == set(), "later they may be somebody else's"
    world.loading.begin_step([])
    world.loading.end_step()
    assert len(world.heard) == 1 and world.loading.take_invalid() == set()


def test_one_that_is_closed_when_all_of_it_is_in_has_arrived(world: World) -> None:
    """A front seals by closing, too."""

    def all_at_once() -> None:
        world.put(0)
        world.put(1)
        world.close()

    world.pauses = [all_at_once]
    world.step()
    assert world.heard == [Arrived(world.receive)]


def test_one_that_is_given_up_before_its_step(world: World) -> None:
    world.rig.front.page.drop(world.receive)
    world.step()
    assert world.heard == [NotArrived(world.receive, "its grant is closed")]
    assert world.loading.take_invalid() == set(world.grant.blocks)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_not_as_its_writer_says_is_not_used(world: World, layer: int) -> None:
    world.put(0)
    world.put(1)
    layout = world.rig.heap.layout
    world.rig.heap.data[layer * layout.layer_nbytes + world.grant.blocks[0] * layout.block_nbytes] ^= 1
    world.step()
    (told,) = world.heard
    assert isinstance(told, NotArrived) and f"layer {layer}" in told.detail and "checksum" in told.detail
    assert world.loading.take_invalid() == set(world.grant.blocks)


def test_its_own_last_row_does_not_make_a_layer_wrong(world: World) -> None:
    """vLLM writes it again, behind the wait."""
    world.put(0)
    world.put(1)
    world.loading.begin_step([world.started])
    world.rig.heap.data[world.grant.blocks[1] * world.rig.heap.layout.block_nbytes] ^= 1
    for layer in range(2):
        world.loading.require_loaded(layer)
        world.loading.computed(layer)
    world.loading.end_step()
    assert world.heard == [Arrived(world.receive)]


def test_layers_in_another_order_and_steps_without_them_are_failures(world: World) -> None:
    world.put(0)
    world.put(1)
    world.loading.begin_step([world.started])
    world.loading.require_loaded(1)
    world.loading.end_step()
    world.loading.begin_step([world.started])
    world.loading.end_step()
    details = [notice.detail for notice in world.heard if isinstance(notice, NotArrived)]
    assert details == ["layer 1 was computed before it was waited for", "the step has computed 1 layers"]

"""The worker's side: the heap that vLLM's KV cache is, what a step puts, and what it reports.

Owns the order of a step's calls. vLLM's objects come as they are.
"""

from __future__ import annotations

import time
from typing import Any

from microserve.kvcache.layout import K, KvLayout
from microserve.services.engine.vllm.connector.limits import layer_names, layout_of
from microserve.services.engine.vllm.connector.loading import Loading, Reports
from microserve.services.engine.vllm.connector.orders import Copy, Orders
from microserve.services.engine.vllm.connector.placement import Placement
from microserve.services.engine.vllm.connector.putting import Putting
from microserve.services.engine.vllm.link import Ready
from microserve.services.engine.vllm.link_ends import End


class WorkerSide:
    def __init__(self, link: End, vllm_config: Any, kv_cache_config: Any) -> None:
        self.link = link
        self._config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._names = layer_names(kv_cache_config)
        self._layers = {name: layer for layer, name in enumerate(self._names)}
        self.placement = Placement(
            self._make_layout,
            incarnation=link.address.incarnation,
            num_slots=link.address.grant_slots,
            refuse=link.refuse,
        )
        self._reports = Reports(link.page.fate, lambda receive: link.page.started(receive) is not None)
        self._loading: Loading | None = None
        self._putting: Putting | None = None
        self._orders: Orders | None = None

    def _make_layout(self) -> KvLayout:
        """K lies in a block as the chosen instructions want it, so their name is the order's."""
        layers = self._config.compilation_config.static_forward_context
        kinds = sorted({str(getattr(layers[name], "isa", "")) for name in self._names})
        return layout_of(self._kv_cache_config, self.link.address, f"vllm-cpu-{'+'.join(kinds)}")

    def placed(self, views: dict[str, Any]) -> None:
        """vLLM has its KV cache."""
        self.placement.require_placed(self._names, views)
        heap = self.placement.heap
        self._putting = Putting(heap, self.link, time.monotonic)
        self._loading = Loading(heap, self.link.page, self.link.tell, checksums=self.link.address.checksums)
        self.link.tell(Ready(heap.address, heap.layout, heap.layout.num_blocks))

    def before_blocks_change(self, orders: Orders) -> None:
        if orders.is_preempting and self._putting is not None:
            self._putting.wait()

    def begin_step(self, orders: Orders) -> None:
        self._orders = orders
        for copy in orders.copies:
            self._copy(copy)
        if self._putting is not None:
            self._putting.end(orders.ended)
            self._putting.begin_step(orders.parts)
        if self._loading is not None:
            self._loading.begin_step(orders.started)

    def layer_begins(self, name: str) -> None:
        if self._loading is not None and name in self._layers:
            self._loading.require_loaded(self._layers[name])

    def layer_computed(self, name: str) -> None:
        self.link.page.count_layer()
        if self._putting is not None and name in self._layers:
            self._putting.put_layer(self._layers[name])
        if self._loading is not None and name in self._layers:
            self._loading.computed(self._layers[name])

    def end_step(self) -> None:
        if self._putting is not None:
            self._putting.end_step()
        if self._loading is not None:
            self._loading.end_step()

    def invalid_blocks(self) -> set[int]:
        """Of the step that has ended: what was not in when it was used."""
        return set() if self._loading is None else self._loading.take_invalid()

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks nobody reads or keeps any more, and those that are received or given up."""
        orders, putting = self._orders or Orders(), self._putting
        drained = putting.drained() if putting is not None else set()
        due = self._reports.due(orders.watched)
        for each in due:
            self._clear(each.blocks)
        for release in orders.releases:
            self._clear(release.blocks)
        self.link.flush()
        released = {release.request_id for release in orders.releases}
        return drained | released, {each.request_id for each in due}

    def _copy(self, copy: Copy) -> None:
        heap = self.placement.heap
        layout = heap.layout
        for layer in range(layout.num_layers):
            source, target = (layout.offset(layer, block, K, 0) for block in (copy.source, copy.target))
            heap.data[target : target + layout.block_nbytes] = heap.data[
                source : source + layout.block_nbytes
            ]

    def _clear(self, blocks: list[int]) -> None:
        """Of a receive that was given up: vLLM gives its blocks to others as they are, whose attention adds
        0 times what lies behind their last token. That is not 0 if a writer left NaN there."""
        heap = self.placement.heap
        layout = heap.layout
        for layer in range(layout.num_layers):
            for block in blocks:
                start = layout.offset(layer, block, K, 0)
                heap.data[start : start + layout.block_nbytes] = 0

    def close(self) -> None:
        if self._putting is not None:
            self._putting.close()
            self._putting = None
        if self.placement.is_entered:
            self.placement.heap.close()
        self.link.close()

"""The door that vLLM calls: one object in its scheduler, one in its worker, made by module path.

    schedule()   num_external ─ blocks ─ allocated ─> the front hears
                 build_connector_meta: parts, watched, releases ───────────────┐
    worker       bind: peers, lanes ─ save_kv_layer: put ─ wait_for_save ─ get_finished: reports
    update()     update_connector_output <──────────────────────────────────────┘

Owns which hook does what, and nothing else: state is behind scheduler_side.py and worker_side.py. The only
file that imports vLLM.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from microserve.protocol.errors import ConfigError
from microserve.services.engine.vllm.connector.lifeline import end_with_parent
from microserve.services.engine.vllm.connector.limits import PHYSICAL_LAYOUT, require_supported
from microserve.services.engine.vllm.connector.orders import Orders
from microserve.services.engine.vllm.connector.scheduler_side import SchedulerSide
from microserve.services.engine.vllm.connector.worker_side import WorkerSide
from microserve.services.engine.vllm.link_ends import End, address_of

if TYPE_CHECKING:
    import torch


class StepOrders(Orders, KVConnectorMetadata):  # type: ignore[misc]
    """As vLLM wants its type."""


class MicroserveConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        end_with_parent()
        is_scheduler = role == KVConnectorRole.SCHEDULER
        address = address_of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        link = End(address, "scheduler" if is_scheduler else "worker")
        try:
            require_supported(vllm_config, kv_cache_config)
        except ConfigError as error:
            link.refuse(error)
            raise
        if is_scheduler:
            block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            self.scheduler_side = SchedulerSide(link, block_size, lambda: self._kv_cache_manager)
        else:
            self.worker_side = WorkerSide(link, vllm_config, kv_cache_config)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return PHYSICAL_LAYOUT

    @property
    def requires_kv_delivery(self) -> bool:
        """A step's puts are made by that step: what a preempted request still brings has been put."""
        return False

    # --- scheduler --------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        self.scheduler_side.new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler_side.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.scheduler_side.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        orders = self.scheduler_side.orders(scheduler_output.num_scheduled_tokens, self._kv_cache_manager)
        return StepOrders(**vars(orders))

    def update_connector_output(self, connector_output: Any) -> None:
        received, sent = connector_output.finished_recving, connector_output.finished_sending
        invalid = connector_output.invalid_block_ids
        self.scheduler_side.reported(set(received or ()), set(sent or ()), set(invalid or ()))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler_side.finished(request, block_ids), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler_side.finished(request, block_ids[0]), None

    # --- worker -----------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        return self.worker_side.placement

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        try:
            self.worker_side.placed(kv_caches)
        except ConfigError as error:
            self.worker_side.link.refuse(error)
            raise

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self.worker_side.before_blocks_change(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker_side.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Peers put into our blocks; there is nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.worker_side.layer_begins(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        self.worker_side.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        self.worker_side.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self.worker_side.finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker_side.invalid_blocks()

    def shutdown(self) -> None:
        side = self.scheduler_side if self.role == KVConnectorRole.SCHEDULER else self.worker_side
        side.close()

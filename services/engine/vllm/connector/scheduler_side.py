"""The scheduler's side: from vLLM's requests, blocks and steps to receives and sends.

Owns who is who among vLLM's requests, and the words of a step. vLLM's objects come as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

from microserve.protocol.errors import InvalidRequest
from microserve.services.engine.vllm.connector.orders import Orders
from microserve.services.engine.vllm.connector.receives import Receives
from microserve.services.engine.vllm.connector.sends import Sends
from microserve.services.engine.vllm.link import Generate, Receive, Send, ask_of
from microserve.services.engine.vllm.link_ends import End

_logger = structlog.get_logger()
REST_S, LOOK_S = 0.003, 0.0005
"""A step that computes nothing waits so long for news of what is received, and looks so often."""
ORDINARY = "vllm_ask_ignored"
"""Event: a request asks of the connector what cannot be; it is served as any other."""


class SchedulerSide:
    def __init__(self, link: End, block_size: int, cache: Callable[[], Any]) -> None:
        """``cache``: vLLM's cache manager, once it has one."""
        self._link = link
        self.receives = Receives(
            block_size, link.page.fate, link.tell, lambda blocks: cache().evict_blocks(blocks)
        )
        self.sends = Sends(link.tell)
        self._requests: dict[str, Any] = {}
        """Of sends."""
        self._outputs: dict[str, int] = {}
        """Of requests whose grammar has to go on behind so many of their prompt's last tokens."""
        self._num_requests = 0

    def new_request(self, request: Any) -> None:
        self._num_requests += 1
        request_id = request.request_id
        problem = None
        try:
            ask = ask_of(request.kv_transfer_params)
        except InvalidRequest as error:
            ask, problem = None, error.detail
        if isinstance(ask, Receive):
            problem = self.receives.add(request_id, ask, request.num_prompt_tokens, request.prompt_token_ids)
        elif isinstance(ask, Generate):
            self.receives.add_generate(request_id, ask)
        elif ask is not None:
            self.sends.add(request_id, ask)
            self._requests[request_id] = request
        if isinstance(ask, Generate | Send) and ask.output:
            self._outputs[request_id] = ask.output
        if problem is not None:
            _logger.error(ORDINARY, request_id=request_id, detail=problem)

    def matched(self, request: Any, num_local: int) -> tuple[int | None, bool]:
        """Asked any number of times, of a request whose grammar is compiled if it has one."""
        if num_output := self._outputs.pop(request.request_id, 0):
            self._go_on(request, num_output)
        return self.receives.num_external(request.request_id, num_local, request.all_token_ids)

    @staticmethod
    def _go_on(request: Any, num_output: int) -> None:
        """vLLM begins a grammar at the first token that it samples: here it has begun before."""
        structured = request.structured_output_request
        if structured is not None:
            output = list(request.prompt_token_ids[-num_output:])
            if not structured.grammar.accept_tokens(request.request_id, output):
                _logger.error(
                    ORDINARY, request_id=request.request_id, detail="its output is not of its grammar"
                )

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        self.receives.allocated(request.request_id, list(blocks.get_block_ids()[0]), num_external)

    def finished(self, request: Any, blocks: list[int]) -> bool:
        """Whether its ``blocks`` are kept until the worker says otherwise."""
        self._num_requests -= 1
        self._requests.pop(request.request_id, None)
        self._outputs.pop(request.request_id, None)
        tokens = request.output_token_ids
        # Both are asked: each lets go of what it knows of the request.
        is_kept = self.sends.finished(request.request_id, tokens[0] if len(tokens) else None)
        is_held = self.receives.finished(request.request_id, blocks, has_output=len(tokens) > 0)
        return is_held or is_kept

    def orders(self, scheduled: dict[str, int], cache: Any) -> Orders:
        """For a step that computes so many tokens of each request; ``cache`` is vLLM's cache manager."""
        parts = []
        for request_id, num_scheduled in scheduled.items():
            request = self._requests.get(request_id)
            if request is not None:
                # Of before this step: vLLM counts its tokens when the step is made.
                num_computed = request.num_computed_tokens
                blocks = list(cache.get_block_ids(request_id)[0])
                if part := self.sends.part(request_id, num_computed, num_scheduled, blocks):
                    parts.append(part)
        orders = Orders(
            parts=parts,
            ended=self.sends.take_ended(),
            watched=self.receives.watched(),
            started=self.receives.started(scheduled),
            releases=self.receives.releases(),
            copies=self.receives.copies(),
            # All are asked: each answer is news once.
            is_preempting=any(
                [
                    self.sends.is_preempted(each, self._requests[each].num_preemptions)
                    for each in self._requests
                ]
            ),
        )
        if not (scheduled or orders.ended or orders.releases):
            self._rest()
        num_running = len(scheduled)
        self._link.page.count_step(
            cache.block_pool.get_num_free_blocks(), num_running, max(self._num_requests - num_running, 0)
        )
        self._link.flush()
        return orders

    def _rest(self) -> None:
        """vLLM steps without pause while anything is parked: a core that whoever computes it may need."""
        until = time.monotonic() + REST_S
        while self.receives.is_resting and time.monotonic() < until:
            time.sleep(LOOK_S)

    def reported(self, received: set[str], sent: set[str], invalid_blocks: set[int]) -> None:
        """What the worker has reported of the last step."""
        self.receives.ran(invalid_blocks)
        self.receives.reported(received)
        self.receives.released(sent)

    def close(self) -> None:
        self._link.close()

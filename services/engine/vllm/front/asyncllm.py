"""vLLM's ``AsyncLLM``, asked for one request at a time: the only file of the front that calls vLLM.

Its errors become ours here: what a client has done wrong is :class:`InvalidRequest`, an engine that is dead
is :class:`EngineLost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from microserve.protocol.errors import CapacityError, EngineLost, InternalError, InvalidRequest, MeshError
from microserve.services.engine.vllm.front.output import Output
from microserve.services.engine.vllm.front.running import Running
from microserve.services.engine.vllm.front.sampling import STRUCTURED, probe_of
from microserve.services.engine.vllm.link import params_of

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

FIRST_PRIORITY, PRIORITY = -1, 0
"""Of requests for blocks, and of others: a grant is asked for before anything is computed for it."""

WARM_UP_TOKENS = 64

_NONE: Mapping[str, Any] = MappingProxyType({})


class Stream(Protocol):
    """One request that vLLM has taken."""

    async def next(self) -> Output:
        """The next output; the last one has a ``finish``. :class:`EngineLost` when vLLM is dead."""
        ...

    async def abort(self) -> None:
        """Its last output follows soon. Of one that has ended: nothing."""
        ...


class Llm(Protocol):
    """What the front asks of vLLM."""

    @property
    def is_dead(self) -> bool:
        """One of its processes has ended, or is about to."""
        ...

    async def add(self, running: Running) -> Stream:
        """Raises :class:`MeshError` for what it refuses."""
        ...

    def shutdown(self) -> None:
        """End its processes; returns when they are gone."""
        ...


class AsyncVllm:
    def __init__(
        self, engine: AsyncLLM, *, shutdown_s: float, adapters: Mapping[str, LoRARequest] = _NONE
    ) -> None:
        """``shutdown_s``: what its processes are given to end by themselves. ``adapters``: those that it has
        loaded, by name."""
        self._engine = engine
        self._adapters = adapters
        self._shutdown_s = shutdown_s

    @property
    def is_dead(self) -> bool:
        return bool(self._engine.errored)

    async def add(self, running: Running) -> Stream:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            collector = await self._engine.add_request(
                running.request_id,
                tokens_input(running.token_ids, cache_salt=running.salt or None),
                _params_of(running),
                lora_request=self._adapters[running.adapter] if running.adapter else None,
                priority=FIRST_PRIORITY if running.is_parked else PRIORITY,
            )
        except EngineDeadError as error:
            raise EngineLost("vLLM's engine is dead") from error
        except (VLLMClientError, ValueError, TypeError) as error:
            field = "grammar" if STRUCTURED in running.sampling else None
            raise InvalidRequest(str(error), field=getattr(error, "parameter", None) or field) from error
        except Exception as error:
            raise _other(error) from error
        return _Stream(self._engine, collector)

    def shutdown(self) -> None:
        self._engine.shutdown(timeout=self._shutdown_s)


async def warm_up(llm: Llm) -> None:
    """One request from end to end: the first steps of a vLLM take seconds, and no client is to wait."""
    running = Running(
        owner=b"",
        request_id="warm-up",
        call_ids=[],
        token_ids=[0] * WARM_UP_TOKENS,
        num_prompt_tokens=WARM_UP_TOKENS,
        params=None,
        sampling={**probe_of(), "max_tokens": 2},
        salt="",
        arrived_at=0.0,
        deadline=0.0,
    )
    stream = await llm.add(running)
    while not (await stream.next()).finish:
        pass


def _params_of(running: Running) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    given = dict(running.sampling)
    structured = given.pop(STRUCTURED, None)
    if structured is not None:
        given[STRUCTURED] = StructuredOutputsParams(**structured)
    if running.ask is not None:
        given["extra_args"] = {"kv_transfer_params": params_of(running.ask)}
    return SamplingParams(**given, output_kind=RequestOutputKind.DELTA)


def _other(error: Exception) -> MeshError:
    """It says by a status of HTTP that it is full."""
    if getattr(error, "status_code", None) is not None or "Queue" in type(error).__name__:
        return CapacityError(str(error) or type(error).__name__, retry_after_s=1.0)
    return InternalError(f"vLLM: {type(error).__name__}: {error}")


class _Stream:
    def __init__(self, engine: AsyncLLM, collector: RequestOutputCollector) -> None:
        self._engine = engine
        self._collector = collector

    async def next(self) -> Output:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            said = self._collector.get_nowait() or await self._collector.get()
        except EngineDeadError as error:
            raise EngineLost("vLLM's engine is dead") from error
        if not said.outputs:
            return Output([], finish="abort" if said.finished else "")
        one = said.outputs[0]
        finish = one.finish_reason or ("abort" if said.finished else "")
        return Output(
            one.token_ids,
            one.logprobs,
            said.prompt_logprobs,
            said.num_cached_tokens or 0,
            finish,
            one.stop_reason,
        )

    async def abort(self) -> None:
        await self._engine.abort(self._collector.request_id, internal=True)

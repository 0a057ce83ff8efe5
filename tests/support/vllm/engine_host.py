"""vLLM in a process of its own, step by step, for tests: run by the Python that has it.

    python engine_host.py DESCRIPTOR

Speaks pickles over a socket: a call's name and its arguments; its answer, or the text of what it raised.
Steps are made when they are asked for, so a test says what happens between them.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)


class Host:
    """What a test may ask for."""

    def start(self, arguments: dict[str, Any], extra_config: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.config import KVTransferConfig

        transfer = KVTransferConfig(
            kv_connector="MicroserveConnector",
            kv_connector_module_path="microserve.services.engine.vllm.connector.connector",
            kv_role="kv_both",
            kv_connector_extra_config=extra_config,
        )
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(kv_transfer_config=transfer, disable_log_stats=True, **arguments)
        )
        self.scheduler: Any = self.engine.engine_core.engine_core.scheduler
        self.preemptions = 0
        preempt = self.scheduler._preempt_request

        def count(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        self.scheduler._preempt_request = count

    def add(
        self, request_id: str, prompt: list[int], params: dict[str, Any] | None, sampling: dict[str, Any]
    ) -> None:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": params} if params else None
        sampled = SamplingParams(temperature=0.0, ignore_eos=True, extra_args=extra, **sampling)
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, sampled)

    def abort(self, request_id: str) -> None:
        self.engine.abort_request([request_id])

    def abort_in_step(self, request_id: str) -> None:
        """As one that comes while a step runs: behind its layers, before its output is read."""
        (found,) = [each for each in self.scheduler.requests if each.rpartition("-")[0] == request_id]
        self.engine.engine_core.engine_core.aborts_queue.put_nowait([found])

    def step(self) -> list[dict[str, Any]]:
        return [
            {
                "id": output.request_id,
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [
                    {token: each.logprob for token, each in position.items()}
                    for position in output.outputs[0].logprobs or []
                ],
                "finished": output.finished,
                "reason": output.outputs[0].finish_reason,
                "cached": output.num_cached_tokens,
            }
            for output in self.engine.step()
        ]

    def idle(self) -> bool:
        """Nothing is left that would make vLLM step."""
        return not self.scheduler.has_requests()

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def num_requests(self) -> int:
        """That vLLM holds, ended ones whose blocks are kept too."""
        return len(self.scheduler.requests)

    def block_ids(self, request_id: str) -> list[int]:
        """Of a request that the test calls so."""
        (found,) = [each for each in self.scheduler.requests if each.rpartition("-")[0] == request_id]
        return list(self.scheduler.kv_cache_manager.get_block_ids(found)[0])

    def num_preemptions(self) -> int:
        return self.preemptions

    def forget_prefixes(self) -> bool:
        return bool(self.engine.reset_prefix_cache())

    def die_at_layer(self, count: int) -> None:
        """Be killed behind that many more layers, before they are put."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector: Any = get_kv_transfer_group()
        save: Callable[..., None] = connector.save_kv_layer
        left = [count]

        def save_or_die(*args: Any, **kwargs: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            save(*args, **kwargs)

        connector.save_kv_layer = save_or_die


def main() -> None:
    test = Connection(int(sys.argv[1]))
    host = Host()
    while True:
        try:
            name, args = test.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, str | None] = getattr(host, name)(*args), None
        except Exception as error:
            traceback.print_exc()
            answer = None, f"{type(error).__name__}: {error}"
        test.send(answer)


if __name__ == "__main__":
    main()

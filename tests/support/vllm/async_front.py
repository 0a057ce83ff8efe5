"""A front as it serves: vLLM's AsyncLLM with an EngineCore and a worker in processes of their own.

    python async_front.py MODEL

Prints one line of JSON when it has answered a first request: the pid of the worker, what came, how far vLLM
is. Then it waits to be killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")


async def serve(model: str) -> None:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from microserve.services.engine.vllm.link import Ready
    from microserve.services.engine.vllm.link_ends import Front

    front = Front(incarnation=5, model="tiny", revision="r", num_receives=4, grant_slots=4, checksums=True)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            dtype="bfloat16",
            enforce_eager=True,
            block_size=32,
            max_model_len=256,
            kv_cache_memory_bytes=1 << 21,
            kv_transfer_config=KVTransferConfig(
                kv_connector="MicroserveConnector",
                kv_connector_module_path="microserve.services.engine.vllm.connector.connector",
                kv_role="kv_both",
                kv_connector_extra_config=front.extra_config,
            ),
        )
    )
    (ready,) = [notice for notice in front.read() if isinstance(notice, Ready)]
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": list(range(3, 50))}, sampling, "a"):
        tokens = list(output.outputs[0].token_ids)
    print(json.dumps([ready.heap.pid, tokens, front.page.progress()]), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))

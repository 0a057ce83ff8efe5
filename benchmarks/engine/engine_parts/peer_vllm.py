"""vLLM's engine on a CPU, as a child of a benchmark: ``peers.py`` says what comes and goes.

Runs in an environment of its own and imports nothing of this project. Its step runs in this process, without
the worker that spins on its queue. Prefix caching is off: no prompt comes twice.
"""

from __future__ import annotations

import json
import os
import sys
import time

MAX_BATCHED_TOKENS = 512
"""As many as an engine of this project takes in a step."""
MAX_MODEL_LEN, MAX_SEQS, CACHE_GB = 4096, 64, 2


def main() -> None:
    directory, threads = sys.argv[1], int(sys.argv[2])
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if threads > (os.cpu_count() or 1) else f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(
        directory,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        enable_prefix_caching=False,
    )
    print(json.dumps({"version": vllm.__version__}), flush=True)
    engine, number = llm.llm_engine, 0
    for line in sys.stdin:
        asked = json.loads(line)
        count = asked["num_tokens"]
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        times: dict[str, list[float]] = {}
        for prompt in asked["prompts"]:
            times[str(number)] = []
            engine.add_request(str(number), {"prompt_token_ids": prompt}, settings)
            number += 1
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                seen = times[output.request_id]
                seen.extend([now] * (len(output.outputs[0].token_ids) - len(seen)))
        print(json.dumps({"times": list(times.values())}), flush=True)


if __name__ == "__main__":
    main()

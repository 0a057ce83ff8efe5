"""OpenVINO GenAI's continuous batching, as a child of a benchmark: ``peers.py`` says what comes and goes.

Runs in an environment of its own and imports nothing of this project. Precision of sums and of the KV cache
is what OpenVINO chooses for this CPU (bf16 where it has it; the KV cache in u8). Prefix caching is off: no
prompt comes twice.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai

CACHE_GB = 2
MAX_BATCHED_TOKENS = 512
"""As many as an engine of this project takes in a step."""


def main() -> None:
    directory, threads = sys.argv[1], int(sys.argv[2])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
    scheduler.enable_prefix_caching = False
    pipe = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
    print(json.dumps({"version": genai.__version__}), flush=True)
    number = 0
    for line in sys.stdin:
        asked = json.loads(line)
        settings = genai.GenerationConfig(
            max_new_tokens=asked["num_tokens"], ignore_eos=True, do_sample=False
        )
        began = time.perf_counter()
        handles = []
        for prompt in asked["prompts"]:
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(pipe.add_request(number, ids, settings))
            number += 1
        times: list[list[float]] = [[] for _ in handles]
        while pipe.has_non_finished_requests():
            pipe.step()
            now = time.perf_counter() - began
            for handle, seen in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        seen.extend([now] * len(output.generated_ids))
        print(json.dumps({"times": times}), flush=True)


if __name__ == "__main__":
    main()

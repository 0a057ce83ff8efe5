"""Dynamo's radix tree, behind a pipe: what prefix_index_peer.py asks of it, and how long it took.

Runs in an environment that has ``ai-dynamo-runtime`` and nothing of ours. A line in is a list of requests,
``[worker, tokens, [parent, [name, ...]] or null]``; a line out has, for each of them, nanoseconds of hashing,
of finding and of applying the event, and what was found; the CPU seconds of the whole process; and how much
its memory has grown by since the first line, which counts what Python keeps of the lines too.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from dynamo._core import RadixTree, compute_block_hash_for_seq

BLOCK_SIZE = 16


def resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    tree = RadixTree()
    at_first = 0
    num_events = 0
    for line in sys.stdin:
        requests, answers = json.loads(line), []
        at_first = at_first or resident_nbytes()
        find_s = apply_s = 0.0
        for worker, tokens, event in requests:
            cpu_s, began = time.process_time(), time.perf_counter_ns()
            hashes = compute_block_hash_for_seq(tokens, BLOCK_SIZE)
            hashed = time.perf_counter_ns()
            found = tree.find_matches(hashes)
            ended = time.perf_counter_ns()
            find_s += time.process_time() - cpu_s
            applied = 0
            if event is not None:
                parent, names = event
                num_events += 1
                new = hashes[len(hashes) - len(names) :]
                blocks = [{"block_hash": n, "tokens_hash": h} for n, h in zip(names, new, strict=True)]
                data = {"stored": {"parent_hash": parent, "blocks": blocks}}
                payload = json.dumps({"event_id": num_events, "data": data, "dp_rank": 0}).encode()
                cpu_s, start = time.process_time(), time.perf_counter_ns()
                tree.apply_event(worker, payload)
                applied = time.perf_counter_ns() - start
                apply_s += time.process_time() - cpu_s
            matched = {str(key[0]): depth for key, depth in found.scores.items()}
            answers.append([hashed - began, ended - hashed, applied, matched])
        told = {"answers": answers, "find_s": find_s, "apply_s": apply_s}
        print(json.dumps({**told, "grown_nbytes": resident_nbytes() - at_first}), flush=True)


if __name__ == "__main__":
    main()

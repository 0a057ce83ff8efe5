"""The prompts that deploy/codec/smollm2-135m.json was measured with, for ``microserve profile --file``.

    python deploy/codec/prompts.py 160 > prompts.jsonl

Three of four are a task that a small model can do, and only with the keys and values of what came long
before: a list of a hundred words, and some of them again in their order; what comes next is the answer. One
of four is prose (of the LICENSE, which stays as it is), without an answer: there next tokens are compared.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from microserve.services.command.bench.workload.prompts import WORDS

LICENSE = Path(__file__).parents[2] / "LICENSE"
NUM_LISTED, NUM_AGAIN, NUM_ANSWER = 100, 4, 2
NUM_PROSE = 160
"""Words."""


def task(chance: random.Random) -> dict[str, str]:
    words = chance.sample(WORDS, NUM_LISTED)
    begin = chance.randrange(NUM_LISTED - NUM_AGAIN - NUM_ANSWER)
    end = begin + NUM_AGAIN
    said = ", ".join(words[begin:end])
    prompt = f"The list: {', '.join(words)}.\nThe list again, from a place in it: {said},"
    return {"prompt": prompt, "answer": " " + ", ".join(words[end : end + NUM_ANSWER])}


def prompts(count: int) -> list[dict[str, str]]:
    chance = random.Random(17)
    prose = LICENSE.read_text(encoding="utf-8").split()
    found = []
    for number in range(count):
        if number % 4 < 3:
            found.append(task(chance))
            continue
        begin = chance.randrange(len(prose) - NUM_PROSE)
        found.append({"prompt": " ".join(prose[begin : begin + NUM_PROSE])})
    return found


if __name__ == "__main__":
    for line in prompts(int(sys.argv[1])):
        print(json.dumps(line))

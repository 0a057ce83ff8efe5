"""Any OpenAI client works: stream one answer from a running mesh.

    make up
    python examples/client.py http://127.0.0.1:8000 --prompt "Write a haiku about the sea."

``--strategy`` asks for one by name, for this request only. Needs ``pip install openai``.
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the gateway")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--strategy", default="")
    arguments = parser.parse_args()
    client = OpenAI(base_url=f"{arguments.url}/v1", api_key="none")
    (model, *_) = client.models.list()
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": arguments.prompt}],
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-microserve-strategy": arguments.strategy} if arguments.strategy else {},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            usage = chunk.usage
            print(f"\n{usage.prompt_tokens} tokens read, {usage.completion_tokens} written")


if __name__ == "__main__":
    main()

"""Make a tiny random model with a tokenizer and a chat template, small enough for tests to serve.

    python tests/support/engine/model/tiny_model.py DIR [--family llama] [--vocab 320] [--seed 0]

The directory is laid out as a real model's: config.json, generation_config.json, model.safetensors,
tokenizer.json, tokenizer_config.json, chat_template.jinja. Every parameter is random, biases and norms too,
and large enough that greedy text wanders. Ids past the tokenizer's have no text, as in padded real models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BOS, EOS = 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Each family with what sets it apart: 9 query heads on 3 KV heads; a window on every layer; one KV head,
# biases and a window on the last layer alone; a KV head for each query head, norms on Q and K, and a head_dim
# that is not hidden / heads; layers without RoPE.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    "mistral": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen3": {"hidden_size": 40, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16},
    "smollm3": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "no_rope_layers": [1, 0],
    },
}


def make_tiny_model(
    path: str | Path, family: str = "llama", vocab: int = 320, seed: int = 0, **config: Any
) -> Path:
    """Write a model of two layers in fp32 to ``path`` and return it.

    family: a key of ``FAMILIES``; vocab: at least 259 (the bytes and three special tokens); config: settings
    of config.json that replace the family's own. The same arguments give the same weights.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": family == "llama",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        **FAMILIES[family],
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **settings), dtype=torch.float32
        )
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, middle, 0.3)
    model.generation_config.eos_token_id = [0, EOS]
    model.save_pretrained(directory)
    write_tokenizer(directory, vocab)
    return directory


def write_tokenizer(directory: Path, vocab: int) -> None:
    """Byte-level BPE; its few merges come from this file's own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__ or ""], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[BOS],
                "eos_token": SPECIAL_TOKENS[EOS],
                "pad_token": SPECIAL_TOKENS[EOS],
            },
            indent=2,
        )
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--vocab", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.directory, arguments.family, arguments.vocab, arguments.seed))


if __name__ == "__main__":
    main()

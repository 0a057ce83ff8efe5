"""``python conversion.py FILE.gguf DIRECTORY``: a GGUF becomes a Hugging Face model directory.

A program of its own, so that who asks for the demo model (``microserve up``) never loads torch. Progress is
what transformers prints to stderr. Writes config.json, generation_config.json (with the sampling that the
model's card recommends: by itself so small a model talks without end), model.safetensors (bf16),
tokenizer.json and chat_template.jinja.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf_file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    # Left packed, the weights could neither be saved nor computed with by our kernels.
    weights = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=weights, dtype=torch.bfloat16)
    model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.9)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

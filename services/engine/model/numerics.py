"""In which numerics class transformers' modules compute (protocol/messages/numerics.py says what one is).

    torch2.13.0-cpu-bfloat16-3f2a9c0b5d1e      version, kind of device, dtype, start of the model's revision

Never exact: libraries choose their kernels by the number of rows, so a row's bits depend on its company.
Equal names are a preference and no promise. Knows no native kernel, which names its class itself.
"""

from __future__ import annotations

import re

import torch

from microserve.protocol.messages.numerics import MAX_NUMERICS_CHARS, Numerics
from microserve.services.engine.model.spec import ModelSpec

REVISION_CHARS = 12

_UNSAFE = re.compile(r"[^a-z0-9.+]+")


def transformers_numerics(spec: ModelSpec, device: torch.device) -> Numerics:
    kind = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    version = torch.__version__.partition("+")[0]
    parts = (f"torch{version}", kind, spec.dtype, spec.revision[:REVISION_CHARS])
    name = "-".join(part for each in parts if (part := _UNSAFE.sub("-", each.lower()).strip("-")))
    return Numerics(name[:MAX_NUMERICS_CHARS])

"""A model as the native step has it, and nothing of how it came to be so. Needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from microserve.kernels.cpu.library import Library
from microserve.kernels.cpu.weights import PackedWeights, Shape
from microserve.protocol.messages.numerics import Numerics
from microserve.services.engine.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class PackedModel:
    spec: ModelSpec
    shape: Shape
    """Without the bounds of a step."""
    weights: PackedWeights
    tables: str
    """Digest of its tables of RoPE, for all positions: how many a pool holds is no part of the class."""

    def numerics(self, library: Library, recipe: str) -> Numerics:
        """Equal names: equal bits. Variants and threads are not in it; recipe, weights and object are."""
        # Tables are the mathematical library's, whose last bit is not the same everywhere.
        told = hashlib.sha256(f"{library.digest} {self.spec.revision} {self.tables}".encode())
        kind = self.spec.dtype if self.shape.weights == "dtype" else f"{self.spec.dtype}-{self.shape.weights}"
        return Numerics(f"{recipe}-{kind}-{told.hexdigest()[:12]}", is_exact=True)

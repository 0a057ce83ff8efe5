"""The C interface of the native step (``native/abi.h``) as ctypes, and which variant serves.

Owns the mirrors of its structs and the choice of a variant. Must not know tensors.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from microserve.kernels.cpu.build import Say, build
from microserve.kernels.cpu.objects import NativeObject
from microserve.kernels.kernel_cache import KernelUnavailable

ABI_VERSION = 1
VARIANTS = ("portable", "avx2", "avx512", "amx")
"""From the slowest on; the same bits by all of them. A variant's number is its place."""
ELEMS = ("bfloat16", "float32")


class Config(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("variant", "elem", "threads")),
        *(
            (name, c_int32)
            for name in (
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "hidden",
                "intermediate",
                "vocab",
            )
        ),
        *((name, c_int32) for name in ("block_size", "num_blocks", "max_rows", "max_context", "max_logits")),
        *((name, c_float) for name in ("eps", "scale")),
    ]


class Layer(ctypes.Structure):
    WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")
    FLOATS = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias")
    _fields_ = [
        *((name, c_void_p) for name in (*WEIGHTS, *FLOATS, "kv")),
        *((name, c_int32) for name in ("use_rope", "window")),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_rows", "num_spans", "num_logits", "table_width")),
        *(
            (name, c_void_p)
            for name in (
                "tokens",
                "positions",
                "slots",
                "span_rows",
                "span_contexts",
                "tables",
                "logit_rows",
                "logits",
            )
        ),
    ]


OnLayer = ctypes.CFUNCTYPE(c_int32, c_int32)

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ms_abi_version": (c_int32, []),
    "ms_supports": (c_int32, [c_int32]),
    "ms_create": (c_void_p, [POINTER(Config)]),
    "ms_set_layer": (c_char_p, [c_void_p, c_int32, POINTER(Layer)]),
    "ms_set_model": (c_char_p, [c_void_p] * 6),
    "ms_logits_width": (c_int64, [c_void_p]),
    "ms_step": (c_char_p, [c_void_p, POINTER(Batch), OnLayer]),
    "ms_destroy": (None, [c_void_p]),
    "ms_product": (c_char_p, [*[c_int32] * 5, *[c_void_p] * 3]),
    "ms_map": (c_char_p, [*[c_int32] * 3, c_void_p]),
}


class Library:
    """A loaded shared object. Its functions release the interpreter's lock."""

    def __init__(self, found: NativeObject) -> None:
        """Raises :class:`KernelUnavailable` where it cannot be loaded."""
        try:
            self.calls = _load(found)
        except OSError as error:
            raise KernelUnavailable(f"{found.name} cannot be loaded: {error}") from None
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.calls, name)
            function.restype, function.argtypes = result, arguments
        if (version := self.calls.ms_abi_version()) != ABI_VERSION:
            raise KernelUnavailable(
                f"{found.name} speaks version {version} of its interface, not {ABI_VERSION}"
            )
        self.digest = found.digest
        """Of the object: part of the numerics class."""

    def supports(self, variant: str) -> bool:
        """Compiled in, and this CPU can run it."""
        return bool(self.calls.ms_supports(VARIANTS.index(variant)))

    def product(
        self, variant: str, a: npt.NDArray[np.float32], b: npt.NDArray[Any], c: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """c + a bᵀ; a: [m, k], c: [m, n]; b: [n, k], float32, or uint16 for bf16. n and k multiples of 32."""
        (m, k), n, out = a.shape, b.shape[0], np.array(c, np.float32, order="C")
        elem = ELEMS.index("bfloat16" if b.dtype == np.uint16 else "float32")
        a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b)
        told = self.calls.ms_product(
            VARIANTS.index(variant), elem, m, n, k, a.ctypes.data, b.ctypes.data, out.ctypes.data
        )
        if told is not None:
            raise ValueError(f"product: {told.decode()}")
        return out

    def apply(self, variant: str, function: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """``exp2``, ``bf16`` (rounding) or ``silu`` of each of values; their number is a multiple of 16."""
        out = np.array(values, np.float32, order="C")
        number = ("exp2", "bf16", "silu").index(function)
        told = self.calls.ms_map(VARIANTS.index(variant), number, out.size, out.ctypes.data)
        if told is not None:
            raise ValueError(f"{function}: {told.decode()}")
        return out


def _load(found: NativeObject) -> ctypes.CDLL:
    """Raises ``OSError``."""
    try:
        return ctypes.CDLL(found.path)
    except OSError:  # a file system without execution, perhaps: memory is none
        try:
            return ctypes.CDLL(found.copied().path)
        except KernelUnavailable:
            pass
        raise


_loaded: list[Library] = []


def library(say: Say = lambda _: None) -> Library:
    """Built and loaded once a process; ``say`` is told what takes long. Raises :class:`KernelUnavailable`."""
    if not _loaded:
        _loaded.append(Library(build(say=say)))
    return _loaded[0]


def choose_variant(found: Library, wanted: str = "auto") -> str:
    """The fastest that this CPU has and that gives the bits of the portable one, or ``wanted``.

    Raises :class:`KernelUnavailable` where ``wanted`` cannot be had.
    """
    usable = [name for name in VARIANTS if found.supports(name)]
    if wanted != "auto" and wanted not in usable:
        raise KernelUnavailable(f"this CPU cannot run the variant {wanted}: it has {', '.join(usable)}")
    for name in [wanted] if wanted != "auto" else reversed(usable):
        if is_right(found, name):
            return name
    raise KernelUnavailable(f"the variant {wanted} computes other bits here than the portable one")


@functools.cache
def is_right(found: Library, variant: str) -> bool:
    """Whether it gives the portable variant's bits on a small problem: a CPU or a compiler may be wrong."""
    if variant == "portable":
        return True
    random = np.random.default_rng(5)
    a = random.standard_normal((40, 96), np.float32)
    c = random.standard_normal((40, 96), np.float32)
    values = (random.standard_normal(512) * 20).astype(np.float32)
    rounded = found.apply("portable", "bf16", a.reshape(-1)).reshape(a.shape)
    weights = random.standard_normal((96, 96), np.float32)
    halves = (found.apply("portable", "bf16", weights.reshape(-1)).view(np.uint32) >> 16).astype(np.uint16)
    for given, b in ((a, weights), (rounded, halves.reshape(weights.shape))):
        for rows in (1, 19, 40):  # each way that tiles have: one row of them, two, two and one
            results = [
                found.product(name, given[:rows], b, c[:rows]).tobytes() for name in ("portable", variant)
            ]
            if results[0] != results[1]:
                return False
    return all(
        found.apply("portable", function, values).tobytes()
        == found.apply(variant, function, values).tobytes()
        for function in ("exp2", "bf16", "silu")
    )

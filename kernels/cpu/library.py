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

ABI_VERSION = 4
VARIANTS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
"""From the slowest on. A variant's number is its place."""
ELEMS = (("cpu1", "bfloat16"), ("cpu1", "float32"), ("cpu2", "bfloat16"))
"""Recipe and dtype (``native/step/numerics.h``): the same bits by all variants. An elem is a place here."""


WEIGHTS = ("dtype", "int8")
"""How a model's matrices stand: in its dtype, or in int8 with a scale for each output. By places, too."""


class Config(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("variant", "elem", "weights", "threads")),
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


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("embedding", "head", "norm", "cos", "sin")),
        ("num_positions", c_int32),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_rows", "num_spans", "num_logits", "table_width", "is_layerwise")),
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
    "ms_supports": (c_int32, [c_int32] * 2),
    "ms_create": (c_void_p, [POINTER(Config)]),
    "ms_layout_version": (c_int32, []),
    "ms_place_weights": (None, [c_void_p, c_void_p, c_int32]),
    "ms_weights_nbytes": (c_int64, [c_void_p]),
    "ms_set_layer": (c_char_p, [c_void_p, c_int32, POINTER(Layer)]),
    "ms_set_model": (c_char_p, [c_void_p, POINTER(Model)]),
    "ms_logits_width": (c_int64, [c_void_p]),
    "ms_step": (c_char_p, [c_void_p, POINTER(Batch), OnLayer]),
    "ms_destroy": (None, [c_void_p]),
    "ms_product": (c_char_p, [*[c_int32] * 6, *[c_void_p] * 3]),
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
        self.layout_version = int(self.calls.ms_layout_version())
        """Of packed weights: objects of one can take each other's."""

    def supports(self, variant: str, dtype: str = "bfloat16") -> bool:
        """Compiled in, this CPU can run it, and it computes the dtype."""
        return bool(self.recipes(variant, dtype))

    def recipes(self, variant: str, dtype: str = "bfloat16") -> list[str]:
        """By which the variant can compute here, the one that it serves by first."""
        number = VARIANTS.index(variant)
        return [
            recipe
            for elem, (recipe, of) in enumerate(ELEMS)
            if of == dtype and self.calls.ms_supports(number, elem)
        ]

    def product(
        self,
        variant: str,
        a: npt.NDArray[np.float32],
        b: npt.NDArray[Any],
        c: npt.NDArray[np.float32],
        recipe: str | None = None,
        weights: str = "dtype",
    ) -> npt.NDArray[np.float32]:
        """c + a bᵀ; a: [m, k], c: [m, n]; b: [n, k], float32, or uint16 for bf16, to be packed as ``weights``
        says. n and k multiples of 32."""
        (m, k), n, out = a.shape, b.shape[0], np.array(c, np.float32, order="C")
        elem = self.elem(variant, "bfloat16" if b.dtype == np.uint16 else "float32", recipe)
        a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b)
        told = self.calls.ms_product(
            *(VARIANTS.index(variant), elem, WEIGHTS.index(weights), m, n, k),
            *(a.ctypes.data, b.ctypes.data, out.ctypes.data),
        )
        if told is not None:
            raise ValueError(f"product: {told.decode()}")
        return out

    def elem(self, variant: str, dtype: str, recipe: str | None = None) -> int:
        """Its number; ``recipe`` None: the one that the variant serves by. Raises ``ValueError``."""
        known = self.recipes(variant, dtype)
        if not known or (recipe is not None and recipe not in known):
            raise ValueError(f"the variant {variant} does not compute {dtype} by {recipe or 'any recipe'}")
        return ELEMS.index((recipe or known[0], dtype))

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


def choose_variant(
    found: Library, wanted: str = "auto", dtype: str = "bfloat16", weights: str = "dtype"
) -> str:
    """The fastest that this CPU has, that computes the dtype and gives the bits of the portable one, or
    ``wanted``.

    Raises :class:`KernelUnavailable` where ``wanted`` cannot be had.
    """
    usable = [name for name in VARIANTS if found.supports(name, dtype)]
    if wanted != "auto" and wanted not in usable:
        what = f"the variant {wanted}: it has {', '.join(usable)}"
        if dtype != "bfloat16" and found.supports(wanted):
            raise KernelUnavailable(f"{dtype} is not computed by {what}")
        raise KernelUnavailable(f"this CPU cannot run {what}")
    for name in [wanted] if wanted != "auto" else reversed(usable):
        if is_right(found, name, weights):
            return name
    raise KernelUnavailable(f"the variant {wanted} computes other bits here than the portable one")


@functools.cache
def is_right(found: Library, variant: str, weights: str = "dtype") -> bool:
    """Whether it gives the portable variant's bits on small problems, with such weights: a CPU or a compiler
    may be wrong."""
    if variant == "portable":
        return True
    random = np.random.default_rng(5)
    for dtype in ("bfloat16", "float32"):
        for recipe in found.recipes(variant, dtype):
            for kind in range(_NUM_KINDS):
                a, b, c = _operands(random, dtype, kind)
                for rows in (1, 19, 40):  # each way that tiles have: one row of them, two, two and one
                    results = [
                        _bits(found.product(name, a[:rows], b, c[:rows], recipe, weights))
                        for name in ("portable", variant)
                    ]
                    if results[0] != results[1]:
                        return False
    values = (random.standard_normal(512) * 20).astype(np.float32)
    return all(
        found.apply("portable", function, values).tobytes()
        == found.apply(variant, function, values).tobytes()
        for function in ("exp2", "bf16", "silu")
    )


_NUM_KINDS = 6


def _operands(random: np.random.Generator, dtype: str, kind: int) -> tuple[Any, Any, npt.NDArray[np.float32]]:
    """Of one kind: ordinary sums, such as cancel, underflow, overflow, any exponents, any bits at all (NaN,
    infinities and denormals among them)."""
    shape = (40, 96)

    def drawn(least: int, most: int) -> npt.NDArray[np.float32]:
        """Of exponents in [least, most), biased by 127 as they stand in the number."""
        bits = random.integers(0, 1 << 32, shape, np.uint32) & np.uint32(0x807FFFFF)
        made = bits | random.integers(least, most, shape, np.uint32) << np.uint32(23)
        return made.view(np.float32)

    if kind == 0:
        a, b, c = (random.standard_normal(shape, np.float32) for _ in range(3))
    else:
        least, most = ((126, 128), (60, 68), (186, 192), (1, 254), (0, 256))[kind - 1]
        a, b, c = drawn(least, most), drawn(least, most), drawn(*((0, 24) if kind == 2 else (least, most)))
    b = np.concatenate([b, b, b[:16]])
    c = np.concatenate([c] * 3, axis=1)[:, :96]
    if dtype == "float32":
        return a, b, c
    halves = (b.view(np.uint32) >> 16).astype(np.uint16)
    return (a.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), halves, c


def _bits(values: npt.NDArray[np.float32]) -> bytes:
    """Every NaN the same: which one it is depends on the order of operands, and means nothing."""
    return np.where(np.isnan(values), np.float32(np.nan), values).tobytes()

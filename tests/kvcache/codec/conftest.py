"""Files that ask for ``way`` run by numpy and by each kind of C++ that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.kernels.codec.build import SOURCE
from microserve.kernels.codec.native import NativeCodec
from microserve.kernels.host_object import build
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.kvcache.codec import codec
from microserve.kvcache.codec.steps import body
from microserve.kvcache.codec.steps.native import NativeBody

VARIANTS = ("portable", "avx2", "avx512")


def native_body(variant: str) -> NativeBody:
    try:
        return NativeBody(NativeCodec(build(SOURCE), variant))
    except KernelUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", params=("numpy", *VARIANTS))
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    found = body if request.param == "numpy" else native_body(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_way", lambda: found)
        yield

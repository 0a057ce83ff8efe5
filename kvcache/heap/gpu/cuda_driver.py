"""The few calls of a CUDA driver that GPU heaps need, and the real driver behind them.

``libcuda.so.1`` is called through ctypes: about twenty functions of a C interface that its versioned names
(``..._v2``) fix, and no package to match with the driver's version. The heaps know only :class:`CudaDriver`,
so their logic runs without a GPU over tests/support/engine/device/host_driver.py.
tests/kvcache/heap/gpu/test_cuda_driver.py calls every function here against a stand-in that is compiled with
NVIDIA's own ``cuda.h``.

Two rules of the driver carry the heaps' promise of order:

  - Work of one stream is done in the order in which it was enqueued.
  - ``write_values`` (cuStreamBatchMemOp of CU_STREAM_MEM_OP_WRITE_VALUE_64, flags 0) makes "a memory fence
    before the write, which has similar semantics to __threadfence_system() but is scoped to the stream
    rather than a CUDA thread" (cuda.h). So whoever sees the value, a CPU or another GPU, finds what the
    stream wrote before. CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER would take that away: never set it.

Owns the calls and their errors. Does not know heaps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any, Final, Protocol

import numpy as np

from microserve.protocol.errors import ConfigError, InternalError, TransferFailed

MAX_BATCH: Final = 255
"""Writes that one cuStreamBatchMemOp takes: fewer than 256."""
HANDLE_NBYTES: Final = 64

_NOT_READY: Final = 600
_STREAM_NON_BLOCKING: Final = 1
_EVENT_DISABLE_TIMING: Final = 2
_IPC_LAZY_ENABLE_PEER_ACCESS: Final = 1
_HOST_REGISTER_PORTABLE_DEVICEMAP: Final = 1 | 2
_CAN_USE_64_BIT_STREAM_MEM_OPS: Final = 122
_WRITE_VALUE_64: Final = 5
_WAIT_VALUE_GEQ: Final = 0


class CudaDriver(Protocol):
    """One device. Addresses, streams and events are ints. Callable from any thread.

    A failing call raises :class:`InternalError`: CUDA errors mostly stay for the life of the process.
    """

    def allocate(self, nbytes: int) -> int:
        """Device memory of its own, zeroed. :class:`ConfigError` if there is too little."""

    def clear(self, address: int, nbytes: int) -> None:
        """Zero device memory; blocks."""

    def free(self, address: int) -> None:
        """Not while another process has it open."""

    def export(self, address: int) -> bytes:
        """A handle, ``HANDLE_NBYTES`` long, for another process to ``open``."""

    def open(self, handle: bytes) -> int:
        """Another process's memory, here. :class:`TransferFailed` if it is gone or out of reach."""

    def close(self, address: int) -> None:
        """What ``open`` gave."""

    def register_host(self, address: int, nbytes: int) -> int:
        """Pin host memory, whole pages, and give its address on the device."""

    def unregister_host(self, address: int) -> None: ...

    def create_stream(self) -> int:
        """It does not wait for the legacy default stream."""

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int | None) -> None:
        """Wait for a stream, or for the whole device."""

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy between any two of: our device, a peer's, registered host memory."""

    def write_values(self, addresses: Sequence[int], value: int, stream: int) -> None:
        """Enqueue 8-byte stores of one value, after all that the stream wrote before; see the module."""

    def wait_value(self, address: int, value: int, stream: int) -> None:
        """The stream goes on once the 8 bytes there are at least ``value``: as signed difference."""

    def record(self, stream: int) -> int:
        """An event: all that is enqueued in the stream by now."""

    def wait_event(self, stream: int, event: int) -> None:
        """What is enqueued in the stream later comes after the event."""

    def is_done(self, event: int) -> bool: ...

    def destroy_event(self, event: int) -> None: ...


class LibCuda:
    """The driver of this machine, for one device, in its primary context, as torch and cupy use it."""

    def __init__(self, device: int = 0, library: str = "libcuda.so.1") -> None:
        """:class:`ConfigError` of field ``device`` without a driver, without that device, or if it cannot
        write words in stream order."""
        try:
            self._lib = ctypes.CDLL(library)
        except OSError as error:
            raise ConfigError(f"no NVIDIA driver: {error}", field="device") from error
        self._functions: dict[str, Callable[..., int]] = {}
        self._exported: dict[bytes, int] = {}
        context, number, can_write = c_void_p(), c_int(), c_int()
        try:
            self._call("cuInit", (c_uint,), 0, needs_context=False)
            self._call("cuDeviceGet", (c_void_p, c_int), byref(number), device, needs_context=False)
            self._call(
                *("cuDeviceGetAttribute", (c_void_p, c_int, c_int)),
                *(byref(can_write), _CAN_USE_64_BIT_STREAM_MEM_OPS, number.value),
                needs_context=False,
            )
            self._call(
                "cuDevicePrimaryCtxRetain",
                (c_void_p, c_int),
                byref(context),
                number.value,
                needs_context=False,
            )
        except InternalError as error:
            raise ConfigError(f"cuda:{device} cannot be used: {error.detail}", field="device") from error
        if not can_write.value:
            raise ConfigError(f"cuda:{device} cannot write 64-bit values in stream order", field="device")
        self._context = context

    def allocate(self, nbytes: int) -> int:
        address = c_uint64()
        try:
            self._call("cuMemAlloc_v2", (c_void_p, c_size_t), byref(address), nbytes)
        except InternalError as error:
            raise ConfigError(
                f"no {nbytes} bytes on the device: {error.detail}", field="num_blocks"
            ) from error
        self.clear(address.value, nbytes)
        return address.value

    def clear(self, address: int, nbytes: int) -> None:
        self._call("cuMemsetD8_v2", (c_uint64, c_ubyte, c_size_t), address, 0, nbytes)
        # On device memory the memset may return before it is done.
        self.synchronize(None)

    def free(self, address: int) -> None:
        self._exported = {handle: at for handle, at in self._exported.items() if at != address}
        self._call("cuMemFree_v2", (c_uint64,), address)

    def export(self, address: int) -> bytes:
        handle = _IpcHandle()
        self._call("cuIpcGetMemHandle", (c_void_p, c_uint64), byref(handle), address)
        self._exported[bytes(handle)] = address
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        if (ours := self._exported.get(handle)) is not None:
            # The driver refuses to open memory of the same process: an engine that attaches itself.
            return ours
        address = c_uint64()
        try:
            self._call(
                *("cuIpcOpenMemHandle_v2", (c_void_p, _IpcHandle, c_uint)),
                *(byref(address), _IpcHandle.from_buffer_copy(handle), _IPC_LAZY_ENABLE_PEER_ACCESS),
            )
        except InternalError as error:
            raise TransferFailed(f"a peer's device memory cannot be opened: {error.detail}") from error
        return address.value

    def close(self, address: int) -> None:
        if address not in self._exported.values():
            self._call("cuIpcCloseMemHandle", (c_uint64,), address)

    def register_host(self, address: int, nbytes: int) -> int:
        on_device = c_uint64()
        self._call(
            "cuMemHostRegister_v2",
            (c_void_p, c_size_t, c_uint),
            address,
            nbytes,
            _HOST_REGISTER_PORTABLE_DEVICEMAP,
        )
        self._call("cuMemHostGetDevicePointer_v2", (c_void_p, c_void_p, c_uint), byref(on_device), address, 0)
        return on_device.value

    def unregister_host(self, address: int) -> None:
        self._call("cuMemHostUnregister", (c_void_p,), address)

    def create_stream(self) -> int:
        stream = c_uint64()
        self._call("cuStreamCreate", (c_void_p, c_uint), byref(stream), _STREAM_NON_BLOCKING)
        return stream.value

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", (c_void_p,), stream)

    def synchronize(self, stream: int | None) -> None:
        if stream is None:
            self._call("cuCtxSynchronize", ())
        else:
            self._call("cuStreamSynchronize", (c_void_p,), stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyAsync", (c_uint64, c_uint64, c_size_t, c_void_p), target, source, nbytes, stream)

    def write_values(self, addresses: Sequence[int], value: int, stream: int) -> None:
        for start in range(0, len(addresses), MAX_BATCH):
            part = addresses[start : start + MAX_BATCH]
            batch = np.zeros(len(part), _WRITE_VALUE)
            batch["operation"], batch["address"], batch["value"] = _WRITE_VALUE_64, part, value
            self._call(
                *("cuStreamBatchMemOp_v2", (c_void_p, c_uint, c_void_p, c_uint)),
                *(stream, len(part), batch.ctypes.data, 0),
            )

    def wait_value(self, address: int, value: int, stream: int) -> None:
        self._call(
            *("cuStreamWaitValue64_v2", (c_void_p, c_uint64, c_uint64, c_uint)),
            *(stream, address, value, _WAIT_VALUE_GEQ),
        )

    def record(self, stream: int) -> int:
        event = c_uint64()
        self._call("cuEventCreate", (c_void_p, c_uint), byref(event), _EVENT_DISABLE_TIMING)
        self._call("cuEventRecord", (c_void_p, c_void_p), event.value, stream)
        return event.value

    def wait_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", (c_void_p, c_void_p, c_uint), stream, event, 0)

    def is_done(self, event: int) -> bool:
        return self._call("cuEventQuery", (c_void_p,), event, may_be=_NOT_READY) == 0

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", (c_void_p,), event)

    def _call(
        self,
        name: str,
        types: tuple[type, ...],
        *arguments: Any,
        may_be: int = 0,
        needs_context: bool = True,
    ) -> int:
        """``may_be`` is a result that is no error. Contexts belong to threads, so ours is set each time."""
        if needs_context:
            self._call("cuCtxSetCurrent", (c_void_p,), self._context, needs_context=False)
        function = self._functions.get(name)
        if function is None:
            try:
                found = getattr(self._lib, name)
            except AttributeError:
                raise InternalError(f"the NVIDIA driver has no {name}: it is too old") from None
            found.argtypes, found.restype = types, c_int
            function = self._functions[name] = found
        result = function(*arguments)
        if result not in (0, may_be):
            raise InternalError(f"{name} failed: {self._describe(result)}")
        return result

    def _describe(self, result: int) -> str:
        text = c_char_p()
        describe = self._lib.cuGetErrorString
        describe.argtypes = (c_int, c_void_p)
        describe(result, byref(text))
        return f"{(text.value or b'unknown').decode()} ({result})"


class _IpcHandle(ctypes.Structure):
    """CUipcMemHandle: passed by value."""

    _fields_ = (("data", c_char * HANDLE_NBYTES),)


_WRITE_VALUE: Final = np.dtype(
    {
        "names": ["operation", "address", "value", "flags"],
        "formats": [np.uint32, np.uint64, np.uint64, np.uint32],
        "offsets": [0, 8, 16, 24],
        "itemsize": 48,
    }
)
"""CUstreamBatchMemOpParams, its ``writeValue``."""

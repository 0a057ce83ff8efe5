"""Heaps in device memory, for engines of one user on one Linux host that come and go.

The data is one device allocation of its own, opened by peers through its IPC handle and written by their
copies (device.py). The words stay in host memory, in a memfd (../memfd.py) that every peer maps and registers
with its driver: a stream stores into them after its copies, and the receiver's step loop reads them with
plain loads, without asking its device anything.

    memfd    header with the IPC handle │ words │ holders: one word a lane
    device   data

Holding. A lane's byte lock keeps writers apart, as in shm.py, but it proves less: it goes free with the
holder's memfd, while the copies of a dying process may run on until its GPU channels are torn down. So a
holder writes who it is (process.py) beside the lane before its first write, and 0 once its stream has
drained, just before it gives up the lock:

    lock     holder                        is_held
    taken    any                           True
    free     0: let go, all is done        False
    free     a process that may be there   True, and nobody else may hold the lane
    free     a process proven gone         False; the owner clears the word

That a process's GPU work is over when the process is gone rests on process.py, and on the nvidia driver
freeing all that a process had, its channels too, before it returns from closing the last of its descriptors
(rm_cleanup_file_private in the open kernel modules). Two things make it do so later, from a thread of the
kernel: the host is being suspended or resumed (nvidia_close_deferred), and a registry key that is off by
default (RmClientListDeferredFree). A host whose engines move KV may have neither.

Life. An owner that leaves frees its memory only if nobody has it open: freeing it then is undefined. What
is open when it leaves stays allocated until its process ends, and after that until the last importer
detaches: a peer that keeps a dead engine's heap open pins all of its device memory. An importer that dies
pins nothing.

Needs x86-64 (memfd.py) and one pid namespace. Owns this kind of heap; knows no grants.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from microserve.kvcache.heap.gpu.cuda_driver import CudaDriver
from microserve.kvcache.heap.gpu.device import BlockPut, DeviceHeap, DevicePeerHeap, DeviceRegion
from microserve.kvcache.heap.mapped import MappedWords
from microserve.kvcache.heap.memfd import IMPORTERS, OWNER, HeapFile, lane_byte
from microserve.kvcache.heap.process import is_gone, this_process
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS, POISON, WORD_NBYTES
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.grant import MAX_LANES, HeapAddress

KIND = "cuda_ipc"


class _Words:
    """The file's words, mapped here and known to our driver."""

    def __init__(self, file: HeapFile, driver: CudaDriver) -> None:
        self.file = file
        self.values = np.frombuffer(file.word_region, np.uint64)
        self.holders = np.frombuffer(file.tail, np.uint64)
        shared = np.frombuffer(file.shared, np.uint8)
        self._driver = driver
        self._host_address = shared.ctypes.data
        self._device_address = driver.register_host(self._host_address, shared.nbytes)

    def address(self, word: int) -> int:
        return self._device_address + word * WORD_NBYTES

    def close(self) -> None:
        """The file too. No stream may write any more."""
        self._driver.unregister_host(self._host_address)
        self.values = self.holders = np.empty(0, np.uint64)
        self.file.close()


class CudaIpcHeap(MappedWords, DeviceHeap):
    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        driver: CudaDriver,
        num_slots: int = DEFAULT_NUM_SLOTS,
        block_put: BlockPut | None = None,
    ) -> None:
        """Takes all of its memory now. :class:`ConfigError` if there is too little, or on a machine that
        is not x86-64 Linux. ``block_put``: how peers put many runs at once; None: one copy each."""
        with ExitStack() as undo:
            address = driver.allocate(layout.data_nbytes)
            undo.callback(driver.free, address)
            self._file = file = HeapFile.create(
                KIND,
                layout,
                incarnation=incarnation,
                num_slots=num_slots,
                tail_nbytes=num_slots * MAX_LANES * WORD_NBYTES,
                device_handle=driver.export(address),
            )
            undo.callback(file.close)
            self._shared = _Words(file, driver)
            undo.pop_all()
        data = DeviceRegion(address, layout.data_nbytes)
        super().__init__(layout, file.words, file.address, data, driver)
        self._words = self._shared.values
        self._block_put = block_put
        self._is_closed = False

    def is_held(self, slot: int, lane: int) -> bool:
        byte, index = lane_byte(slot, lane), slot * MAX_LANES + lane
        if not self._file.lock(byte):
            return True
        try:
            holder = self._shared.holders.item(index)
            if holder and not is_gone(holder):
                return True
            self._shared.holders[index] = 0
            return False
        finally:
            self._file.unlock(byte)

    def attach(self, address: HeapAddress) -> CudaIpcPeerHeap:
        return CudaIpcPeerHeap(self.layout, self.data, address, self._driver, self._block_put)

    def word_address(self, word: int) -> int:
        return self._shared.address(word)

    def poison(self, word: int) -> None:
        self.store(word, self.load(word) | POISON)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._file.unlock(OWNER)
        # Whoever imports now finds no owner; whoever did so before is seen here.
        is_imported = self._file.is_locked(IMPORTERS)
        self._words = np.empty(0, np.uint64)
        self._shared.close()
        if not is_imported:
            self.data.free_with_last_view(self._driver)
        self.data = DeviceRegion(0, 0)


class CudaIpcPeerHeap(DevicePeerHeap):
    def __init__(
        self,
        mine: KvLayout,
        source: DeviceRegion,
        address: HeapAddress,
        driver: CudaDriver,
        block_put: BlockPut | None = None,
    ) -> None:
        with ExitStack() as undo:
            self._file = file = HeapFile.open(address, KIND, mine)
            undo.callback(file.close)
            # Before the owner is asked for: see the owner's ``close``.
            file.share(IMPORTERS)
            if not file.is_locked(OWNER):
                raise TransferFailed(f"the owner {address.incarnation:#x} is gone")
            target = driver.open(file.header.device_handle)
            undo.callback(driver.close, target)
            self._shared = _Words(file, driver)
            undo.pop_all()
        super().__init__(file.header.layout, file.words, address, source, target, driver, block_put)
        self._me = this_process()

    def read(self, word: int) -> int:
        self._require_open()
        return self._shared.values.item(word)

    def owner_is_dead(self) -> bool:
        self._require_open()
        return not self._file.is_locked(OWNER)

    def _write(self, words: list[int], value: int) -> None:
        self._driver.write_values([self._shared.address(word) for word in words], value, self.stream)

    def _take(self, slot: int, lane: int) -> bool:
        if not self._file.lock(lane_byte(slot, lane)):
            return False
        index = slot * MAX_LANES + lane
        if self._shared.holders.item(index):
            # Somebody died here, and the owner has yet to see the proof.
            self._file.unlock(lane_byte(slot, lane))
            return False
        # By the host: no write of ours is on its way yet, so this one comes first.
        self._shared.holders[index] = self._me
        return True

    def _leave(self, slot: int, lane: int) -> None:
        """Nothing to write: the host lets go once the stream has drained."""

    def _give_back(self, slot: int, lane: int) -> None:
        self._release(slot, lane)

    def _release(self, slot: int, lane: int) -> None:
        self._shared.holders[slot * MAX_LANES + lane] = 0
        self._file.unlock(lane_byte(slot, lane))

    def _detach(self) -> None:
        self._driver.close(self.target_address)
        self._shared.close()

"""Disks and networks of your own."""

from __future__ import annotations

import errno
import logging
import threading
from enum import Enum, IntFlag
from typing import Any, Callable

from ._lib import ffi, let_go, lib, structure
from .device import Attached

log = logging.getLogger("vmbed")


class BlockOp(Enum):
    """What a disk is to do."""

    #: Fill the guest's memory.
    READ = "read"
    #: Write out the guest's memory.
    WRITE = "write"
    #: Bring what was written to stable storage. There is no data.
    FLUSH = "flush"
    #: The guest no longer needs what is there. There is no data.
    DISCARD = "discard"
    #: Make it read as zeroes. There is no data.
    WRITE_ZEROES = "write zeroes"


class BlockRequest:
    """A request to a disk of yours, and the guest's memory that it is about.

    It ends with :meth:`complete`, within `submit` or later, on any thread, in any order. One that nobody refers to any
    more fails.
    """

    def __init__(self, op: BlockOp, given: Any) -> None:
        #: What to do.
        self.op = op
        #: Where on the disk, in bytes, and how many; 0 for a flush.
        self.offset, self.length = int(given.offset), int(given.length)
        #: Of a write or a zeroing: to be on stable storage when it is completed, since the driver has no way to flush.
        self.durable = bool(given.durable)
        #: Of a zeroing: what was there may be given back to the host.
        self.unmap = bool(given.unmap)
        self._disk, self._tag = given.disk, given.tag
        self._pieces = [(given.pieces[i].base, given.pieces[i].length) for i in range(given.count)]
        self._lock, self._open = threading.Lock(), True

    def __repr__(self) -> str:
        return f"<vmbed.BlockRequest {self.op.value} of {self.length} at {self.offset}>"

    def read(self) -> bytes:
        """What the guest wants to be written."""
        with self._lock:
            self._still()
            return b"".join(bytes(ffi.buffer(base, length)) for base, length in self._pieces)

    def fill(self, data: bytes | bytearray | memoryview) -> None:
        """Gives the guest what it reads: `length` bytes."""
        data = memoryview(data).cast("B")
        if self.op is not BlockOp.READ or len(data) != self.length:
            raise ValueError(f"{len(data)} bytes for {self!r}")
        with self._lock:
            self._still()
            for base, length in self._pieces:
                ffi.memmove(base, data[:length], length)
                data = data[length:]

    def complete(self, error: int | OSError | None = None) -> bool:
        """Ends it, well or with an errno, which the guest sees as an I/O error. False where nobody waits for it any more."""
        with self._lock:
            self._still()
            self._open = False
        number = error.errno or errno.EIO if isinstance(error, OSError) else error or 0
        return bool(lib.vmbed_block_complete(self._disk, self._tag, number, ffi.NULL) == lib.VMBED_OK)

    def _still(self) -> None:
        if not self._open:
            raise ValueError(f"{self!r} has ended")

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.complete(errno.EIO)


class BlockBackend:
    """A disk of your own; `size` is in bytes, a multiple of 512.

    Override :meth:`submit`. It is called on a device thread of the VM's, one call at a time, and must not wait for that
    VM; while it has not returned, neither has what waits for the VM. An OSError that it raises fails the request with its
    errno, anything else with EIO, and is kept in :attr:`Vm.exceptions`. There are at most 256 requests at a time and no
    order among them: a flush is about the writes that had been completed before it came. Until a request is completed
    the guest waits, also when its driver resets the device; :meth:`Vm.pause` raises TimedOut after 10 s, and the end of
    the VM gives up on it after 5 s.
    """

    size: int = 0
    #: The guest may not write.
    readonly: bool = False
    #: `DISCARD` and `WRITE_ZEROES` come, too; otherwise the guest is told that the disk knows no such thing.
    discards: bool = False

    def submit(self, request: BlockRequest) -> None:
        """Does the request, or begins it."""
        raise NotImplementedError


class Offloads(IntFlag):
    """What may be left to do on a frame (virtio 1.2, 5.1.6): its header says where."""

    NONE = 0
    #: Its TCP or UDP checksum. Without it, none of the others.
    CSUM = 1
    #: It is to be cut into segments: TCP over IPv4.
    TSO4 = 2
    #: TCP over IPv6.
    TSO6 = 4
    #: TSO of connections with explicit congestion notification.
    ECN = 8
    #: It is to be cut into UDP datagrams.
    USO = 16


class NetBackend:
    """A network of your own.

    A frame is bytes: a header of 12 (`struct virtio_net_hdr_v1`) and the frame from its Ethernet header on, without its
    checksum. A header says what is left to do on its frame: nothing, so that it is all zero, but for the
    :attr:`offloads` that both sides know. The methods are called on a device thread of the VM's, one call at a
    time, and must not block. What they raise but OSError is kept in :attr:`Vm.exceptions` and counts as EIO. Where frames
    come from other threads, one of a pair of connected sockets is easier: :meth:`Builder.net_fd`.
    """

    #: What it does itself on frames that a guest sends, and may leave to do on those for a guest. Looked at when it is attached.
    offloads: Offloads = Offloads.NONE

    def set_offloads(self, taken: Offloads) -> None:
        """What of it the guest's driver takes: a frame for it that leaves anything else to do is dropped. Called when a driver
        begins, before anything else, on the thread that has the device serve it. It must not call into the VM."""

    def fileno(self) -> int:
        """Polls readable while a frame waits, and writable while there is room: an eventfd will do. It is duplicated."""
        raise NotImplementedError

    def receive(self) -> bytes | None:
        """The next frame for the guest; None when there is none, and then the descriptor is not readable before there is
        one. An OSError says that the network is gone; a second later this is called again."""
        raise NotImplementedError

    def send(self, frame: bytes) -> None:
        """Sends a frame of the guest's. BlockingIOError when there is no room: it comes again when the descriptor is
        writable. Another OSError: the frame is lost."""
        raise NotImplementedError


def _guarded(attached: Attached, function: Callable[[], int]) -> int:
    """Does it; an errno where it raises."""
    try:
        return function()
    except OSError as raised:
        return raised.errno or errno.EIO
    except BaseException as raised:  # noqa: BLE001 - nothing may unwind into the library
        attached.exceptions.append(raised)
        log.error("a callback of a VM raised", exc_info=raised)
        return errno.EIO


def _submit(op: BlockOp, user: Any, given: Any) -> int:
    attached: Attached = ffi.from_handle(user)
    request = BlockRequest(op, given)

    def submit() -> int:
        attached.target.submit(request)
        return int(lib.VMBED_BLOCK_PENDING)

    answer = _guarded(attached, submit)
    if answer != lib.VMBED_BLOCK_PENDING:
        # It raised: the library hears of it by what this returns, if the request has not ended before.
        with request._lock:
            request._open, was_open = False, request._open
        return answer if was_open else int(lib.VMBED_BLOCK_PENDING)
    return answer


@ffi.callback("int32_t(void *, const vmbed_block_request *)")  # type: ignore[untyped-decorator]
def _block_read(user: Any, given: Any) -> int:
    return _submit(BlockOp.READ, user, given)


@ffi.callback("int32_t(void *, const vmbed_block_request *)")  # type: ignore[untyped-decorator]
def _block_write(user: Any, given: Any) -> int:
    return _submit(BlockOp.WRITE, user, given)


@ffi.callback("int32_t(void *, const vmbed_block_request *)")  # type: ignore[untyped-decorator]
def _block_flush(user: Any, given: Any) -> int:
    return _submit(BlockOp.FLUSH, user, given)


@ffi.callback("int32_t(void *, const vmbed_block_request *)")  # type: ignore[untyped-decorator]
def _block_discard(user: Any, given: Any) -> int:
    return _submit(BlockOp.DISCARD, user, given)


@ffi.callback("int32_t(void *, const vmbed_block_request *)")  # type: ignore[untyped-decorator]
def _block_zeroes(user: Any, given: Any) -> int:
    return _submit(BlockOp.WRITE_ZEROES, user, given)


def _pieces(pieces: Any, count: int) -> list[tuple[Any, int]]:
    return [(pieces[i].base, pieces[i].length) for i in range(count)]


@ffi.callback("int32_t(void *, const vmbed_piece *, size_t, size_t *)")  # type: ignore[untyped-decorator]
def _net_receive(user: Any, pieces: Any, count: int, length: Any) -> int:
    attached: Attached = ffi.from_handle(user)

    def receive() -> int:
        frame = attached.target.receive()
        if frame is None:
            return errno.EAGAIN
        left = memoryview(frame)
        for base, room in _pieces(pieces, count):
            if not left:
                break
            step = min(room, len(left))
            ffi.memmove(base, left[:step], step)
            left = left[step:]
        length[0] = len(frame) - len(left)
        return 0

    return _guarded(attached, receive)


@ffi.callback("int32_t(void *, const vmbed_piece *, size_t)")  # type: ignore[untyped-decorator]
def _net_send(user: Any, pieces: Any, count: int) -> int:
    attached: Attached = ffi.from_handle(user)
    frame = b"".join(bytes(ffi.buffer(base, length)) for base, length in _pieces(pieces, count))

    def send() -> int:
        attached.target.send(frame)
        return 0

    return _guarded(attached, send)


@ffi.callback("void(void *, uint32_t)")  # type: ignore[untyped-decorator]
def _net_set_offloads(user: Any, taken: int) -> None:
    attached: Attached = ffi.from_handle(user)

    def set_offloads() -> int:
        attached.target.set_offloads(Offloads(taken))
        return 0

    _guarded(attached, set_offloads)


_BLOCK = {"read": _block_read, "write": _block_write, "flush": _block_flush, "destroy": let_go}
BLOCK = structure("vmbed_block_ops", **_BLOCK)
DISCARDING = structure("vmbed_block_ops", **_BLOCK, discard=_block_discard, write_zeroes=_block_zeroes)
_NET = {"receive": _net_receive, "send": _net_send, "destroy": let_go, "set_offloads": _net_set_offloads}


def net_table(backend: NetBackend) -> Any:
    """Its functions, and what it knows."""
    return structure("vmbed_net_ops", **_NET, offloads=int(backend.offloads))


__all__ = ["BLOCK", "BlockBackend", "BlockOp", "BlockRequest", "DISCARDING", "NetBackend", "Offloads", "net_table"]

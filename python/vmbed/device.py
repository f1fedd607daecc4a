"""Devices of your own, and the other callbacks."""

from __future__ import annotations

import logging
from typing import Any, Callable

from ._lib import ffi, hold, let_go, lib, structure

log = logging.getLogger("vmbed")


class Device:
    """A port-I/O or MMIO device of your own. Override what the guest shall meet.

    The methods are called on the thread of the vCPU whose instruction touched the device, which waits for the answer;
    those of several vCPUs at the same time. `offset` counts bytes from the start of the range, and `data` are the
    guest's bytes, little-endian, 1 to 8 of them. What a method raises stops that VM, and no other: the cause names the
    device, and the exception is in :attr:`Vm.exceptions`. They may call what never waits for the VM.
    """

    def read(self, vcpu: int, offset: int, length: int) -> bytes | int:
        """The guest reads `length` bytes: answer them, or a number. All-ones where this is not overridden."""
        return b"\xff" * length

    def write(self, vcpu: int, offset: int, data: bytes) -> None:
        """The guest writes. Nothing happens where this is not overridden."""


class Attached:
    """What the library holds of a callback: the object, and where its exceptions go."""

    def __init__(self, target: Any, exceptions: list[BaseException]) -> None:
        self.target, self.exceptions = target, exceptions

    def guard(self, function: Callable[[], None]) -> int:
        """Does it; VMBED_ERR_INTERNAL, and the exception kept, where it raises."""
        try:
            function()
        except BaseException as raised:  # noqa: BLE001 - nothing may unwind into the library
            self.exceptions.append(raised)
            log.error("a callback of a VM raised", exc_info=raised)
            return int(lib.VMBED_ERR_INTERNAL)
        return int(lib.VMBED_OK)


@ffi.callback("int32_t(void *, uint32_t, uint64_t, uint8_t *, size_t)")  # type: ignore[untyped-decorator]
def _read(user: Any, vcpu: int, offset: int, data: Any, length: int) -> int:
    attached: Attached = ffi.from_handle(user)

    def read() -> None:
        answer = attached.target.read(vcpu, offset, length)
        if isinstance(answer, int):
            answer = (answer & (1 << 8 * length) - 1).to_bytes(length, "little")
        if len(answer) != length:
            raise ValueError(f"read() answered {len(answer)} bytes for {length}")
        ffi.memmove(data, answer, length)

    return attached.guard(read)


@ffi.callback("int32_t(void *, uint32_t, uint64_t, const uint8_t *, size_t)")  # type: ignore[untyped-decorator]
def _write(user: Any, vcpu: int, offset: int, data: Any, length: int) -> int:
    attached: Attached = ffi.from_handle(user)
    return attached.guard(lambda: attached.target.write(vcpu, offset, bytes(ffi.buffer(data, length))))


@ffi.callback("void(void *, const uint8_t *, size_t)")  # type: ignore[untyped-decorator]
def console(user: Any, data: Any, length: int) -> None:
    """Takes a piece of a console's output to the function behind `user`."""
    attached: Attached = ffi.from_handle(user)
    attached.guard(lambda: attached.target(bytes(ffi.buffer(data, length))))


@ffi.callback("void(void *, uint64_t, int32_t, uint32_t, int32_t)")  # type: ignore[untyped-decorator]
def thread(user: Any, vm: int, role: int, index: int, tid: int) -> None:
    """Takes the start of a library thread to the function behind `user`."""
    attached: Attached = ffi.from_handle(user)
    attached.guard(lambda: attached.target(vm, role, index, tid))


@ffi.callback("void(void *, int32_t, const char *, const char *)")  # type: ignore[untyped-decorator]
def log_line(user: Any, level: int, target: Any, message: Any) -> None:
    """Takes a log line to the logger behind `user`."""
    levels = {1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG, 5: logging.DEBUG}
    logger: logging.Logger = ffi.from_handle(user)
    said = ffi.string(message).decode(errors="replace")
    logger.log(levels.get(level, logging.DEBUG), "%s: %s", ffi.string(target).decode(errors="replace"), said)


OPERATIONS = structure("vmbed_device_ops", read=_read, write=_write, destroy=let_go)

__all__ = ["Attached", "Device", "OPERATIONS", "console", "hold", "let_go", "log_line", "thread"]

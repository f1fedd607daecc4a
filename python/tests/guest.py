"""What the cases share: guests of a few instructions, a device, waiting with a deadline."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections import deque
from pathlib import Path
from typing import Callable

import vmbed

LONG = 60.0
#: in al, 0x10; out 0x11, al; hlt
TALKS = bytes([0xE4, 0x10, 0xE6, 0x11, 0xF4])
#: cli; jmp $
SPINS = bytes([0xFA, 0xEB, 0xFE])
#: out 0x10, al; jmp $-2
WRITES = bytes([0xE6, 0x10, 0xEB, 0xFC])


class Port(vmbed.Device):
    """Keeps what is written to it, and answers 0x5a; does something at each write."""

    def __init__(self, then: Callable[[], object] | None = None) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.writes = 0
        self.then = then

    def read(self, vcpu: int, offset: int, length: int) -> int:
        return 0x5A

    def write(self, vcpu: int, offset: int, data: bytes) -> None:
        self.writes += 1
        if len(self.written) < 64:
            self.written.append((offset, data))
        if self.then:
            self.then()


def builder(code: bytes, port: vmbed.Device | None = None, host: vmbed.Host | None = None) -> vmbed.Builder:
    """A bare guest in real mode with the device at port 0x10."""
    made = (host or vmbed.Host()).builder(vmbed.BareConfig(code))
    return made.pio_device("port", 0x10, 8, port) if port else made


def wait_until(what: str, done: Callable[[], object]) -> None:
    """Waits, with a deadline."""
    end = time.monotonic() + LONG
    while not done():
        assert time.monotonic() < end, f"waited a minute for {what}"
        time.sleep(0.001)


#: The steps of tests/guests/virtio.c.
END, READ, WRITE, FLUSH, BEGIN_READ, FINISH, SEND, RECEIVE, RESET, TELL, BEGIN_WRITE = range(11)
INFLATE, DEFLATE, ACCOUNT, ASKED, TARGET, DISCARD, ZERO, HEADER = range(11, 19)
Step = tuple[int, int, int, int]


def behind(header: bytes) -> Step:
    """The step from which on frames are sent behind that header."""
    one, two, three = struct.unpack("<3I", header)
    return HEADER, one, two, three


def driver(disks: int = 0, nets: int = 0) -> vmbed.BareConfig:
    """A PC with the guest of tests/guests, which tests/python.rs has built, and that many disks and cards."""
    code = Path(os.environ["VMBED_GUEST"]).read_bytes()
    config = vmbed.BareConfig(code, entry=0x10000, mode=vmbed.Mode.LONG, stack=0x7F00, memory=4 << 20)
    config.platform = vmbed.Platform.PC
    config.disks = [vmbed.Disk() for _ in range(disks)]
    config.nets = [vmbed.Net() for _ in range(nets)]
    return config


def start(made: vmbed.Builder, steps: list[Step], said: Port | None = None) -> vmbed.Vm:
    """Starts that guest on these steps."""
    vm = (made.pio_device("said", 0x10, 1, said) if said else made).build()
    vm.write_memory(0x8000, b"".join(struct.pack("<4I", *step) for step in [*steps, (END, 0, 0, 0)]))
    vm.start()
    return vm


def finish(vm: vmbed.Vm, count: int) -> list[tuple[int, int, int]]:
    """How the steps went, when all are done."""
    assert vm.wait(LONG) is vmbed.Cause.GUEST_RESET
    results = vm.read_memory(0x9000, 16 * count)
    return [struct.unpack_from("<IIQ", results, 16 * i) for i in range(count)]


class Ram(vmbed.BlockBackend):
    """A disk in memory. It fails at sector 100, raises at 101, and keeps what is about sector 200 or beyond."""

    size = 512 * 1024

    def __init__(self) -> None:
        self.bytes = bytearray(self.size)
        self.kept: list[vmbed.BlockRequest] = []
        self.flushes, self.discards = 0, True
        self.asked: list[vmbed.BlockOp] = []

    def submit(self, request: vmbed.BlockRequest) -> None:
        sector = request.offset // 512
        if sector == 100:
            raise OSError(errno.ENOSPC, "full")
        if sector == 101:
            raise RuntimeError("a mistake")
        if sector >= 200:
            self.kept.append(request)
        else:
            assert self.perform(request)

    def perform(self, request: vmbed.BlockRequest) -> bool:
        place = slice(request.offset, request.offset + request.length)
        self.asked.append(request.op)
        if request.op is vmbed.BlockOp.READ:
            request.fill(self.bytes[place])
        elif request.op is vmbed.BlockOp.WRITE:
            self.bytes[place] = request.read()
        elif request.op is vmbed.BlockOp.WRITE_ZEROES:
            assert request.unmap and not request.durable
            self.bytes[place] = bytes(request.length)
        elif request.op is vmbed.BlockOp.FLUSH:
            self.flushes += 1
        return request.complete()


class Echo(vmbed.NetBackend):
    """A network that gives every frame back; one of 99 bytes fails."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.headers: list[bytes] = []
        self.taken: vmbed.Offloads | None = None
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self.bell

    def receive(self) -> bytes | None:
        if not self.frames:
            try:
                os.eventfd_read(self.bell)
            except BlockingIOError:
                pass
            return None
        return self.frames.popleft()

    def set_offloads(self, taken: vmbed.Offloads) -> None:
        self.taken = taken

    def send(self, frame: bytes) -> None:
        self.headers.append(frame[:12])
        if len(frame) == 12 + 99:
            raise OSError(errno.ENETDOWN, "down")
        self.frames.append(frame)
        os.eventfd_write(self.bell, 1)

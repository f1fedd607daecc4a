"""What the cases share: guests of a few instructions, a device, waiting with a deadline."""

from __future__ import annotations

import time
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

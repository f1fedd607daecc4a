#!/usr/bin/env python3
"""A plain virtual machine monitor, to copy from: boots a Linux kernel with disks and network cards, its console on this
terminal.

Ctrl-A x ends the guest. SIGTERM, SIGINT and SIGHUP press its power button, the second time they end it. Exit status: 0 the
guest powered off, 2 it asked for a reboot, 3 it crashed, 1 anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import termios
import tty
from collections import deque

import vmbed

STATUS = {
    vmbed.Cause.GUEST_POWEROFF: 0,
    vmbed.Cause.GUEST_RESET: 2,
    vmbed.Cause.TRIPLE_FAULT: 3,
    vmbed.Cause.GUEST_PANIC: 3,
}


def size(text: str) -> int:
    """512M, 2G, or bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def disk(text: str) -> vmbed.Disk:
    """FILE, or FILE,ro."""
    return vmbed.Disk(text.removesuffix(",ro"), readonly=text.endswith(",ro"))


def arguments() -> vmbed.LinuxConfig:
    parser = argparse.ArgumentParser(prog="boot", description=__doc__)
    parser.add_argument("--kernel", required=True, metavar="FILE")
    parser.add_argument("--initrd", metavar="FILE")
    parser.add_argument("--cmdline", default="console=ttyS0", metavar="TEXT")
    parser.add_argument("--disk", type=disk, action="append", default=[], metavar="FILE[,ro]")
    parser.add_argument("--tap", type=vmbed.Net, action="append", default=[], metavar="NAME")
    parser.add_argument("--vcpus", type=int, default=1, metavar="N")
    parser.add_argument("--memory", type=size, default=size("256M"), metavar="512M")
    given = parser.parse_args()
    return vmbed.LinuxConfig(
        given.kernel,
        initrd=given.initrd,
        cmdline=given.cmdline,
        disks=given.disk,
        nets=given.tap,
        vcpus=given.vcpus,
        memory=given.memory,
    )


class Keyboard:
    """Types what comes from stdin on the guest's console, and knows Ctrl-A x."""

    def __init__(self, vm: vmbed.Vm) -> None:
        self.vm, self.loop = vm, asyncio.get_running_loop()
        self.waiting: deque[bytes] = deque()
        self.escaped = False
        try:
            self.loop.add_reader(0, self.read)
        except PermissionError:  # A file, or /dev/null, which is always readable.
            self.loop.call_soon(self.read)

    def read(self) -> None:
        data = os.read(0, 4096)
        if not data:
            self.loop.remove_reader(0)
        for byte in data:
            if self.escaped and byte == ord("x"):
                self.vm.request_stop()
            self.escaped = not self.escaped and byte == 1
            if not self.escaped:
                self.waiting.append(bytes([byte]))
        self.type()

    def type(self) -> None:
        while self.waiting and self.vm.console_input(self.waiting[0]):
            self.waiting.popleft()
        if self.waiting:  # The guest has not read what it has.
            self.loop.call_later(0.01, self.type)


async def run(vm: vmbed.Vm) -> int:
    pressed = False

    def press() -> None:
        nonlocal pressed
        if pressed:
            vm.request_stop()
        else:
            vm.shutdown()
        pressed = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, press)
    Keyboard(vm)
    async for event in vm.events():
        if event.cause:
            print(f"\r\nboot: {event.text}", end="\r\n", file=sys.stderr)
            return STATUS.get(event.cause, 1)
    return 1


def main() -> int:
    config = arguments()
    try:
        with vmbed.Host().builder(config).console_output(1).build() as vm:
            terminal = termios.tcgetattr(0) if os.isatty(0) else None
            if terminal:
                tty.setraw(0)
            try:
                vm.start()
                return asyncio.run(run(vm))
            finally:
                if terminal:
                    termios.tcsetattr(0, termios.TCSANOW, terminal)
    except vmbed.Error as error:
        print(f"boot: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

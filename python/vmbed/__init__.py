"""The virtual machine monitor you embed: many KVM virtual machines inside your own process.

>>> import vmbed
>>> code = bytes([0xB0, ord("x"), 0xE6, 0xE9, 0xF4])  # mov al, 'x'; out 0xe9, al; hlt
>>> class Port(vmbed.Device):
...     def write(self, vcpu, offset, data):
...         print(data)
>>> with vmbed.Host().builder(vmbed.BareConfig(code)).pio_device("debug", 0xE9, 1, Port()).build() as vm:
...     vm.start()
...     print(vm.wait().name)
b'x'
GUEST_HALT

Linux guests begin with :class:`LinuxConfig`. Everything that can fail raises a subclass of :class:`Error`.
"""

from __future__ import annotations

import logging

from ._lib import call, ffi, hold, let_go, lib, text
from .backend import BlockBackend, BlockOp, BlockRequest, NetBackend, Offloads
from .config import Backing, BackingKind, Balloon, BareConfig, Cgroup, CacheMode, Config, Console, CpuidMask, Disk, DiskEngine, DiskFormat, HugePages, LinuxConfig, Mode, Net, Platform, Sandbox, Vhost, create_disk
from .device import Device, log_line
from .errors import (
    BadImage,
    Busy,
    Constraint,
    Error,
    Exhausted,
    Field,
    HostError,
    Internal,
    InvalidArgument,
    InvalidState,
    NotFound,
    PermissionDenied,
    Refused,
    Slack,
    TimedOut,
    Unsupported,
    Verdict,
)
from .events import Cause, Event, Events, Kind, Pressure, Stage
from .host import UNLIMITED, Builder, Dispatcher, Finding, Host, Probe, Reclaim, ReclaimSandbox, Shares, ThreadRole, Usage
from .switch import (
    UNLIMITED_RATE,
    Capture,
    CaptureSummary,
    PortOptions,
    PortStatistics,
    Rate,
    Switch,
    SwitchPort,
    Traffic,
)
from .vm import BalloonStatistics, DiskStatistics, GuestMemory, Memory, NetStatistics, Registers, SandboxReport, State, VcpuReturn, VcpuStatistics, Vm
from .wiring import Wiring

_VERSION = lib.vmbed_version()
#: The library's version.
__version__ = f"{_VERSION >> 16}.{_VERSION >> 8 & 0xFF}.{_VERSION & 0xFF}"


def features() -> list[str]:
    """What this build of the library can do beyond the least."""
    found: list[str] = []
    while (name := lib.vmbed_feature(len(found))) != ffi.NULL:
        found.append(text(name))
    return found


def has_feature(name: str) -> bool:
    """Whether it can do that."""
    return bool(lib.vmbed_has_feature(name.encode()))


def log_to(logger: logging.Logger | None, level: int = logging.INFO) -> None:
    """Sends the library's log lines from `level` on to a logger; nowhere with None, as in the beginning."""
    if logger is None:
        call(lib.vmbed_log_set, lib.VMBED_LOG_OFF, ffi.NULL, ffi.NULL, ffi.NULL)
        return
    steps = [(logging.ERROR, 1), (logging.WARNING, 2), (logging.INFO, 3), (logging.DEBUG, 4)]
    wanted = next((number for least, number in steps if level >= least), 5)
    call(lib.vmbed_log_set, wanted, log_line, hold(logger), let_go)


def handle_sigbus() -> None:
    """Has the process survive SIGBUS on guest memory (failing hardware, a huge page that the pool has no more): the VM that
    the memory belongs to stops, with a device fault of ``memory``. Any other SIGBUS goes where it went before: enable the
    faulthandler first, if you want both.
    """
    call(lib.vmbed_handle_sigbus)


__all__ = [
    "Backing", "BackingKind", "BadImage", "Balloon", "BalloonStatistics", "BareConfig", "BlockBackend", "BlockOp", "BlockRequest", "Cgroup",
    "Builder", "Busy", "CacheMode", "Capture", "CaptureSummary", "Cause", "Config", "Console", "Constraint", "CpuidMask",
    "Device", "Disk", "DiskEngine", "DiskFormat", "DiskStatistics", "Dispatcher", "Error", "Event", "Events", "Exhausted", "Field",
    "Finding", "GuestMemory", "Host", "HugePages", "HostError", "Internal", "InvalidArgument", "InvalidState", "Kind",
    "LinuxConfig", "Memory", "Mode", "Net", "NetBackend", "NetStatistics", "NotFound", "Offloads", "PermissionDenied",
    "Platform", "PortOptions", "PortStatistics", "Pressure", "Probe", "Rate", "Reclaim", "ReclaimSandbox", "Refused", "Registers",
    "Sandbox", "SandboxReport", "Shares", "Slack", "Stage", "State", "Switch", "SwitchPort", "ThreadRole", "TimedOut", "Traffic",
    "UNLIMITED", "UNLIMITED_RATE", "Unsupported", "Usage", "VcpuReturn", "VcpuStatistics", "Verdict", "Vhost", "Vm", "Wiring",
    "create_disk", "features", "handle_sigbus", "has_feature", "log_to",
]  # fmt: skip

"""A switch inside of the process: cards of VMs and networks of the host on its ports."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from ._lib import HasFileno, call, ffi, fileno, lib, make, numbers, optional, structure, text


class Traffic(NamedTuple):
    """Frames, and their bytes from the Ethernet header on."""

    frames: int
    bytes: int


@dataclass(frozen=True)
class PortStatistics:
    """What a port has carried since it was added."""

    #: What its station has sent, also what was dropped.
    received: Traffic
    #: What was put into its queue for its station.
    sent: Traffic
    #: What was copied to it because other ports are mirrored to it.
    mirrored: Traffic
    #: Addresses that were not remembered for want of room.
    unlearned: int
    #: Addresses that were another port's before.
    moved: int
    #: Addresses remembered now.
    addresses: int
    #: How many frames were dropped, by the reason: `{"spoofed-mac": 3}`.
    drops: dict[str, int]


class Rate(NamedTuple):
    """How much may pass; 0 for any number. A burst of 0 is a tenth of a second's."""

    bytes_per_second: int = 0
    bytes_burst: int = 0
    ops_per_second: int = 0
    ops_burst: int = 0


#: Everything passes.
UNLIMITED_RATE = Rate(ops_per_second=(1 << 64) - 1)


@dataclass
class PortOptions:
    """What one port is told."""

    #: The one VLAN of an access port, whose frames have no tags; of a trunk, that of frames without one (0 drops them).
    vlan: int = 1
    #: The VLANs that have tags here. None: an access port.
    trunk: list[int] | None = None
    #: Reaches ports that are not isolated, and not the others that are.
    isolated: bool = False
    #: Frames to addresses that nobody has been heard from go here, too.
    unknown_unicast: bool = True
    #: How many addresses behind this port are remembered.
    max_addresses: int = 1024
    #: Who the station may claim to be: MAC addresses, and IP addresses or prefixes. Empty and None: anybody.
    guard_macs: list[str] = field(default_factory=list)
    guard_addresses: list[str] | None = None
    guard_router: bool = False
    #: How much the station may send, and how much goes to it.
    rate_in: Rate = Rate()
    rate_out: Rate = Rate()
    #: How much the station may send of what goes to many.
    storm: Rate = Rate(ops_per_second=10_000, ops_burst=2_000)

    def _given(self) -> tuple[Any, list[Any]]:
        """The structure, and what must live as long."""
        trunk = numbers(self.trunk)
        macs = optional(" ".join(self.guard_macs) if self.guard_macs else None)
        addresses = optional(None if self.guard_addresses is None else " ".join(self.guard_addresses))
        given = structure(
            "vmbed_port_options",
            vlan=self.vlan,
            trunk=trunk,
            trunk_length=len(self.trunk or []),
            isolated=int(self.isolated),
            no_unknown_unicast=int(not self.unknown_unicast),
            max_addresses=self.max_addresses,
            guard_router=int(self.guard_router),
            guard_macs=macs,
            guard_addresses=addresses,
            rate_in=tuple(self.rate_in),
            rate_out=tuple(self.rate_out),
            storm=tuple(self.storm),
        )
        return given, [trunk, macs, addresses]


_REASONS = [text(lib.vmbed_drop_name(i)) for i in range(lib.VMBED_DROP_REASONS)]


class SwitchPort:
    """A port of a :class:`Switch`; it stays when this object is gone, until it is removed."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer

    @property
    def name(self) -> str:
        """The name that it was given."""
        return text(lib.vmbed_port_name(self._pointer))

    def __repr__(self) -> str:
        return f"<vmbed.SwitchPort {self.name}>"

    def set_options(self, options: PortOptions) -> None:
        """Tells it something else, from the next frame on."""
        given, _keep = options._given()
        call(lib.vmbed_port_set_options, self._pointer, given)

    def statistics(self) -> PortStatistics:
        """What it has carried, and what it has dropped."""
        now = structure("vmbed_port_statistics")
        call(lib.vmbed_port_get_statistics, self._pointer, now)
        return PortStatistics(
            Traffic(now.received_frames, now.received_bytes),
            Traffic(now.sent_frames, now.sent_bytes),
            Traffic(now.mirrored_frames, now.mirrored_bytes),
            now.unlearned,
            now.moved,
            now.addresses,
            {name: count for name, count in zip(_REASONS, now.dropped) if count},
        )

    def mirror_to(self, monitor: SwitchPort | None) -> None:
        """Copies what comes in and goes out here to `monitor` as well; None ends that."""
        call(lib.vmbed_port_mirror_to, self._pointer, ffi.NULL if monitor is None else monitor._pointer)

    def remove(self) -> None:
        """Takes the port away: a VM that is on it has a card without a cable from then on."""
        call(lib.vmbed_port_remove, self._pointer)


class CaptureSummary(NamedTuple):
    """What became of a capture."""

    written: int
    #: Frames that came faster than they could be written.
    missed: int


class Capture:
    """A capture that is being written; :meth:`finish`, or the end of its `with` statement, ends it."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        #: Once it has ended.
        self.summary: CaptureSummary | None = None

    def finish(self) -> CaptureSummary:
        """Ends it: what has passed until now is in the file."""
        if self.summary is None:
            written, missed = ffi.new("uint64_t *"), ffi.new("uint64_t *")
            call(lib.vmbed_capture_finish, self._pointer, written, missed)
            self.summary = CaptureSummary(int(written[0]), int(missed[0]))
        return self.summary

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


class Switch:
    """A learning Ethernet switch with VLANs inside of the process, for :meth:`Builder.net_port`. It needs no privilege.

    VMs on it go on reaching each other when this object is gone; uplinks and captures end with the last object of the
    switch or of its ports.
    """

    def __init__(self, addresses: int = 8192, ageing: int = 300) -> None:
        options = structure("vmbed_switch_options", addresses=addresses, ageing=ageing)
        self._pointer = make(lib.vmbed_switch_new, "switch", options)

    def add_port(self, name: str, options: PortOptions | None = None) -> SwitchPort:
        """A new port with nothing on it. `name` is for errors, captures and people."""
        given, _keep = (options or PortOptions())._given()
        return SwitchPort(make(lib.vmbed_switch_add_port, "port", self._pointer, name.encode(), given))

    def add_tap(self, name: str, tap: str, options: PortOptions | None = None) -> SwitchPort:
        """A new port with a TAP interface of the host's on it. One that goes away is looked for once a second; meanwhile, and while it is
        down, frames to it are counted at the port (``uplink``), without an event."""
        given, _keep = (options or PortOptions())._given()
        return SwitchPort(make(lib.vmbed_switch_add_tap, "port", self._pointer, name.encode(), tap.encode(), given))

    def add_stream(self, name: str, path: str | os.PathLike[str], options: PortOptions | None = None) -> SwitchPort:
        """A new port with a network in user space on it, which listens on that Unix socket, as passt does: a way out without privilege."""
        given, _keep = (options or PortOptions())._given()
        return SwitchPort(make(lib.vmbed_switch_add_stream, "port", self._pointer, name.encode(), os.fsencode(path), given))

    def add_fd(self, name: str, file: int | HasFileno, options: PortOptions | None = None) -> SwitchPort:
        """A new port with a connected Unix socket on it, whose messages are frames behind a header of 12 bytes (or a stream, as
        :meth:`add_stream` has it), or with a queue of a TAP interface. The descriptor is duplicated."""
        given, _keep = (options or PortOptions())._given()
        return SwitchPort(make(lib.vmbed_switch_add_fd, "port", self._pointer, name.encode(), fileno(file), given))

    def capture(self, output: int | HasFileno, ports: list[SwitchPort] | None = None) -> Capture:
        """Writes what passes through `ports`, or through all that there are, to a file that Wireshark opens (pcapng)."""
        wanted = [port._pointer for port in ports or []]
        given = ffi.new("vmbed_port *[]", wanted) if wanted else ffi.NULL
        pointer = make(lib.vmbed_switch_capture, "capture", self._pointer, given, len(wanted), fileno(output))
        return Capture(pointer)

"""What happened to VMs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import IntEnum
from typing import Any, AsyncIterator, Iterator, NamedTuple

from ._lib import call, ffi, lib, make, structure, text


class Kind(IntEnum):
    """What an event tells."""

    STARTED = 1
    PAUSED = 2
    RESUMED = 3
    #: The last of a VM, and never lost.
    STOPPED = 4
    DEVICE_NEEDS_RESET = 5
    BACKEND_ERROR = 6
    #: `count` events are missing, since nobody read the stream.
    LOST = 7
    DOORBELL = 8
    #: The guest has given up as much as it was asked for, or takes some back; `value` is how much it has given up.
    BALLOON = 9
    #: Something was done since the host has not enough memory; `pressure` says what.
    MEMORY_PRESSURE = 10
    #: The thread that did so has ended, and `text` says why: nobody looks after the VM's memory until ``Host.set_reclaim()`` is called again.
    RECLAIM_FAILED = 11


class Cause(IntEnum):
    """Why a VM ended."""

    GUEST_POWEROFF = 1
    GUEST_RESET = 2
    TRIPLE_FAULT = 3
    GUEST_PANIC = 4
    GUEST_HALT = 5
    HOST_STOP = 6
    VCPU_FAULT = 7
    DEVICE_FAULT = 8
    #: The host had not enough memory, and the VM was a declared victim.
    MEMORY_PRESSURE = 9
    #: A thread, which `device` names, made a system call that its sandbox refuses.
    SANDBOX_VIOLATION = 10


class Stage(IntEnum):
    """What is done with a VM when the host's memory gets short."""

    BALLOON = 0
    PAGE_OUT = 1
    PAUSE = 2
    STOP = 3


class Pressure(NamedTuple):
    """What was done with a VM since the host has not enough memory, in bytes."""

    stage: Stage
    #: What the step is about: what the balloon is asked for, what is to be paged out, what there is of the VM.
    wanted: int
    #: What the guest says that it has given up so far; what was named to the kernel for paging out.
    claimed: int
    #: What the host has got of that.
    measured: int
    #: Of a pause: how many seconds it lasts at most.
    deadline: float | None


@dataclass(frozen=True)
class Event:
    """Something that happened to a VM."""

    kind: Kind
    #: Counts the events of one stream from 0, without gaps.
    seq: int
    time: datetime
    #: Which VM: its `id`.
    vm: int
    #: How many equal ones were folded into this one.
    count: int
    #: Of STOPPED.
    cause: Cause | None
    #: The device's id or name, where one is at fault.
    device: str | None
    errno: int
    offset: int
    #: What the guest wrote to a doorbell; bytes that it has given up to its balloon.
    value: int
    #: For people.
    text: str
    #: Of MEMORY_PRESSURE.
    pressure: Pressure | None = None


class Events:
    """The reading end of a stream of events, of one VM or of several.

    Iterating waits for events: `for event in events`, or `async for` on asyncio. The stream of one VM ends after its
    STOPPED; one that several share does not end. Each event goes to one reader.
    """

    def __init__(self) -> None:
        self._pointer = make(lib.vmbed_events_new, "events")
        self._vm: int | None = None
        self._ended = False

    @classmethod
    def _of(cls, pointer: Any, vm: int | None) -> Events:
        made = cls.__new__(cls)
        made._pointer, made._vm, made._ended = pointer, vm, False
        return made

    def fileno(self) -> int:
        """The fd that polls readable while an event waits: for select and the like only."""
        return int(lib.vmbed_events_fd(self._pointer))

    def next(self, timeout: float | None = None) -> Event | None:
        """The oldest unread event; None where none has come within `timeout` seconds (None: waits for ever, 0: not at all)."""
        out = ffi.new("vmbed_event **")
        wait = -1 if timeout is None else max(0, round(timeout * 1000))
        call(lib.vmbed_events_next, self._pointer, wait, out)
        if out[0] == ffi.NULL:
            return None
        try:
            event = _read(out[0])
        finally:
            lib.vmbed_event_free(out[0])
        self._ended = self._ended or event.kind is Kind.STOPPED and event.vm == self._vm
        return event

    def __iter__(self) -> Iterator[Event]:
        while not self._ended:
            event = self.next()
            if event is not None:
                yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        while not self._ended:
            event = self.next(0)
            if event is not None:
                yield event
                continue
            ready = asyncio.Event()
            loop.add_reader(self.fileno(), ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(self.fileno())


def _read(event: Any) -> Event:
    cause, device = lib.vmbed_event_cause(event), lib.vmbed_event_device(event)
    return Event(
        kind=Kind(lib.vmbed_event_kind(event)),
        seq=lib.vmbed_event_seq(event),
        time=datetime.fromtimestamp(lib.vmbed_event_time(event) / 1e9, timezone.utc),
        vm=lib.vmbed_event_vm_id(event),
        count=lib.vmbed_event_count(event),
        cause=Cause(cause) if cause else None,
        device=None if device == ffi.NULL else text(device),
        errno=lib.vmbed_event_errno(event),
        offset=lib.vmbed_event_offset(event),
        value=lib.vmbed_event_value(event),
        text=text(lib.vmbed_event_text(event)),
        pressure=_pressure(event),
    )


def _pressure(event: Any) -> Pressure | None:
    said = structure("vmbed_pressure")
    if not lib.vmbed_event_pressure(event, said):
        return None
    deadline = said.deadline / 1000 if said.deadline else None
    return Pressure(Stage(said.stage), said.wanted, said.claimed, said.measured, deadline)

"""A VM's life."""

from __future__ import annotations

import atexit
import os
import weakref
from dataclasses import dataclass, fields
from enum import IntEnum
from types import TracebackType
from typing import Any, Callable, NamedTuple

from ._lib import HasFileno, call, ffi, fileno, filled, hold, lib, make, optional, structure
from .backend import NetBackend, net_table
from .config import DiskFormat
from .device import Attached
from .events import Cause, Events
from .switch import Rate, SwitchPort


class State(IntEnum):
    """Where a VM is in its life."""

    BUILT = 1
    RUNNING = 2
    PAUSED = 3
    STOPPED = 4


class VcpuReturn(IntEnum):
    """Why :meth:`Vm.run_vcpu` returned."""

    ENDED = 1
    INTERRUPTED = 2


@dataclass
class Registers:
    """The general registers of a vCPU."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 0


class Memory(NamedTuple):
    """What a VM's memory was promised, and what of it is really there, in bytes."""

    max: int
    entitlement: int
    guarantee: int
    overhead: int
    generation: int
    backing: int
    resident: int
    swapped: int
    huge: int
    pinned: int
    stage2: int
    #: What the guest says that it has given up to its balloon: no promise depends on it.
    loaned: int


class VcpuStatistics(NamedTuple):
    """How much of the host a vCPU got: times in nanoseconds."""

    thread: int
    cpu: int
    run_time: int
    run_delay: int


class DiskStatistics(NamedTuple):
    """What a disk has done since the VM was built: requests, and bytes."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    flushes: int
    #: Requests that were answered with an error.
    errors: int
    #: Discards and zeroings, and their bytes.
    discards: int
    discarded_bytes: int
    #: How long requests took: element 0 counts those below 1 µs, element i those of 2^(i-1) to below 2^i µs, the last one
    #: also all that took longer.
    latency: tuple[int, ...]


class NetStatistics(NamedTuple):
    """What a card has carried since the VM was built: frames, and their bytes from the Ethernet header on. What the host's kernel
    carries by itself (``Net.vhost``) is counted at the TAP interface."""

    rx_frames: int
    rx_bytes: int
    rx_dropped: int
    tx_frames: int
    tx_bytes: int
    tx_dropped: int
    #: What the guest's driver has said that it does not want.
    rx_filtered: int
    #: Pairs of queues that the host's kernel serves now; 0 while the VM is paused, and before its guest's driver has begun.
    vhost: int


class BalloonStatistics(NamedTuple):
    """What a balloon has moved since the VM was built, in bytes: as the guest claimed, and as the host measured."""

    target: int
    actual: int
    inflated_claimed: int
    inflated_measured: int
    deflated: int
    reported_claimed: int
    reported_measured: int
    hinted_claimed: int
    hinted_measured: int
    #: Pages and ranges that it named and that are not its memory.
    ignored: int


class SandboxReport(NamedTuple):
    """What is in force of a sandbox; zeroes where there is none."""

    #: How many threads are in it.
    threads: int
    #: Whether their calls are filtered: 0 or 1.
    seccomp: int
    #: The version of Landlock's interface; 0 where the kernel has none.
    landlock: int


class GuestMemory(NamedTuple):
    """A guest's own account of its memory, in bytes or in how often something happened; None where it does not say."""

    #: When it came, in nanoseconds since 1970.
    time: int
    swapped_in: int | None
    swapped_out: int | None
    major_faults: int | None
    minor_faults: int | None
    free: int | None
    total: int | None
    available: int | None
    caches: int | None
    huge_allocations: int | None
    huge_failures: int | None
    oom_kills: int | None
    stalls: int | None


_balloon_statistics = filled("vmbed_balloon_statistics", BalloonStatistics, lib.vmbed_vm_get_balloon_statistics)
_sandbox = filled("vmbed_sandbox", SandboxReport, lib.vmbed_vm_get_sandbox)
_guest_memory = filled("vmbed_guest_memory", GuestMemory, lib.vmbed_vm_get_guest_memory)
_net_statistics = filled("vmbed_net_statistics", NetStatistics, lib.vmbed_vm_get_net_statistics)
_memory = filled("vmbed_memory", Memory, lib.vmbed_vm_get_memory)
_vcpu_statistics = filled("vmbed_vcpu_statistics", VcpuStatistics, lib.vmbed_vm_get_vcpu_statistics)


def _rate(rate: Rate | None) -> Any:
    return ffi.NULL if rate is None else ffi.new("vmbed_rate *", tuple(rate))


def _milliseconds(timeout: float | None) -> int:
    return -1 if timeout is None else max(0, round(timeout * 1000))


#: Those that still are, to be ended before the interpreter is.
_living: weakref.WeakSet[Vm] = weakref.WeakSet()


class Vm:
    """A virtual machine in this process; :meth:`Builder.build` makes it.

    Every method may be called from any thread. Use it in a `with` statement, or call :meth:`close`: that ends the guest,
    every thread, and every file descriptor. Methods that wait for the VM raise InvalidState in its own callbacks.
    """

    def __init__(self, pointer: Any, exceptions: list[BaseException]) -> None:
        self._pointer = pointer
        #: What the VM's callbacks have raised, in order.
        self.exceptions = exceptions
        _living.add(self)

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<vmbed.Vm {self.id} {self.state.name.lower() if self.state else 'closed'}>"

    def close(self) -> None:
        """Ends everything. When it returns, no callback of the VM runs or will run; in one of them, it returns at once."""
        ffi.release(self._pointer)

    @property
    def id(self) -> int:
        """A number that no other VM of this process has had; 0 after close()."""
        return int(lib.vmbed_vm_id(self._pointer))

    @property
    def state(self) -> State | None:
        """Where it is in its life; None after close()."""
        state = lib.vmbed_vm_state(self._pointer)
        return State(state) if state else None

    def start(self) -> None:
        """Lets the vCPUs run, and returns at once."""
        call(lib.vmbed_vm_start, self._pointer)

    def pause(self) -> None:
        """Stops the guest's time; returns when everything stands still."""
        call(lib.vmbed_vm_pause, self._pointer)

    def resume(self) -> None:
        """Lets a paused guest go on."""
        call(lib.vmbed_vm_resume, self._pointer)

    def shutdown(self) -> None:
        """Presses the power button, and returns at once."""
        call(lib.vmbed_vm_shutdown, self._pointer)

    def stop(self) -> Cause:
        """Ends the guest now, as pulling the plug would. TimedOut after 10 s when something of the host's hangs."""
        cause = ffi.new("int32_t *")
        call(lib.vmbed_vm_stop, self._pointer, cause)
        return Cause(cause[0])

    def request_stop(self) -> None:
        """Asks for the end, and returns at once; for callbacks."""
        call(lib.vmbed_vm_request_stop, self._pointer)

    def wait(self, timeout: float | None = None) -> Cause:
        """Waits until the guest has ended, at most `timeout` seconds: then TimedOut."""
        cause = ffi.new("int32_t *")
        call(lib.vmbed_vm_wait, self._pointer, _milliseconds(timeout), cause)
        return Cause(cause[0])

    def events(self) -> Events:
        """The VM's events; readable after close(), too."""
        return Events._of(make(lib.vmbed_vm_events, "events", self._pointer), self.id)

    def console_tail(self) -> bytes:
        """The last 64 KiB that the guest wrote to its console."""
        room, length = ffi.new("uint8_t[]", 64 << 10), ffi.new("size_t *")
        call(lib.vmbed_vm_console_tail, self._pointer, room, len(room), length)
        return bytes(ffi.buffer(room, length[0]))

    def console_input(self, data: bytes) -> int:
        """Types on the guest's console; how much was taken. The rest may be offered again."""
        taken = ffi.new("size_t *")
        call(lib.vmbed_vm_console_input, self._pointer, data, len(data), taken)
        return int(taken[0])

    @property
    def memory_size(self) -> int:
        """The guest's memory, in bytes."""
        return int(lib.vmbed_vm_memory_size(self._pointer))

    @property
    def first_exit(self) -> float | None:
        """When the guest first reached for a device outside of it, as time.monotonic() counts; None until then."""
        return int(lib.vmbed_vm_first_exit(self._pointer)) / 1e9 or None

    def read_memory(self, address: int, length: int) -> bytes:
        """Bytes of guest memory, in every state."""
        data = ffi.new("uint8_t[]", length)
        call(lib.vmbed_vm_read_memory, self._pointer, address, data, length)
        return bytes(ffi.buffer(data))

    def write_memory(self, address: int, data: bytes) -> None:
        """Writes guest memory, in every state."""
        call(lib.vmbed_vm_write_memory, self._pointer, address, data, len(data))

    def registers(self, vcpu: int = 0) -> Registers:
        """A vCPU's general registers, while the VM does not run."""
        found = structure("vmbed_registers")
        call(lib.vmbed_vm_get_registers, self._pointer, vcpu, found)
        return Registers(**{f.name: getattr(found, f.name) for f in fields(Registers)})

    def set_registers(self, registers: Registers, vcpu: int = 0) -> None:
        """Sets them, all of them."""
        made = structure("vmbed_registers", **{f.name: getattr(registers, f.name) for f in fields(Registers)})
        call(lib.vmbed_vm_set_registers, self._pointer, vcpu, made)

    def sandbox(self) -> SandboxReport:
        """What is in force of its sandbox. In every state; never blocks."""
        return _sandbox(self._pointer)

    def memory(self) -> Memory:
        """What its memory was promised, and what is there. Costs a walk over page tables."""
        return _memory(self._pointer)

    def set_guarantee(self, guarantee: int, generation: int | None = None) -> None:
        """Changes what the ledger never takes back; InvalidState where `generation` is another one by now."""
        known = (1 << 64) - 1 if generation is None else generation
        call(lib.vmbed_vm_set_guarantee, self._pointer, guarantee, known)

    def set_balloon(self, target: int) -> None:
        """Asks the guest to give up that many bytes in all; it does it in its own time, and Kind.BALLOON tells when."""
        call(lib.vmbed_vm_set_balloon, self._pointer, target)

    def balloon_statistics(self) -> BalloonStatistics:
        """What the balloon has moved so far. In every state."""
        return _balloon_statistics(self._pointer)

    def guest_memory(self, timeout: float | None = 0) -> GuestMemory:
        """Asks the guest for an account of its memory and waits `timeout` seconds for it (None: for ever); with 0, the last
        one that came. TimedOut where there is none, InvalidState where the VM has ended."""
        told = _guest_memory(self._pointer, _milliseconds(timeout))
        return GuestMemory(told.time, *(None if n == (1 << 64) - 1 else n for n in told[1:]))

    def discard_free_pages(self, timeout: float | None = None) -> int:
        """Asks the guest for its free pages and gives them back to the host; how many bytes the host has got."""
        got = ffi.new("uint64_t *")
        call(lib.vmbed_vm_discard_free_pages, self._pointer, _milliseconds(timeout), got)
        return int(got[0])

    def disk_statistics(self, index: int = 0) -> DiskStatistics:
        """What the disk has done so far. In every state."""
        found = structure("vmbed_disk_statistics")
        call(lib.vmbed_vm_get_disk_statistics, self._pointer, index, found)
        numbers = {name: int(getattr(found, name)) for name in DiskStatistics._fields if name != "latency"}
        return DiskStatistics(**numbers, latency=tuple(found.latency))

    def resize_disk(self, size: int, index: int = 0) -> None:
        """Gives the disk another size, in bytes, a multiple of 512; the guest is told at once. A file grows with it; one that
        is larger keeps its length. A block device must have grown before."""
        call(lib.vmbed_vm_resize_disk, self._pointer, index, size)

    def save_disk(
        self,
        path: str | os.PathLike[str],
        format: DiskFormat = DiskFormat.RAW,
        progress: Callable[[int, int], bool] | None = None,
        index: int = 0,
    ) -> bool:
        """Saves the disk, as it is at one instant, to a new image: standalone and sparse. The guest is paused for that instant, and
        runs while the image is made. `progress` hears of the bytes behind and of all, and ends it by a false answer. Whether it
        is complete; where it is not, the image is gone."""
        raised: list[BaseException] = []

        def hear(user: Any, behind: int, all_: int) -> bool:
            try:
                return progress is None or bool(progress(behind, all_))
            except BaseException as exception:  # noqa: BLE001 - nothing may unwind into the library
                raised.append(exception)
                return False

        function, complete = ffi.callback("bool(void *, uint64_t, uint64_t)", hear), ffi.new("bool *")
        call(lib.vmbed_vm_save_disk, self._pointer, index, os.fsencode(path), int(format), function, ffi.NULL, complete)
        if raised:
            raise raised[0]
        return bool(complete[0])

    def set_disk_rate(self, rate: Rate | None, index: int = 0) -> None:
        """Limits the disk from now on; None for no limit."""
        call(lib.vmbed_vm_set_disk_rate, self._pointer, index, _rate(rate))

    def set_link(self, up: bool, index: int = 0) -> None:
        """Plugs the card's cable in or out; what is sent to or by a card without one is dropped."""
        call(lib.vmbed_vm_set_link, self._pointer, index, up)

    def change_net(
        self,
        index: int = 0,
        *,
        tap: str | None = None,
        stream: str | os.PathLike[str] | None = None,
        fd: int | HasFileno | None = None,
        port: SwitchPort | None = None,
        backend: NetBackend | None = None,
    ) -> None:
        """Puts the card on another network while the guest runs, one of these; :meth:`announce_net` has it say where it is now."""
        if sum(one is not None for one in (tap, stream, fd, port, backend)) != 1:
            raise ValueError("one of tap, stream, fd, port and backend says where to")
        if fd is not None:
            call(lib.vmbed_vm_change_net_fd, self._pointer, index, fileno(fd))
        elif port is not None:
            call(lib.vmbed_vm_change_net_port, self._pointer, index, port._pointer)
        elif backend is not None:
            table, fd = net_table(backend), backend.fileno()
            call(lib.vmbed_vm_change_net_backend, self._pointer, index, table, fd, hold(Attached(backend, self.exceptions)))
        else:
            keep = [optional(tap), optional(None if stream is None else os.fsencode(stream))]
            call(lib.vmbed_vm_change_net, self._pointer, index, structure("vmbed_net", tap=keep[0], stream=keep[1]))

    def announce_net(self, index: int = 0) -> None:
        """Has the guest tell the card's network where it is, as after a move: where its driver knows how."""
        call(lib.vmbed_vm_announce_net, self._pointer, index)

    def set_net_rates(self, receive: Rate | None, send: Rate | None, index: int = 0) -> None:
        """Limits what the card may receive and send from now on; None for no limit."""
        call(lib.vmbed_vm_set_net_rates, self._pointer, index, _rate(receive), _rate(send))

    def net_statistics(self, index: int = 0) -> NetStatistics:
        """What the card has carried so far. In every state."""
        return _net_statistics(self._pointer, index)

    def vcpu_statistics(self, vcpu: int = 0) -> VcpuStatistics:
        """How much of the host a vCPU got."""
        return _vcpu_statistics(self._pointer, vcpu)

    def run_vcpu(self, vcpu: int = 0) -> VcpuReturn:
        """Runs a vCPU on the calling thread, in a VM whose builder said `caller_vcpus()`."""
        outcome = ffi.new("int32_t *")
        call(lib.vmbed_vcpu_run, self._pointer, vcpu, outcome)
        return VcpuReturn(outcome[0])

    def interrupt_vcpu(self, vcpu: int = 0) -> None:
        """Makes run_vcpu() of that vCPU return."""
        call(lib.vmbed_vcpu_interrupt, self._pointer, vcpu)


@atexit.register
def _end_all() -> None:
    # Threads of the library must not call into an interpreter that is no more.
    for vm in list(_living):
        vm.close()

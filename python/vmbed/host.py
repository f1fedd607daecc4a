"""The machine that VMs run on, and the making of VMs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Sequence, TypedDict

from . import backend, device
from ._lib import HasFileno, call, ffi, filled, hold, let_go, lib, make, optional, structure, text
from ._lib import fileno as _fd
from .backend import BlockBackend, NetBackend
from .config import Config
from .device import Attached, Device
from .errors import Verdict
from .events import Events
from .switch import SwitchPort
from .vm import SandboxReport, Vm

if TYPE_CHECKING:
    from typing import Unpack

_sandbox = filled("vmbed_sandbox", SandboxReport, lib.vmbed_host_get_reclaim_sandbox)


class ThreadRole(IntEnum):
    """What a thread of the library is for."""

    VCPU = 0
    DEVICE = 1
    CONTROL = 2
    SUPERVISOR = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; without a problem where it is as it should be."""

    what: str
    problem: str | None
    remedy: str | None


@dataclass(frozen=True)
class Probe:
    """What the machine can do for VMs, what is missing, and how to mend it."""

    usable: bool
    findings: list[Finding]


class Usage(NamedTuple):
    """What the VMs of a host hold, what there is, and how much of it is really there: bytes, and vCPUs."""

    memory: int
    memory_capacity: int
    vcpus: int
    #: `UNLIMITED` where vCPUs are not limited.
    vcpu_capacity: int
    dedicated_vcpus: int
    dedicated_cpus: int
    generation: int
    vms: int
    memory_usable: int
    swap: int
    entitlement: int
    guarantee: int
    overhead: int
    backing: int
    stage2: int
    pinned: int
    process: int
    charged: int
    unattributed: int
    loaned: int


class ReclaimSandbox(IntEnum):
    """Whether the thread that does something when memory gets short is in a sandbox: it may make the system calls that its work
    needs and no others, and opens no files. A call that is refused ends it: VMs that it has paused go on, and each VM that there is has
    an event, Kind.RECLAIM_FAILED. As long as it is there, do not change the process's user or groups."""

    OFF = 0
    #: As far as the kernel has what it takes; ``Host.reclaim_sandbox()`` says what is in force.
    IF_PRESENT = 1
    #: The thread does not begin where the kernel lacks something of it.
    REQUIRED = 2


@dataclass
class Reclaim:
    """What a host does when its memory gets short. The thresholds are bytes that are free; 0: never."""

    #: Below it, guests with a balloon are asked for what they do not use.
    balloon_below: int = 1 << 30
    #: Below it, what VMs have above their guarantees is paged out, where there is swap.
    page_out_below: int = 512 << 20
    #: Below it, VMs above their guarantees are paused, one after the other.
    pause_below: int = 0
    #: Below it, VMs with a victim class are stopped, one after the other.
    stop_below: int = 0
    #: How much of what a guest does not use may be asked for.
    idle_tax: float = 0.75
    #: How many seconds a VM may be paused; then it goes on, or is stopped if it may be.
    pause_deadline: float = 10.0
    #: How often the host's memory is looked at, in seconds, besides whenever the kernel reports pressure.
    interval: float = 1.0
    #: Whether the thread is in a sandbox. Another one than before begins with another thread.
    sandbox: ReclaimSandbox = ReclaimSandbox.OFF


class Shares(TypedDict, total=False):
    """What a host may share out; what is not named has its default."""

    #: The path of the KVM device.
    kvm: str | os.PathLike[str]
    #: Memory in bytes: all that this process may have.
    memory: int
    #: What of it is kept for the host itself: 512 MiB.
    memory_reserved: int
    #: How often the rest may be promised: once.
    memory_ratio: float
    #: How many vCPUs a core may carry: any number.
    vcpu_ratio: float
    #: The least and the most memory that one VM may have, and what it is a multiple of, in bytes.
    memory_min_unit: int
    memory_max_unit: int
    memory_step: int
    #: Swap space that guests may be paged out to, in bytes: none.
    swap: int
    #: How long the host takes to react when memory gets short, in seconds: 0.
    reaction_time: float
    #: The host's CPUs that are kept for VMs with dedicated vCPUs: none.
    dedicated_cpus: Sequence[int]


def _options(shares: Shares) -> tuple[Any, object]:
    """Them for the library, and what must live through the call."""
    numbers: dict[str, Any] = {**shares}
    kvm, cpus = numbers.pop("kvm", None), list(numbers.pop("dedicated_cpus", ()))
    numbers["reaction_time"] = round(numbers.pop("reaction_time", 0) * 1000)
    if numbers.get("memory_reserved") == 0:
        numbers["memory_reserved"] = 1  # 0 is the default there
    path = optional(None if kvm is None else os.fsencode(kvm))
    listed = ffi.new("uint32_t[]", cpus)
    made = structure("vmbed_host_options", kvm=path, dedicated_cpus=listed, dedicated_count=len(cpus), **numbers)
    return made, (path, listed)


_usage = filled("vmbed_usage", Usage, lib.vmbed_host_usage)
#: A capacity without limit.
UNLIMITED = (1 << 64) - 1


class Dispatcher:
    """Serves devices of any number of VMs on your own event loop: poll its fd for reading, then call dispatch()."""

    def __init__(self) -> None:
        self._pointer = make(lib.vmbed_dispatcher_new, "dispatcher")

    def fileno(self) -> int:
        """For select, poll and asyncio's add_reader; it stays readable while there is work."""
        return int(lib.vmbed_dispatcher_fd(self._pointer))

    def dispatch(self) -> None:
        """Serves what is ready, and returns. After STOPPED, one more call takes the guest's last words to its console."""
        call(lib.vmbed_dispatcher_dispatch, self._pointer)


class Builder:
    """A VM in the making: its configuration, and what is not data. Methods answer the builder."""

    def __init__(self, host: Any, config: Config) -> None:
        self._pointer = make(lib.vmbed_builder_new, "builder", host, config._build())
        self._exceptions: list[BaseException] = []

    def _hold(self, target: object) -> Any:
        return hold(Attached(target, self._exceptions))

    def pio_device(self, name: str, port: int, length: int, attached: Device) -> Builder:
        """Attaches a device of yours to `length` ports from `port`."""
        arguments = (self._pointer, name.encode(), port, length, device.OPERATIONS, self._hold(attached))
        call(lib.vmbed_builder_add_pio, *arguments)
        return self

    def mmio_device(self, name: str, address: int, length: int, attached: Device) -> Builder:
        """The same for guest-physical addresses without memory."""
        arguments = (self._pointer, name.encode(), address, length, device.OPERATIONS, self._hold(attached))
        call(lib.vmbed_builder_add_mmio, *arguments)
        return self

    def pio_doorbell(self, name: str, port: int, length: int = 1) -> Builder:
        """What the guest writes there is an event of kind DOORBELL."""
        call(lib.vmbed_builder_add_pio_doorbell, self._pointer, name.encode(), port, length)
        return self

    def mmio_doorbell(self, name: str, address: int, length: int) -> Builder:
        """The same for guest-physical addresses without memory."""
        call(lib.vmbed_builder_add_mmio_doorbell, self._pointer, name.encode(), address, length)
        return self

    def disk_fd(self, index: int, disk: int | HasFileno) -> Builder:
        """Backs disk `index` of the configuration, one without a path, by an open raw image or block device."""
        call(lib.vmbed_builder_disk_fd, self._pointer, index, _fd(disk))
        return self

    def disk_backend(self, index: int, disk: BlockBackend) -> Builder:
        """Backs disk `index` of the configuration, one without a path, by code of yours."""
        table = backend.DISCARDING if disk.discards else backend.BLOCK
        arguments = (self._pointer, index, table, disk.size, disk.readonly, self._hold(disk))
        call(lib.vmbed_builder_disk_backend, *arguments)
        return self

    def net_fd(self, index: int, net: int | HasFileno) -> Builder:
        """Puts card `index` of the configuration, one without a TAP interface, on a queue of one that somebody attached, or
        on a connected Unix socket (SOCK_SEQPACKET or SOCK_DGRAM), on which each message is a frame (:class:`NetBackend`), or
        on one of the kind SOCK_STREAM, with the protocol of ``Net.stream``."""
        call(lib.vmbed_builder_net_fd, self._pointer, index, _fd(net))
        return self

    def net_port(self, index: int, port: SwitchPort) -> Builder:
        """Puts card `index` of the configuration, one without a TAP interface, on a port of a :class:`Switch`."""
        call(lib.vmbed_builder_net_port, self._pointer, index, port._pointer)
        return self

    def net_backend(self, index: int, net: NetBackend) -> Builder:
        """Puts card `index` of the configuration, one without a TAP interface, on a network of yours."""
        arguments = (self._pointer, index, backend.net_table(net), net.fileno(), self._hold(net))
        call(lib.vmbed_builder_net_backend, *arguments)
        return self

    def events(self, events: Events) -> Builder:
        """Sends the VM's events to a stream that it may share with others."""
        call(lib.vmbed_builder_set_events, self._pointer, events._pointer)
        return self

    def console_output(self, output: int | HasFileno | Callable[[bytes], object]) -> Builder:
        """Writes the guest's console to a file, fd (which is duplicated) or function, which must not wait for the VM."""
        if isinstance(output, int) or hasattr(output, "fileno"):
            call(lib.vmbed_builder_console_output, self._pointer, _fd(output))
        else:
            arguments = (self._pointer, device.console, self._hold(output), let_go)
            call(lib.vmbed_builder_console_callback, *arguments)
        return self

    def console_input(self, source: int | HasFileno) -> Builder:
        """Reads the guest's console input from a file or fd, which is duplicated."""
        call(lib.vmbed_builder_console_input, self._pointer, _fd(source))
        return self

    def on_thread_start(self, hook: Callable[[int, ThreadRole, int, int], object]) -> Builder:
        """Calls `hook(vm_id, role, index, tid)` on each thread of the library before it does anything else."""

        def with_role(vm: int, role: int, index: int, tid: int) -> None:
            hook(vm, ThreadRole(role), index, tid)

        arguments = (self._pointer, device.thread, self._hold(with_role), let_go)
        call(lib.vmbed_builder_on_thread_start, *arguments)
        return self

    def dispatcher(self, dispatcher: Dispatcher) -> Builder:
        """Serves console, network cards and random numbers on your event loop."""
        call(lib.vmbed_builder_set_dispatcher, self._pointer, dispatcher._pointer)
        return self

    def caller_vcpus(self) -> Builder:
        """Leaves the vCPUs to threads of yours, which call :meth:`Vm.run_vcpu`."""
        call(lib.vmbed_builder_caller_vcpus, self._pointer)
        return self

    def build(self) -> Vm:
        """Makes the VM; nothing runs yet. The builder is done then, also where this raises."""
        return Vm(make(lib.vmbed_builder_build, "vm", self._pointer), self._exceptions)


class Host:
    """An opened /dev/kvm, and the ledger of what its VMs were promised."""

    def __init__(self, **shares: Unpack[Shares]) -> None:
        """Opens it, with what it may share out."""
        options, _keep = _options(shares)
        self._pointer = make(lib.vmbed_host_open, "host", options)

    @staticmethod
    def probe(kvm: str | os.PathLike[str] | None = None) -> Probe:
        """Looks at everything that VMs need, and opens nothing for good."""
        probe = make(lib.vmbed_probe_new, "probe", optional(None if kvm is None else os.fsencode(kvm)))
        findings: list[Finding] = []
        while (what := lib.vmbed_probe_what(probe, len(findings))) != ffi.NULL:
            index = len(findings)
            problem, remedy = lib.vmbed_probe_problem(probe, index), lib.vmbed_probe_remedy(probe, index)
            findings.append(Finding(text(what), text(problem) or None, text(remedy) or None))
        return Probe(bool(lib.vmbed_probe_is_usable(probe)), findings)

    def builder(self, config: Config) -> Builder:
        """Begins a VM."""
        return Builder(self._pointer, config)

    def build(self, config: Config) -> Vm:
        """Makes a VM that needs nothing but its configuration."""
        return self.builder(config).build()

    def verdict(self, config: Config) -> Verdict:
        """What the ledger would answer to such a VM. Nothing is built or booked."""
        verdict = structure("vmbed_verdict")
        call(lib.vmbed_host_verdict, self._pointer, config._build(), verdict)
        return Verdict._of(verdict)

    def set_shares(self, generation: int | None = None, **shares: Unpack[Shares]) -> None:
        """Changes what there is to give while VMs run; what is not named has its default, `kvm` stays. Less than is promised
        is accepted. `generation`, if given, is the one of the :class:`Usage` that the change is based on."""
        options, _keep = _options(shares)
        call(lib.vmbed_host_set_shares, self._pointer, options, UNLIMITED if generation is None else generation)

    def set_reclaim(self, reclaim: Reclaim | None) -> None:
        """Says what to do with the VMs of this host when its memory gets short; None, as in the beginning: nothing. Each
        step is an event of the VM that it is about, Kind.MEMORY_PRESSURE."""
        if reclaim is None:
            call(lib.vmbed_host_set_reclaim, self._pointer, ffi.NULL)
            return
        options = structure(
            "vmbed_reclaim_options",
            balloon_below=reclaim.balloon_below,
            page_out_below=reclaim.page_out_below,
            pause_below=reclaim.pause_below,
            stop_below=reclaim.stop_below,
            idle_tax=reclaim.idle_tax,
            pause_deadline=max(1, round(reclaim.pause_deadline * 1000)),
            interval=max(1, round(reclaim.interval * 1000)),
            sandbox=reclaim.sandbox,
        )
        call(lib.vmbed_host_set_reclaim, self._pointer, options)

    def reclaim_sandbox(self) -> SandboxReport:
        """What is in force of the sandbox of the thread that does so; zeroes where it has none, or is not there. Never blocks."""
        return _sandbox(self._pointer)

    def usage(self) -> Usage:
        """What the VMs hold, and what there is."""
        return _usage(self._pointer)

"""What a VM is to be: plain data."""

from __future__ import annotations

import os
import uuid as uuids
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ._lib import call, ffi, lib, make, optional, structure
from .switch import Rate

MIB = 1 << 20


class Mode(IntEnum):
    """How a bare guest's vCPUs begin."""

    REAL = 0
    PROTECTED = 1
    LONG = 2


class Platform(IntEnum):
    """What surrounds the vCPUs."""

    #: Local APICs, IOAPIC, PCI Express, hardware-reduced ACPI, serial port, clock, pvpanic.
    PC = 0
    #: vCPUs and memory only. HLT ends a vCPU, since nothing could wake it.
    BARE = 1


class Console(IntEnum):
    """What a PC's console is."""

    SERIAL = 0
    VIRTIO = 1


class DiskFormat(IntEnum):
    """What a disk's file holds: said by you, never guessed."""

    RAW = 0
    #: QEMU's format, version 2 or 3; only where `has_feature("qcow2")`.
    QCOW2 = 1


class CacheMode(IntEnum):
    """When a write is on stable storage, and whose memory it goes through."""

    #: Through the host's page cache; on stable storage when the guest flushes.
    WRITEBACK = 0
    #: Each write is on stable storage before it is answered, unless the guest chooses otherwise.
    WRITETHROUGH = 1
    #: Past the host's page cache (`O_DIRECT`).
    DIRECT = 2
    #: Flushes are answered and not done: for data that nobody misses after a power cut.
    UNSAFE = 3


class DiskEngine(IntEnum):
    """How a disk asks the host to move data."""

    #: io_uring where the host has it and allows it.
    AUTO = 0
    #: One system call for each request, on the disk's thread.
    SYNC = 1
    IO_URING = 2


def _backing(files: list[tuple[str | os.PathLike[str], DiskFormat]]) -> tuple[Any, object]:
    """Them for the library, and what must live through the call."""
    paths = [ffi.new("char[]", os.fsencode(path)) for path, _ in files]
    made = [(path, int(kind), 0) for path, (_, kind) in zip(paths, files)]
    return ffi.new("vmbed_backing_file[]", made) if files else ffi.NULL, paths


def create_disk(
    path: str | os.PathLike[str],
    size: int,
    format: DiskFormat = DiskFormat.RAW,
    backing: tuple[str | os.PathLike[str], DiskFormat] | None = None,
) -> None:
    """Makes an image for a disk of `size` bytes: sparse, all zeroes, or, in qcow2, a layer on `backing`, whose size 0 stands for."""
    below = _backing([backing] if backing else [])
    call(lib.vmbed_disk_create, os.fsencode(path), int(format), size, below[0])


@dataclass
class Disk:
    """A virtio-blk disk: an image or block device, or what :meth:`Builder.disk_fd` or `disk_backend` attaches."""

    #: None where something is attached.
    path: str | os.PathLike[str] | None = None
    readonly: bool = False
    #: At most 20 bytes, which the guest can read.
    serial: str | None = None
    #: Its place, such as 00:05.0; the first free one otherwise.
    pci: str | None = None
    format: DiskFormat = DiskFormat.RAW
    #: What a qcow2 image is based on, the nearest first. Only these files are opened, whatever the image itself says.
    backing: list[tuple[str | os.PathLike[str], DiskFormat]] = field(default_factory=list)
    #: Where a qcow2 image keeps its data, if not in itself. Only this file is opened, whatever the image says.
    data_file: str | os.PathLike[str] | None = None
    #: What opens the encrypted images among ``path`` and ``backing``, which can only be read. Shown nowhere.
    passphrases: list[str] = field(default_factory=list, repr=False)
    cache: CacheMode = CacheMode.WRITEBACK
    engine: DiskEngine = DiskEngine.AUTO
    #: That the guest may use at a time, each with a thread of its own: 1 to 16.
    queues: int = 1
    #: What the guest discards becomes free on the host.
    discard: bool = True
    #: A file named by `path` is locked as QEMU does it: a writer has it alone, readers share it.
    lock: bool = True
    #: How much may be transferred; :meth:`Vm.set_disk_rate` changes it.
    rate: Rate = Rate()


class Vhost(IntEnum):
    """Whether the host's kernel serves a card on a TAP interface (vhost-net)."""

    OFF = 0
    #: Where `/dev/vhost-net` is there and may be opened; ``Vm.net_statistics().vhost`` says whether.
    IF_PRESENT = 1
    #: The VM is not built where it cannot.
    REQUIRED = 2


@dataclass
class Net:
    """A network card: on a TAP interface that exists, or on what :meth:`Builder.net_fd` or `net_backend` attaches."""

    #: None where something is attached.
    tap: str | None = None
    #: The Unix socket of a network in user space, such as ``passt --socket PATH``; instead of ``tap``.
    stream: str | os.PathLike[str] | None = None
    #: Follows from the VM's UUID otherwise.
    mac: str | None = None
    pci: str | None = None
    #: The largest packet that the guest's driver is to send; its network's. It takes 1500 otherwise.
    mtu: int | None = None
    #: What the guest shows, in Mbit/s. It limits nothing.
    speed: int | None = None
    #: Pairs of queues, 1 to 16: more than one for a TAP interface that was made so, by name or a descriptor for each.
    queues: int = 1
    #: Whether the cable is plugged in; :meth:`Vm.set_link` changes it.
    link: bool = True
    #: How much the guest may receive and send; operations are frames. :meth:`Vm.set_net_rates` changes it.
    receive_rate: Rate = Rate()
    send_rate: Rate = Rate()
    #: Whether the host's kernel carries the frames itself. It counts nothing and knows no addresses; while there is something that it
    #: cannot do (a limit, a cable that is not plugged in), vmbed serves the card.
    vhost: Vhost = Vhost.OFF


@dataclass
class Balloon:
    """A virtio-balloon, through which a guest gives memory back."""

    #: The guest may take memory out of it before it kills a process for want of memory.
    deflate_on_oom: bool = True
    #: The guest gives large pieces of free memory back as it goes along; never on the pool of huge pages.
    reporting: bool = True
    #: :meth:`Vm.discard_free_pages` works. A Linux guest that runs out of memory at that moment may use a page while it
    #: is being given back, and lose what it has written there. Refused on the pool of huge pages.
    hinting: bool = False
    pci: str | None = None


class BackingKind(IntEnum):
    """Where a VM's pages come from."""

    #: A memfd, sealed against resizing: exact accounts at the cost of one system call.
    MEMFD = 0
    #: Anonymous memory, which the kernel may merge. Accounts cost a walk over page tables.
    ANONYMOUS = 1
    #: Pages of 2 MiB from the pool that the host's administrator set aside. They are never swapped.
    HUGE_2M = 2
    #: The same with pages of 1 GiB.
    HUGE_1G = 3


class HugePages(IntEnum):
    """What to ask transparent huge pages for."""

    #: What the loader fills, and where a kernel boots; elsewhere as the host's kernel is set up.
    AUTO = 0
    ALWAYS = 1
    NEVER = 2


@dataclass
class Backing:
    """What a VM's memory is made of."""

    kind: BackingKind = BackingKind.MEMFD
    huge: HugePages = HugePages.AUTO
    #: All of the memory is there when the VM is built.
    prefault: bool = False
    #: The kernel may merge pages of the same content (KSM), of anonymous memory only. It saves memory, and lets a guest
    #: find out by time what others hold.
    mergeable: bool = False
    #: The host's NUMA nodes that the pages may come from, by their numbers; empty for any.
    numa_nodes: list[int] = field(default_factory=list)


@dataclass
class Cgroup:
    """A cgroup (version 2) of its own for a VM's threads, gone with the VM."""

    #: The directory of a cgroup that the process is in or below. None: the process's own.
    parent: str | os.PathLike[str] | None = None
    #: The VM's part of the time that its parent has, when more is wanted than there is: 1 to 10,000.
    weight: int = 100
    #: What its threads together may run in a period, both in microseconds; None: no limit.
    quota: int | None = None
    period: int = 100_000


@dataclass
class Sandbox:
    """A sandbox for a VM's threads: each may make the system calls that its work needs and no others, and opens no files.

    A thread that would call code of yours cannot be in it: building the VM raises InvalidArgument and names what may be False.
    """

    #: Threads that run vCPUs. They call your devices, and some functions of your networks.
    vcpus: bool = True
    #: Threads that serve the console, cards and the random number generator. They call your console callback and networks.
    devices: bool = True
    #: Threads that serve disks. They call your disks.
    disks: bool = True
    #: The thread that serves the balloon.
    balloon: bool = True
    #: Goes on with what the kernel has. False: Unsupported where it lacks seccomp's notices or Landlock.
    best_effort: bool = False


@dataclass
class CpuidMask:
    """Bits of CPUID that the guest is not to see (`clear`), or is to see (`set`)."""

    leaf: int
    subleaf: int
    #: "eax", "ebx", "ecx" or "edx".
    register: str
    clear: int = 0
    set: int = 0


@dataclass(kw_only=True)
class _Common:
    name: str | None = None
    uuid: uuids.UUID | None = None
    #: Bytes, a multiple of 4 KiB. None: 256 MiB for Linux, 2 MiB for a bare guest.
    memory: int | None = None
    backing: Backing = field(default_factory=Backing)
    vcpus: int = 1
    threads_per_core: int = 1
    sockets: int = 1
    platform: Platform | None = None
    console: Console = Console.SERIAL
    #: A random number generator. None: for Linux, and not for a bare guest.
    rng: bool | None = None
    disks: list[Disk] = field(default_factory=list)
    nets: list[Net] = field(default_factory=list)
    #: None: the guest has none.
    balloon: Balloon | None = None
    cpuid_masks: list[CpuidMask] = field(default_factory=list)
    #: None: its threads stay where they are made.
    cgroup: Cgroup | None = None
    #: None: its threads have the rights of the process.
    sandbox: Sandbox | None = None
    #: What of the memory the ledger never takes back, in bytes.
    guarantee: int = 0
    #: Its class where the host gets short of memory, 0 to 255; None: never stopped for others.
    victim: int | None = None
    #: vCPU by vCPU, the host's CPUs that it may run on.
    affinity: list[list[int]] = field(default_factory=list)
    dedicated: bool = False

    def _make(self) -> Any:
        raise NotImplementedError

    def validate(self) -> None:
        """Raises InvalidArgument with every bad field, without opening anything."""
        call(lib.vmbed_config_validate, self._build())

    def _build(self) -> Any:
        config = self._make()
        if self.name is not None:
            call(lib.vmbed_config_set_name, config, self.name.encode())
        if self.uuid is not None:
            call(lib.vmbed_config_set_uuid, config, self.uuid.bytes)
        if self.memory is not None:
            call(lib.vmbed_config_set_memory, config, self.memory)
        if self.backing != Backing():
            backing, nodes = self.backing, ffi.new("uint32_t[]", self.backing.numa_nodes)
            call(
                lib.vmbed_config_set_backing,
                config,
                structure(
                    "vmbed_backing",
                    kind=int(backing.kind),
                    huge=int(backing.huge),
                    prefault=int(backing.prefault),
                    mergeable=int(backing.mergeable),
                    numa_nodes=nodes,
                    numa_node_count=len(backing.numa_nodes),
                ),
            )
        call(lib.vmbed_config_set_cpus, config, self.vcpus, self.threads_per_core, self.sockets)
        if self.platform is not None:
            call(lib.vmbed_config_set_platform, config, int(self.platform))
        if self.console is not Console.SERIAL:
            call(lib.vmbed_config_set_console, config, int(self.console))
        if self.rng is not None:
            call(lib.vmbed_config_set_rng, config, self.rng)
        for mask in self.cpuid_masks:
            register = ["eax", "ebx", "ecx", "edx"].index(mask.register.lower())
            call(lib.vmbed_config_mask_cpuid, config, mask.leaf, mask.subleaf, register, mask.clear, mask.set)
        for disk in self.disks:
            path, data = (None if file is None else os.fsencode(file) for file in (disk.path, disk.data_file))
            keep = [optional(path), optional(disk.serial), optional(disk.pci), optional(data)]
            below = _backing(disk.backing)
            words = [ffi.new("char[]", word.encode()) for word in disk.passphrases]
            passphrases = ffi.new("char *[]", words) if words else ffi.NULL
            made = structure(
                "vmbed_disk", path=keep[0], serial=keep[1], pci=keep[2], readonly=int(disk.readonly), format=disk.format,
                cache=disk.cache, engine=disk.engine, queues=disk.queues, no_discard=int(not disk.discard),
                no_lock=int(not disk.lock), rate=tuple(disk.rate), backing=below[0], backing_count=len(disk.backing),
                data_file=keep[3], passphrases=passphrases, passphrase_count=len(words),
            )  # fmt: skip
            call(lib.vmbed_config_add_disk, config, made)
        for net in self.nets:
            stream = None if net.stream is None else os.fsencode(net.stream)
            keep = [optional(net.tap), optional(net.mac), optional(net.pci), optional(stream)]
            made = structure(
                "vmbed_net", tap=keep[0], mac=keep[1], pci=keep[2], mtu=net.mtu or 0, speed=net.speed or 0,
                link_down=int(not net.link), queues=net.queues, receive_rate=tuple(net.receive_rate), send_rate=tuple(net.send_rate),
                stream=keep[3], vhost=net.vhost,
            )  # fmt: skip
            call(lib.vmbed_config_add_net, config, made)
        if self.balloon is not None:
            pci, given = optional(self.balloon.pci), self.balloon
            flags = {"keep_on_oom": not given.deflate_on_oom, "no_reporting": not given.reporting, "hinting": given.hinting}
            call(lib.vmbed_config_set_balloon, config, structure("vmbed_balloon", pci=pci, **flags))
        if self.guarantee or self.victim is not None:
            call(lib.vmbed_config_set_promise, config, self.guarantee, -1 if self.victim is None else self.victim)
        if self.cgroup is not None:
            parent = None if self.cgroup.parent is None else os.fsencode(self.cgroup.parent)
            limit = (0, 0) if self.cgroup.quota is None else (self.cgroup.quota, self.cgroup.period)
            call(lib.vmbed_config_set_cgroup, config, optional(parent), self.cgroup.weight, *limit)
        if self.sandbox is not None:
            confined = (self.sandbox.vcpus, self.sandbox.devices, self.sandbox.disks, self.sandbox.balloon)
            threads = sum(1 << bit for bit, wanted in enumerate(confined) if wanted)
            call(lib.vmbed_config_set_sandbox, config, threads, self.sandbox.best_effort)
        if self.dedicated:
            call(lib.vmbed_config_set_dedicated, config, True)
        for vcpu, cpus in enumerate(self.affinity):
            call(lib.vmbed_config_set_affinity, config, vcpu, ffi.new("uint32_t[]", cpus), len(cpus))
        return config


@dataclass
class LinuxConfig(_Common):
    """A PC that boots a Linux kernel: a bzImage, or an ELF image with a PVH entry."""

    kernel: str | os.PathLike[str]
    initrd: str | os.PathLike[str] | None = None
    cmdline: str = ""
    #: The kernel's own decompressor runs, and randomizes its addresses.
    kaslr: bool = False

    def _make(self) -> Any:
        config = make(lib.vmbed_config_new_linux, "config", os.fsencode(self.kernel))
        if self.initrd is not None:
            call(lib.vmbed_config_set_initrd, config, os.fsencode(self.initrd))
        call(lib.vmbed_config_set_cmdline, config, self.cmdline.encode())
        call(lib.vmbed_config_set_kaslr, config, self.kaslr)
        return config


@dataclass
class BareConfig(_Common):
    """Bytes at an address: every vCPU starts there, with its index in RDI."""

    code: bytes
    entry: int = 0x1000
    mode: Mode = Mode.REAL
    #: More bytes, by guest-physical address.
    images: dict[int, bytes] = field(default_factory=dict)
    stack: int | None = None

    def _make(self) -> Any:
        arguments = (int(self.mode), self.entry, self.code, len(self.code))
        config = make(lib.vmbed_config_new_bare, "config", *arguments)
        for address, data in self.images.items():
            call(lib.vmbed_config_add_image, config, address, data, len(data))
        if self.stack is not None:
            call(lib.vmbed_config_set_stack, config, self.stack)
        return config


Config = LinuxConfig | BareConfig

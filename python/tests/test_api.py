"""The cases of tests/api-cases through Python; tests/api (Rust) and tests/c (C) have the same."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import gc
import itertools
import logging
import os
import random
import select
import socket
import struct
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import vmbed
from guest import (
    ACCOUNT,
    ASKED,
    BEGIN_READ,
    BEGIN_WRITE,
    DEFLATE,
    DISCARD,
    FINISH,
    FLUSH,
    INFLATE,
    LONG,
    READ,
    RECEIVE,
    SEND,
    SPINS,
    TALKS,
    TARGET,
    TELL,
    WRITE,
    WRITES,
    ZERO,
    Echo,
    Port,
    Ram,
    behind,
    builder,
    driver,
    finish,
    start,
    wait_until,
)
from scapy.utils import RawPcapNgReader  # type: ignore[import-untyped, unused-ignore]

HERE = Path(__file__).resolve()


def test_listed_here_and_there() -> None:
    listed = []
    for line in (HERE.parents[2] / "tests/api-cases").read_text().splitlines():
        name, *languages = line.split("#")[0].split() or [""]
        if name and "python" in (languages or ["python"])[0].split(","):
            listed.append(name)
    have = [name[5:] for name in globals() if name.startswith("test_") and name != "test_listed_here_and_there"]
    assert sorted(have) == sorted(listed)


def states(vm: vmbed.Vm) -> str | None:
    """Where it is, by name."""
    return vm.state.name if vm.state else None


def test_guest_and_device() -> None:
    port = Port()
    with builder(TALKS, port).build() as vm:
        assert states(vm) == "BUILT" and vm.id > 0 and vm.memory_size == 2 << 20
        with pytest.raises(vmbed.TimedOut):
            vm.wait(0.01)
        vm.start()
        assert vm.wait(LONG) is vmbed.Cause.GUEST_HALT
        assert port.written == [(1, b"\x5a")] and states(vm) == "STOPPED"
        assert vm.first_exit and 0 < time.monotonic() - vm.first_exit < LONG
        with pytest.raises(vmbed.InvalidState, match="ended"):
            vm.start()
    assert vm.state is None and vm.id == 0
    with pytest.raises(vmbed.InvalidArgument, match="was freed"):
        vm.start()


def test_events_in_order() -> None:
    with builder(SPINS).build() as vm:
        events, number = vm.events(), vm.id
        assert events.next(0) is None and not select.select([events], [], [], 0)[0]
        vm.start()
        vm.pause()
        vm.resume()
        assert select.select([events], [], [], 0)[0]
        assert vm.stop() is vmbed.Cause.HOST_STOP
    told = list(events)
    assert [event.kind.name for event in told] == ["STARTED", "PAUSED", "RESUMED", "STOPPED"]
    assert [event.seq for event in told] == [0, 1, 2, 3] and {event.vm for event in told} == {number}
    assert told[-1].cause is vmbed.Cause.HOST_STOP and told[0].time <= told[-1].time

    async def follow() -> list[str]:
        with builder(TALKS, Port()).build() as vm:
            vm.start()
            return [event.kind.name async for event in vm.events()]

    assert asyncio.run(asyncio.wait_for(follow(), LONG)) == ["STARTED", "STOPPED"]


def test_registers_and_memory() -> None:
    with builder(SPINS).build() as vm:
        registers = vm.registers()
        assert registers.rip == 0x1000
        registers.rax, registers.rip = 0x1234, 0x1001
        vm.set_registers(registers)
        assert vm.registers() == registers
        vm.write_memory(0x2000, b"hello")
        assert vm.read_memory(0x2000, 5) == b"hello" and vm.read_memory(0x1000, 3) == SPINS
        with pytest.raises(vmbed.InvalidArgument):
            vm.read_memory(2 << 20, 1)
        with pytest.raises(vmbed.InvalidArgument, match="no vCPU 1"):
            vm.registers(1)
        vm.start()
        with pytest.raises(vmbed.InvalidState, match="pause"):
            vm.registers()


def test_every_bad_field_at_once() -> None:
    config = vmbed.LinuxConfig("/k", memory=4097, vcpus=0, disks=[vmbed.Disk("")])
    with pytest.raises(vmbed.InvalidArgument) as caught:
        config.validate()
    assert {"memory", "cpus.count", "disks[0].path"} <= {field.name for field in caught.value.fields}
    assert all(field.problem and field.remedy for field in caught.value.fields) and caught.value.code == -1
    with pytest.raises(vmbed.NotFound, match="/nonexistent") as missing:
        vmbed.Host().build(vmbed.LinuxConfig("/nonexistent"))
    assert missing.value.errno == 2 and isinstance(missing.value.__cause__, OSError)


def test_what_is_promised_and_what_is_there() -> None:
    host = vmbed.Host()
    with builder(SPINS, host=host).build() as vm:
        usage, memory = host.usage(), vm.memory()
        assert usage.vms == 1 and usage.vcpus == 1 and usage.vcpu_capacity == vmbed.UNLIMITED
        assert memory.max == 2 << 20 and memory.backing == usage.backing
        vm.write_memory(0x100000, b"\1" * 4096)
        assert vm.memory().backing == usage.backing + 4096
        vm.set_guarantee(1 << 20, memory.generation)
        with pytest.raises(vmbed.InvalidState, match="generation"):
            vm.set_guarantee(0, memory.generation)
        vm.start()
        wait_until("a millisecond of the vCPU", lambda: vm.vcpu_statistics().run_time > 1_000_000)
        assert vm.first_exit is None, "it only spins"
        with pytest.raises(vmbed.InvalidState, match="generation"):
            host.set_shares(0, memory=1 << 30)
        host.set_shares(memory=4096, memory_reserved=0, swap=4096)
        config = vmbed.BareConfig(SPINS)
        verdict = host.verdict(config)
        nominal = verdict.slack[vmbed.Constraint.NOMINAL]
        assert verdict.binding is vmbed.Constraint.MEMORY_UNITS
        assert nominal.broken and nominal.wanted == 2 << 20 and nominal.left < 0
        with pytest.raises(vmbed.Refused) as refused:
            host.build(config)
        why = refused.value.verdict
        assert why and why.binding is verdict.binding and why.slack[vmbed.Constraint.NOMINAL] == nominal
        assert len(refused.value.fields) == len(vmbed.Constraint)


def test_data_are_destroyed_once() -> None:
    class Data:
        def __call__(self, *_: object) -> None:
            pass

    device, hook = Port(), Data()
    gone: list[weakref.ref[Any]] = [weakref.ref(device), weakref.ref(hook)]
    made = builder(SPINS, device).on_thread_start(hook).console_output(Data())
    with pytest.raises(vmbed.InvalidArgument):
        made.pio_device("other", 0xFFFF, 2, Port()).build()
    del device, hook, made
    gc.collect()
    assert [reference() is None for reference in gone] == [True, True]
    another = Port()
    reference = weakref.ref(another)
    with builder(SPINS, another).build() as vm:
        del another
        gc.collect()
        assert reference() is not None, "the VM holds it"
        vm.start()
    gc.collect()
    assert reference() is None


def test_a_device_that_fails_is_the_cause() -> None:
    class Fails(vmbed.Device):
        def read(self, vcpu: int, offset: int, length: int) -> bytes:
            return b"too long" * 9

    with builder(SPINS).build() as other, builder(TALKS, Fails()).build() as vm:
        other.start()
        vm.start()
        assert vm.wait(LONG) is vmbed.Cause.DEVICE_FAULT
        last = list(vm.events())[-1]
        assert last.device == "port" and "read" in last.text
        assert isinstance(vm.exceptions[0], ValueError) and other.state is vmbed.State.RUNNING


def test_a_callback_that_panics() -> None:
    def fails() -> None:
        raise KeyError("as the test wants")

    with builder(TALKS, Port(fails)).build() as vm:
        vm.start()
        assert vm.wait(LONG) is vmbed.Cause.DEVICE_FAULT
        assert [str(raised) for raised in vm.exceptions] == ["'as the test wants'"]


def test_a_callback_stops_its_vm() -> None:
    with builder(WRITES, port := Port()).build() as vm:
        port.then = vm.request_stop
        vm.start()
        assert vm.wait(LONG) is vmbed.Cause.HOST_STOP


def test_a_callback_frees_its_vm() -> None:
    port = Port()
    vm = builder(WRITES, port).build()
    events, seen = vm.events(), threading.Event()

    def close() -> None:
        vm.close()
        seen.set()

    port.then = close
    vm.start()
    assert seen.wait(LONG)
    last = None
    while (event := events.next(LONG)) is not None and last is None:
        last = event.cause
        if last is not None:
            break
    assert last is vmbed.Cause.HOST_STOP and vm.state is None


def quietly(call: Any, *arguments: object) -> None:
    """A call that another thread may have made pointless."""
    try:
        call(*arguments)
    except vmbed.Error:
        pass


def together(*calls: Any) -> None:
    """Makes calls on a thread each, and waits for them."""
    threads = [threading.Thread(target=quietly, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive(), "waited a minute for a call to return"


def test_free_races_with_everything() -> None:
    for _ in range(30):
        vm = builder(WRITES, Port()).build()
        vm.start()
        together(vm.pause, vm.wait, vm.registers, vm.console_tail, vm.stop, vm.close, vm.close)
        assert vm.state is None


def test_log_lines_go_where_they_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test.vmbed")
    with caplog.at_level(logging.DEBUG, logger="test.vmbed"):
        vmbed.log_to(logger, logging.DEBUG)
        with builder(SPINS).build() as vm:
            vm.start()
            vm.stop()
        vmbed.log_to(None)
        said = len(caplog.records)
        with builder(SPINS).build() as vm:
            vm.stop()
    assert any("stop" in record.getMessage() for record in caplog.records) and len(caplog.records) == said


def test_version_and_features() -> None:
    assert vmbed.__version__ == "0.1.0" and "bare" in vmbed.features()
    assert vmbed.has_feature("bare") and not vmbed.has_feature("nonsense")


def test_a_probe_says_what_is_missing() -> None:
    assert vmbed.Host.probe().usable
    probe = vmbed.Host.probe("/nonexistent/kvm")
    assert not probe.usable
    assert any(finding.problem and finding.remedy for finding in probe.findings)


def entries(what: str) -> int:
    return len(os.listdir(f"/proc/self/{what}"))


def test_cycles_leave_nothing() -> None:
    def cycle() -> None:
        with builder(TALKS, Port()).build() as vm:
            vm.start()
            vm.wait(LONG)

    for _ in range(20):
        cycle()
    gc.collect()
    before = entries("fd"), entries("task")
    for _ in range(200):
        cycle()
    gc.collect()
    assert (entries("fd"), entries("task")) == before


def test_a_callback_reenters() -> None:
    refused: list[type] = []
    port = Port()
    with builder(WRITES, port).build() as vm:

        def reenter() -> None:
            port.then = None
            for call in (vm.start, vm.pause, vm.resume, vm.stop, vm.wait, vm.registers):
                try:
                    call()
                except vmbed.Error as error:
                    refused.append(type(error))
            with builder(TALKS, Port()).build() as other:
                other.start()
                assert other.wait(LONG) is vmbed.Cause.GUEST_HALT

        port.then = reenter
        vm.start()
        wait_until("the callback", lambda: port.writes > 2)
        assert refused == [vmbed.InvalidState] * 6 and vm.state is vmbed.State.RUNNING and not vm.exceptions


def test_a_callback_that_blocks() -> None:
    entered, leave = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert leave.wait(LONG)

    with builder(WRITES, Port(block)).build() as vm:
        vm.start()
        assert entered.wait(LONG)
        with pytest.raises(vmbed.TimedOut):
            vm.stop()
        assert vm.state is vmbed.State.RUNNING, "the end stays requested"
        leave.set()
        assert vm.wait(LONG) is vmbed.Cause.HOST_STOP


def test_other_callbacks_reenter_and_free() -> None:
    vms: list[vmbed.Vm] = []
    refused: list[type] = []

    def takes(_: bytes) -> None:
        if vms:
            vm = vms.pop()
            with pytest.raises(vmbed.InvalidState):
                vm.stop()
            refused.append(vmbed.InvalidState)
            vm.close()

    made = vmbed.Host().builder(talker(resets=False)).console_output(takes)
    vms.append(made.build())
    events = vms[0].events()
    vms[0].start()
    wait_until("the console's callback", lambda: refused)
    causes = [event.cause for event in events]
    assert causes[-1] is vmbed.Cause.HOST_STOP


def test_handles_from_eight_threads() -> None:
    seed = int(os.environ.get("VMBED_SEED", "1"))
    shared: list[vmbed.Vm] = [builder(WRITES, Port()).build() for _ in range(4)]
    unexpected: list[BaseException] = []

    def play(number: int) -> None:
        dice = random.Random(seed * 8 + number)
        try:
            for _ in range(100):
                place = dice.randrange(4)
                vm = shared[place]
                what = dice.randrange(9)
                if what == 0:
                    shared[place] = builder(WRITES, Port()).build()
                    quietly(vm.close)
                else:
                    calls = [vm.start, vm.start, vm.pause, vm.resume, vm.registers, vm.memory, vm.events, vm.request_stop]
                    quietly(calls[what - 1])
        except BaseException as raised:  # noqa: BLE001 - told below
            unexpected.append(raised)

    together(*(lambda number=number: play(number) for number in range(8)))
    for vm in shared:
        vm.close()
    assert not unexpected, f"seed {seed}: {unexpected}"


def test_freeing_in_every_order() -> None:
    for order in itertools.permutations(range(4)):
        host = vmbed.Host()
        made = builder(SPINS, host=host)
        vm = made.build()
        parts: list[Any] = [host, made, vm, vm.events()]
        vm.start()
        del host, made, vm
        for index in order:
            parts[index] = None
            gc.collect()


def test_stop_races_with_everything() -> None:
    for _ in range(30):
        with builder(WRITES, Port()).build() as vm:
            vm.start()
            together(vm.stop, vm.stop, vm.wait, vm.pause, vm.resume, vm.request_stop)
            assert vm.wait(LONG) is vmbed.Cause.HOST_STOP


def test_a_fork_while_a_vm_runs() -> None:
    port = Port()
    with builder(WRITES, port).build() as vm:
        vm.start()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                try:
                    vm.stop()
                except vmbed.InvalidState as error:
                    os._exit(0 if "fork" in str(error) else 2)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            written = port.writes
            wait_until("the guest to go on", lambda: port.writes > written)


def test_many_at_once() -> None:
    host, stream = vmbed.Host(), vmbed.Events()

    class Refuses(vmbed.Device):
        def read(self, vcpu: int, offset: int, length: int) -> int:
            raise RuntimeError("as the test wants")

    # lidt [0x2000], where there are zeroes; ud2
    code = bytes([0x0F, 0x01, 0x1D, 0x00, 0x20, 0x00, 0x00, 0x0F, 0x0B])
    fault = vmbed.BareConfig(code, mode=vmbed.Mode.PROTECTED)
    vms = [builder(TALKS, Refuses(), host).events(stream).build(), host.builder(fault).events(stream).build()]
    vms += [builder(TALKS, Port(), host).events(stream).build() for _ in range(62)]
    for vm in vms:
        vm.start()
    causes: dict[int, vmbed.Cause] = {}
    while len(causes) < len(vms):
        event = stream.next(LONG)
        assert event, f"waited a minute; {len(causes)} of {len(vms)} have ended"
        if event.cause:
            causes[event.vm] = event.cause
    assert [causes[vm.id].name for vm in vms] == ["DEVICE_FAULT", "TRIPLE_FAULT"] + ["GUEST_HALT"] * 62
    for vm in vms:
        vm.close()


def test_vcpus_on_the_callers_threads() -> None:
    port = Port()
    with builder(WRITES, port).caller_vcpus().build() as vm:
        vm.start()
        for _ in range(5):
            thread = threading.Thread(target=vm.interrupt_vcpu)
            thread.start()
            assert vm.run_vcpu() is vmbed.VcpuReturn.INTERRUPTED
            thread.join()
        port.then = vm.request_stop
        assert vm.run_vcpu() is vmbed.VcpuReturn.ENDED and port.writes > 0
        assert vm.wait(LONG) is vmbed.Cause.HOST_STOP
        with pytest.raises(vmbed.InvalidArgument, match="no vCPU 1"):
            vm.run_vcpu(1)
    with builder(TALKS, Port()).build() as vm, pytest.raises(vmbed.InvalidState, match="caller_vcpus"):
        vm.run_vcpu()


def talker(resets: bool = True) -> vmbed.BareConfig:
    """mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al; [mov al, 0xfe; out 0x64, al;] jmp $"""
    says = bytes([0xBA, 0xF8, 0x03, 0xB0, 0x68, 0xEE, 0xB0, 0x69, 0xEE])
    says += bytes([0xB0, 0xFE, 0xE6, 0x64] if resets else []) + bytes([0xEB, 0xFE])
    return vmbed.BareConfig(says, platform=vmbed.Platform.PC)


def test_devices_on_the_callers_loop() -> None:
    said: list[tuple[bytes, int]] = []
    dispatcher = vmbed.Dispatcher()
    made = vmbed.Host().builder(talker()).dispatcher(dispatcher)
    made.console_output(lambda data: said.append((data, threading.get_ident())))

    async def run() -> vmbed.Cause | None:
        loop, cause = asyncio.get_running_loop(), None
        loop.add_reader(dispatcher.fileno(), dispatcher.dispatch)
        with made.build() as vm:
            vm.start()
            async for event in vm.events():
                cause = event.cause
        loop.remove_reader(dispatcher.fileno())
        return cause

    assert asyncio.run(asyncio.wait_for(run(), LONG)) is vmbed.Cause.GUEST_RESET
    dispatcher.dispatch()
    assert {thread for _, thread in said} <= {threading.get_ident()}


def test_doorbells_ring() -> None:
    # mov al, 7; out 0x20, al; hlt
    code = bytes([0xB0, 0x07, 0xE6, 0x20, 0xF4])
    with builder(code).pio_doorbell("bell", 0x20).build() as vm:
        vm.start()
        rung = [event for event in vm.events() if event.kind is vmbed.Kind.DOORBELL]
    assert [(event.device, event.value, event.offset) for event in rung] == [("bell", 7, 0)]


#: 7 and 8 in two sectors.
SUM = 512 * (7 + 8)


def test_a_disk_of_ones_own() -> None:
    ram, said = Ram(), Port()
    steps = [(WRITE, 3, 2, 7), (FLUSH, 0, 0, 0), (READ, 3, 2, 0), (READ, 100, 1, 0), (READ, 101, 1, 0)]
    steps += [(BEGIN_READ, 200, 1, 0), (BEGIN_WRITE, 300, 2, 7), (BEGIN_READ, 400, 1, 0), (TELL, 0, 0, 1), (FINISH, 0, 0, 0)]
    steps += [(ZERO, 4, 1, 1), (DISCARD, 8, 4, 0), (DISCARD, 8, 4, 1)]
    with start(vmbed.Host().builder(driver(disks=1)).disk_backend(0, ram), steps, said) as vm:
        wait_until("three requests", lambda: said.writes and len(ram.kept) == 3)

        def backwards() -> None:
            while ram.kept:
                request = ram.kept.pop()
                assert ram.perform(request)
                with pytest.raises(ValueError, match="has ended"):
                    request.complete()

        thread = threading.Thread(target=backwards)
        thread.start()
        thread.join()
        results = finish(vm, len(steps))
        assert results[:5] == [(0, 1, 0), (0, 1, 0), (0, 1025, SUM), (1, 1, 0), (1, 1, 0)]
        assert results[9] == (0, 513 + 1 + 513, 0) and ram.bytes[512 * 301] == 8 and ram.flushes == 1
        assert results[10:] == [(0, 1, 0), (0, 1, 0), (2, 1, 0)] and (ram.bytes[512 * 3], ram.bytes[512 * 4]) == (7, 0)
        assert ram.asked[-2:] == [vmbed.BlockOp.WRITE_ZEROES, vmbed.BlockOp.DISCARD]
        done = vm.disk_statistics()
        assert done[:8] == (3, 2048, 2, 2048, 1, 3, 2, 5 * 512) and sum(done.latency) == 11
        with pytest.raises(vmbed.InvalidArgument, match="disk1"):
            vm.disk_statistics(1)
        failed = [event for event in vm.events() if event.kind is vmbed.Kind.BACKEND_ERROR]
        assert {event.device for event in failed} == {"disk0"}
        assert [type(raised) for raised in vm.exceptions] == [RuntimeError]


def test_a_disk_that_does_not_answer() -> None:
    ram, said = Ram(), Port()
    steps = [(BEGIN_READ, 200, 1, 0), (TELL, 0, 0, 1), (FINISH, 0, 0, 0)]
    steps += [(BEGIN_READ, 201, 1, 0), (TELL, 0, 0, 2), (FINISH, 0, 0, 0)]
    with start(vmbed.Host().builder(driver(disks=1)).disk_backend(0, ram), steps, said) as vm:
        wait_until("a request", lambda: said.writes == 1 and ram.kept)
        with pytest.raises(vmbed.TimedOut, match="disk0"):
            vm.pause()
        assert ram.perform(ram.kept.pop())
        wait_until("another request", lambda: said.writes == 2 and ram.kept)
        assert vm.stop() is vmbed.Cause.HOST_STOP
    assert not ram.perform(ram.kept.pop()), "nobody waits for it"


def test_disks_and_what_is_changed_of_them(tmp_path: Path) -> None:
    image, size, host = tmp_path / "disk", 1 << 20, vmbed.Host()
    image.write_bytes(bytes(size))
    cache, engine = vmbed.CacheMode, vmbed.DiskEngine

    def config(**options: Any) -> vmbed.BareConfig:
        made = driver()
        made.disks = [vmbed.Disk(image, **options)]
        return made

    with pytest.raises(vmbed.InvalidArgument, match="queues"):
        host.builder(config(queues=17)).build()
    steps = [(WRITE, 3, 2, 7), (FLUSH, 0, 0, 0), (READ, 3, 2, 0), (ZERO, 3, 1, 0), (DISCARD, 0, 1, 0), (READ, 2047, 2, 0)]
    ways: list[dict[str, Any]] = [
        {"cache": cache.WRITEBACK},
        {"cache": cache.WRITETHROUGH, "engine": engine.SYNC, "queues": 3},
        {"cache": cache.DIRECT, "engine": engine.IO_URING, "queues": 2},
        {"cache": cache.UNSAFE, "engine": engine.SYNC},
    ]
    for options in ways:
        with start(host.builder(config(**options)), steps, Port()) as vm:
            results = finish(vm, len(steps))
            assert results == [(0, 1, 0), (0, 1, 0), (0, 1025, SUM), (0, 1, 0), (0, 1, 0), (1, 1, 0)], options
            there = image.read_bytes()
            assert (there[512 * 3], there[512 * 4]) == (0, 8)
            done = vm.disk_statistics()
            assert (done.discards, done.errors) == (2, 1)
    with host.builder(config()).build() as vm:
        with pytest.raises(vmbed.InvalidState, match="in use"):
            host.builder(config()).build()
        host.builder(config(lock=False)).build().close()
        vm.resize_disk(2 * size)
        assert image.stat().st_size == 2 * size
        with pytest.raises(vmbed.InvalidArgument, match="512"):
            vm.resize_disk(513)
        with pytest.raises(vmbed.InvalidArgument, match="disk1"):
            vm.resize_disk(size, 1)
        saved, heard = tmp_path / "saved", []

        def progress(behind: int, all_: int) -> bool:
            heard.append((behind, all_))
            return True

        assert vm.save_disk(saved, progress=progress) and heard[-1] == (2 * size, 2 * size)
        assert saved.read_bytes() == image.read_bytes()
        saved.unlink()
        assert not vm.save_disk(saved, vmbed.DiskFormat.QCOW2, lambda *_: False) and not saved.exists()
        with pytest.raises(ZeroDivisionError):
            vm.save_disk(saved, progress=lambda *_: bool(1 // 0))
        vm.set_disk_rate(vmbed.Rate(bytes_per_second=1 << 20, ops_per_second=100))
        vm.set_disk_rate(None)
        with pytest.raises(vmbed.InvalidArgument, match="disk1"):
            vm.set_disk_rate(None, 1)
    layer, raw, qcow2 = tmp_path / "layer", vmbed.DiskFormat.RAW, vmbed.DiskFormat.QCOW2
    vmbed.create_disk(layer, 0, qcow2, (image, raw))
    made = driver()
    made.disks = [vmbed.Disk(layer, format=qcow2)]
    with pytest.raises(vmbed.InvalidArgument, match="backing"):
        host.builder(made).build()
    made.disks = [vmbed.Disk(layer, format=qcow2, data_file=tmp_path / "nothing")]
    with pytest.raises(vmbed.NotFound, match="data_file: .*/nothing"):
        host.builder(made).build()
    made.disks = [vmbed.Disk(layer, format=qcow2, backing=[(image, raw)], readonly=True)]
    # An encrypted image (QEMU's method 1), for a while.
    plain = layer.read_bytes()
    layer.write_bytes(plain[:35] + b"\x01" + plain[36:])
    with pytest.raises(vmbed.InvalidArgument, match="there are no passphrases"):
        host.builder(made).build()
    made.disks[0].passphrases = ["open sesame", "open barley"]
    assert "sesame" not in repr(made)
    host.builder(made).build().close()
    layer.write_bytes(plain)
    made.disks = [vmbed.Disk(layer, format=qcow2, backing=[(image, raw)])]
    steps = [(READ, 4, 1, 0), (WRITE, 4, 1, 9), (FLUSH, 0, 0, 0), (READ, 4, 1, 0)]
    with start(host.builder(made), steps, Port()) as vm:
        assert finish(vm, 4) == [(0, 513, 512 * 8), (0, 1, 0), (0, 1, 0), (0, 513, 512 * 9)]
    assert image.read_bytes()[512 * 4] == 8


def test_a_card_moves_to_another_network() -> None:
    echo, other, said = Echo(), Echo(), Port()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    frame = bytes(12) + bytes([3] * 60)
    steps = [(SEND, 0, 60, 5), (RECEIVE, 0, 0, 0), (TELL, 0, 0, 1), (RECEIVE, 0, 0, 0), (SEND, 0, 61, 5), (TELL, 0, 0, 2), (RECEIVE, 0, 0, 0)]
    far.settimeout(LONG)
    with near, far, start(vmbed.Host().builder(driver(nets=1)).net_backend(0, echo), steps, said) as vm:
        wait_until("the guest's first word", lambda: (0, b"\1") in said.written)
        for nowhere in ({"tap": "vmbednone0"}, {"stream": "/nonexistent"}):
            with pytest.raises(vmbed.NotFound):
                vm.change_net(**nowhere)  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            vm.change_net(tap="a", stream="b")
        vm.change_net(fd=near)
        far.send(frame)
        assert len(far.recv(100)) == 73
        wait_until("its second", lambda: (0, b"\2") in said.written)
        vm.change_net(backend=other)
        port = vmbed.Switch().add_port("p")
        vm.change_net(port=port)
        far.send(frame)
        vm.change_net(fd=near)
        results = finish(vm, len(steps))
        assert results[3][1] == results[6][1] == 72
        assert not vm.exceptions
    os.close(echo.bell)
    os.close(other.bell)


def test_a_network_of_ones_own() -> None:
    # A checksum at 34 + 16, and segments of 1448 bytes behind 54 of headers: TCP over IPv4, and over IPv6.
    headers = [struct.pack("<BBHHHHH", 1, *some, 34, 16, 0) for some in ((0, 0, 0), (1, 54, 1448), (4, 54, 1448))]
    csum, tso4, tso6 = map(behind, headers)
    steps = [csum, (SEND, 0, 200, 5), (RECEIVE, 1, 0, 0), tso4, (SEND, 0, 1990, 5), (RECEIVE, 2, 0, 0), tso6, (SEND, 0, 1990, 5)]
    echo, known = Echo(), vmbed.Offloads
    echo.offloads = known.CSUM | known.TSO4 | known.TSO6
    with start(vmbed.Host().builder(driver(nets=1)).net_backend(0, echo), steps) as vm:
        results = finish(vm, len(steps))
        assert (results[2], results[5]) == ((0, 212, 1000), (0, 2002, 9950))
        assert (echo.headers, echo.taken) == (headers[:2], known.CSUM | known.TSO4)
        for slot, header in enumerate(headers[:2], 1):
            # In one buffer.
            assert vm.read_memory(0x180000 + 2048 * slot, 12) == header[:10] + bytes([1, 0])
        carried = vm.net_statistics()
        assert (carried.tx_frames, carried.tx_dropped, carried.rx_frames) == (2, 1, 2), "its driver knows no TSO6"
        assert not vm.exceptions
    os.close(echo.bell)
    echo = Echo()
    steps = [(SEND, 0, 60, 5), (RECEIVE, 0, 0, 0), (SEND, 0, 99, 5), (SEND, 0, 5, 5)]
    with start(vmbed.Host().builder(driver(nets=1)).net_backend(0, echo), steps) as vm:
        assert finish(vm, len(steps))[1] == (0, 72, 300)
        assert vm.net_statistics() == (1, 60, 0, 1, 60, 2, 0, 0)
        with pytest.raises(vmbed.InvalidArgument, match="net1"):
            vm.net_statistics(1)
        assert not vm.exceptions and echo.headers == [bytes(12)] * len(echo.headers)
    os.close(echo.bell)
    rate = vmbed.Rate(bytes_per_second=1 << 20)
    unplugged = driver()
    unplugged.nets = [vmbed.Net(mtu=9000, speed=1000, link=False, receive_rate=rate, send_rate=rate)]
    other = Echo()
    with start(vmbed.Host().builder(unplugged).net_backend(0, other), [(SEND, 0, 60, 5), (SEND, 0, 99, 5)]) as vm:
        finish(vm, 2)
        assert vm.net_statistics() == (0, 0, 0, 0, 0, 2, 0, 0)
        vm.set_link(True)
        vm.announce_net()
        vm.set_net_rates(None, rate)
        with pytest.raises(vmbed.InvalidArgument, match="net1"):
            vm.set_link(True, 1)
        with pytest.raises(vmbed.InvalidArgument, match="net1"):
            vm.set_net_rates(None, None, 1)
    os.close(other.bell)
    outside = driver()
    outside.nets = [vmbed.Net(stream="/nonexistent/socket")]
    with pytest.raises(vmbed.NotFound, match="net0: connecting to /nonexistent/socket"):
        vmbed.Host().build(outside)
    required = driver()
    required.nets = [vmbed.Net(vhost=vmbed.Vhost.REQUIRED)]
    echo = Echo()
    with pytest.raises(vmbed.InvalidArgument, match="net0: vhost is required"):
        vmbed.Host().builder(required).net_backend(0, echo).build()
    os.close(echo.bell)
    required.nets[0].receive_rate = rate
    with pytest.raises(vmbed.InvalidArgument, match="vhost"):
        required.validate()
    unplugged.nets[0].queues = 17
    with pytest.raises(vmbed.InvalidArgument, match="queues"):
        unplugged.validate()
    unplugged.nets[0].mtu = 67
    with pytest.raises(vmbed.InvalidArgument, match="mtu"):
        unplugged.validate()
    ended = weakref.ref(echo)
    del echo
    gc.collect()
    assert ended() is None, "the library has let go of it"


def test_memory_given_back() -> None:
    config, host = driver(), vmbed.Host()
    with host.builder(config).build() as without:
        with pytest.raises(vmbed.Unsupported, match="no balloon"):
            without.set_balloon(0)
        with pytest.raises(vmbed.Unsupported, match="no balloon"):
            without.balloon_statistics()
    config.balloon = vmbed.Balloon(pci="00:07.0")
    steps = [
        (ACCOUNT, 0, 4, 2),
        (TELL, 0, 0, 1),
        (ASKED, 0, 0, 0),
        (ACCOUNT, 0, 4, 3),
        (TARGET, 128, 0, 0),
        (INFLATE, 768, 128, 9),
        (DEFLATE, 768, 64, 0),
    ]
    said, size = Port(), 128 << 12
    with start(host.builder(config), steps, said) as vm:
        wait_until("the guest's word", lambda: said.written)
        account = vm.guest_memory(LONG)
        assert (account.free, account.total, account.caches) == (3 << 20, 4 << 20, None)
        assert vm.guest_memory() == account, "the last one that came"
        with pytest.raises(vmbed.InvalidArgument, match="balloon0"):
            vm.set_balloon(5 << 20)
        with pytest.raises(vmbed.Unsupported, match="hints"):
            vm.discard_free_pages(LONG)
        vm.set_balloon(size)
        finish(vm, len(steps))
        moved = vm.balloon_statistics()
        assert (moved.target, moved.actual, vm.memory().loaned) == (size, size, size)
        assert host.usage().loaned == size
        assert moved[2:] == (size, size, size // 2, 0, 0, 0, 0, 0)
        told = [event.value for event in vm.events() if event.kind is vmbed.Kind.BALLOON]
        assert told == [size]


def test_a_share_of_the_processors() -> None:
    host = vmbed.Host()
    with pytest.raises(vmbed.InvalidArgument) as wrong:
        vmbed.BareConfig(SPINS, cgroup=vmbed.Cgroup(weight=0, quota=0)).validate()
    assert [field.name for field in wrong.value.fields] == ["cgroup.weight", "cgroup.quota"]
    with pytest.raises(vmbed.NotFound, match="cgroup: /nowhere/vmbed-"):
        host.build(vmbed.BareConfig(SPINS, cgroup=vmbed.Cgroup(parent="/nowhere", weight=300)))
    try:
        with host.build(vmbed.BareConfig(SPINS, cgroup=vmbed.Cgroup(quota=20_000))) as vm:
            thread = vm.vcpu_statistics().thread
            own = Path(f"/proc/self/task/{thread}/cgroup").read_text()
            assert f"/vmbed-{os.getpid()}-" in own
    except vmbed.Error as error:
        assert "cgroup" in str(error), "only where the host delegates one"


def test_a_sandbox_for_its_threads() -> None:
    assert vmbed.has_feature("sandbox")
    host = vmbed.Host()
    with host.build(vmbed.BareConfig(SPINS)) as vm:
        assert vm.sandbox() == (0, 0, 0)
    with host.build(vmbed.BareConfig(SPINS, sandbox=vmbed.Sandbox())) as vm:
        found = vm.sandbox()
        assert (found.threads, found.seccomp) == (1, 1) and found.landlock > 0
        vm.start()
        vm.pause()
        vm.resume()
        assert vm.state is vmbed.State.RUNNING
    inside, outside = (vmbed.BareConfig(SPINS, sandbox=vmbed.Sandbox(vcpus=vcpus)) for vcpus in (True, False))
    with pytest.raises(vmbed.InvalidArgument, match="'port'") as wrong:
        host.builder(inside).pio_device("port", 0x10, 1, Port()).build()
    assert [field.name for field in wrong.value.fields] == ["sandbox.vcpus"]
    with host.builder(outside).pio_device("port", 0x10, 1, Port()).build() as vm:
        assert vm.sandbox() == (0, 0, 0)


def test_memory_of_every_kind() -> None:
    host, size = vmbed.Host(), 4 << 20

    def config(memory: int = size, **backing: Any) -> vmbed.BareConfig:
        return vmbed.BareConfig(SPINS, memory=memory, backing=vmbed.Backing(**backing))

    for kind in (vmbed.BackingKind.MEMFD, vmbed.BackingKind.ANONYMOUS):
        with host.build(config(kind=kind, huge=vmbed.HugePages.NEVER)) as vm:
            before = vm.memory()
            vm.write_memory(0x200000, b"\1" * 8192)
            after = vm.memory()
            assert after.backing == before.backing + 8192 and after.resident == after.backing
            assert after.huge == after.pinned == 0
            vm.start()
        with host.build(config(kind=kind, prefault=True)) as vm:
            assert vm.memory().backing == size
    pool = vmbed.BackingKind.HUGE_2M
    with pytest.raises(vmbed.InvalidArgument) as wrong:
        config(5 << 20, kind=pool, mergeable=True, huge=vmbed.HugePages.ALWAYS).validate()
    assert [field.name for field in wrong.value.fields] == ["memory", "backing.huge", "backing.mergeable"]
    try:
        with host.build(config(kind=pool)) as vm:
            assert vm.memory().pinned == size and vm.memory().huge == vm.memory().backing
    except vmbed.Exhausted as error:
        assert "nr_hugepages" in str(error)
    with pytest.raises(vmbed.Error, match=r"numa_nodes is \[1000\]"):
        host.build(config(numa_nodes=[1000]))


def test_memory_that_is_lost() -> None:
    vmbed.handle_sigbus()
    vmbed.handle_sigbus()
    assert vmbed.has_feature("sigbus")

    def mapped() -> set[int]:
        return {int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines() if "vmbed-guest" in line}

    host, before = vmbed.Host(), mapped()
    with host.build(vmbed.BareConfig(SPINS, memory=4 << 20)) as vm:
        (at,) = mapped() - before
        with host.build(vmbed.BareConfig(SPINS, memory=4 << 20)) as other, tempfile.TemporaryFile() as nothing:
            other.start()
            # Nothing stands behind a page of it any more.
            mmap = ctypes.CDLL(None).mmap
            mmap.restype, mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
            assert mmap(at + 0x200000, 4096, 3, 0x11, nothing.fileno(), 0) == at + 0x200000
            vm.start()
            with pytest.raises(vmbed.Exhausted, match="guest memory at 0x200000 is lost"):
                vm.read_memory(0x1FFFF0, 32)
            assert vm.wait(60) is vmbed.Cause.DEVICE_FAULT
            other.write_memory(0x200000, b"still there")
            assert other.state is vmbed.State.RUNNING


def test_cards_on_a_switch() -> None:
    host, switch = vmbed.Host(), vmbed.Switch(addresses=100)
    ports = [switch.add_port(name, vmbed.PortOptions(vlan=vlan)) for name, vlan in [("first", 10), ("second", 10), ("other", 20)]]
    first, second, other = ports
    assert first.name == "first"
    listens = [(TELL, 0, 0, 1), (RECEIVE, 0, 0, 0), (SEND, 2, 70, 4), (TELL, 0, 0, 2)]
    heard, outside_heard = Port(), Port()
    with tempfile.TemporaryFile() as file, switch.capture(file, [first, second]) as capture:
        with (
            start(host.builder(driver(nets=1)).net_port(0, second), listens, heard) as answers,
            start(host.builder(driver(nets=1)).net_port(0, other), listens, outside_heard) as outside,
        ):
            wait_until("both to listen", lambda: heard.written and outside_heard.written)
            with start(host.builder(driver(nets=1)).net_port(0, first), [(SEND, 0xFF, 60, 2), (RECEIVE, 0, 0, 0)]) as asks:
                assert finish(asks, 2)[1] == (0, 12 + 70, 6 * 2 + 64 * 4)
                assert first.statistics().addresses == 1
            assert finish(answers, 2)[1] == (0, 12 + 60, 6 * 0xFF + 54 * 2)
            outside.stop()
            assert outside.net_statistics().rx_frames == 0
        one, two, three = (port.statistics() for port in ports)
        assert (one.received.frames, one.sent, two.sent.bytes, three.sent.frames) == (1, (1, 70), 60, 0)
        assert (one.addresses, one.drops) == (0, {}), "forgotten with its VM"
        assert capture.finish() == (4, 0)
        file.seek(0)
        question, answer = bytes([0xFF] * 6 + [2] * 54), bytes([2] * 6 + [4] * 64)
        reader: Any = RawPcapNgReader
        packets = [(data, meta.ifname) for data, meta in reader(file)]
        assert packets == [(question, b"first"), (question, b"second"), (answer, b"second"), (answer, b"first")]


def test_a_switch_drops_and_says_why() -> None:
    host, switch = vmbed.Host(), vmbed.Switch()
    guard = vmbed.PortOptions(guard_macs=["04:04:04:04:04:04"], guard_addresses=[])
    guarded, opened, monitor = switch.add_port("guarded", guard), switch.add_port("open"), switch.add_port("monitor")
    guarded.mirror_to(monitor)
    with pytest.raises(vmbed.InvalidArgument, match="itself"):
        guarded.mirror_to(guarded)
    heard, seen = Port(), Port()
    made = host.builder(driver(nets=1)).net_port(0, opened)
    with start(made, [(TELL, 0, 0, 1), (RECEIVE, 0, 0, 0)], heard) as hears:
        made = host.builder(driver(nets=1)).net_port(0, monitor)
        with start(made, [(TELL, 0, 0, 1), (RECEIVE, 0, 0, 0), (RECEIVE, 0, 0, 0)], seen) as sees:
            wait_until("both to listen", lambda: heard.written and seen.written)
            made = host.builder(driver(nets=1)).net_port(0, guarded)
            with start(made, [(SEND, 0xFF, 60, 2), (SEND, 0xFF, 64, 4)]) as lies:
                finish(lies, 2)
            assert finish(hears, 2)[1][1] == 12 + 64
            assert finish(sees, 3)[2][1] == 12 + 64
        with pytest.raises(vmbed.Busy, match="net0"):
            host.builder(driver(nets=1)).net_port(0, opened).build()
    assert guarded.statistics().drops == {"spoofed-mac": 1}
    assert monitor.statistics().mirrored.frames == 2
    guarded.mirror_to(None)
    host.builder(driver(nets=1)).net_port(0, opened).build().close()
    with pytest.raises(vmbed.InvalidArgument) as wrong:
        opened.set_options(vmbed.PortOptions(trunk=[10, 4095]))
    assert [field.name for field in wrong.value.fields] == ["vlan.vlans"]
    limits = vmbed.PortOptions(trunk=[10, 20], isolated=True, storm=vmbed.UNLIMITED_RATE, rate_in=vmbed.Rate(1000))
    opened.set_options(limits)
    opened.remove()
    with pytest.raises(vmbed.NotFound, match="open"):
        opened.set_options(limits)
    with pytest.raises(vmbed.NotFound, match="open"):
        host.builder(driver(nets=1)).net_port(0, opened).build()
    with pytest.raises(vmbed.NotFound, match="vmbed-no-tap"):
        switch.add_tap("uplink", "vmbed-no-tap")
    with pytest.raises(vmbed.NotFound, match="nobody listens"):
        switch.add_stream("uplink", "/nonexistent/passt.socket")
    with open("/dev/null") as null, pytest.raises(vmbed.InvalidArgument, match="uplink"):
        switch.add_fd("uplink", null)
    # From one socket to another, of the two kinds.
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket.socket(socket.AF_UNIX) as listener, near, far, tempfile.TemporaryDirectory() as directory:
        listener.bind(f"{directory}/stream")
        listener.listen()
        switch.add_fd("messages", near, vmbed.PortOptions(vlan=30))
        switch.add_stream("stream", f"{directory}/stream", vmbed.PortOptions(vlan=30))
        listener.settimeout(LONG)
        stream = listener.accept()[0]
        with stream:
            stream.settimeout(LONG)
            frame = b"\xff" * 6 + b"\x02\0\0\0\0\x31" + bytes(50)
            far.send(bytes(12) + frame)
            assert stream.recv(4 + len(frame), socket.MSG_WAITALL) == len(frame).to_bytes(4, "big") + frame


def test_what_is_done_when_memory_gets_short() -> None:
    always, host = 1 << 60, vmbed.Host()
    nothing = {"balloon_below": 0, "page_out_below": 0, "interval": 0.02}

    def told(vm: vmbed.Vm) -> list[vmbed.Stage]:
        events, found = vm.events(), []
        while event := events.next(0):
            assert (event.pressure is not None) == (event.kind is vmbed.Kind.MEMORY_PRESSURE)
            found += [event.pressure.stage] if event.pressure else []
        return found

    with pytest.raises(vmbed.InvalidArgument, match="interval"):
        host.set_reclaim(vmbed.Reclaim(idle_tax=1.0, interval=0.001))
    config = driver()
    config.balloon = vmbed.Balloon()
    steps = [(ACCOUNT, 0, 4, 2), (ASKED, 0, 0, 0), (TARGET, 384, 0, 0)]
    with start(host.builder(config), steps) as vm:
        host.set_reclaim(vmbed.Reclaim(**{**nothing, "balloon_below": always}))  # type: ignore[arg-type]
        finish(vm, len(steps))
        assert vm.balloon_statistics().target == 384 << 12
        host.set_reclaim(None)
        assert vm.balloon_statistics().target == 0
        assert told(vm) == [vmbed.Stage.BALLOON]
    with host.builder(vmbed.BareConfig(SPINS)).build() as vm:
        vm.start()
        required = vmbed.ReclaimSandbox.REQUIRED
        host.set_reclaim(vmbed.Reclaim(**{**nothing, "pause_below": always}, pause_deadline=600, sandbox=required))  # type: ignore[arg-type]
        wait_until("the VM to be paused", lambda: vm.state is vmbed.State.PAUSED)
        assert (report := host.reclaim_sandbox()).threads == report.seccomp == 1 and report.landlock > 0
        host.set_reclaim(None)
        assert not any(host.reclaim_sandbox())
        wait_until("the VM to go on", lambda: vm.state is vmbed.State.RUNNING)
        assert told(vm) == [vmbed.Stage.PAUSE]
        with host.builder(vmbed.BareConfig(SPINS, victim=1)).build() as victim:
            victim.start()
            host.set_reclaim(vmbed.Reclaim(**{**nothing, "stop_below": always}))  # type: ignore[arg-type]
            assert victim.wait(LONG) is vmbed.Cause.MEMORY_PRESSURE
            wait_until("its memory to be free", lambda: victim.memory().backing == 0)
            assert told(victim) == [vmbed.Stage.STOP] and vm.state is vmbed.State.RUNNING
        host.set_reclaim(None)


def test_disks_and_cards_by_descriptor() -> None:
    host = vmbed.Host()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.settimeout(LONG)
    steps = [(WRITE, 3, 2, 7), (READ, 3, 2, 0), (SEND, 0, 60, 5), (RECEIVE, 0, 0, 0)]
    with tempfile.TemporaryFile() as file, far:
        file.truncate(512 * 1024)
        with near:
            made = host.builder(driver(1, 1)).disk_fd(0, file).net_fd(0, near)
        with start(made, steps) as vm:
            assert len(far.recv(100)) == 72
            far.send(bytes(12) + bytes([9]) * 40)
            assert finish(vm, 4) == [(0, 1, 0), (0, 1025, SUM), (0, 0, 0), (0, 52, 360)]
        file.seek(1536)
        assert file.read(1024) == bytes([7]) * 512 + bytes([8]) * 512
        for made, text in [
            (host.builder(driver(disks=1)), r"disks\[0\].path"),
            (host.builder(driver(nets=1)), r"nets\[0\].tap"),
            (host.builder(driver()).disk_fd(0, file), r"disks\[0\]"),
            (host.builder(driver(disks=1)).disk_fd(0, far), "disk0: fd"),
            (host.builder(driver(nets=1)).net_fd(0, file), "net0"),
        ]:
            with pytest.raises(vmbed.InvalidArgument, match=text):
                made.build()


def _in_a_namespace() -> None:
    """Another thread's network: what is made here is seen nowhere else."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x4000_0000) == 0, os.strerror(ctypes.get_errno())

    def there(name: str) -> bool:
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        return any(line.split(":")[0].strip() == name for line in lines)

    with vmbed.Wiring() as wiring:
        wiring.add_bridge("br0", mac="02:00:00:00:00:01", mtu=1400)
        wiring.add_bridge("br1")
        wiring.add_tap("vnet0", bridge="br0", multi_queue=True, owner=65534, persistent=True)
        wiring.add_tap("vnet1")
        wiring.attach("vnet1", "br1")
        assert all(there(name) for name in ["br0", "br1", "vnet0", "vnet1"])
        with pytest.raises(vmbed.Busy, match="bridge 'br0'"):
            wiring.add_bridge("br0")
        with pytest.raises(vmbed.InvalidState, match="VLANs"):
            wiring.add_tap("vnet2", bridge="br0", vlan=10)
        with pytest.raises(vmbed.InvalidArgument, match="VLAN 4095"):
            wiring.add_tap("vnet2", bridge="br0", trunk=[4095])
        with pytest.raises(vmbed.InvalidState, match="VLANs"):
            wiring.set_vlans("vnet0", trunk=[10, 20])
        with pytest.raises(vmbed.NotFound, match="'eth7'"):
            wiring.add_vlan("eth7.10", "eth7", 10)
        with pytest.raises(vmbed.InvalidState, match="port of 'br1'"):
            wiring.attach("vnet1", "br0")
        with pytest.raises(vmbed.InvalidArgument, match="there before"):
            wiring.remove("lo")
        assert not there("br2") and not there("vnet2")
        wiring.detach("vnet1")
        wiring.set_mtu("vnet1", 9000)
        wiring.set_mac("vnet1", "02:00:00:00:00:02")
        wiring.set_mtu("lo", 2000)
        wiring.set_up("lo")
        wiring.remove("br1")
        assert not there("br1")
    assert not there("br0") and there("vnet0") and not there("vnet1")
    wiring.add_bridge("br0")
    del wiring
    assert not there("br0")


def test_the_hosts_side_of_a_network() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as one:
        one.submit(_in_a_namespace).result(LONG)

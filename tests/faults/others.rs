//! What else there is to live with. The test's own calls are made aside, where they neither count nor fail.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vmbed::{
    BackingKind, BalloonConfig, BareBoot, BridgeOptions, Bytes, CacheMode, ConsoleKind, CpuMode, DiskConfig,
    DiskEngine, DiskFormat, Dispatcher, Host, HostConfig, HugePages, LinuxBoot, NetConfig, Network, Platform,
    PortOptions, ReclaimConfig, ReclaimSandbox, SandboxConfig, StopCause, Switch, TapOptions, Vm, VmBuilder,
    VmConfig, Wiring,
};

use crate::driven::{FRAME, Far, SENT, SIZE, arrival};
use crate::guests::{self, Op, script};
use crate::life::{FAR, Life, SERVER, Stage, Told, aside, end_of, exercise, expect, keep, lock, remove};
use crate::wire;

pub type Step = (Op, u32, u32, u32);

/// What some of them begin with.
pub fn prepare(stage: &Stage) {
    std::fs::write(stage.file("kernel"), crate::elf::kernel(&ECHO)).unwrap();
    std::fs::write(stage.file("initrd"), [7; 5000]).unwrap();
}

/// Looks 30,000 times whether something was typed, sends that back, and resets the machine.
const ECHO: [u8; 32] = [
    0xb9, 0x30, 0x75, 0x00, 0x00, // mov ecx, 30000
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, 0xa8, 0x01, 0x75, 0x04, // in al, dx; test al, 1; jnz +4
    0xe2, 0xf9, 0xeb, 0x06, // loop -7; jmp +6
    0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, // mov dx, 0x3f8; in al, dx; out dx, al
    0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfa, // mov al, 0xfe; out 0x64, al; jmp -6
    0x90, 0x90,
];

/// A pipe: what is read from, and what is written to.
fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    aside(|| std::io::pipe().unwrap())
}

/// What came through it, all of whose writers are gone.
pub fn heard(mut pipe: impl Read + Send + 'static) -> Vec<u8> {
    aside(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Has nothing of it left before what was tried is answered.
pub fn end(host: Host, vm: Vm, ended: vmbed::Result<impl Sized>) -> vmbed::Result<()> {
    let stopped = vm.stop();
    drop(vm);
    drop(host);
    ended?;
    stopped.map(drop)
}

pub fn linux(stage: &Stage) -> vmbed::Result<()> {
    let (input, mut typed) = pipe();
    let (listens, output) = pipe();
    let typed = aside(move || typed.write_all(b"typed").map(|()| typed).unwrap());
    let lived = boot(stage, &input, &output);
    aside(move || drop((input, output, typed)));
    let echo = heard(listens);
    expect(echo == b"t", "what was typed is sent back");
    lived
}

fn boot(stage: &Stage, input: &std::io::PipeReader, output: &std::io::PipeWriter) -> vmbed::Result<()> {
    let host = Host::open()?;
    let boot = LinuxBoot::new(stage.file("kernel")).initrd(stage.file("initrd")).cmdline("quiet");
    let mut config = VmConfig::linux(boot);
    config.memory = Bytes::mib(32);
    config.cpus.affinity = vec![vec![a_processor()]];
    let vm = host.builder(config).console_input(input)?.console_output(output)?.build()?;
    vm.start()?;
    let ended = exercise(&vm);
    end(host, vm, ended)
}

/// One that this process may run on.
fn a_processor() -> u32 {
    aside(|| {
        let set = rustix::thread::sched_getaffinity(None).unwrap();
        (0..1024).find(|cpu| set.is_set(*cpu)).unwrap() as u32
    })
}

pub fn console(stage: &Stage) -> vmbed::Result<()> {
    let (input, mut typed) = pipe();
    let (listens, output) = pipe();
    let typed = aside(move || typed.write_all(b"typed").map(|()| typed).unwrap());
    let lived = turn(stage, &input, &output);
    aside(move || drop((input, output, typed)));
    expect(heard(listens) == [b'x'; 16], "what was printed");
    lived
}

/// On a loop of the caller's.
fn turn(stage: &Stage, input: &std::io::PipeReader, output: &std::io::PipeWriter) -> vmbed::Result<()> {
    let dispatcher = Dispatcher::new()?;
    let host = Host::open()?;
    let mut config = stage.pc();
    (config.console, config.rng) = (ConsoleKind::Virtio, true);
    let builder = host.builder(config).dispatcher(&dispatcher);
    let vm = ready(builder.console_input(input)?.console_output(output)?, &PRINTS)?;
    vm.start()?;
    let (begin, mut told) = (Instant::now(), Told::default());
    let turned = loop {
        let turned = dispatcher.dispatch();
        told.hear(&vm);
        if told.has_ended() || turned.is_err() {
            break turned.and_then(|()| dispatcher.dispatch());
        }
        if begin.elapsed() > told.patience() {
            told.excuse(&vm);
            break Ok(());
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    end(host, vm, turned)
}

const PRINTS: [Step; 2] = [(Op::Random, 0, 64, 0), (Op::Print, 0, 16, b'x' as u32)];

/// With that script.
pub fn ready(builder: VmBuilder, steps: &[Step]) -> vmbed::Result<Vm> {
    let vm = builder.pio_doorbell("said", guests::SAY, 1).build()?;
    vm.write_memory(guests::SCRIPT, &script(steps))?;
    Ok(vm)
}

const WRITES: [Step; 3] = [(Op::Write, 3, 2, 7), (Op::Flush, 0, 0, 0), (Op::Read, 3, 2, 0)];

pub fn memory(stage: &Stage, works: bool) -> vmbed::Result<()> {
    // Its handler stays.
    if works {
        vmbed::handle_sigbus()?;
        aside(keep);
    }
    let (made, saved) = (stage.file("made"), stage.file("saved"));
    let lived = remember(stage);
    remove(&made);
    remove(&saved);
    lived
}

fn remember(stage: &Stage) -> vmbed::Result<()> {
    vmbed::create_disk(stage.file("made"), DiskFormat::Raw, Bytes(SIZE), None)?;
    let host = Host::open()?;
    no_pool(stage, &host);
    let mut reclaim = ReclaimConfig::default();
    (reclaim.balloon_below, reclaim.page_out_below) = (Bytes(u64::MAX / 4), Bytes(u64::MAX / 4));
    (reclaim.interval, reclaim.sandbox) = (Duration::from_millis(10), ReclaimSandbox::IfPresent);
    host.set_reclaim(Some(&reclaim))?;
    let mut config = stage.pc();
    (config.backing.kind, config.backing.huge) = (BackingKind::Anonymous, HugePages::Always);
    (config.backing.prefault, config.backing.mergeable) = (true, true);
    config.backing.numa_nodes = vec![0];
    let mut disk = DiskConfig::new(stage.file("made"));
    (disk.engine, disk.cache) = (DiskEngine::Sync, CacheMode::Direct);
    config.disks = vec![disk];
    config.balloon = Some(BalloonConfig::default());
    let mut steps = WRITES.to_vec();
    steps.extend([(Op::Account, 0, 4, 2), (Op::Inflate, 768, 1, 9)]);
    let vm = ready(host.builder(config), &steps)?;
    let lived = vm.start().and_then(|()| {
        vm.resize_disk(0, Bytes(2 * SIZE))?;
        vm.save_disk(0, stage.file("ended"), DiskFormat::Raw, |_, _| false)?;
        vm.save_disk(0, stage.file("saved"), DiskFormat::Qcow2, |_, _| true)?;
        exercise(&vm)?;
        host.set_reclaim(None)
    });
    let _ = host.usage();
    end(host, vm, lived)
}

/// Asks for huge pages of a pool that has few or none.
fn no_pool(stage: &Stage, host: &Host) {
    let mut config = stage.pc();
    (config.backing.kind, config.memory) = (BackingKind::Huge1G, Bytes::gib(1));
    let _ = host.build(config);
}

/// A program's first VM: two processors, of a host that keeps another one for others.
pub fn cold() -> vmbed::Result<()> {
    let mut config = HostConfig::default();
    config.dedicated_cpus = vec![a_processor()];
    let host = Host::open_with(config)?;
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, SPINS));
    (config.platform, config.cpus.count) = (Platform::Pc, 2);
    let vm = host.build(config)?;
    let ended = vm.start().and_then(|()| vm.stop());
    end(host, vm, ended)
}

/// cli; jmp $
const SPINS: [u8; 3] = [0xfa, 0xeb, 0xfe];

pub fn wired(stage: &Stage) -> vmbed::Result<()> {
    let wiring = Wiring::new()?;
    let lived = wire_up(stage, &wiring);
    if lived.is_err() {
        // The answer to what has failed is not this one's.
        let _ = wiring.set_mtu("lo", 1500);
        return lived;
    }
    wiring.release()
}

fn wire_up(stage: &Stage, wiring: &Wiring) -> vmbed::Result<()> {
    let mut bridge = BridgeOptions::default();
    (bridge.mac, bridge.mtu) = (Some("02:00:00:00:00:01".parse()?), Some(1400));
    wiring.add_bridge("br0", &bridge)?;
    let mut tap = TapOptions::on("br0");
    (tap.multi_queue, tap.owner, tap.group) = (true, Some(0), Some(0));
    wiring.add_tap("vnet0", &tap)?;
    wiring.set_mtu("vnet0", 1300)?;
    let lived = plug_in(stage);
    *lock(&FAR) = None;
    lived?;
    wiring.detach("vnet0")
}

/// Two cards, one of them on a queue that somebody else has opened.
fn plug_in(stage: &Stage) -> vmbed::Result<()> {
    let (adopted, far) = aside(|| (wire::tap("vnet1"), wire::packets("vnet0")));
    let host = Host::open()?;
    let mut config = stage.pc();
    let mut card = NetConfig::tap("vnet0");
    card.queues = 2;
    config.nets = vec![card, NetConfig::attached()];
    let steps = [(Op::Send, 0, FRAME as u32, SENT.into()), (Op::Receive, 0, 0, 0)];
    let vm = ready(host.builder(config).net_fd(1, adopted)?, &steps)?;
    *lock(&FAR) = Some(Far::Packets(far));
    let lived = vm.start().and_then(|()| exercise(&vm));
    end(host, vm, lived)
}

/// A network in user space: hangs up on its first guest when a frame has come from there, and has frames for the others.
pub struct Server {
    listener: UnixListener,
    /// In how many turns (2 ms) it hangs up where there is no frame.
    hangs_up: Option<u32>,
    guests: Vec<UnixStream>,
}

/// Waits until it has a guest that it has not hung up on, whose VM may have ended by then: longer than it waits for the first frame, which a fault may lose.
fn is_back() {
    for _ in 0..500 {
        if lock(&SERVER).as_ref().is_some_and(|server| server.hangs_up.is_none() && !server.guests.is_empty())
        {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Server {
    /// Begins one, in that file.
    fn begin(stage: &Stage) {
        let path = stage.file("stream");
        aside(move || {
            let listener = UnixListener::bind(path).unwrap();
            listener.set_nonblocking(true).unwrap();
            *lock(&SERVER) = Some(Self { listener, hangs_up: Some(1000), guests: Vec::new() });
        });
    }

    fn end(stage: &Stage) {
        aside(|| drop(lock(&SERVER).take()));
        remove(&stage.file("stream"));
    }

    pub fn turn(&mut self) {
        if let Ok((guest, _)) = self.listener.accept() {
            guest.set_nonblocking(true).unwrap();
            self.guests.push(guest);
        }
        if let Some(turns) = &mut self.hangs_up {
            let sent =
                self.guests.iter_mut().any(|guest| guest.read(&mut [0; 2000]).is_ok_and(|count| count > 0));
            *turns = if sent { 0 } else { *turns - u32::from(!self.guests.is_empty()) };
            if *turns == 0 {
                self.guests.clear();
                self.hangs_up = None;
            }
            return;
        }
        let frame = [&[0, 0, 0, FRAME as u8][..], &arrival()].concat();
        self.guests.retain_mut(|guest| match guest.write(&frame) {
            Ok(count) => count == frame.len(),
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        });
    }
}

pub fn switched(stage: &Stage) -> vmbed::Result<()> {
    Server::begin(stage);
    let captured = stage.file("captured");
    let file = aside(|| File::create(captured).unwrap());
    let lived = join(stage, file);
    *lock(&FAR) = None;
    Server::end(stage);
    lived
}

fn join(stage: &Stage, file: File) -> vmbed::Result<()> {
    let (near, far) = aside(|| Far::pair(Life::Switched).unwrap());
    let switch = Switch::new(&Default::default())?;
    switch.add_fd("messages", near, &PortOptions::default())?;
    switch.add_stream("stream", stage.file("stream"), &PortOptions::default())?;
    let port = switch.add_port("guest", &PortOptions::default())?;
    strange(stage, &switch)?;
    let capture = switch.capture(&[], BufWriter::new(file))?;
    let host = Host::open()?;
    let mut config = stage.pc();
    config.nets = vec![NetConfig::attached()];
    let steps = [(Op::Send, 0xff, FRAME as u32, SENT.into()), (Op::Receive, 0, 0, 0)];
    let vm = ready(host.builder(config).net_port(0, &port), &steps)?;
    *lock(&FAR) = Some(far);
    let lived = vm.start().and_then(|()| exercise(&vm));
    is_back();
    end(host, vm, lived)?;
    capture.finish().map(drop)
}

/// What passes through a port of another switch is not told, into a file that has something to be written already.
fn strange(stage: &Stage, switch: &Switch) -> vmbed::Result<()> {
    let other = Switch::new(&Default::default())?;
    let port = other.add_port("strange", &PortOptions::default())?;
    let strange = stage.file("strange");
    let mut output = BufWriter::new(aside(|| File::create(strange).unwrap()));
    output.write_all(b"more").expect("there is room for that");
    expect(switch.capture(&[port], output).is_err(), "that port is of another switch");
    Ok(())
}

pub fn sandboxed(stage: &Stage) -> vmbed::Result<()> {
    Server::begin(stage);
    let lived = confine(stage);
    *lock(&FAR) = None;
    Server::end(stage);
    lived
}

fn confine(stage: &Stage) -> vmbed::Result<()> {
    let host = Host::open()?;
    let mut config = stage.pc();
    let mut sandbox = SandboxConfig::default();
    // Filters of calls that somebody hears of are one to a thread, and these threads have the test's.
    sandbox.best_effort = true;
    config.sandbox = Some(sandbox);
    let mut disk = DiskConfig::new(stage.disk());
    (disk.engine, disk.cache) = (DiskEngine::Sync, CacheMode::Writethrough);
    config.disks = vec![disk];
    config.nets = vec![NetConfig::stream(stage.file("stream"))];
    let mut steps = WRITES.to_vec();
    // The card watches its network by the time that it has a frame for it.
    steps.extend([(Op::Room, 0, 0, 0), (Op::Send, 0, FRAME as u32, SENT.into()), (Op::Receive, 0, 1, 0)]);
    let vm = ready(host.builder(config), &steps)?;
    let lived = vm.start().and_then(|()| {
        end_of(&vm)?;
        // Where it came back, it has another network now.
        let (near, far) = aside(|| Far::pair(Life::Sandboxed).unwrap());
        *lock(&FAR) = Some(far);
        vm.set_link(0, false)?;
        vm.change_net(0, Network::Fd(near))?;
        vm.set_link(0, true)?;
        vm.announce_net(0)
    });
    end(host, vm, lived)
}

/// A guest that never ends, whose threads are refused calls (`notices.rs`).
pub fn refused(works: bool) -> vmbed::Result<()> {
    let host = Host::open()?;
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, SPINS));
    config.sandbox = Some(SandboxConfig::default());
    let vm = host.build(config)?;
    let lived = vm.start().and_then(|()| if works { end_of(&vm) } else { Ok(None) });
    // Not for the first one.
    let is_it =
        matches!(&lived, Ok(Some(StopCause::SandboxViolation { call, .. })) if call.starts_with("socket"));
    expect(is_it || !works, "the VM is ended for the second call");
    end(host, vm, lived)
}

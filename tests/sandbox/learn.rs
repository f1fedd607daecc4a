//! What threads call in runs of everything that a sandbox allows: each call is on the list of its thread, and each entry of the
//! lists is needed by one.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::internals::sandbox;
use vmbed::{
    BackingKind, BareBoot, Boot, Bytes, CacheMode, CpuMode, DiskConfig, DiskEngine, DiskFormat, Event,
    EventKind, NetConfig, Network, Platform, RateLimit, StopCause, Switch, VmState, create_disk,
};

use crate::guests::Op;
use crate::life::{LONG, SIZE, SPINS, Scratch, bare, ends, hear, host, pc, start, wait_until};
use crate::{part, trial};

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("every_call_is_on_a_list_and_every_entry_is_needed", lists));
    trials.push(trial("networks_that_went_away_are_opened_again_outside", || drop(part("again"))));
}

/// Networks that went away are opened again for threads that may open nothing.
pub fn again() {
    taps();
    streams();
}

fn lists() {
    // An entry is needed where either of the processes needs it.
    let said = [part("learn"), part("one arena")];
    let unneeded: Vec<Vec<&str>> = said
        .iter()
        .map(|said| said.lines().filter(|line| line.starts_with("not needed")).collect())
        .collect();
    let never: Vec<_> = unneeded[0].iter().filter(|line| unneeded[1].contains(line)).collect();
    let wrong = said.iter().any(|said| !said.contains("all seen") || said.contains("WRONG"));
    assert!(never.is_empty() && !wrong, "{never:#?}\n{}", said.join("\n"));
}

/// In a process of its own, where every VM learns.
pub fn inside() {
    learns(&[
        spinning,
        halting,
        console,
        disks,
        resets,
        saves,
        limits,
        cards,
        taps,
        streams,
        balloon,
        allocations,
        crate::rare::everything,
        crate::reclaim::everything,
    ]);
}

/// In another, whose threads have one arena of the C library's together.
pub fn one_arena() {
    learns(&[crate::rare::arenas]);
}

fn learns(runs: &[fn()]) {
    sandbox::learn();
    for run in runs {
        // What the others show is told all the same.
        if std::panic::catch_unwind(run).is_err() {
            println!("WRONG: one of the runs failed");
        }
    }
    for line in sandbox::unlisted() {
        println!("WRONG: on no list: {line}");
    }
    for line in sandbox::unneeded() {
        println!("not needed: {line}");
    }
    for line in sandbox::shown() {
        println!("seen all the same: {line}");
    }
    println!("all seen");
}

/// Four vCPUs that are kicked.
fn spinning() {
    let mut config = bare(&SPINS);
    config.cpus.count = 4;
    let vm = host().build(config).unwrap();
    vm.start().unwrap();
    for _ in 0..20 {
        vm.pause().unwrap();
        vm.resume().unwrap();
    }
    assert!(vm.vcpu_statistics(0).is_ok());
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

/// Copies of a disk that are ended while the guest's changes have more copied.
fn saves() {
    const LARGE: u32 = 64 << 20;
    let image = Scratch::new("large");
    std::fs::File::create(&image.0).unwrap().set_len(LARGE.into()).unwrap();
    let copy = image.0.with_extension("copy");
    let mut config = pc();
    config.disks = vec![DiskConfig::new(&image.0)];
    let mut steps = vec![(Op::Discard, 0, LARGE / 512, 0); 60];
    steps.extend([(Op::Flush, 0, 0, 0), (Op::Tell, 0, 0, 1)]);
    let vm = start(host().builder(config), &steps);
    let (mut saved, end) = (0, Instant::now() + LONG);
    while vm.disk_statistics(0).unwrap().flushes == 0 {
        assert!(Instant::now() < end, "waited a minute for the guest's flush: {vm:?}");
        if !matches!(vm.state(), VmState::Running) {
            break;
        }
        // It may have ended meanwhile.
        if let Ok(complete) = vm.save_disk(0, &copy, DiskFormat::Raw, |_, _| false) {
            assert!(!complete && !copy.exists(), "it is gone at once");
            saved += 1;
        }
    }
    assert!(saved > 0);
    assert_eq!(ends(&vm), StopCause::GuestReset);
}

/// The last vCPU ends the VM, while another spins: it kicks that.
fn halting() {
    // lidt [0x1100] with limit 0; ud2
    let mut config = bare(&[]);
    let code = [0x0f, 0x01, 0x1d, 0x00, 0x11, 0, 0, 0x0f, 0x0b];
    let mut boot = BareBoot::new(CpuMode::Protected, 0x1000, code);
    boot.images.push((0x1100, vec![0; 6]));
    (config.boot, config.cpus.count) = (Boot::Bare(boot), 3);
    let vm = host().build(config).unwrap();
    vm.start().unwrap();
    assert_eq!(ends(&vm), StopCause::TripleFault);
}

fn console() {
    // mov dx, 0x3f8; in al, dx; mov al, 'x'; out dx, al; jmp to the in
    let code = [0xba, 0xf8, 0x03, 0xec, 0xb0, b'x', 0xee, 0xeb, 0xfa];
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    let (out, to) = std::io::pipe().unwrap();
    for socket in [true, false] {
        let mut config = bare(&code);
        (config.platform, config.rng) = (Platform::Pc, true);
        let builder = host().builder(config).console_input(&ours).unwrap();
        let vm = if socket { builder.console_output(&ours) } else { builder.console_output(&to) };
        let vm = vm.unwrap().build().unwrap();
        vm.start().unwrap();
        theirs.write_all(b"typed").unwrap();
        let mut bytes = [0; 4096];
        let read = if socket { theirs.read_exact(&mut bytes) } else { (&out).read_exact(&mut bytes) };
        read.unwrap();
        // Nobody reads: it waits for room.
        std::thread::sleep(Duration::from_millis(50));
        vm.stop().unwrap();
    }
}

fn disks() {
    let steps = [
        (Op::Write, 3, 2, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Read, 3, 2, 0),
        (Op::Zero, 8, 8, 1),
        (Op::Zero, 24, 8, 0),
        (Op::Discard, 16, 8, 0),
        (Op::Reset, 0, 0, 0),
        (Op::Tell, 0, 0, 1),
        (Op::Write, 64, 8, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Read, 3, 2, 0),
    ];
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        for engine in [DiskEngine::Sync, DiskEngine::IoUring] {
            for cache in [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Direct] {
                let image = Scratch::disk();
                let mut config = pc();
                let mut disk = image.config();
                if format == DiskFormat::Qcow2 {
                    std::fs::remove_file(&image.0).unwrap();
                    create_disk(&image.0, DiskFormat::Qcow2, Bytes(SIZE), None).unwrap();
                    disk = DiskConfig::qcow2(&image.0);
                }
                (disk.engine, disk.cache) = (engine, cache);
                config.disks = vec![disk];
                let vm = start(host().builder(config), &steps);
                hear(&vm, 1);
                let _ = vm.pause().and_then(|()| vm.resume());
                assert_eq!(ends(&vm), StopCause::GuestReset);
            }
        }
    }
}

/// Drivers that reset a disk amid requests, and amid an image's growth. How much is under way then is a matter of luck: rare.rs
/// has one that is not.
fn resets() {
    let mut steps = Vec::new();
    for round in 0..6 {
        steps.extend([0, 1, 2, 3].map(|at| (Op::BeginWrite, (round * 4 + at) * 8, 8, 7)));
        steps.push((Op::Reset, 0, 0, 0));
    }
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        for engine in [DiskEngine::Sync, DiskEngine::IoUring] {
            for cache in [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Direct] {
                let image = Scratch::new("reset");
                create_disk(&image.0, format, Bytes(SIZE), None).unwrap();
                let mut disk = image.config();
                (disk.format, disk.engine, disk.cache) = (format, engine, cache);
                let mut config = pc();
                config.disks = vec![disk];
                let vm = start(host().builder(config), &steps);
                assert_eq!(ends(&vm), StopCause::GuestReset);
            }
        }
    }
}

/// Requests and frames wait for their turn.
fn limits() {
    let image = Scratch::disk();
    let (near, far) = UnixDatagram::pair().unwrap();
    let mut config = pc();
    config.disks = vec![image.config()];
    config.nets = vec![NetConfig::attached()];
    let steps: Vec<_> = (0..4).flat_map(|i| [(Op::Write, i, 1, 7), (Op::Send, 0, 60, 5)]).collect();
    let mut rate = RateLimit::default();
    (rate.ops_per_second, rate.ops_burst) = (100, 1);
    config.disks[0].rate = rate;
    config.nets[0].send_rate = rate;
    let vm = start(host().builder(config).net_fd(0, near).unwrap(), &steps);
    assert_eq!(ends(&vm), StopCause::GuestReset);
    drop(far);
}

fn cards() {
    let (near, far) = UnixDatagram::pair().unwrap();
    let mut config = pc();
    config.nets = vec![NetConfig::attached()];
    let steps = [(Op::Send, 0, 60, 5), (Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0)];
    let vm = start(host().builder(config.clone()).net_fd(0, near).unwrap(), &steps);
    hear(&vm, 1);
    let (other, end) = UnixDatagram::pair().unwrap();
    vm.change_net(0, Network::Fd(other.into())).unwrap();
    vm.set_link(0, false).unwrap();
    vm.set_link(0, true).unwrap();
    drop(far);
    end.send(&[0; 100]).unwrap();
    assert_eq!(ends(&vm), StopCause::GuestReset);
    let switch = Switch::new(&Default::default()).unwrap();
    let port = switch.add_port("one", &Default::default()).unwrap();
    let vm = start(host().builder(config).net_port(0, &port), &[(Op::Send, 0, 60, 5)]);
    assert_eq!(ends(&vm), StopCause::GuestReset);
}

pub fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status().expect("ip, of iproute2");
    assert!(done.success(), "ip {arguments}");
}

/// A TAP interface by name, which goes away and comes back.
fn taps() {
    let make = || {
        ip("tuntap add tap0 mode tap");
        ip("addr add 10.9.0.1/24 dev tap0");
        ip("link set tap0 up");
    };
    make();
    let mut config = pc();
    config.nets = vec![NetConfig::tap("tap0")];
    let mut steps = vec![(Op::Send, 0, 60, 5), (Op::Receive, 0, 0, 0), (Op::Tell, 0, 0, 1)];
    steps.extend([(Op::Receive, 0, 0, 0); 16]);
    let vm = start(host().builder(config), &steps);
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    // Nobody has that address: the kernel asks for it, and that is what the guest gets.
    let ask = || drop(socket.send_to(&[0; 100], "10.9.0.2:9"));
    ask();
    hear(&vm, 1);
    ip("link del tap0");
    let gone = |e: Event| matches!(e.kind, EventKind::BackendError { .. });
    wait_until("the card to find its interface gone", || {
        std::iter::from_fn(|| vm.events().next_event()).any(gone)
    });
    make();
    let frames = || vm.net_statistics(0).unwrap().rx_frames;
    let before = frames();
    wait_until("a frame through the interface that came back", || {
        ask();
        frames() > before
    });
    vm.stop().unwrap();
    ip("link del tap0");
}

/// A network in user space by its path, which goes away and comes back.
fn streams() {
    let socket = Scratch::new("stream");
    let listener = UnixListener::bind(&socket.0).unwrap();
    let mut config = pc();
    let mut card = NetConfig::attached();
    card.stream = Some(socket.0.clone());
    config.nets = vec![card];
    let vm =
        start(host().builder(config), &[(Op::Send, 0, 60, 5), (Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0)]);
    let (first, _) = listener.accept().unwrap();
    hear(&vm, 1);
    drop(first);
    let (second, _) = listener.accept().unwrap();
    // One that the VM was built without.
    let next = Scratch::new("stream");
    let other = UnixListener::bind(&next.0).unwrap();
    vm.change_net(0, Network::Stream(next.0.clone())).unwrap();
    drop((second, other.accept().unwrap()));
    let (mut last, _) = other.accept().unwrap();
    last.write_all(&[&100u32.to_be_bytes()[..], &[1; 100]].concat()).unwrap();
    assert_eq!(ends(&vm), StopCause::GuestReset);
}

fn balloon() {
    let steps = [
        (Op::Account, 0, 4, 2),
        (Op::Inflate, 768, 16, 9),
        (Op::Tell, 0, 0, 1),
        (Op::Target, 8, 0, 0),
        (Op::Deflate, 768, 16, 0),
        (Op::Tell, 0, 0, 2),
        (Op::Receive, 0, 0, 0),
    ];
    for kind in [BackingKind::Memfd, BackingKind::Anonymous] {
        let mut config = pc();
        config.backing.kind = kind;
        let (near, far) = UnixDatagram::pair().unwrap();
        config.nets = vec![NetConfig::attached()];
        let vm = start(host().builder(config).net_fd(0, near).unwrap(), &steps);
        hear(&vm, 1);
        vm.set_balloon(Bytes(8 << 12)).unwrap();
        hear(&vm, 2);
        // It does not answer: nobody asked it to.
        let _ = vm.guest_memory(Duration::from_millis(200));
        far.send(&[0; 100]).unwrap();
        assert_eq!(ends(&vm), StopCause::GuestReset);
    }
}

/// What any thread may come to need of the allocator.
fn allocations() {
    let vm = host().build(pc()).unwrap();
    let grown = sandbox::on_loop(&vm, 0, || {
        let mut much: Vec<u8> = vec![1; 1 << 20];
        much.reserve_exact(8 << 20);
        much.capacity()
    });
    assert!(grown.unwrap() > 8 << 20);
    // More than an arena keeps: it shrinks, for which the C library asks for a file once for each process.
    let shrunk = sandbox::on_loop(&vm, 0, || {
        let blocks = std::hint::black_box([(); 8].map(|()| vec![1u8; 60_000]));
        blocks.len()
    });
    assert_eq!(shrunk.unwrap(), 8);
}

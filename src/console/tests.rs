#![forbid(unsafe_code)]
use std::fs::File;
use std::io::{Read, Seek, Write, pipe};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};

use super::*;
use crate::events::StopCause;

const LONG: Duration = Duration::from_secs(20);

struct Rig {
    console: Console,
    event_loop: Arc<EventLoop>,
    causes: Sender<StopCause>,
}

impl Rig {
    fn new() -> Self {
        let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
        Self { console: Console::new(), event_loop, causes: channel().0 }
    }

    fn attach(&self, output: Option<Output>, input: Option<OwnedFd>) -> Attached<Pump> {
        let causes = self.causes.clone();
        let stop = StopLine::new(move |cause| causes.send(cause).unwrap());
        self.console.attach(output, input, &self.event_loop, &stop).unwrap()
    }

    fn output(&self, fd: impl Into<OwnedFd>) -> Attached<Pump> {
        self.attach(Some(Output::Fd(fd.into())), None)
    }

    fn flush(&self) -> bool {
        self.console.flush(Instant::now() + LONG)
    }
}

/// 100 000 bytes whose order shows.
fn pattern() -> Vec<u8> {
    (0..100_000u32).map(|i| (i % 251) as u8).collect()
}

fn eventually(what: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !what() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_tail_is_the_last_64_kib_and_everything_is_counted() {
    let console = Console::new();
    let bytes = pattern();
    for (at, piece) in bytes.chunks(77).enumerate() {
        console.write(piece);
        assert!(at != 10 || console.tail() == bytes[..11 * 77]);
    }
    assert!(console.tail() == bytes[bytes.len() - KEPT..]);
    console.write(&bytes);
    assert!(console.tail() == bytes[bytes.len() - KEPT..], "one write larger than all");
    assert_eq!((console.written(), console.lost()), (200_000, 0));
    assert!(console.flush(Instant::now()), "nobody to wait for");
}

#[test]
fn output_reaches_pipe_socket_terminal_and_file_in_order() {
    let rig = Rig::new();
    let (mut reader, writer) = pipe().unwrap();
    let (mut far, near) = UnixStream::pair().unwrap();
    let mut file = crate::sys::memory::sealed_memfd(c"console", 5).unwrap();
    let (master, slave) = crate::sys::fd::pty().unwrap();
    rig.console.write(b"early");
    let mut read = [0; 5];

    let pump = rig.output(writer);
    reader.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"early", "what came before goes first");
    pump.detach().unwrap();

    let pump = rig.output(near);
    rig.console.write(b"socks");
    far.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"socks");
    pump.detach().unwrap();

    let pump = rig.output(slave);
    rig.console.write(b"ttyS0");
    File::from(master).read_exact(&mut read).unwrap();
    assert_eq!(&read, b"ttyS0");
    pump.detach().unwrap();

    let pump = rig.output(file.try_clone().unwrap());
    rig.console.write(b"files");
    assert!(rig.flush());
    pump.detach().unwrap();
    file.rewind().unwrap();
    file.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"files");
}

#[test]
fn a_pipe_that_nobody_reads_never_blocks_the_guest_and_the_loss_is_counted() {
    let rig = Rig::new();
    let (mut reader, writer) = pipe().unwrap();
    let pump = rig.output(writer);
    let bytes = pattern();
    for _ in 0..20 {
        bytes.iter().for_each(|byte| rig.console.write(&[*byte]));
    }
    assert!(!rig.console.flush(Instant::now() + Duration::from_millis(50)), "the deadline holds");
    let total = 20 * bytes.len() as u64;
    let lost = rig.console.lost();
    assert!(lost > total - 64 * 1024 - KEPT as u64 - 1, "{lost} of {total}");
    let collect = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        all
    });
    assert!(rig.flush());
    pump.detach().unwrap();
    let all = collect.join().unwrap();
    assert_eq!(all.len() as u64, total - rig.console.lost(), "each byte is read or counted");
    assert!(all.ends_with(&bytes[bytes.len() - KEPT..]), "the oldest are dropped");
}

#[test]
fn a_slow_reader_gets_everything_and_the_loop_sleeps_while_it_waits() {
    let rig = Rig::new();
    let (mut reader, writer) = pipe().unwrap();
    let _pump = rig.output(writer.try_clone().unwrap());
    let bytes = pattern();
    rig.console.write(&bytes[..60_000]);
    assert!(rig.flush());
    rig.console.write(&bytes[..60_000]);
    eventually(|| lock(&rig.console.0.state).stuck);
    rig.console.write(b"more");
    assert_eq!(lock(&rig.console.0.state).armed, None, "only the pipe can wake it");
    let mut all = vec![0; 120_004];
    reader.read_exact(&mut all).unwrap();
    assert!(all == [&bytes[..60_000], &bytes[..60_000], b"more"].concat());
    assert_eq!(rig.console.lost(), 0);
}

#[test]
fn a_closed_reader_ends_the_output_and_nothing_else() {
    for stuck in [false, true] {
        let rig = Rig::new();
        let (reader, writer) = pipe().unwrap();
        let mut reader = Some(reader).filter(|_| stuck);
        let (mut writes, input) = pipe().map(|(r, w)| (w, r)).unwrap();
        let _pump = rig.attach(Some(Output::Fd(writer.into())), Some(input.into()));
        for _ in 0..4 {
            rig.console.write(&pattern());
            rig.console.flush(Instant::now() + Duration::from_millis(20));
        }
        eventually(|| !stuck || lock(&rig.console.0.state).stuck);
        drop(reader.take());
        assert!(rig.flush(), "nobody is waited for");
        assert_eq!(rig.console.written(), 400_000);
        writes.write_all(b"on").unwrap();
        eventually(|| rig.console.has_input());
    }
}

#[test]
fn a_callback_gets_the_output_in_pieces_on_the_loop() {
    let rig = Rig::new();
    let (sender, receiver) = channel();
    let here = std::thread::current().id();
    let callback = move |bytes: &[u8]| {
        assert_ne!(std::thread::current().id(), here);
        sender.send(bytes.to_vec()).unwrap();
    };
    let _pump = rig.attach(Some(Output::Callback(Box::new(callback))), None);
    b"login: ".iter().for_each(|byte| rig.console.write(&[*byte]));
    assert!(rig.flush());
    assert_eq!(receiver.try_iter().flatten().collect::<Vec<_>>(), b"login: ");
    rig.console.write(&pattern()[..KEPT]);
    assert!(rig.flush());
    assert!(receiver.try_iter().flatten().collect::<Vec<_>>() == pattern()[..KEPT]);
}

#[test]
fn a_callback_that_panics_ends_the_vm_and_holds_up_nobody() {
    let (causes, cause) = channel();
    let rig = Rig { causes, ..Rig::new() };
    let _pump = rig.attach(Some(Output::Callback(Box::new(|_| panic!("as the test wants")))), None);
    rig.console.write(b"x");
    let expected =
        StopCause::DeviceFault { device: "console".into(), why: "panicked: as the test wants".into() };
    assert_eq!(cause.recv_timeout(LONG), Ok(expected));
    let start = Instant::now();
    rig.console.write(b"x");
    assert!(rig.flush() && start.elapsed() < LONG);
}

#[test]
fn pushed_input_is_bounded_and_wakes_the_device() {
    let console = Console::new();
    let (woken, wakes) = channel();
    console.push_input(b"!");
    console.on_input(Some(Arc::new(move || woken.send(()).unwrap())));
    assert_eq!(wakes.try_iter().count(), 1, "input that came first is not forgotten");
    assert_eq!(console.push_input(&pattern()), INPUT - 1);
    assert_eq!(console.push_input(b"x"), 0);
    assert_eq!(wakes.try_iter().count(), 1);
    let mut buffer = [0; 100];
    assert_eq!(console.read(&mut buffer), 100);
    assert_eq!(buffer[..3], [b'!', 0, 1]);
    assert_eq!(console.push_input(&pattern()), 100);
}

#[test]
fn input_from_an_fd_waits_in_the_fd_while_the_guest_does_not_read() {
    let rig = Rig::new();
    let (near, mut far) = UnixStream::pair().unwrap();
    let _pump = rig.attach(None, Some(near.into()));
    far.set_nonblocking(true).unwrap();
    let bytes = pattern();
    let mut sent = 0;
    // The socket fills up: that is the back-pressure.
    let deadline = Instant::now() + Duration::from_millis(200);
    let mut push = |until: Instant| {
        while sent < 1_000_000 && Instant::now() < until {
            sent += far.write(&bytes[sent % bytes.len()..]).unwrap_or(0);
        }
        sent
    };
    assert!(push(deadline) < 1_000_000);
    assert!(lock(&rig.console.0.state).input.len() <= INPUT);
    let mut read = 0;
    let mut buffer = [0; 1000];
    let deadline = Instant::now() + LONG;
    while read < 1_000_000 {
        assert!(Instant::now() < deadline);
        push(Instant::now() + Duration::from_micros(10));
        let count = rig.console.read(&mut buffer);
        for byte in &buffer[..count] {
            assert_eq!(*byte, bytes[read % bytes.len()]);
            read += 1;
        }
    }
}

#[test]
fn a_regular_file_is_input_until_its_end() {
    let rig = Rig::new();
    let mut file = crate::sys::memory::sealed_memfd(c"input", 100_000).unwrap();
    file.write_all(&pattern()).unwrap();
    file.rewind().unwrap();
    let _pump = rig.attach(None, Some(file.into()));
    let mut all = Vec::new();
    eventually(|| rig.console.has_input());
    let deadline = Instant::now() + LONG;
    while all.len() < 100_000 {
        assert!(Instant::now() < deadline);
        let mut buffer = [0; 999];
        let count = rig.console.read(&mut buffer);
        all.extend_from_slice(&buffer[..count]);
    }
    assert!(all == pattern());
}

#[test]
fn a_terminal_is_both_output_and_input() {
    let rig = Rig::new();
    let (master, slave) = crate::sys::fd::pty().unwrap();
    let (output, input) = (slave.try_clone().unwrap(), slave);
    let _pump = rig.attach(Some(Output::Fd(output)), Some(input));
    let mut master = File::from(master);
    master.write_all(b"ls\n").unwrap();
    eventually(|| rig.console.has_input());
    let mut buffer = [0; 10];
    assert_eq!((rig.console.read(&mut buffer), &buffer[..3]), (3, &b"ls\n"[..]));
    rig.console.write(b"bin\n");
    let mut echo_and_output = [0; 9];
    master.read_exact(&mut echo_and_output).unwrap();
    assert_eq!(&echo_and_output, b"ls\r\nbin\r\n");
}

#[test]
fn attaching_twice_is_refused_and_again_after_detaching_works() {
    let rig = Rig::new();
    let pump = rig.attach(None, None);
    let stop = StopLine::new(|_| {});
    let error = rig.console.attach(None, None, &rig.event_loop, &stop).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidState);
    pump.detach().unwrap();
    rig.attach(None, None);
}

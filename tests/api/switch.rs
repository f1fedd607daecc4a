//! Guests on the ports of a switch: who hears whom.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom};
use std::os::unix::net::{UnixDatagram, UnixListener};

use vmbed::{
    DropReason, ErrorKind, Guard, MacAddress, PortOptions, PortVlan, RateLimit, StopCause, Switch,
    SwitchOptions, SwitchPort,
};

use crate::backends::{Guest, config};
use crate::guest::host;
use crate::guests::Op;

/// The stations are 02:02:02:02:02:02 and 04:…; the broadcast address is 0xff.
const ALL: u32 = 0xff;

fn start(port: &SwitchPort, steps: &[(Op, u32, u32, u32)]) -> Guest {
    Guest::start(host().builder(config(0, 1)).net_port(0, port), steps)
}

pub fn cards_on_a_switch() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let access = |name: &str, vlan| switch.add_port(name, &PortOptions::access(vlan)).unwrap();
    let (first, second, other) = (access("first", 10), access("second", 10), access("other", 20));
    assert_eq!(first.name(), "first");
    let mut file = memory_file();
    let capture = switch.capture(&[], BufWriter::new(file.try_clone().unwrap())).unwrap();
    // They listen before anybody speaks.
    let listens = [(Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0), (Op::Send, 2, 70, 4), (Op::Tell, 0, 0, 2)];
    let (answers, outside) = (start(&second, &listens), start(&other, &listens));
    answers.wait_for(1);
    outside.wait_for(1);
    let asks = start(&first, &[(Op::Send, ALL, 60, 2), (Op::Receive, 0, 0, 0)]);
    assert_eq!(asks.results(2)[1], (0, 12 + 70, 6 * 2 + 64 * 4), "the answer");
    assert_eq!(answers.results(2)[1], (0, 12 + 60, 6 * 0xff + 54 * 2), "the question");
    assert_eq!(outside.vm.stop().unwrap(), StopCause::HostStop);
    assert_eq!(outside.vm.net_statistics(0).unwrap().rx_frames, 0, "it has heard nothing");
    let (one, two, three) = (first.statistics(), second.statistics(), other.statistics());
    assert_eq!((one.received.frames, two.received.frames), (1, 1));
    assert_eq!((one.sent.bytes, two.sent.bytes, three.sent.frames), (70, 60, 0));
    assert_eq!((one.addresses, three.addresses, one.drops().count()), (1, 0, 0));
    let summary = capture.finish().unwrap();
    assert_eq!((summary.written, summary.missed), (4, 0), "each frame as it came in, and as it went out");
    let (mut bytes, mut written) = ([0; 4], Vec::new());
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_exact(&mut bytes).unwrap();
    file.read_to_end(&mut written).unwrap();
    assert_eq!(bytes, [0x0a, 0x0d, 0x0d, 0x0a], "a section header block");
    assert_eq!(written.windows(40).filter(|w| *w == [4; 40]).count(), 2 * (64 - 39), "the answer, twice");
}

fn memory_file() -> File {
    let path = std::env::temp_dir().join(format!("vmbed-test-{}.pcapng", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

pub fn a_switch_drops_and_says_why() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let mac = MacAddress([4; 6]);
    let guarded = switch.add_port("guarded", &PortOptions::access(1).guard(Guard::new(mac, []))).unwrap();
    let open = switch.add_port("open", &PortOptions::default()).unwrap();
    let monitor = switch.add_port("monitor", &PortOptions::default()).unwrap();
    guarded.mirror_to(Some(&monitor)).unwrap();
    assert_eq!(guarded.mirror_to(Some(&guarded)).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let hears = start(&open, &[(Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0)]);
    let sees = start(&monitor, &[(Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0), (Op::Receive, 0, 0, 0)]);
    hears.wait_for(1);
    sees.wait_for(1);
    let lies = start(&guarded, &[(Op::Send, ALL, 60, 2), (Op::Send, ALL, 64, 4)]);
    lies.results(2);
    assert_eq!(hears.results(2)[1].1, 12 + 64, "the second one");
    assert_eq!(sees.results(3)[2].1, 12 + 64, "both");
    let drops: Vec<_> = guarded.statistics().drops().collect();
    assert_eq!(drops, [(DropReason::SpoofedMac, 1)]);
    assert_eq!((DropReason::SpoofedMac.name(), monitor.statistics().mirrored.frames), ("spoofed-mac", 2));

    let build = || host().builder(config(0, 1)).net_port(0, &open).build();
    let error = build().unwrap_err();
    assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("net0"), "{error}");
    drop(hears);
    drop(build().unwrap());
    let mut bad = PortOptions::trunk([10, 4095]);
    (bad.rate_in, bad.isolated) = (RateLimit::NONE.ops(10, 0), true);
    let error = open.set_options(&bad).unwrap_err();
    assert!(error.fields().iter().any(|f| f.field == "vlan.vlans"), "{error:?}");
    bad.vlan = PortVlan::Trunk { vlans: vec![10, 20], native: Some(1) };
    open.set_options(&bad).unwrap();
    open.remove();
    assert_eq!(build().unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(open.set_options(&bad).unwrap_err().kind(), ErrorKind::NotFound);
    let twice = host().builder(config(0, 1)).net_port(0, &open).net_port(0, &open).build();
    assert!(twice.unwrap_err().to_string().contains("nets[0].tap"));
    let missing = switch.add_tap("uplink", "vmbed-no-tap", &PortOptions::default());
    assert!(missing.unwrap_err().to_string().contains("vmbed-no-tap"));
    let missing = switch.add_stream("uplink", "/nonexistent/passt.socket", &PortOptions::default());
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    let null = File::open("/dev/null").unwrap();
    let wrong = switch.add_fd("uplink", null, &PortOptions::default()).unwrap_err();
    assert!(wrong.kind() == ErrorKind::InvalidArgument && wrong.to_string().contains("uplink"), "{wrong}");
    sockets(&switch);
}

/// From one socket to another, of the two kinds.
fn sockets(switch: &Switch) {
    let directory = std::env::temp_dir().join(format!("vmbed-api-switch-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let listener = UnixListener::bind(directory.join("stream")).unwrap();
    let (near, far) = UnixDatagram::pair().unwrap();
    switch.add_fd("messages", near, &PortOptions::access(30)).unwrap();
    switch.add_stream("stream", directory.join("stream"), &PortOptions::access(30)).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(crate::guest::LONG)).unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    let frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 0x31], &[0; 50]].concat();
    far.send(&[&[0; 12][..], &frame].concat()).unwrap();
    let mut heard = vec![0; 4 + frame.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(heard, [&(frame.len() as u32).to_be_bytes()[..], &frame].concat());
}

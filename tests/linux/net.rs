//! Network cards on TAP interfaces. The interfaces are made for the test and gone after it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use vmbed::{DiskConfig, NetConfig, NetStatistics, Network, PortOptions, Switch, SwitchOptions};

use crate::assets::KERNELS;
use crate::balloon::wait_until;
use crate::devices::{TempFile, noise, sha256};
use crate::guest::{Guest, LONG, config};
use crate::holdings::Holdings;
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("net::checksums_over_tcp_and_frames_of_every_size", sizes));
    trials.push(trial("net::streams_with_every_offload_on_and_off", streams));
    trials.push(trial("net::eight_queues_at_full_traffic", queues));
    trials.push(trial("net::full_traffic_for_long_on_a_bridge_that_goes", long));
    trials.push(trial("net::the_driver_says_what_it_wants", filters));
    trials.push(trial("net::a_network_in_user_space", user_space));
}

/// A TAP interface with an address of the host's.
pub struct Tap {
    pub name: String,
    /// The third byte of 172.30.N.0/24; the host is .1, the guest .2.
    pub net: u32,
}

impl Tap {
    pub fn new() -> Self {
        Self::made(&[])
    }

    /// With several queues.
    pub fn with_queues() -> Self {
        Self::made(&["multi_queue"])
    }

    fn made(how: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let net = NEXT.fetch_add(1, Ordering::Relaxed);
        let tap = Self { name: format!("vmbt{}", std::process::id() % 10_000 * 100 + net % 100), net };
        tap.plug(how);
        tap
    }

    /// Makes the interface, anew where it was deleted.
    pub fn plug(&self, how: &[&str]) {
        let tap = self;
        ip(&[&["tuntap", "add", &tap.name, "mode", "tap"], how].concat());
        ip(&["addr", "add", &format!("{}/24", tap.host()), "dev", &tap.name]);
        ip(&["link", "set", &tap.name, "up"]);
    }

    pub fn host(&self) -> String {
        format!("172.30.{}.1", self.net)
    }

    pub fn guest(&self) -> String {
        format!("172.30.{}.2", self.net)
    }

    /// Shell lines that bring the guest's card up.
    pub fn up(&self) -> String {
        format!("ip addr add {}/24 dev eth0; ip link set eth0 up; ip link set lo up\n", self.guest())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.name]).status();
    }
}

pub fn ip(arguments: &[&str]) {
    let output =
        Command::new("ip").args(arguments).output().expect("ip (package iproute2) must be installed");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Accepts one connection, with a deadline.
pub fn accept(listener: &TcpListener, guest: &Guest) -> std::net::TcpStream {
    listener.set_nonblocking(true).unwrap();
    let end = std::time::Instant::now() + LONG;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(LONG)).unwrap();
                stream.set_write_timeout(Some(LONG)).unwrap();
                stream.set_write_timeout(Some(LONG)).unwrap();
                return stream;
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                assert!(
                    std::time::Instant::now() < end,
                    "waited for the guest's connection:\n{}",
                    guest.console()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => panic!("accept: {e}"),
        }
    }
}

/// Shell: does as it is told, a line at a time.
pub const TOLD: &str = "stty -echo\necho ready=yes\nwhile read line; do eval \"$line\"; done\n";

/// Shell: `swap HOST PORT KEY` takes what comes from there, sends it back, and says what it was. busybox' nc leaves when its input ends or the
/// network does, so that its input stays open.
pub const SWAP: &str = "mkfifo /run/open; exec 3<>/run/open
swap() {
nc $1 $2 <&3 >/run/got
{ cat /run/got; read x <&3; } | { nc $1 $2 >/dev/null; echo >&3; }
echo $3=$(sha256sum </run/got | cut -d' ' -f1)
}
";

/// The host's half of `swap`, whom the guest knows by that address: a half of the content, what is to happen `meanwhile` (0 on the way to the
/// guest, 1 on the way back), and the other half.
pub fn swap(
    guest: &Guest,
    listener: &TcpListener,
    address: &str,
    (key, content): (&str, &[u8]),
    mut meanwhile: impl FnMut(usize),
) {
    let port = listener.local_addr().unwrap().port();
    guest.vm.console_input(format!("swap {address} {port} {key}\n").as_bytes());
    let half = content.len() / 2;
    let mut down = accept(listener, guest);
    down.write_all(&content[..half]).unwrap();
    meanwhile(0);
    down.write_all(&content[half..]).unwrap();
    down.shutdown(std::net::Shutdown::Both).unwrap();
    let mut up = accept(listener, guest);
    // Until all is there: passt (2023) forgets what it has not passed on yet when it hears that no more will come.
    let mut received = vec![0; content.len()];
    up.read_exact(&mut received[..half]).unwrap();
    meanwhile(1);
    up.read_exact(&mut received[half..]).unwrap();
    drop(up);
    assert!(received == content, "what was sent comes back");
    assert_eq!(guest.value(key), sha256(content));
}

/// TCP both ways; and `ping`, which no one here wrote, checks every byte of what comes back.
fn sizes() {
    let tap = Tap::new();
    let script = [&*tap.up(), "echo mac=$(cat /sys/class/net/eth0/address)\n", SWAP, TOLD].concat();
    let mut config = config(KERNELS[1], &script);
    let mut net = NetConfig::tap(&tap.name);
    net.mac = Some("52:54:00:ab:cd:ef".parse().unwrap());
    config.nets.push(net);
    let guest = Guest::start(config);
    assert_eq!(guest.value("mac"), "52:54:00:ab:cd:ef");
    assert_eq!(guest.value("ready"), "yes");
    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    swap(&guest, &listener, &tap.host(), ("swapped", &noise(11, 4 << 20)), |_| {});
    for length in (0..1472).step_by(97).chain([15, 16, 17, 1471, 1472, 4000]) {
        let lost = ping(&tap, &["-c", "2", "-i", "0.2", "-s", &length.to_string(), "-p", "a55a"]);
        assert_eq!(lost, "0% packet loss", "{length} bytes");
    }
    guest.vm.stop().unwrap();
}

/// A server that ends with the test.
pub struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What both ends of [`Matrix`] are tested with.
const EXERCISE: &str = include_str!("../assets/net-exercise");
/// The host by IPv6.
const HOST6: &str = "fd5e::1";

/// A guest and streams of all kinds.
struct Matrix {
    guest: Guest,
    tap: Tap,
    listener: TcpListener,
    content: Vec<u8>,
}

/// What `counters` says: packets whose checksum was wrong, UDP datagrams, packets of connections that heed congestion.
fn counters(said: &str) -> [u64; 3] {
    let numbers: Vec<u64> = said.split_whitespace().map(|n| n.parse().unwrap()).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("three numbers: {said}"))
}

impl Matrix {
    fn start() -> Self {
        let long = std::env::var_os("VMBED_NET_SECONDS").is_some();
        let content = noise(13, if long { 8 << 20 } else { 128 << 10 });
        let tap = Tap::new();
        ip(&["link", "set", &tap.name, "mtu", "9000"]);
        ip(&["-6", "addr", "add", &format!("{HOST6}/64"), "dev", &tap.name, "nodad"]);
        let up = "echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip -6 addr add fd5e::2/64 dev eth0\n";
        let tools = "export PATH=$PATH:/mnt/bin; . /dev/vdb\n";
        let mut config = crate::disks::with_tools(&[TOOLS, up, &tap.up(), tools, SWAP, TOLD].concat());
        // A script that is longer than a command line, to the end of its last sector.
        let width = EXERCISE.len().next_multiple_of(512);
        let script = TempFile::new(format!("{EXERCISE:\n<width$}").as_bytes());
        config.disks.push(DiskConfig::new(script.path()).readonly());
        config.nets.push(NetConfig::tap(&tap.name));
        let guest = Guest::start(config);
        assert_eq!(guest.value("ready"), "yes");
        Self { guest, tap, listener: TcpListener::bind(("::", 0)).unwrap(), content }
    }

    /// What the guest and the host have counted.
    fn count(&self, key: &str) -> [[u64; 3]; 2] {
        let here = Command::new("sh").args(["-c", &format!("{EXERCISE}\ncounters")]).output().unwrap();
        let there = self.guest.told("said=$(counters)", key);
        [counters(&there), counters(&String::from_utf8(here.stdout).unwrap())]
    }

    /// TCP and UDP, IPv4 and IPv6, both ways; all that came was what was sent, whoever did the sums. Packets of connections that heed
    /// congestion, at both ends.
    fn cell(&self, name: &str) -> [u64; 2] {
        let before = self.count(&format!("{name}-before"));
        let bytes = self.content.len();
        // UDP in one packet each, and in one each or in fragments.
        for (address, length) in [(self.tap.host(), 1400), (HOST6.to_owned(), 8000)] {
            swap(&self.guest, &self.listener, &address, (&format!("{name}-{length}"), &self.content), |_| {});
            let streams = format!("streams {address} {bytes} {length}; said=fine");
            assert_eq!(self.guest.told(&streams, &format!("{name}-{length}-streams")), "fine");
        }
        let after = self.count(&format!("{name}-after"));
        let datagrams = bytes as u64 / 1400 + bytes as u64 / 8000;
        for (end, before, after) in [("guest", before[0], after[0]), ("host", before[1], after[1])] {
            assert_eq!(after[0], before[0], "{name}: wrong checksums at the {end}");
            // UDP may lose some, where a lab is slow.
            assert!(
                after[1] - before[1] > datagrams / 2,
                "{name}: datagrams at the {end}: {before:?} {after:?}"
            );
        }
        [0, 1].map(|end| after[end][2] - before[end][2])
    }

    fn mtu(&self, mtu: u32) {
        self.guest.told(
            &format!("ip link set eth0 mtu {mtu}; said=$(cat /sys/class/net/eth0/mtu)"),
            &format!("mtu{mtu}"),
        );
    }

    /// Each of the guest's offloads off by itself, and on again.
    fn offloads(&self, mtu: u32) {
        for offload in ["tx", "tso", "gso", "gro", "sg"] {
            let key = format!("{mtu}-{offload}");
            let set = |state| {
                self.guest
                    .told(&format!("offload {offload} {state}; said={state}"), &format!("{key}-{state}"))
            };
            set("off");
            self.cell(&key);
            set("on");
        }
    }

    /// Whether what the host sends comes in long frames over the card.
    fn arrives_long(&self, key: &str) -> bool {
        longest_of(&self.tap.name, || {
            swap(&self.guest, &self.listener, &self.tap.host(), (key, &noise(17, 1 << 20)), |_| {});
        }) > 1514
    }
}

/// The longest frame that the host sends to that interface meanwhile.
pub fn longest_of(interface: &str, meanwhile: impl FnOnce()) -> usize {
    let mut tcpdump = Command::new("tcpdump");
    tcpdump.args([
        "-Z",
        "root",
        "--immediate-mode",
        "-U",
        "-s",
        "64",
        "-Q",
        "out",
        "-w",
        "-",
        "-i",
        interface,
    ]);
    let started = tcpdump.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut tcpdump = Server(started.expect("tcpdump (tests/setup installs it)"));
    let mut said = BufReader::new(tcpdump.0.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("listening on")));
    let mut written = tcpdump.0.stdout.take().unwrap();
    let read = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        written.read_to_end(&mut bytes).map(|_| bytes)
    });
    meanwhile();
    drop(tcpdump);
    let bytes = read.join().unwrap().unwrap();
    // A file's header, and that of each frame: a time, how much of it is there, and its length.
    let (mut at, mut longest) = (24, 0);
    let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize);
    while let (Some(there), Some(length)) = (number(at + 8), number(at + 12)) {
        longest = longest.max(length);
        at += 16 + there;
    }
    assert!(longest > 0, "nothing was sent to {interface}");
    longest
}

/// TCP and UDP, IPv4 and IPv6, both ways, with small frames and large ones, whatever is left to do on them; eight MiB each where VMBED_NET_SECONDS
/// is set.
fn streams() {
    let _server = server("5201");
    let all = Matrix::start();
    for mtu in [9000, 1500] {
        all.mtu(mtu);
        all.cell(&format!("{mtu}-all"));
        all.offloads(mtu);
    }
    assert!(all.arrives_long("long"));
    // The guest would take more than it gets.
    let taps = |state: &str| {
        let arguments = ["-K", &all.tap.name, "tx", state, "tso", state, "gso", state];
        let done = Command::new("ethtool").args(arguments).output().expect("ethtool");
        assert!(done.status.success(), "{done:?}");
    };
    taps("off");
    assert!(!all.arrives_long("cut"));
    all.cell("by-the-host");
    taps("on");
    assert!(all.arrives_long("uncut"));
    // The guest asks for it, and Linux agrees by default.
    all.guest.told("echo 1 >/proc/sys/net/ipv4/tcp_ecn; said=1", "ecn");
    let heeded = all.cell("heeds-congestion");
    assert!(heeded.iter().all(|packets| *packets > 10), "{heeded:?}");
    assert_eq!(all.guest.vm.net_statistics(0).unwrap().tx_dropped, 0);
    all.guest.vm.stop().unwrap();
}

/// iperf3's other end, on that port.
pub fn server(port: &str) -> Server {
    let mut server = Command::new("iperf3");
    let started = server.args(["-s", "-p", port]).stdout(Stdio::null()).spawn();
    Server(started.expect("iperf3 must be installed"))
}

/// Shell lines that mount the tools.
pub const TOOLS: &str = "mkdir -p /mnt; mount -t ext4 -o ro /dev/vda /mnt; ln -s /mnt/lib64 /lib64; export LD_LIBRARY_PATH=/mnt/lib\n";

/// Eight pairs of queues for two vCPUs, of which the guest uses more and fewer, while everything that can happen to a card does.
fn queues() {
    const STREAMS: &str = "
        run() {
            for try in 1 2 3 4 5 6; do
                /mnt/bin/iperf3 -P 8 --connect-timeout 60000 \"$@\" >/run/said 2>&1 && return
                sleep 1
            done
            echo \"$* failed\"; tail -n 20 /run/said; exit 1
        }
        echo most=$(/mnt/bin/ethtool -l eth0 | grep -m 1 Combined | tr -dc 0-9)
        for count in 8 3 1 2; do
            /mnt/bin/ethtool -L eth0 combined $count || echo refused
            run -c HOST -n 4M; run -c HOST -n 4M -R
            echo with=$count
        done
        /mnt/bin/ethtool -L eth0 combined 8
        /mnt/bin/iperf3 -P 8 -c HOST -t 1000 >/dev/null 2>&1 &
        /mnt/bin/iperf3 -p 5202 -P 8 -c HOST -t 1000 -R >/dev/null 2>&1 &
        sleep 2; echo full=traffic
        read go
        # The driver goes and comes back while frames fly.
        device=$(basename $(readlink /sys/class/net/eth0/device))
        echo $device >/sys/bus/virtio/drivers/virtio_net/unbind
        echo $device >/sys/bus/virtio/drivers/virtio_net/bind
        killall iperf3; sleep 1; UP
        run -c HOST -n 2M; run -c HOST -n 2M -R
        /mnt/bin/ethtool -L eth0 combined 8
        echo reset=fine
        read go
        run -c HOST -n 2M; run -c HOST -n 2M -R
        echo other=fine; sleep 1000";
    let tap = Tap::with_queues();
    let _servers = [server("5201"), server("5202")];
    let script = STREAMS.replace("HOST", &tap.host()).replace("UP", tap.up().trim());
    // A command line holds 2 KiB.
    let script = TOOLS.to_owned() + &tap.up() + &script;
    let lines: Vec<_> = script.lines().map(str::trim).filter(|line| !line.starts_with('#')).collect();
    let mut config = crate::disks::with_tools(&lines.join("\n"));
    config.cpus.count = 2;
    let mut card = NetConfig::tap(&tap.name);
    card.queues = 8;
    config.nets.push(card);
    let guest = Guest::start(config);
    guest.wait_for("with=2");
    assert_eq!(guest.value("most"), "8");
    guest.wait_for("full=traffic");
    for _ in 0..5 {
        guest.vm.pause().unwrap();
        let still = guest.vm.net_statistics(0).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(guest.vm.net_statistics(0).unwrap(), still, "a card stands still with its VM");
        guest.vm.resume().unwrap();
        let carried = |way: fn(&NetStatistics) -> u64| way(&guest.vm.net_statistics(0).unwrap());
        for way in [|s: &NetStatistics| s.rx_frames, |s: &NetStatistics| s.tx_frames] {
            wait_until(&guest, "traffic to go on", |_| carried(way) > way(&still) + 100);
        }
    }
    guest.vm.console_input(b"go\n");
    guest.wait_for("reset=fine");
    ip(&["link", "del", &tap.name]);
    std::thread::sleep(Duration::from_millis(1500));
    tap.plug(&["multi_queue"]);
    // It is looked for once a second.
    wait_until(&guest, "the card to find its interface", |_| {
        ping(&tap, &["-c", "1", "-w", "1"]).starts_with("0%")
    });
    // Another one with as many queues, which has the host's addresses now.
    let other = Tap::with_queues();
    let address = std::fs::read_to_string(format!("/sys/class/net/{}/address", tap.name)).unwrap();
    ip(&["link", "set", &other.name, "address", address.trim()]);
    ip(&["addr", "flush", "dev", &tap.name]);
    ip(&["addr", "add", &format!("{}/24", tap.host()), "dev", &other.name]);
    guest.vm.change_net(0, Network::Tap(other.name.clone())).unwrap();
    guest.vm.announce_net(0).unwrap();
    guest.vm.console_input(b"go\n");
    guest.wait_for("other=fine");
    let queues = std::fs::read_dir(format!("/sys/class/net/{}/queues", other.name)).unwrap();
    assert_eq!(queues.count(), 16, "all of them, each way");
    guest.vm.stop().unwrap();
}

/// Both ways at once, for 15 s, or as many as VMBED_NET_SECONDS says (`make soak`): nothing is left over, nothing stands still. Then the
/// bridge is deleted, and another one made.
fn long() {
    let seconds: u64 = std::env::var("VMBED_NET_SECONDS").map_or(15, |n| n.parse().expect("a number"));
    let _servers = [server("5201"), server("5202")];
    let tap = Tap::new();
    ip(&["addr", "flush", "dev", &tap.name]);
    let bridge = format!("{}b", tap.name);
    let bridged = || {
        let wiring = vmbed::Wiring::new().unwrap();
        wiring.add_bridge(&bridge, &vmbed::BridgeOptions::default()).unwrap();
        wiring.attach(&tap.name, &bridge).unwrap();
        ip(&["addr", "add", &format!("{}/24", tap.host()), "dev", &bridge]);
        wiring
    };
    let wiring = bridged();
    let script = format!(
        "{TOOLS}{up}(/mnt/bin/iperf3 -c {host} -t {seconds} >/run/up 2>&1; echo $? >/run/code) &
        /mnt/bin/iperf3 -p 5202 -c {host} -R -t {seconds} >/run/down 2>&1; down=$?
        wait; tail -n 4 /run/up /run/down; echo soak=$down $(cat /run/code); sleep 100000",
        up = tap.up(),
        host = tap.host(),
    );
    let mut config = crate::disks::with_tools(&script);
    config.nets.push(NetConfig::tap(&tap.name));
    let guest = Guest::start(config);
    let carried = || guest.vm.net_statistics(0).unwrap();
    // Of each stream's own, and little: a lab beside another one carries a few Mbit/s.
    wait_until(&guest, "traffic", |_| carried().tx_bytes > 256 << 10 && carried().rx_bytes > 256 << 10);
    let (before, mut last) = (Holdings::now(), carried());
    // They began before now, and end before `seconds` from here.
    let end = std::time::Instant::now() + Duration::from_secs(seconds.saturating_sub(seconds / 10 + 10));
    while std::time::Instant::now() < end {
        // A second of TCP's silence is not much in a lab; five are.
        std::thread::sleep(Duration::from_secs(5).min(Duration::from_secs(seconds)));
        let now = carried();
        assert!(now.tx_bytes > last.tx_bytes && now.rx_bytes > last.rx_bytes, "it stands still: {now:?}");
        last = now;
    }
    let after = Holdings::now();
    assert_eq!(before.counts(), after.counts(), "descriptors, threads, guests' maps");
    assert!(after.anonymous < before.anonymous + (8 << 20), "memory: {before:?} and then {after:?}");
    let deadline = std::time::Instant::now() + Duration::from_secs(seconds) + LONG;
    while !guest.console().contains("soak=") {
        assert!(
            std::time::Instant::now() < deadline,
            "waited for the end of the streams:\n{}",
            guest.console()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(guest.value("soak"), "0 0", "{}", guest.console());
    println!("{seconds} s: {:?}", carried());

    ip(&["link", "del", &bridge]);
    let there = Command::new("ping").args(["-q", "-c", "1", "-W", "1", &tap.guest()]).output().unwrap();
    assert!(!there.status.success(), "there is no way: {there:?}");
    drop(wiring);
    let wiring = bridged();
    wait_until(&guest, "the guest to answer", |_| ping(&tap, &["-c", "1", "-w", "1"]).starts_with("0%"));
    guest.vm.stop().unwrap();
    wiring.release().unwrap();
}

/// What a stock driver says of addresses and VLANs, and how it announces itself.
fn filters() {
    let tap = Tap::new();
    be_quiet(&tap.name);
    let mut config = crate::disks::with_tools(&[TOOLS, &tap.up(), TOLD].concat());
    config.nets.push(NetConfig::tap(&tap.name));
    let guest = Guest::start(config);
    assert_eq!(guest.value("ready"), "yes");
    assert_eq!(ping(&tap, &["-c", "2", "-i", "0.2"]), "0% packet loss");
    let told = |steps: &str, key: &str| {
        let said = guest.told(&format!("{steps} && said=done"), key);
        assert_eq!(said, "done", "{steps}\n{}", guest.console());
    };
    let heard = || guest.vm.net_statistics(0).unwrap();
    let said_to_be = |mac: &str| ip(&["neigh", "replace", &tap.guest(), "lladdr", mac, "dev", &tap.name]);
    // Whether the guest gets frames for that address, which is said to be its own.
    let gets = |mac: &str| {
        said_to_be(mac);
        let before = heard();
        ping(&tap, &["-c", "5", "-i", "0.1", "-W", "0.5"]);
        let counted = || {
            let now = heard();
            [now.rx_frames - before.rx_frames, now.rx_filtered - before.rx_filtered]
        };
        wait_until(&guest, "the card to see five frames", |_| counted().iter().any(|count| *count >= 5));
        let [got, filtered] = counted();
        assert!((got >= 5) != (filtered >= 5), "{mac}: {got} {filtered}");
        got >= 5
    };
    let (stranger, group) = ("52:54:00:00:00:77", "01:00:5e:01:02:03");
    assert!(!gets(stranger) && !gets(group));
    told("/mnt/bin/ip link set eth0 promisc on", "promiscuous");
    assert!(gets(stranger) && gets(group));
    told(&format!("/mnt/bin/ip link set eth0 promisc off; /mnt/bin/ip maddr add {group} dev eth0"), "member");
    assert!(gets(group) && !gets("01:00:5e:01:02:04") && !gets(stranger));
    told(&format!("/mnt/bin/ip maddr del {group} dev eth0"), "left");
    assert!(!gets(group));
    told("/mnt/bin/ip link set eth0 allmulticast on", "all-groups");
    assert!(gets(group) && !gets(stranger));
    told(
        "/mnt/bin/ip link set eth0 allmulticast off; /mnt/bin/ip link set eth0 address 52:54:00:00:00:99",
        "moved",
    );
    assert!(gets("52:54:00:00:00:99") && !gets(group), "another address is its own");
    tagged(&guest, &tap);
    announces(&guest, &tap);
    guest.vm.stop().unwrap();
}

/// Nothing but what is sent here leaves that interface: no router is asked for.
fn be_quiet(name: &str) {
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1").unwrap();
}

/// Frames of a VLAN come while the guest has an interface for it.
fn tagged(guest: &Guest, tap: &Tap) {
    let (vlan, own, its) =
        (format!("{}v", tap.name), format!("172.31.{}.1", tap.net), format!("172.31.{}.2", tap.net));
    ip(&["link", "add", "link", &tap.name, "name", &vlan, "type", "vlan", "id", "10"]);
    be_quiet(&vlan);
    ip(&["addr", "add", &format!("{own}/24"), "dev", &vlan]);
    ip(&["link", "set", &vlan, "up"]);
    ip(&["neigh", "replace", &its, "lladdr", "52:54:00:00:00:99", "dev", &vlan]);
    // Whether the guest answers there; if not, because its driver wants no such frames.
    let answers = || {
        let before = guest.vm.net_statistics(0).unwrap().rx_filtered;
        let filtered = || guest.vm.net_statistics(0).unwrap().rx_filtered - before;
        let mut ping = Command::new("ping");
        let ping =
            ping.args(["-n", "-q", "-c", "3", "-i", "0.1", "-w", "300", &its]).stdout(Stdio::null()).spawn();
        let ping = std::cell::RefCell::new(Server(ping.expect("ping")));
        let ended = || ping.borrow_mut().0.try_wait().unwrap().is_some();
        wait_until(guest, "three answers, or as many frames that were filtered", |_| {
            ended() || filtered() >= 3
        });
        filtered() < 3
    };
    assert!(!answers());
    let add = format!(
        "for module in /mnt/modules/*; do insmod $module; done; /mnt/bin/ip link add link eth0 name eth0.10 type vlan id 10 && \
         ip addr add {its}/24 dev eth0.10 && ip link set eth0.10 up && said=there"
    );
    assert_eq!(guest.told(&add, "vlan"), "there");
    assert!(answers());
    assert_eq!(guest.told("/mnt/bin/ip link del eth0.10 && said=gone", "no-vlan"), "gone");
    assert!(!answers());
}

/// ARP that nobody has asked for, in the guest's own name: whoever believed that it is elsewhere knows now.
fn announces(guest: &Guest, tap: &Tap) {
    ip(&["neigh", "replace", &tap.guest(), "lladdr", "52:54:00:00:00:77", "dev", &tap.name, "nud", "stale"]);
    let mut tcpdump = Command::new("timeout");
    tcpdump.args([
        "300",
        "tcpdump",
        "-Z",
        "root",
        "-n",
        "-e",
        "-t",
        "-l",
        "--immediate-mode",
        "-c",
        "1",
        "-i",
        &tap.name,
    ]);
    tcpdump.arg("arp and ether src 52:54:00:00:00:99 and arp[14:4] = arp[24:4]");
    let started = tcpdump.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut tcpdump = Server(started.expect("tcpdump (tests/setup installs it)"));
    let mut said = BufReader::new(tcpdump.0.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("listening on")));
    guest.vm.announce_net(0).unwrap();
    wait_until(guest, "the guest to announce itself", |_| {
        let neighbours = Command::new("ip").args(["neigh", "show", &tap.guest(), "dev", &tap.name]).output();
        String::from_utf8(neighbours.unwrap().stdout).unwrap().contains("52:54:00:00:00:99")
    });
    let mut captured = String::new();
    tcpdump.0.stdout.take().unwrap().read_to_string(&mut captured).unwrap();
    let wanted = format!(
        "52:54:00:00:00:99 > ff:ff:ff:ff:ff:ff, ethertype ARP (0x0806), length 42: Request who-has {0} tell {0}",
        tap.guest()
    );
    assert!(captured.contains(&wanted), "{captured}");
}

/// passt, with an interface of the host's that leads nowhere: it wants one, to have addresses from.
struct Passt {
    program: Child,
    socket: String,
}

impl Passt {
    const HOST: &str = "203.0.113.2";
    /// Where the guest finds the host's loopback.
    const GATEWAY: &str = "203.0.113.1";
    const LINK: &str = "vmbout0";
    /// Forwarded to the guest.
    const PORT: u16 = 5399;

    fn new() -> Self {
        ip(&["link", "add", Self::LINK, "type", "dummy"]);
        ip(&["addr", "add", &format!("{}/24", Self::HOST), "dev", Self::LINK]);
        ip(&["link", "set", Self::LINK, "up"]);
        ip(&["route", "add", "default", "via", Self::GATEWAY]);
        let socket = format!("/tmp/vmbed-passt-{}", std::process::id());
        Self { program: Self::program(&socket), socket }
    }

    fn program(socket: &str) -> Child {
        let _ = std::fs::remove_file(socket);
        let mut passt = Command::new("passt");
        passt.args(["--foreground", "--quiet", "--ipv4-only", "--socket", socket]);
        passt.args(["--tcp-ports", &Self::PORT.to_string(), "--interface", Self::LINK]);
        let program = passt.stderr(Stdio::null()).spawn();
        let program = program.expect("passt (tests/setup installs it)");
        let end = std::time::Instant::now() + LONG;
        while !std::path::Path::new(socket).exists() {
            assert!(std::time::Instant::now() < end, "waited for passt to make {socket}");
            std::thread::sleep(Duration::from_millis(20));
        }
        program
    }

    fn end(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }

    /// It ends and begins again.
    fn again(&mut self) {
        self.end();
        std::thread::sleep(Duration::from_millis(500));
        self.program = Self::program(&self.socket);
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        self.end();
        let _ = std::fs::remove_file(&self.socket);
        let _ = Command::new("ip").args(["link", "del", Self::LINK]).status();
    }
}

/// An address by DHCP, TCP both ways, a port that leads to the guest; and passt ends and begins again. By a card that is on it, and by one on a
/// port of a switch, whose guest leaves to others what passt cannot do.
fn user_space() {
    const STEPS: &str = "
        ip link set lo up
        cat >/run/lease <<'END'
#!/bin/sh
[ $1 = bound ] || exit 0
ip addr add $ip/$mask dev $interface; ip route add default via $router
END
        chmod 755 /run/lease
        lease() { ip link set $1 up; udhcpc -q -n -t 20 -i $1 -s /run/lease >/dev/null 2>&1; said=$(ip -4 -o addr show $1 | awk '{print $4}'); }
";
    let mut passt = Passt::new();
    let lines: Vec<_> = STEPS.lines().map(str::trim).collect();
    let mut config = config(KERNELS[0], &[&*lines.join("\n"), "\n", SWAP, TOLD].concat());
    config.nets.extend([NetConfig::stream(&passt.socket), NetConfig::attached()]);
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let port = switch.add_port("guest", &PortOptions::access(10)).unwrap();
    let guest = Guest::start_with(config, |builder| builder.net_port(1, &port));
    assert_eq!(guest.value("ready"), "yes");
    passes(&guest, &mut passt, "eth0");
    // passt has one peer at a time.
    guest.told("ip addr flush dev eth0; ip link set eth0 down; said=down", "off");
    let (near, _far) = std::os::unix::net::UnixDatagram::pair().unwrap();
    guest.vm.change_net(0, Network::Fd(near.into())).unwrap();
    passt.again();
    let uplink = switch.add_stream("out", &passt.socket, &PortOptions::access(10)).unwrap();
    passes(&guest, &mut passt, "eth1");
    // What the guest leaves to others is done before passt has it, which does not do it.
    let out = uplink.statistics();
    assert!(out.sent.frames > 500 && out.sent.bytes / out.sent.frames < 1515, "{out:?}");
    guest.vm.stop().unwrap();
}

/// All that passt does for that card.
fn passes(guest: &Guest, passt: &mut Passt, card: &str) {
    assert_eq!(guest.told(&format!("lease {card}"), card), format!("{}/24", Passt::HOST));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let content = noise(12, 1 << 20);
    swap(guest, &listener, Passt::GATEWAY, (&format!("{card}-first"), &content), |_| {});
    let hear =
        format!("nc -l -p {} </dev/null >/run/heard; echo {card}-heard=$(cat /run/heard)\n", Passt::PORT);
    guest.vm.console_input(hear.as_bytes());
    let end = std::time::Instant::now() + LONG;
    // passt takes the connection also while nobody in the guest listens yet, and closes it then.
    while !guest.console().contains(&format!("{card}-heard=hello")) {
        assert!(std::time::Instant::now() < end, "waited for the guest to hear: {}", guest.console());
        if let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", Passt::PORT)) {
            let _ = writeln!(stream, "hello");
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    // It is found again, within a second or so, and the guest asks more than once.
    passt.again();
    swap(guest, &listener, Passt::GATEWAY, (&format!("{card}-again"), &content), |_| {});
}

/// Pings the guest; what part was lost. Wrong bytes in an answer are an error.
pub fn ping(tap: &Tap, arguments: &[&str]) -> String {
    let output =
        Command::new("ping").args(["-n", "-q", "-W", "60"]).args(arguments).arg(tap.guest()).output();
    let output = output.expect("ping (package iputils-ping) must be installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("wrong data"), "{text}");
    let loss = text.split(", ").find(|part| part.contains("packet loss"));
    loss.unwrap_or_else(|| panic!("ping said: {text}")).to_owned()
}

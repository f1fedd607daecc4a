//! Network cards on TAP interfaces. The interfaces are made for the test and gone after it.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use vmbed::{NetConfig, NetStatistics};

use crate::assets::KERNELS;
use crate::balloon::wait_until;
use crate::devices::{noise, sha256};
use crate::guest::{Guest, LONG, config};
use crate::holdings::Holdings;
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("net::checksums_both_ways_over_tcp", checksums));
    trials.push(trial("net::frames_of_every_size", sizes));
    trials.push(trial("net::iperf3_with_every_offload_on_and_off", streams));
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

fn checksums() {
    let tap = Tap::new();
    let content = noise(11, 8 << 20);
    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!(
        "{up}
        echo mac=$(cat /sys/class/net/eth0/address)
        ping -c 3 -q {host} >/run/ping && echo ping=ok
        nc {host} {port} </dev/null >/run/got
        echo got=$(sha256sum </run/got | cut -d' ' -f1)
        dd if=/dev/urandom of=/run/noise bs=1M count=8 2>/dev/null
        echo sent=$(sha256sum </run/noise | cut -d' ' -f1)
        nc {host} {port} </run/noise >/dev/null",
        up = tap.up(),
        host = tap.host()
    );
    let mut config = config(KERNELS[0], &script);
    let mut net = NetConfig::tap(&tap.name);
    net.mac = Some("52:54:00:ab:cd:ef".parse().unwrap());
    config.nets.push(net);
    let guest = Guest::start(config);
    let mut down = accept(&listener, &guest);
    down.write_all(&content).unwrap();
    down.shutdown(std::net::Shutdown::Both).unwrap();
    let mut received = Vec::new();
    accept(&listener, &guest).read_to_end(&mut received).unwrap();
    guest.power_off();
    assert_eq!(guest.value("mac"), "52:54:00:ab:cd:ef");
    assert_eq!(guest.value("ping"), "ok");
    assert_eq!(guest.value("got"), sha256(&content));
    assert_eq!(guest.value("sent"), sha256(&received));
}

/// `ping`, which no one here wrote, checks every byte of what comes back.
fn sizes() {
    let tap = Tap::new();
    let script = format!("{up} echo ready; sleep 1000", up = tap.up());
    let mut config = config(KERNELS[1], &script);
    config.nets.push(NetConfig::tap(&tap.name));
    let guest = Guest::start(config);
    guest.wait_for("ready");
    for length in (0..1472).step_by(97).chain([15, 16, 17, 1471, 1472, 4000]) {
        let lost = ping(&tap, &["-c", "2", "-i", "0.2", "-s", &length.to_string(), "-p", "a55a"]);
        assert_eq!(lost, "0% packet loss", "{length} bytes");
    }
    guest.vm.stop().unwrap();
}

/// A server that ends with the test.
pub struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// TCP and UDP, IPv4 and IPv6, both ways, with small frames and large ones, whatever the guest's driver leaves to do.
fn streams() {
    const STREAMS: &str = "
        mkdir -p /mnt; mount -t ext4 -o ro /dev/vda /mnt; ln -s /mnt/lib64 /lib64; export LD_LIBRARY_PATH=/mnt/lib
        echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip -6 addr add fd5e::2/64 dev eth0; sleep 1
        run() {
            for try in 1 2 3; do
                /mnt/bin/iperf3 -V -l 64k --connect-timeout 60000 \"$@\" >/run/said 2>&1 && return
                # The server may not be done with the last one.
                grep -q busy /run/said && sleep 1 || break
            done
            echo \"$* failed\"; tail -n 20 /run/said; exit 1
        }
        for mtu in 9000 1500; do
            ip link set eth0 mtu $mtu
            for offloads in 'tx on tso on gso on gro on' 'tso off gso off' 'tx off gro off'; do
                /mnt/bin/ethtool -K eth0 $offloads >/dev/null 2>&1 || true
                run -c HOST -n 8M; run -c fd5e::1 -n 8M -R; run -c HOST -n 8M -R; run -c fd5e::1 -n 8M
                run -u -b 80M -l 1400 -c HOST -n 1M; run -u -b 80M -l 8000 -c fd5e::1 -n 1M -R
                echo \"mtu $mtu: $offloads\"
            done
        done
        echo streams=done; sleep 1000";
    let tap = Tap::new();
    ip(&["link", "set", &tap.name, "mtu", "9000"]);
    ip(&["-6", "addr", "add", "fd5e::1/64", "dev", &tap.name, "nodad"]);
    let _server = server("5201");
    let script = tap.up() + &STREAMS.replace("HOST", &tap.host());
    let mut config = crate::disks::with_tools(&script);
    let mut card = NetConfig::tap(&tap.name);
    card.mtu = Some(9000);
    config.nets.push(card);
    let guest = Guest::start(config);
    guest.wait_for("mtu 9000: tx on");
    let long = guest.vm.net_statistics(0).unwrap();
    assert_eq!(guest.value("streams"), "done");
    guest.vm.stop().unwrap();
    // 16 MiB each way over TCP, and what little UDP there is: nobody cut it, and few frames are but for acknowledgements.
    for (frames, bytes) in [(long.rx_frames, long.rx_bytes), (long.tx_frames, long.tx_bytes)] {
        assert!(bytes > 16 << 20 && bytes / frames > 6000, "{long:?}");
    }
    let all = guest.vm.net_statistics(0).unwrap();
    // Of what a client has written, its server may leave the last buffers where they are.
    assert!(all.tx_bytes > 80 << 20 && all.rx_bytes > 80 << 20 && all.tx_dropped == 0, "{all:?}");
}

/// iperf3's other end, on that port.
pub fn server(port: &str) -> Server {
    let mut server = Command::new("iperf3");
    let started = server.args(["-s", "-p", port]).stdout(std::process::Stdio::null()).spawn();
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
            run -c HOST -n 16M; run -c HOST -n 16M -R
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
        run -c HOST -n 4M; run -c HOST -n 4M -R
        echo reset=fine
        read go
        run -c HOST -n 4M; run -c HOST -n 4M -R
        echo tap=back; sleep 1000";
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
    guest.vm.console_input(b"go\n");
    guest.wait_for("tap=back");
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

/// What a stock driver says of addresses, and how it announces itself.
fn filters() {
    const STEPS: &str = "
        echo ready; read go
        ip link set eth0 promisc on; echo promisc; read go
        ip link set eth0 promisc off; ip link set eth0 address 52:54:00:00:00:99; echo moved; sleep 1000";
    let tap = Tap::new();
    let mut config = config(KERNELS[0], &(tap.up() + STEPS));
    config.nets.push(NetConfig::tap(&tap.name));
    let guest = Guest::start(config);
    guest.wait_for("ready");
    assert_eq!(ping(&tap, &["-c", "2", "-i", "0.2"]), "0% packet loss");
    let heard = || guest.vm.net_statistics(0).unwrap();
    // Frames for somebody else, who is said to be the guest.
    let elsewhere = |mac: &str| ip(&["neigh", "replace", &tap.guest(), "lladdr", mac, "dev", &tap.name]);
    elsewhere("52:54:00:00:00:77");
    let before = heard();
    ping(&tap, &["-c", "5", "-i", "0.2", "-W", "1"]);
    let after = heard();
    assert!(after.rx_filtered >= before.rx_filtered + 5, "{before:?} {after:?}");
    guest.vm.console_input(b"go\n");
    guest.wait_for("promisc");
    ping(&tap, &["-c", "5", "-i", "0.2", "-W", "1"]);
    let all = heard();
    assert!(
        all.rx_frames >= after.rx_frames + 5 && all.rx_filtered < after.rx_filtered + 5,
        "{after:?} {all:?}"
    );
    guest.vm.console_input(b"go\n");
    guest.wait_for("moved");
    elsewhere("52:54:00:00:00:99");
    assert_eq!(ping(&tap, &["-c", "2", "-i", "0.2"]), "0% packet loss", "another address is its own");
    let before = heard();
    guest.vm.announce_net(0).unwrap();
    wait_until(&guest, "the guest to announce itself", |_| heard().tx_frames > before.tx_frames);
    guest.vm.stop().unwrap();
}

/// passt, with an interface of the host's that leads nowhere: it wants one, to have addresses from.
struct Passt {
    program: std::process::Child,
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

    fn program(socket: &str) -> std::process::Child {
        let _ = std::fs::remove_file(socket);
        let mut passt = Command::new("passt");
        passt.args(["--foreground", "--quiet", "--ipv4-only", "--socket", socket]);
        passt.args(["--tcp-ports", &Self::PORT.to_string(), "--interface", Self::LINK]);
        let program = passt.stderr(std::process::Stdio::null()).spawn();
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
}

impl Drop for Passt {
    fn drop(&mut self) {
        self.end();
        let _ = std::fs::remove_file(&self.socket);
        let _ = Command::new("ip").args(["link", "del", Self::LINK]).status();
    }
}

/// An address by DHCP, TCP both ways, a port that leads to the guest; and passt ends and begins again.
fn user_space() {
    const STEPS: &str = "
        ip link set lo up; ip link set eth0 up
        cat >/run/lease <<'END'
#!/bin/sh
[ $1 = bound ] || exit 0
ip addr add $ip/$mask dev eth0; ip route add default via $router
END
        chmod 755 /run/lease; udhcpc -q -n -t 20 -i eth0 -s /run/lease >/dev/null 2>&1
        echo address=$(ip -4 -o addr show eth0 | awk '{print $4}')
        mkfifo /run/open; exec 3<>/run/open
        for turn in 1 2; do
            nc GATEWAY PORT <&3 >/run/got
            echo got$turn=$(sha256sum </run/got | cut -d' ' -f1)
            { cat /run/got; read x <&3; } | { nc GATEWAY PORT >/dev/null; echo >&3; }
            nc -l -p FORWARDED </dev/null >/run/heard
            echo heard$turn=$(cat /run/heard)
            read go
        done";
    let mut passt = Passt::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let script = STEPS.replace("GATEWAY", Passt::GATEWAY).replace("PORT", &port);
    let lines: Vec<_> = script.lines().map(str::trim).collect();
    let script = lines.join("\n").replace("FORWARDED", &Passt::PORT.to_string());
    let mut config = config(KERNELS[0], &script);
    config.nets.push(NetConfig::stream(&passt.socket));
    let guest = Guest::start(config);
    assert_eq!(guest.value("address"), format!("{}/24", Passt::HOST));
    let content = noise(12, 4 << 20);
    for turn in 1..=2 {
        let mut down = accept(&listener, &guest);
        down.write_all(&content).unwrap();
        down.shutdown(std::net::Shutdown::Both).unwrap();
        // Until all is there: this passt (2023) forgets what it has not passed on yet when it hears that no more will come.
        let mut received = vec![0; content.len()];
        accept(&listener, &guest).read_exact(&mut received).unwrap();
        assert!(received == content, "what was sent comes back");
        assert_eq!(guest.value(&format!("got{turn}")), sha256(&content));
        if turn == 2 {
            break;
        }
        let end = std::time::Instant::now() + LONG;
        // passt takes the connection also while nobody in the guest listens yet, and closes it then.
        while !guest.console().contains("heard1=hello") {
            assert!(std::time::Instant::now() < end, "waited for the guest to hear: {}", guest.console());
            if let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", Passt::PORT)) {
                let _ = writeln!(stream, "hello");
            }
            std::thread::sleep(Duration::from_millis(300));
        }
        // It is found again, within a second or so.
        passt.end();
        std::thread::sleep(Duration::from_millis(500));
        passt.program = Passt::program(&passt.socket);
        std::thread::sleep(Duration::from_millis(2500));
        guest.vm.console_input(b"go\n");
    }
    let carried = guest.vm.net_statistics(0).unwrap();
    assert!(carried.rx_bytes > 8 << 20 && carried.tx_bytes > 8 << 20, "{carried:?}");
    guest.vm.stop().unwrap();
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

//! Cards that the host's kernel serves (vhost-net), with a stock driver.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{EventKind, Host, NetConfig, RateLimit, Vhost};

use crate::balloon::wait_until;
use crate::devices::noise;
use crate::guest::{Guest, LONG};
use crate::net::{SWAP, TOLD, TOOLS, Tap, ip, ping, server, swap};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("vhost::all_that_can_happen_to_a_card", card));
}

/// Shell: an iperf3 that comes to its end.
const RUN: &str = "run() {
for try in 1 2 3 4 5 6 7 8 9; do /mnt/bin/iperf3 --connect-timeout 60000 \"$@\" >/run/said 2>&1 && return; sleep 1; done
echo \"$* failed\"; tail -n 20 /run/said; exit 1
}
";

/// A guest that does as it is told.
struct Told {
    guest: Guest,
    tap: Tap,
}

impl Told {
    /// Has it run that, and waits until it is done.
    fn run(&self, steps: &str, key: &str) -> String {
        self.guest.told(&steps.replace("HOST", &self.tap.host()), key)
    }

    /// Pairs of queues that the kernel serves.
    fn by_kernel(&self, pairs: u16) {
        let what = format!("vhost-net to serve {pairs} pairs of queues");
        wait_until(&self.guest, &what, |guest| guest.vm.net_statistics(0).unwrap().vhost == pairs);
    }

    /// Frames that vmbed itself has carried.
    fn by_vmbed(&self) -> u64 {
        let carried = self.guest.vm.net_statistics(0).unwrap();
        carried.rx_frames + carried.tx_frames
    }

    /// Bytes that went through the interface, from the guest and to it.
    fn through(&self) -> [u64; 2] {
        ["rx_bytes", "tx_bytes"].map(|name| {
            let path = format!("/sys/class/net/{}/statistics/{name}", self.tap.name);
            std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
        })
    }

    fn flows(&self) {
        let before = self.through();
        wait_until(&self.guest, "traffic both ways", |_| {
            let now = self.through();
            (0..2).all(|way| now[way] > before[way] + (1 << 20))
        });
    }

    /// Full traffic both ways, until something is done about it.
    fn stream(&self, key: &str) {
        let both = "(/mnt/bin/iperf3 -P 4 -c HOST -t 1000 & /mnt/bin/iperf3 -p 5202 -P 4 -c HOST -t 1000 -R) >/dev/null 2>&1 &";
        self.guest.vm.console_input(format!("{both}\n").replace("HOST", &self.tap.host()).as_bytes());
        self.run("said=begun", key);
        self.flows();
    }

    /// Waits for an event.
    fn hear(&self, what: &str, is_it: impl Fn(&EventKind) -> bool) {
        let end = Instant::now() + LONG;
        let mut heard = Vec::new();
        while !heard.last().is_some_and(&is_it) {
            assert!(Instant::now() < end, "waited for {what}, and heard {heard:?}");
            match self.guest.vm.events().next_event() {
                Some(event) => heard.push(event.kind),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// The kernel's threads that are called after one of ours.
fn kernel_threads() -> Vec<String> {
    let numbers = |of: &str| -> Vec<String> {
        let all = std::fs::read_dir(of).unwrap().flatten();
        all.map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| name.parse::<u32>().is_ok())
            .collect()
    };
    let ours: Vec<_> = numbers("/proc/self/task").iter().map(|id| format!("vhost-{id}")).collect();
    // Linux 6.4 and later have them among ours.
    let everywhere = numbers("/proc").into_iter().map(|id| format!("/proc/{id}"));
    let all =
        everywhere.chain(numbers("/proc/self/task").into_iter().map(|id| format!("/proc/self/task/{id}")));
    let name =
        |task: String| Some((std::fs::read_to_string(task.clone() + "/comm").ok()?.trim().to_owned(), task));
    all.filter_map(name).filter(|(name, _)| ours.contains(name)).map(|(_, task)| task).collect()
}

/// Not only that frames pass: `make test-all`.
fn all() -> bool {
    std::env::var_os("VMBED_VHOST").is_some()
}

fn card() {
    assert!(Command::new("modprobe").arg("vhost_net").status().unwrap().success());
    let tap = Tap::with_queues();
    let servers = [server("5201"), server("5202")];
    let mut config = crate::disks::with_tools(&[TOOLS, &tap.up(), SWAP, RUN, TOLD].concat());
    if let vmbed::Boot::Linux(boot) = &mut config.boot {
        // For `devmem`.
        boot.cmdline += " iomem=relaxed";
    }
    let mut net = NetConfig::tap(&tap.name);
    (net.queues, net.vhost) = (2, Vhost::Required);
    config.nets.push(net);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let told = Told { guest: Guest::start(config), tap };
    assert_eq!(told.guest.value("ready"), "yes");
    told.by_kernel(2);
    let threads = kernel_threads();
    assert_eq!(threads.len(), 2, "{threads:?}");
    carries(&told);
    stands_still_and_goes_on(&told);
    if all() {
        breaks(&told);
        loses_its_interface(&told);
    }
    told.stream("again");
    drop(servers);
    let Told { guest, tap } = told;
    drop(guest);
    assert_eq!((descriptors(), kernel_threads().len()), (before, 0), "of descriptors and threads");
    let gone = |task: &String| !std::path::Path::new(task).exists();
    let end = Instant::now() + LONG;
    while !threads.iter().all(gone) {
        assert!(Instant::now() < end, "waited for the end of {threads:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    by_descriptor(&tap);
}

/// TCP both ways with and without offloads, and every byte as it was sent.
fn carries(told: &Told) {
    // VIRTIO_NET_F_CTRL_RX, _VLAN and _RX_EXTRA.
    let offered = "said=$(cut -c 19-21 /sys/class/net/eth0/device/features)";
    assert_eq!(told.run(offered, "filters"), "000", "no filter is offered that vhost-net does not know");
    let ways = [("long", "tx on tso on gso on gro on"), ("cut", "tx off gro off")];
    for (key, offloads) in &ways[..if all() { 2 } else { 1 }] {
        let set = format!("/mnt/bin/ethtool -K eth0 {offloads} >/dev/null 2>&1");
        told.run(&format!("{set}; run -P 2 -c HOST -n 8M; run -P 2 -c HOST -n 8M -R; said=carried"), key);
    }
    let content = noise(41, 4 << 20);
    let listener = TcpListener::bind((told.tap.host(), 0)).unwrap();
    swap(&told.guest, &listener, &told.tap.host(), ("got", &content), |_| {});
    assert!(told.through().iter().all(|bytes| *bytes > 11 << 20), "{:?}", told.through());
    assert_eq!(told.by_vmbed(), 0, "nothing came through vmbed");
}

/// Pauses amid traffic, and what vhost-net cannot do: there vmbed serves the card, and hands it back.
fn stands_still_and_goes_on(told: &Told) {
    told.stream("traffic");
    let vm = &told.guest.vm;
    for _ in 0..if all() { 5 } else { 1 } {
        vm.pause().unwrap();
        let still = told.through();
        assert_eq!(vm.net_statistics(0).unwrap().vhost, 0);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(told.through(), still, "a card stands still with its VM");
        vm.resume().unwrap();
        told.by_kernel(2);
        told.flows();
    }
    assert_eq!(told.by_vmbed(), 0, "nothing came through vmbed");
    vm.set_link(0, false).unwrap();
    told.by_kernel(0);
    // The last frames were on their way.
    std::thread::sleep(Duration::from_millis(100));
    let unplugged = told.through()[0];
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(told.through()[0], unplugged, "nothing leaves the guest");
    vm.set_link(0, true).unwrap();
    told.by_kernel(2);
    told.flows();
    if !all() {
        return;
    }
    let before = told.by_vmbed();
    vm.set_net_rates(0, RateLimit::NONE, RateLimit::NONE.bytes(100 << 20, 10 << 20)).unwrap();
    told.by_kernel(0);
    wait_until(&told.guest, "frames through vmbed", |_| told.by_vmbed() > before + 50);
    vm.set_net_rates(0, RateLimit::NONE, RateLimit::NONE).unwrap();
    told.by_kernel(2);
    told.flows();
    told.run("/mnt/bin/ethtool -L eth0 combined 1; said=one", "fewer");
    told.by_kernel(1);
    told.run("/mnt/bin/ethtool -L eth0 combined 2; said=two", "more");
    told.by_kernel(2);
    told.flows();
}

/// An available index that cannot be: vhost-net stops, vmbed says what is wrong, and another driver finds a card that works.
fn breaks(told: &Told) {
    let vm = &told.guest.vm;
    // A driver that sends writes its index anew, and nobody has seen the wrong one.
    told.run("killall iperf3; sleep 1; said=so", "quiet");
    // The common configuration of virtio over PCI (4.1.4.3): the second queue is that to send by, its available ring at 0x28.
    let ring = told.run(
        "read bar rest </sys/class/net/eth0/device/../resource; busybox devmem $((bar+0x16)) 16 1; said=$(busybox devmem $((bar+0x28)) 32)",
        "ring",
    );
    let ring = u64::from_str_radix(ring.trim_start_matches("0x"), 16).unwrap();
    // Whoever begins to serve a queue looks at it.
    vm.pause().unwrap();
    let mut index = [0; 2];
    vm.read_memory(ring + 2, &mut index).unwrap();
    let wrong = u16::from_le_bytes(index).wrapping_add(0x4000);
    vm.write_memory(ring + 2, &wrong.to_le_bytes()).unwrap();
    vm.resume().unwrap();
    let why = |kind: &EventKind| match kind {
        EventKind::DeviceNeedsReset { device, why } => &**device == "net0" && why.contains("available index"),
        _ => false,
    };
    told.hear("DeviceNeedsReset", why);
    let steps = "device=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net; \
        killall iperf3; echo $device >unbind; echo $device >bind; cd /; sleep 1; UP; \
        run -c HOST -n 4M; run -c HOST -n 4M -R; said=works";
    assert_eq!(told.run(&steps.replace("UP", told.tap.up().trim()), "anew"), "works");
    told.by_kernel(2);
}

/// The interface is deleted and made again.
fn loses_its_interface(told: &Told) {
    told.stream("before");
    ip(&["link", "del", &told.tap.name]);
    told.hear("the loss of the network", |kind| {
        matches!(kind, EventKind::BackendError { errno: libc::ENETDOWN, .. })
    });
    told.by_kernel(0);
    told.tap.plug(&["multi_queue"]);
    wait_until(&told.guest, "the card to find its interface", |_| {
        ping(&told.tap, &["-c", "1", "-w", "1"]).starts_with("0%")
    });
    told.by_kernel(2);
    let steps = "killall iperf3; run -c HOST -n 4M; run -c HOST -n 4M -R; said=works";
    assert_eq!(told.run(steps, "back"), "works");
}

/// Queues that somebody else has attached; and a socket, which is none.
fn by_descriptor(tap: &Tap) {
    let mut config = crate::disks::with_tools("");
    config.nets.push(NetConfig::attached());
    config.nets[0].vhost = Vhost::Required;
    let host = Host::open().unwrap();
    let (near, _far) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let refused = host.builder(config.clone()).net_fd(0, &near).unwrap().build().unwrap_err().to_string();
    assert!(refused.contains("net0") && refused.contains("no TAP interface"), "{refused}");
    config.nets[0].queues = 2;
    let [first, second] = [tap, tap].map(queue);
    let builder = host.builder(config).net_fd(0, &first).unwrap().net_fd(0, &second).unwrap();
    drop(builder.build().unwrap());
}

/// One more queue of the interface.
fn queue(tap: &Tap) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    // `struct ifreq`: 16 bytes of a name, and here the flags.
    let mut request = [0u8; 40];
    request[..tap.name.len()].copy_from_slice(tap.name.as_bytes());
    request[16..18].copy_from_slice(&(flags as u16).to_le_bytes());
    #[expect(unsafe_code, reason = "nothing safe attaches to a TAP interface")]
    // SAFETY: TUNSETIFF reads and writes one ifreq, which is 40 bytes long and lives until the call returns.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{}: {}", tap.name, std::io::Error::last_os_error());
    file
}

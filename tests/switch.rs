//! Guests on the ports of a switch: who hears whom.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vmbed::{
    Access, BareBoot, Bytes, CpuMode, Device, DropReason, ErrorKind, Guard, Host, MacAddress, NetConfig,
    Platform, PortOptions, StopCause, Switch, SwitchOptions, SwitchPort, Vm, VmConfig,
};

mod guests;
use guests::{Op, outcome, script};

const LONG: Duration = Duration::from_secs(60);

/// The guest's word that it has come so far.
#[derive(Default)]
struct Said(AtomicU32);

impl Device for Said {
    fn read(&self, _: Access, _: &mut [u8]) -> vmbed::Result<()> {
        Ok(())
    }

    fn write(&self, _: Access, data: &[u8]) -> vmbed::Result<()> {
        self.0.store(data[0].into(), Ordering::SeqCst);
        Ok(())
    }
}

fn config() -> VmConfig {
    let guest = guests::virtio(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, std::fs::read(&guest).unwrap());
    std::fs::remove_file(guest).unwrap();
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory) = (Platform::Pc, Bytes(guests::MEMORY));
    config.nets.push(NetConfig::attached());
    config
}

fn start(port: &SwitchPort, steps: &[(Op, u32, u32, u32)]) -> (Vm, Arc<Said>) {
    let said = Arc::new(Said::default());
    let builder = Host::open().unwrap().builder(config()).net_port(0, port);
    let vm = builder.pio_device("said", guests::SAY, 1, said.clone()).build().unwrap();
    vm.write_memory(guests::SCRIPT, &script(steps)).unwrap();
    vm.start().unwrap();
    (vm, said)
}

fn results(vm: &Vm, count: usize) -> Vec<guests::Outcome> {
    assert_eq!(vm.wait_timeout(LONG).unwrap(), Some(StopCause::GuestReset), "within a minute");
    let mut bytes = vec![0; 16 * count];
    vm.read_memory(guests::RESULTS, &mut bytes).unwrap();
    (0..count).map(|i| outcome(&bytes, i)).collect()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The stations are 02:02:02:02:02:02 and 04:…; the broadcast address is 0xff.
const ALL: u32 = 0xff;

#[test]
fn guests_of_one_vlan_hear_each_other_and_nobody_else_does() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let access = |name: &str, vlan| switch.add_port(name, &PortOptions::access(vlan)).unwrap();
    let (first, second, other) = (access("first", 10), access("second", 10), access("other", 20));
    // They listen before anybody speaks.
    let listens = [(Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0), (Op::Send, 2, 70, 4), (Op::Tell, 0, 0, 2)];
    let (answers, answers_said) = start(&second, &listens);
    let (outside, outside_said) = start(&other, &listens);
    wait_until("both to listen", || {
        [&answers_said, &outside_said].iter().all(|said| said.0.load(Ordering::SeqCst) > 0)
    });
    let (asks, _said) = start(&first, &[(Op::Send, ALL, 60, 2), (Op::Receive, 0, 0, 0)]);
    assert_eq!(results(&asks, 2)[1], (0, 12 + 70, 6 * 2 + 64 * 4), "the answer");
    assert_eq!(results(&answers, 2)[1], (0, 12 + 60, 6 * 0xff + 54 * 2), "the question");
    assert_eq!(outside_said.0.load(Ordering::SeqCst), 1, "it has heard nothing");
    assert_eq!(outside.stop().unwrap(), StopCause::HostStop);
    assert_eq!(outside.net_statistics(0).unwrap().rx_frames, 0);
    assert_eq!((first.statistics().received.frames, second.statistics().received.frames), (1, 1));
    assert_eq!(
        (first.statistics().sent.bytes, second.statistics().sent.bytes, other.statistics().sent.frames),
        (70, 60, 0)
    );
}

#[test]
fn a_guard_keeps_a_guest_to_its_own_name() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let mac = MacAddress([4; 6]);
    let guarded = switch.add_port("guarded", &PortOptions::access(1).guard(Guard::new(mac, []))).unwrap();
    let open = switch.add_port("open", &PortOptions::access(1)).unwrap();
    let (hears, said) = start(&open, &[(Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0)]);
    wait_until("it to listen", || said.0.load(Ordering::SeqCst) == 1);
    let (lies, _said) = start(&guarded, &[(Op::Send, ALL, 60, 2), (Op::Send, ALL, 64, 4)]);
    results(&lies, 2);
    assert_eq!(results(&hears, 2)[1].1, 12 + 64, "the second one");
    let drops: Vec<_> = guarded.statistics().drops().collect();
    assert_eq!(drops, [(DropReason::SpoofedMac, 1)]);
}

#[test]
fn a_port_is_for_one_card_and_free_again_with_its_vm() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let port = switch.add_port("port", &PortOptions::access(1)).unwrap();
    let build = || Host::open().unwrap().builder(config()).net_port(0, &port).build();
    let vm = build().unwrap();
    let error = build().err().unwrap();
    assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("net0"), "{error}");
    drop(vm);
    drop(build().unwrap());
    port.remove();
    assert_eq!(build().err().unwrap().kind(), ErrorKind::NotFound);
    let twice = Host::open().unwrap().builder(config()).net_port(0, &port).net_port(0, &port).build();
    assert!(twice.err().unwrap().to_string().contains("nets[0].tap"));
}

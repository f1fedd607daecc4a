//! Hostile guests beside those that work: each does all that `hostile.c` knows to its devices, ends, and is followed by another one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmbed::{
    BareBoot, CpuMode, EventKind, Host, NetConfig, PortOptions, StopCause, Switch, SwitchPort, VmConfig,
};

use super::schedule::Random;
use crate::rogue::{LONG, Rogue, SEND, USE, rows, types_without_end};

/// What they did: rows of the table, and VMs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub rows: usize,
    pub vms: usize,
}

/// One after the other until it is over.
pub fn keep_on(host: &Host, switch: &Switch, seed: u64, over: &AtomicBool) -> Done {
    let (mut random, mut done) = (Random(seed), Done::default());
    let port = |name: &str, vlan| switch.add_port(name, &PortOptions::access(vlan)).unwrap();
    let cable = [port("rogue0", super::VLAN + 1), port("rogue1", super::VLAN + 1)];
    let among = [port("rogue2", super::VLAN), port("rogue3", super::VLAN)];
    while !over.load(Ordering::Relaxed) {
        // A cable of its own; two ports of the switch; and then amid the others.
        let switched = !done.vms.is_multiple_of(2);
        let rogue = if switched { on(host, &cable) } else { Rogue::start(host) };
        let mut order = rows();
        // The rows about frames send to where they come from, which a switch does not pass on.
        order.retain(|row| !switched || *row < 17);
        random.shuffle(&mut order);
        for row in order {
            if over.load(Ordering::Relaxed) {
                break;
            }
            if row == 22 {
                types_without_end(&rogue.vm);
            }
            rogue.does(row);
            let told = rogue.events();
            let harmless = |kind: &EventKind| matches!(kind, EventKind::DeviceNeedsReset { .. });
            assert!(told.iter().all(harmless), "row {row}: {told:?}");
            done.rows += 1;
            // The others are to get somewhere, too.
            std::thread::sleep(Duration::from_millis(random.below(500)));
        }
        assert_eq!(rogue.does(USE), 0);
        rogue.disk_is_unharmed();
        rogue.ends();
        drop(rogue);
        let rogue = on(host, &among);
        (0..10).for_each(|_| assert_eq!(rogue.does(SEND), 0));
        drop(rogue);
        bare(host);
        done.vms += 5;
    }
    done
}

/// A hostile guest with its cards on these ports.
fn on(host: &Host, ports: &[SwitchPort; 2]) -> Rogue {
    Rogue::with(host, vec![NetConfig::attached(); 2], |builder, disk| {
        builder.disk_fd(0, disk).unwrap().net_port(0, &ports[0]).net_port(1, &ports[1])
    })
}

/// A jump to where nothing is, a triple fault, and one that never leaves its loop.
fn bare(host: &Host) {
    let built = |mode, code: &[u8]| {
        let vm = host.build(VmConfig::bare(BareBoot::new(mode, 0x1000, code))).unwrap();
        vm.start().unwrap();
        vm
    };
    let vm = built(CpuMode::Protected, &[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]); // mov eax, 0xd0000000; jmp eax
    let cause = vm.wait_timeout(LONG).unwrap();
    assert!(matches!(cause, Some(StopCause::VcpuFault { .. })), "{cause:?}");
    // lidt [0x1100], where there are zeroes; ud2
    let vm = built(CpuMode::Protected, &[0x0f, 0x01, 0x1d, 0, 0x11, 0, 0, 0x0f, 0x0b]);
    assert_eq!(vm.wait_timeout(LONG).unwrap(), Some(StopCause::TripleFault));
    let vm = built(CpuMode::Real, &[0xfa, 0xeb, 0xfe]); // cli; jmp $
    assert_eq!(vm.wait_timeout(Duration::from_millis(300)).unwrap(), None, "it goes on by itself");
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

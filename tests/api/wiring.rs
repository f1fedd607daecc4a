//! Bridges and TAP interfaces of the host, in a network namespace of the test's own. tests/linux/wiring.rs has the rest, where there is a
//! kernel that knows VLANs.

use vmbed::{BridgeOptions, ErrorKind, PortVlan, TapOptions, Wiring};

pub fn the_hosts_side_of_a_network() {
    let run = std::thread::spawn(|| {
        #[expect(unsafe_code, reason = "libc's")]
        // SAFETY: an integer goes in; what changes is this thread's.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        in_a_namespace();
    });
    run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Whether this thread's namespace has that interface.
fn there(name: &str) -> bool {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    text.lines().any(|line| line.trim().split(':').next() == Some(name))
}

fn in_a_namespace() {
    let wiring = Wiring::new().unwrap();
    let mut bridge = BridgeOptions::default();
    (bridge.mac, bridge.mtu) = (Some("02:00:00:00:00:01".parse().unwrap()), Some(1400));
    wiring.add_bridge("br0", &bridge).unwrap();
    wiring.add_bridge("br1", &BridgeOptions::default()).unwrap();
    let mut on = TapOptions::on("br0");
    (on.multi_queue, on.owner, on.persistent) = (true, Some(65534), true);
    wiring.add_tap("vnet0", &on).unwrap();
    wiring.add_tap("vnet1", &TapOptions::default()).unwrap();
    wiring.attach("vnet1", "br1").unwrap();
    assert!(["br0", "br1", "vnet0", "vnet1"].into_iter().all(there));

    let refused = |done: vmbed::Result<()>, kind, word: &str| {
        let error = done.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(word), "{error:?}");
    };
    refused(wiring.add_bridge("br0", &bridge), ErrorKind::Busy, "bridge 'br0'");
    let tap = TapOptions::on("br0");
    refused(wiring.add_tap("vnet2", &tap.clone().access(10)), ErrorKind::InvalidState, "VLANs");
    refused(wiring.add_tap("vnet2", &tap.access(4095)), ErrorKind::InvalidArgument, "VLAN 4095");
    let vlans = PortVlan::Trunk { vlans: vec![10, 20], native: None };
    refused(wiring.set_vlans("vnet0", &vlans), ErrorKind::InvalidState, "VLANs");
    refused(wiring.add_vlan("eth7.10", "eth7", 10), ErrorKind::NotFound, "'eth7'");
    refused(wiring.attach("vnet1", "br0"), ErrorKind::InvalidState, "port of 'br1'");
    refused(wiring.remove("lo"), ErrorKind::InvalidArgument, "there before");
    assert!(!there("br2") && !there("vnet2"));

    wiring.detach("vnet1").unwrap();
    wiring.set_mtu("vnet1", 9000).unwrap();
    wiring.set_mac("vnet1", "02:00:00:00:00:02".parse().unwrap()).unwrap();
    wiring.set_mtu("lo", 2000).unwrap();
    wiring.set_up("lo", true).unwrap();
    wiring.remove("br1").unwrap();
    assert!(!there("br1"));
    wiring.release().unwrap();
    assert!(!there("br0") && there("vnet0") && !there("vnet1"));
    let wiring = Wiring::new().unwrap();
    wiring.add_bridge("br0", &BridgeOptions::default()).unwrap();
    drop(wiring);
    assert!(!there("br0"));
}

#![forbid(unsafe_code)]

use super::*;
use crate::config::{MacAddress, NetConfig};
use crate::net::pair::Pair;
use crate::virtio::net::Net;
use crate::virtio::queue_driver::{Driver, WRITE, activation, signals};
use crate::virtio::{Activation, VirtioDevice};

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

fn control(wanted: config::Vhost) -> Arc<Control> {
    let config = NetConfig { vhost: wanted, ..NetConfig::attached() };
    Arc::new(Control::new("net0", MAC, &config, None))
}

#[test]
fn what_is_no_tap_interface_is_refused_where_it_must_be_one_and_left_to_vmbed_elsewhere() {
    let lanes: [(Box<dyn NetBackend>, Place); 1] = [(Box::new(Pair::new().0), Place::Caller)];
    let required = control(config::Vhost::Required);
    let refused = Vhost::open_all(&required, config::Vhost::Required, &lanes).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
    assert!(refused.to_string().contains("net0: vhost is required"), "{refused}");
    for wanted in [config::Vhost::Off, config::Vhost::IfPresent] {
        assert!(Vhost::open_all(&control(wanted), wanted, &lanes).unwrap().is_empty());
    }
    let other: Vec<Box<dyn NetBackend>> = vec![Box::new(Pair::new().0)];
    let (refused, _) = required.put_ready(other).unwrap_err();
    assert!(refused.to_string().contains("no TAP interface"), "{refused}");
    assert!(control(config::Vhost::IfPresent).put_ready(vec![Box::new(Pair::new().0)]).is_ok());
}

#[test]
fn errors_name_the_remedy() {
    let text = |errno| not_opened("net0", io::Error::from_raw_os_error(errno));
    for errno in [libc::ENOENT, libc::ENODEV] {
        assert_eq!(text(errno).kind(), ErrorKind::NotFound);
        let missing = text(errno).to_string();
        assert!(
            missing.contains("net0: /dev/vhost-net is missing") && missing.contains("modprobe vhost_net")
        );
    }
    let denied = text(libc::EACCES);
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
    assert!(denied.to_string().contains("read and write access"));
}

/// A card whose kernel refuses everything.
fn forsaken() -> (Net, Arc<Control>, crate::net::pair::Control, Driver, Driver) {
    let control = control(config::Vhost::IfPresent);
    let bell = || EventFd::new(EFD_NONBLOCK).unwrap();
    let dead = Vhost {
        device: Device::dead(),
        memory: None,
        control: control.clone(),
        serves: false,
        failed: false,
        errors: bell(),
        changes: bell(),
        look: TimerFd::new().unwrap(),
    };
    let (backend, far) = Pair::new();
    let net = Net::new(control.clone(), vec![(Box::new(backend), Place::Caller)]).with_kernel(vec![dead]);
    let memory = Memory::new(1 << 20).unwrap();
    (net, control, far, Driver::new(&memory, 0x4000, 16), Driver::new(&memory, 0xc000, 16))
}

#[test]
fn where_the_kernel_refuses_vmbed_serves() {
    let (mut net, control, far, mut rx, mut tx) = forsaken();
    assert_eq!(net.features() & UNKNOWN, 0, "it may come to serve a card later");
    let signals = signals("net0").0;
    for _ in 0..2 {
        let begun: Activation = activation(0, &[&rx, &tx], &signals);
        net.activate(begun).unwrap();
        let sent = tx.send(&[(0x8_0000, 12 + 60, 0)]);
        rx.send(&[(0x2_0000, 1526, WRITE)]);
        far.far.send(&[0; 72]).unwrap();
        net.process_queues();
        assert_eq!((tx.take_used(), rx.take_used().map(|(_, len)| len)), (Some((sent, 0)), Some(72)));
        net.deactivate();
        rx.reset();
        tx.reset();
    }
    let carried = control.statistics();
    assert_eq!((carried.vhost, carried.tx_frames, carried.rx_frames), (0, 2, 2));
    assert_eq!(signals.status(), 0, "the driver hears nothing of it");
}

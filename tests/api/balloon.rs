//! Memory that a guest gives back.

use std::time::Duration;

use vmbed::{BalloonConfig, Bytes, ErrorKind, EventKind};

use crate::backends::{Guest, config};
use crate::guest::host;
use crate::guests::Op;

const LONG: Duration = Duration::from_secs(60);

pub fn memory_given_back() {
    let mut config = config(0, 0);
    let without = host().builder(config.clone()).build().unwrap();
    assert_eq!(without.set_balloon(Bytes(0)).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(without.balloon_statistics().unwrap_err().kind(), ErrorKind::Unsupported);
    drop(without);
    config.balloon = Some(BalloonConfig::default());
    let with_balloon = config.clone();
    let steps = [
        (Op::Account, 0, 4, 2),
        (Op::Tell, 0, 0, 1),
        (Op::Asked, 0, 0, 0),
        (Op::Account, 0, 4, 3),
        (Op::Target, 128, 0, 0),
        (Op::Inflate, 768, 128, 9),
        (Op::Deflate, 768, 64, 0),
    ];
    let host = host();
    let guest = Guest::start(host.builder(config), &steps);
    guest.wait_for(1);
    let vm = &guest.vm;
    let account = vm.guest_memory(LONG).unwrap();
    assert_eq!(
        (account.free, account.total, account.caches),
        (Some(Bytes::mib(3)), Some(Bytes::mib(4)), None)
    );
    assert_eq!(vm.guest_memory(Duration::ZERO).unwrap(), account, "the last one that came");
    let error = vm.set_balloon(Bytes::mib(5)).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidArgument && error.to_string().contains("balloon0"), "{error}");
    assert_eq!(vm.discard_free_pages(LONG).unwrap_err().kind(), ErrorKind::Unsupported);
    let size = Bytes(128 << 12);
    vm.set_balloon(size).unwrap();
    guest.results(steps.len());
    let moved = vm.balloon_statistics().unwrap();
    assert_eq!((moved.target, moved.actual, vm.memory().loaned), (size, size, size));
    assert_eq!(host.usage().loaned, size);
    assert_eq!((moved.inflated.claimed, moved.inflated.measured), (size, size));
    assert_eq!((moved.deflated, moved.reported.claimed, moved.ignored), (Bytes(64 << 12), Bytes(0), 0));
    let events: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).map(|e| e.kind).collect();
    assert!(events.contains(&EventKind::Balloon { target: size, actual: size }), "{events:?}");
    drop(guest);

    // Whoever waits for a guest's answer waits no longer than there is one.
    let guest = Guest::start(host.builder(with_balloon), &steps);
    guest.wait_for(1);
    guest.vm.pause().unwrap();
    std::thread::scope(|scope| {
        let asks = scope.spawn(|| guest.vm.guest_memory(LONG).unwrap_err());
        std::thread::sleep(Duration::from_millis(50));
        guest.vm.stop().unwrap();
        let error = asks.join().unwrap();
        assert!(
            error.kind() == ErrorKind::InvalidState && error.to_string().contains("has ended"),
            "{error}"
        );
    });
    assert_eq!(guest.vm.guest_memory(LONG).unwrap_err().kind(), ErrorKind::InvalidState);
}

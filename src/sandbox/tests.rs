#![forbid(unsafe_code)]

use std::collections::HashSet;

use super::*;

const ALL: Opens = Opens { taps: true, streams: true, vhost: true };
const NONE: Opens = Opens { taps: false, streams: false, vhost: false };

#[test]
fn nothing_is_killed_and_nothing_refused_unheard() {
    for opens in [ALL, NONE] {
        let filters = Filters::compile(opens).unwrap();
        for duty in calls::DUTIES {
            let ends: HashSet<u32> =
                filters.of(duty).iter().filter(|i| i.code == 0x06).map(|i| i.k).collect();
            assert_eq!(
                ends,
                HashSet::from([libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF]),
                "{duty:?}"
            );
        }
    }
}

#[test]
fn files_and_sockets_are_for_cards_that_were_given_by_name_alone() {
    use syscalls::Sysno;
    let may = |duty, call, opens| calls::of(duty).any(|rule| rule.call == call && rule.when.is_so(opens));
    for call in [Sysno::openat, Sysno::socket] {
        assert!(may(Duty::Device, call, ALL) && !may(Duty::Device, call, NONE));
        for duty in [Duty::Vcpu, Duty::Disk, Duty::Balloon] {
            assert!(!may(duty, call, ALL), "{duty:?} {call}");
        }
    }
    for call in [
        Sysno::open,
        Sysno::execve,
        Sysno::execveat,
        Sysno::clone,
        Sysno::clone3,
        Sysno::ptrace,
        Sysno::io_uring_setup,
    ] {
        assert!(calls::DUTIES.iter().all(|duty| !may(*duty, call, ALL)), "{call}");
    }
}

#[test]
fn a_notice_reads_as_people_would_write_it() {
    let said = describe(&Notice::of(0xc000_003e, 257, [0xffff_ff9c, 0x7f00, 0, 0, 0, 0]));
    assert_eq!(said, "openat (257) with 0xffffff9c, 0x7f00, 0x0, 0x0, 0x0, 0x0");
    assert!(describe(&Notice::of(0x4000_0003, 5, [0; 6])).starts_with("a call of 32-bit programs (5)"));
    assert!(describe(&Notice::of(0xc000_003e, 99_999, [0; 6])).contains("(99999)"));
}

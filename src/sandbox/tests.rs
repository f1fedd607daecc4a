#![forbid(unsafe_code)]

use std::collections::HashSet;

use super::*;

#[test]
fn nothing_is_killed_and_nothing_refused_unheard() {
    for vhost in [true, false] {
        let filters = Filters::compile(&calls::DUTIES, vhost).unwrap();
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
fn no_duty_opens_files_or_sockets_or_starts_anything() {
    use syscalls::Sysno;
    let may = |duty, call| calls::of(duty).any(|rule| rule.call == call);
    for call in [
        Sysno::open,
        Sysno::openat,
        Sysno::openat2,
        Sysno::socket,
        Sysno::connect,
        Sysno::execve,
        Sysno::execveat,
        Sysno::clone,
        Sysno::clone3,
        Sysno::ptrace,
        Sysno::io_uring_setup,
    ] {
        assert!(calls::DUTIES.iter().all(|duty| !may(*duty, call)), "{call}");
    }
}

#[test]
fn a_notice_reads_as_people_would_write_it() {
    let said = describe(&Notice::of(0xc000_003e, 257, [0xffff_ff9c, 0x7f00, 0, 0, 0, 0]));
    assert_eq!(said, "openat (257) with 0xffffff9c, 0x7f00, 0x0, 0x0, 0x0, 0x0");
    assert!(describe(&Notice::of(0x4000_0003, 5, [0; 6])).starts_with("a call of 32-bit programs (5)"));
    assert!(describe(&Notice::of(0xc000_003e, 99_999, [0; 6])).contains("(99999)"));
}

#[test]
fn what_the_allocator_asks_ends_no_vm_and_nothing_like_it_passes_for_it() {
    let peek = Peek::new().unwrap();
    let judged = |number, from: i32, path: &std::ffi::CStr, flags: i32| {
        let arguments = [from as u32 as u64, path.as_ptr() as u64, flags as u64, 0, 0, 0];
        judge(Duty::Disk, &Notice::of(0xc000_003e, number, arguments), &peek)
    };
    let (here, flags) = (libc::AT_FDCWD, libc::O_RDONLY | libc::O_CLOEXEC);
    assert_eq!(judged(257, here, c"/proc/sys/vm/overcommit_memory", flags), Verdict::Fails);
    for (number, from, path, flags) in [
        (258, here, c"/proc/sys/vm/overcommit_memory", flags),
        (257, 3, c"/proc/sys/vm/overcommit_memory", flags),
        (257, here, c"/proc/sys/vm/overcommit_ratio", flags),
        (257, here, c"/proc/sys/vm/overcommit_memory", libc::O_RDWR | libc::O_CLOEXEC),
    ] {
        assert_eq!(judged(number, from, path, flags), Verdict::Violates, "{number} {path:?} {flags}");
    }
}

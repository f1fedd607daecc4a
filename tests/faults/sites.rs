//! Of every place of src that calls the kernel, a call fails in one of the lives, or it is said why not.

use crate::Kind;
use crate::life::lock;
use crate::places::Places;
use crate::sweep::{AFTER, HITS};

/// Why a place does not fail in any life.
enum Why {
    /// It undoes, or does in another way, what has failed: it is come by in lives in which something fails.
    After,
    /// It fails for its arguments alone, or not at all, or nothing of it is a call.
    Cannot(&'static str),
    /// What this test itself is made of is in its way.
    Here(&'static str),
    /// Another processor or kernel makes it; this one may.
    Elsewhere(&'static str),
}

use Why::{After, Cannot, Elsewhere, Here};

/// File and function, and what of its calls is not come by.
const EXCUSED: [(&str, &str, Why); 36] = [
    ("block/create.rs", "create_disk", After),
    ("block/engine/uring.rs", "finish", Cannot(IN_PARTS)),
    ("block/engine/uring.rs", "submit", Cannot("a flush, which does not go this way")),
    ("block/own.rs", "abandon", Here(FOR_SECONDS)),
    ("host/probe.rs", "no_device", After),
    ("host/reclaim/worker.rs", "wait", Cannot(GIVES_BACK)),
    ("memory/backing.rs", "set_up", After),
    ("memory/residency.rs", "huge", After),
    (
        "net/switch/mod.rs",
        "capture",
        Cannot("the end of the embedder's writer, which has nothing to write yet"),
    ),
    ("reactor.rs", "add", After),
    ("reactor.rs", "detach", Cannot(GIVES_BACK)),
    ("reactor.rs", "remove", Cannot(GIVES_BACK)),
    ("reactor/dispatcher.rs", "remove", Cannot(GIVES_BACK)),
    ("sys/fd.rs", "is_nonblocking", After),
    ("sys/fd.rs", "is_writable", After),
    ("sys/fork.rs", "make_page", Here(ANONYMOUS)),
    ("sys/image.rs", "pure_write_zeroes", After),
    ("sys/image.rs", "resize", Cannot("the library asks for it in nothing that is done with an image here")),
    ("sys/memory.rs", "map_inside", Cannot("it is given the mapping")),
    ("sys/netlink.rs", "exchange", Here("what is asked for after an answer that could not be read")),
    ("sys/netlink.rs", "open", Here("what the call before it has left on the stack is taken for it")),
    ("sys/residency.rs", "count_entries", Elsewhere("kernels before 6.7")),
    ("sys/residency.rs", "resident_in", After),
    ("sys/seccomp.rs", "answer", Here(ONE_LISTENER)),
    ("sys/seccomp.rs", "finds", Here(ONE_LISTENER)),
    ("sys/seccomp.rs", "receive", Here(ONE_LISTENER)),
    ("sys/sigbus.rs", "pass_on", Cannot(IN_A_HANDLER)),
    ("sys/sigbus.rs", "replace", Cannot(IN_A_HANDLER)),
    ("sys/uring.rs", "drop", Here(FOR_SECONDS)),
    (
        "virtio/net/worker.rs",
        "process",
        Here("an interface that is removed under an idle card: tests/sandbox has one"),
    ),
    (
        "virtio/transport/doorbells.rs",
        "arm",
        Elsewhere("KVMs that compare no length, and machines of tests without one"),
    ),
    ("virtio/transport/doorbells.rs", "disarm", Elsewhere("KVMs that compare no length")),
    ("vm/answers.rs", "answer", Here(ONE_LISTENER)),
    ("vm/answers.rs", "hear", Here(ONE_LISTENER)),
    ("vm/answers.rs", "new", Here(ONE_LISTENER)),
    ("vm/supervisor.rs", "process", Here(ONE_LISTENER)),
];

const ANONYMOUS: &str =
    "memory without a file cannot be told from the allocator's, for want of which a Rust program ends";
const FOR_SECONDS: &str =
    "a request that is not answered for five seconds: unit tests have it, with less patience";
const GIVES_BACK: &str = "what is forgotten is: see the supervisor";
const IN_A_HANDLER: &str = "in a handler of signals, where the process ends if it fails";
const IN_PARTS: &str = "a flush that came to its end in parts";
const ONE_LISTENER: &str =
    "a thread has one filter that somebody hears of, and these have the test's; tests/sandbox has the others";

/// Calls that come from no line of src, and whose they are. The first of each kind fails as those from lines do.
const NOBODYS: [(libc::c_long, u32, &str); 12] = [
    (libc::SYS_fcntl, 0, "the standard library's, before it closes a file, in tests"),
    (libc::SYS_madvise, 0, "the C library's, of a thread's stack at its end"),
    (libc::SYS_mmap, 0, "the C library's stacks; a ring's queues, by its crate on a thread of its own"),
    (libc::SYS_io_uring_setup, 0, "the same ring"),
    (libc::SYS_openat, 0, "the C library's, at a thread's end"),
    (libc::SYS_prctl, 0, "the standard library's name of a thread"),
    (libc::SYS_read, 0, "the event manager's crate"),
    (libc::SYS_write, 0, "a capture's file, through the embedder's own buffer"),
    (libc::SYS_write, Kind::PART, "the same"),
    (libc::SYS_socketpair, 0, "the test's"),
    (libc::SYS_ioctl, libc::FIONBIO as u32, "the test's"),
    (libc::SYS_epoll_ctl, Kind::KEPT, "the event manager's crate"),
];

/// What is wrong with these lists, now that all has been tried, where calls of those kinds come from no line.
pub fn wrong(places: &Places, nobodys: Vec<Kind>) -> Vec<String> {
    let (hits, after) = (lock(&HITS), lock(&AFTER));
    let mut wrong = Vec::new();
    for (place, number) in places.all.iter().zip(1u32..).filter(|(_, number)| !hits.contains(number)) {
        if !EXCUSED.iter().any(|(file, name, _)| *file == place.file && *name == place.function) {
            let seen =
                if after.contains(&number) { "no call from there was answered" } else { "no life comes by" };
            wrong.push(format!("{place}: {seen}, and nobody says why"));
        }
    }
    for (file, function, why) in &EXCUSED {
        let own = places.all.iter().zip(1u32..).filter(|(p, _)| p.file == *file && p.function == *function);
        let (hit, left): (Vec<u32>, _) =
            own.map(|(_, number)| number).partition(|number| hits.contains(number));
        let is_stale = match why {
            After => left.is_empty() || !left.iter().all(|number| after.contains(number)),
            Cannot(why) | Here(why) => left.is_empty() || why.is_empty(),
            Elsewhere(why) => left.is_empty() && hit.is_empty() || why.is_empty(),
        };
        if is_stale {
            wrong.push(format!(
                "{file}: {function}: its excuse does not hold: left {left:?}, after a fault {after:?}"
            ));
        }
    }
    let known = |kind: &Kind| NOBODYS.iter().any(|(number, request, _)| *kind == Kind::of(*number, *request));
    wrong.extend(
        nobodys
            .iter()
            .filter(|kind| !known(kind))
            .map(|kind| format!("{}: from no line of src", kind.name())),
    );
    wrong
}

//! Of every place of src that calls the kernel, a call fails in one of the lives, or it is said why not.

use crate::Kind;
use crate::callers::LOST;
use crate::life::lock;
use crate::places::Places;
use crate::sweep::{AFTER, HITS, NOBODYS};

/// File and function, how many of its lines at most, and why no call of theirs fails.
const EXCUSED: [(&str, &str, usize, &str); 14] = [
    ("block/engine/uring.rs", "submit", 1, "a flush, which does not go this way"),
    ("capi/arguments.rs", "fd", 1, "for its number alone"),
    ("host/reclaim/worker.rs", "wait", 1, GIVES_BACK),
    ("net/switch/mod.rs", "capture", 1, "the end of the embedder's writer, which has nothing to write yet"),
    ("reactor.rs", "add", 1, GIVES_BACK),
    ("reactor.rs", "detach", 1, GIVES_BACK),
    ("reactor.rs", "remove", 1, GIVES_BACK),
    ("reactor/dispatcher.rs", "remove", 1, GIVES_BACK),
    ("sys/image.rs", "resize", 1, "the library asks for it in nothing that is done with an image here"),
    ("sys/memory.rs", "map_inside", 1, "it is given the mapping"),
    ("sys/sigbus.rs", "pass_on", 1, IN_A_HANDLER),
    ("sys/sigbus.rs", "replace", 2, IN_A_HANDLER),
    ("virtio/transport/doorbells.rs", "arm", 1, "of machines without KVM, in unit tests"),
    ("vm/answers.rs", "answer", 1, GIVES_BACK),
];

const GIVES_BACK: &str = "what is forgotten is: see the supervisor";
const IN_A_HANDLER: &str = "in a handler of signals, which ends the process then, or can do nothing about it";

/// Calls that come from no line of src, and whose they are. The first of each kind fails as those from lines do.
const OTHERS: [(libc::c_long, u32, &str); 4] = [
    (libc::SYS_madvise, 0, "the C library's, of a thread's stack at its end"),
    (libc::SYS_prctl, 0, "the standard library's name of a thread"),
    (libc::SYS_socketpair, 0, "the test's"),
    (libc::SYS_ioctl, libc::FIONBIO as u32, "the test's"),
];

/// Those that are not among them.
pub fn nobodys() -> Vec<String> {
    let known =
        |kind: &&Kind| OTHERS.iter().any(|(number, request, _)| **kind == Kind::of(*number, *request));
    let kinds = lock(&NOBODYS);
    kinds
        .iter()
        .filter(|kind| !known(kind))
        .map(|kind| format!("{}: from no line of src", kind.name()))
        .collect()
}

/// What is wrong with the list of excuses, now that all has been tried.
pub fn wrong(places: &Places) -> Vec<String> {
    let (hits, after) = (lock(&HITS), lock(&AFTER));
    let mut wrong = Vec::new();
    if after.contains(&LOST) {
        wrong.push("there are calls whose stacks do not say where they come from".into());
    }
    for (place, number) in places.known(&after).filter(|(_, number)| !hits.contains(number)) {
        if !EXCUSED.iter().any(|(file, name, ..)| *file == place.file && *name == place.function) {
            let seen =
                if after.contains(&number) { "no call from there was answered" } else { "no life comes by" };
            wrong.push(format!("{place}: {seen}, and nobody says why"));
        }
    }
    for (file, function, most, why) in &EXCUSED {
        let own = places.known(&after).filter(|(p, _)| p.file == *file && p.function == *function);
        let left: Vec<u32> = own.map(|(_, number)| number).filter(|number| !hits.contains(number)).collect();
        let is_stale = left.is_empty() || why.is_empty();
        if is_stale || left.len() > *most {
            let after = left.iter().filter(|number| after.contains(number)).count();
            wrong.push(format!(
                "{file}: {function}: its excuse does not hold: left are {} lines, of {most}, {after} of which are come by",
                left.len()
            ));
        }
    }
    wrong
}

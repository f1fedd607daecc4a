//! Of every place of src that calls the kernel, a call fails in one of the lives, or it is said why not.

use crate::Kind;
use crate::callers::LOST;
use crate::life::lock;
use crate::places::Places;
use crate::sweep::{AFTER, HITS, NOBODYS};

/// Why a place does not fail in any life.
enum Why {
    /// It fails for its arguments alone, or not at all, or nothing of it is a call.
    Cannot(&'static str),
    /// Another processor or kernel makes it; this one may.
    Elsewhere(&'static str),
}

use Why::{Cannot, Elsewhere};

/// File and function, how many of its lines at most, and what there is about them.
const EXCUSED: [(&str, &str, usize, Why); 15] = [
    ("block/engine/uring.rs", "submit", 1, Cannot("a flush, which does not go this way")),
    ("capi/arguments.rs", "fd", 1, Cannot("for its number alone")),
    ("host/reclaim/worker.rs", "wait", 1, Cannot(GIVES_BACK)),
    (
        "net/switch/mod.rs",
        "capture",
        2,
        Cannot("the end of the embedder's writer, which has nothing to write yet"),
    ),
    ("reactor.rs", "add", 1, Cannot(GIVES_BACK)),
    ("reactor.rs", "detach", 1, Cannot(GIVES_BACK)),
    ("reactor.rs", "remove", 1, Cannot(GIVES_BACK)),
    ("reactor/dispatcher.rs", "remove", 1, Cannot(GIVES_BACK)),
    (
        "sys/image.rs",
        "resize",
        1,
        Cannot("the library asks for it in nothing that is done with an image here"),
    ),
    ("sys/memory.rs", "map_inside", 1, Cannot("it is given the mapping")),
    ("sys/sigbus.rs", "pass_on", 1, Cannot(IN_A_HANDLER)),
    ("sys/sigbus.rs", "replace", 2, Cannot(IN_A_HANDLER)),
    (
        "virtio/transport/doorbells.rs",
        "arm",
        2,
        Elsewhere("KVMs that compare no length, and machines of tests without one"),
    ),
    ("virtio/transport/doorbells.rs", "disarm", 1, Elsewhere("KVMs that compare no length")),
    ("vm/answers.rs", "answer", 1, Cannot(GIVES_BACK)),
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
        let (hit, left): (Vec<u32>, _) =
            own.map(|(_, number)| number).partition(|number| hits.contains(number));
        let is_stale = match why {
            Cannot(why) => left.is_empty() || why.is_empty(),
            Elsewhere(why) => left.is_empty() && hit.is_empty() || why.is_empty(),
        };
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

//! Every place of src that calls the kernel is come by in one of the lives, and so fails there, or it is said why not.

use std::collections::BTreeSet;

use crate::life::lock;
use crate::places::Places;
use crate::sweep::AFTER;

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
const EXCUSED: [(&str, &str, Why); 33] = [
    ("block/create.rs", "create_disk", After),
    ("block/engine/uring.rs", "finish", Cannot(IN_PARTS)),
    ("block/engine/uring.rs", "submit", Cannot("a flush, which does not go this way")),
    ("block/own.rs", "abandon", Cannot(FOR_SECONDS)),
    ("host/probe.rs", "no_device", Elsewhere("machines without KVM")),
    ("host/reclaim/worker.rs", "wait", Cannot(GIVES_BACK)),
    ("memory/backing.rs", "set_up", After),
    ("memory/residency.rs", "huge", After),
    ("reactor.rs", "add", After),
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
    ("sys/uring.rs", "drop", Cannot(FOR_SECONDS)),
    ("virtio/net/worker.rs", "process", Here("the other end goes in the middle of a read")),
    (
        "virtio/transport/doorbells.rs",
        "arm",
        Elsewhere("Intel's processors, and machines of tests without KVM"),
    ),
    ("virtio/transport/doorbells.rs", "disarm", Elsewhere("Intel's processors")),
    ("vm/answers.rs", "answer", Here(ONE_LISTENER)),
    ("vm/answers.rs", "hear", Here(ONE_LISTENER)),
    ("vm/answers.rs", "new", Here(ONE_LISTENER)),
    ("vm/supervisor.rs", "process", Here(ONE_LISTENER)),
];

const ANONYMOUS: &str =
    "memory without a file cannot be told from the allocator's, for want of which a Rust program ends";
const FOR_SECONDS: &str = "a request that is not answered for seconds";
const GIVES_BACK: &str = "what is forgotten is: see the supervisor";
const IN_A_HANDLER: &str = "in a handler of signals, where the process ends if it fails";
const IN_PARTS: &str = "a flush that came to its end in parts";
const ONE_LISTENER: &str =
    "a thread has one filter that somebody hears of, and these have the test's; tests/sandbox has the others";

/// What is wrong with that list, where those places are reached by lives without a fault.
pub fn wrong(places: &Places, reached: &BTreeSet<u32>) -> Vec<String> {
    let after = lock(&AFTER);
    let of = |file: &str, function: &str| {
        let one = places.all.iter().zip(1u32..);
        let one = one.filter(|(place, _)| place.file == file && place.function == function);
        one.map(|(_, number)| number).filter(|number| !reached.contains(number)).collect::<Vec<_>>()
    };
    let mut wrong = Vec::new();
    for (place, number) in places.all.iter().zip(1u32..) {
        let excused = EXCUSED.iter().any(|(file, name, _)| *file == place.file && *name == place.function);
        if !reached.contains(&number) && !after.contains(&number) && !excused {
            wrong.push(format!("{place}: no life has it, and nobody says why"));
        } else if !reached.contains(&number) && !excused {
            wrong.push(format!("{place}: only a life with a fault has it"));
        }
    }
    for (file, function, why) in &EXCUSED {
        let left = of(file, function);
        match why {
            After if left.is_empty() || !left.iter().all(|number| after.contains(number)) => {
                wrong.push(format!("{file}: {function}: not come by after a fault: {left:?}"));
            }
            Cannot(_) | Here(_) if left.is_empty() => {
                wrong.push(format!("{file}: {function}: all of it is reached"))
            }
            Cannot(why) | Here(why) | Elsewhere(why) => assert!(!why.is_empty()),
            After => {}
        }
    }
    wrong
}

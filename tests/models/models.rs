//! Models: the code that threads meet in, in every order that they can come, and with every value that one may see of another's (loom). The files
//! are the product's own. Their locks, atomics, eventfds and kicks are others (`sys/sync.rs`), and what they merely name is here.
//!
//! What fails once fails each time. `VMBED_PREEMPTIONS` is how many more times a thread's turn is taken from it than a model asks for.

// `cargo test --examples` would have the files' unit tests in it, too.
#![cfg(not(test))]

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// A model, and what it shows.
type Model = (&'static str, fn());

/// The models of a file.
macro_rules! models {
    ($($name:ident),* $(,)?) => {
        pub(crate) const MODELS: &[crate::Model] = &[$((stringify!($name), $name)),*];
    };
}
pub(crate) use models;

#[path = "../../src/budget/mod.rs"]
#[allow(dead_code, unused_imports, reason = "models use a part")]
mod budget;
mod claims;
#[path = "../../src/error.rs"]
#[allow(dead_code, reason = "models use a part")]
mod error;
#[path = "../../src/events.rs"]
#[allow(dead_code, reason = "models use a part")]
mod events;
mod reports;
#[path = "../../src/units.rs"]
#[allow(dead_code, reason = "models use a part")]
mod units;

mod sys {
    #[path = "../../../src/sys/fork.rs"]
    #[expect(unsafe_code, reason = "the product's")]
    pub(crate) mod fork;
    pub(crate) mod io;
    pub(crate) mod sync;

    /// Chance would be another one in each order.
    pub(crate) fn random(bytes: &mut [u8]) {
        bytes.fill(0x5a);
    }
}

mod memory {
    use std::sync::Arc;

    use crate::sys::sync::atomic::{AtomicBool, Ordering};

    /// A card's, until it has taken its buffers back.
    #[derive(Clone, Default)]
    pub(crate) struct Memory(Arc<AtomicBool>);

    impl Memory {
        pub fn take_back(&self) {
            self.0.store(true, Ordering::Relaxed);
        }

        pub fn write(&self) {
            assert!(!self.0.load(Ordering::Relaxed), "its buffers are the driver's again");
        }
    }
}

mod config {
    pub(crate) use vmbed::MacAddress;
}

mod vcpu {
    #[path = "../../../src/vcpu/gate.rs"]
    #[allow(dead_code, reason = "models use a part")]
    mod gate;
    pub(crate) mod models;
    #[path = "../../../src/vcpu/turns.rs"]
    #[allow(dead_code, reason = "models use a part")]
    mod turns;
}

mod net {
    /// As `src/net/mod.rs` has them.
    pub(crate) const HEADER_LEN: usize = 12;
    pub(crate) const MAX_FRAME: usize = 65_535 + 14 + 8;

    pub(crate) mod addresses;
    pub(crate) mod frames;
    #[path = "../../../src/net/switch/landing.rs"]
    #[allow(dead_code, reason = "models use a part")]
    mod landing;
    pub(crate) mod landings;
    #[path = "../../../src/net/switch/queue.rs"]
    #[allow(dead_code, reason = "models use a part")]
    mod queue;
    #[path = "../../../src/net/switch/table.rs"]
    #[allow(dead_code, reason = "models use a part")]
    mod table;
}

#[expect(unsafe_code, reason = "handles are pointers")]
mod capi {
    #[path = "../../../src/capi/handle.rs"]
    #[allow(dead_code, unused_imports, unused_macros, reason = "models use a part")]
    mod handle;
    pub(crate) mod models;
}

fn main() -> ExitCode {
    let all: [(&str, &[Model]); 7] = [
        ("gate", vcpu::models::MODELS),
        ("events", reports::MODELS),
        ("queue", net::frames::MODELS),
        ("landing", net::landings::MODELS),
        ("table", net::addresses::MODELS),
        ("ledger", claims::MODELS),
        ("handles", capi::models::MODELS),
    ];
    let trials = all.iter().flat_map(|(of, models)| {
        models.iter().map(move |(name, model)| {
            Trial::test(format!("{of}::{name}"), move || {
                model();
                Ok(())
            })
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

//! Threads of the library: named, with every signal blocked from their first instruction on.

use std::io;
use std::thread::{Builder, JoinHandle};

use super::signal::SignalSet;

/// Starts a thread on which no signal of the embedder's process is ever delivered.
pub(crate) fn spawn(name: String, f: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    // A new thread inherits the mask of its maker: block first, so that there is no gap.
    let old = SignalSet::library_thread().block();
    let thread = Builder::new().name(name).spawn(f);
    old.block();
    thread
}

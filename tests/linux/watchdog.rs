//! A deadline for a whole trial: each of its waits has one of its own, but a call that never returns has none.

use std::fmt::Write;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// More than the waits of any trial that goes well, also beside a second lab on a slow machine; `make soak` has longer ones.
pub fn limit() -> Duration {
    let given = std::env::var("VMBED_TRIAL_SECONDS").ok();
    Duration::from_secs(given.map_or(900, |n| n.parse().expect("VMBED_TRIAL_SECONDS is a number")))
}

/// Runs `body`; where that never ends, says what each thread of this process waits for, and ends the process.
pub fn guarded(name: &str, body: impl FnOnce()) {
    let (done, waiting) = channel::<()>();
    let name = name.to_owned();
    let watchdog = std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
        if waiting.recv_timeout(limit()) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{name}: waited {:?} for its end; its threads:\n{}", limit(), threads());
            std::process::exit(101);
        }
    });
    let watchdog = watchdog.expect("a thread more");
    body();
    drop(done);
    watchdog.join().expect("it only waits");
}

/// The threads of this process: name, the system call it is in, and, for root, where in the kernel.
pub fn threads() -> String {
    let mut text = String::new();
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let _ = writeln!(text, "{}: {}{}", read("comm").trim(), read("syscall"), read("stack"));
    }
    text
}

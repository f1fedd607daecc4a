#![no_main]

#[allow(dead_code, reason = "its rings are broken by it, and taken by a model")]
#[path = "../bodies/bent.rs"]
mod bent;
#[path = "../bodies/queue.rs"]
mod body;
mod report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| report::add(&body::run(data).counters()));

#![no_main]

#[path = "../bodies/bus.rs"]
mod body;
mod report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| report::add(&body::run(data).counters()));

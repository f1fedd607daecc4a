#![no_main]

#[allow(dead_code, reason = "it looks at how long each was")]
#[path = "../bodies/bent.rs"]
mod bent;
#[path = "../bodies/ports.rs"]
mod body;
mod report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| report::add(&body::run(data).counters()));

#![no_main]

#[path = "../bodies/bent.rs"]
#[allow(dead_code)]
mod bent;
#[path = "../bodies/qcow2.rs"]
mod body;
mod report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| report::add(&body::run(data).counters()));

#![no_main]

#[path = "../bodies/structures.rs"]
mod body;
#[path = "../bodies/given.rs"]
mod given;
mod report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| report::add(&body::run(data).counters()));

#![no_main]

#[allow(dead_code, reason = "its stations break rings in their own way")]
#[path = "../bodies/bent.rs"]
mod bent;
#[path = "../bodies/landing.rs"]
mod body;
mod report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| report::add(&body::run(data).counters()));

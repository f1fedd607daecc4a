#![no_main]

#[path = "../bodies/boot.rs"]
mod body;
#[allow(dead_code, reason = "its images are used, its run is not")]
#[path = "../bodies/kernel.rs"]
mod kernel;
mod report;

libfuzzer_sys::fuzz_target!(|data: &[u8]| report::add(&body::run(data).counters()));

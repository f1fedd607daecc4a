//! Nanoseconds from the exec of a command to the first line of its output that holds a given text. In the
//! lab under icount a nanosecond is an instruction: `figure-boot 'init: up' boot --kernel …`.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [text, program, rest @ ..] = &arguments[..] else {
        eprintln!("usage: figure-boot TEXT PROGRAM ARGUMENT...");
        return ExitCode::FAILURE;
    };
    let begin = Instant::now();
    let child = Command::new(program).args(rest).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = child.expect("the program should start");
    let mut first = None;
    let mut found = None;
    for line in BufReader::new(child.stdout.take().expect("piped")).split(b'\n') {
        let now = begin.elapsed().as_nanos();
        first.get_or_insert(now);
        if String::from_utf8_lossy(&line.unwrap_or_default()).contains(text.as_str()) {
            found = Some(now);
            break;
        }
    }
    let _ = child.wait();
    match (first, found) {
        (Some(first), Some(found)) => {
            println!("first-line {first} found {found}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("figure-boot: {program} ended without saying {text:?}");
            ExitCode::FAILURE
        }
    }
}

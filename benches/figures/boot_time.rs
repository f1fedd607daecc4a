//! Nanoseconds from the exec of a command to the first byte of its output and to the line that holds a given
//! text: `figure-boot 'init: up' boot --kernel …`. In the lab under icount a nanosecond is an instruction.
//!
//! `figure-boot --parts TEXT KERNEL INITRD CMDLINE MEMORY` boots the same in this process, to tell how much
//! of it is what: nanoseconds until the VM is built, until its first exit, and until the line.

use std::error::Error;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmbed::{Host, LinuxBoot, VmConfig};

const LONG: Duration = Duration::from_secs(120);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [option, text, kernel, initrd, cmdline, memory] if option == "--parts" => {
            let mut config = VmConfig::linux(LinuxBoot::new(kernel).initrd(initrd).cmdline(cmdline));
            config.memory = memory.parse()?;
            parts(text, config)
        }
        [text, program, rest @ ..] => outside(text, program, rest),
        _ => Err("usage: figure-boot [--parts] TEXT PROGRAM ARGUMENT...".into()),
    }
}

fn outside(text: &str, program: &str, arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    let mut child =
        Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().ok_or("piped")?;
    let (mut output, mut first, mut found) = (Vec::new(), None, None);
    let mut buffer = [0; 4096];
    loop {
        let count = stdout.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        let now = begin.elapsed().as_nanos();
        first.get_or_insert(now);
        output.extend_from_slice(&buffer[..count]);
        if found.is_none() && output.windows(text.len()).any(|w| w == text.as_bytes()) {
            found = Some(now);
        }
    }
    let status = child.wait()?;
    let output = String::from_utf8_lossy(&output);
    let (Some(first), Some(found), true) = (first, found, status.success()) else {
        return Err(format!("{program} ended with {status}, and said: {output}").into());
    };
    println!("first-byte {first} line {found}");
    Ok(())
}

fn parts(text: &str, config: VmConfig) -> Result<(), Box<dyn Error>> {
    let (line, came) = std::sync::mpsc::channel();
    let (mut output, text) = (Vec::new(), text.as_bytes().to_vec());
    let begin = Instant::now();
    let host = Host::open()?;
    let vm = host.builder(config).console_callback(move |bytes| {
        output.extend_from_slice(bytes);
        if output.windows(text.len()).any(|w| w == text) {
            let _ = line.send(Instant::now());
        }
    });
    let vm = vm.build()?;
    let built = begin.elapsed().as_nanos();
    vm.start()?;
    let line = (came.recv_timeout(LONG)? - begin).as_nanos();
    let first = vm.first_exit().map_or(0, |at| (at - begin).as_nanos());
    vm.wait_timeout(LONG)?;
    println!("built {built} first-exit {first} line {line}");
    Ok(())
}

//! Bare guests that are more than a few instructions: made from C with the machine's compiler.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the guest is put, and begins.
pub const ENTRY: u64 = 0x1_0000;
pub const SCRIPT: u64 = 0x8000;
pub const RESULTS: u64 = 0x9000;
/// Where it receives its frames, 2 KiB for each.
pub const FRAMES: u64 = 0x18_0000;
/// What it needs.
pub const MEMORY: u64 = 4 << 20;
pub const STACK: u64 = 0x7f00;
/// The port that it tells the test on.
pub const SAY: u16 = 0x10;

/// A step of the script of virtio.c.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Op {
    End,
    Read,
    Write,
    Flush,
    BeginRead,
    Finish,
    Send,
    Receive,
    Reset,
    Tell,
    BeginWrite,
    Inflate,
    Deflate,
    Account,
    Asked,
    Target,
    Discard,
    Zero,
    Header,
    Random,
    Print,
    Pairs,
    Interrupts,
    Room,
}

/// What comes of a step: the worst status, the bytes that the device wrote, the sum of what it read.
pub type Outcome = (u32, u32, u64);

/// Steps as virtio.c reads them: what to do, at which sector, how many (or how long a frame), with what.
pub fn script(steps: &[(Op, u32, u32, u32)]) -> Vec<u8> {
    let end = [(Op::End, 0, 0, 0)];
    let steps = steps.iter().chain(&end);
    steps.flat_map(|(op, a, b, c)| [*op as u32, *a, *b, *c]).flat_map(u32::to_le_bytes).collect()
}

/// Result `index`.
pub fn outcome(results: &[u8], index: usize) -> Outcome {
    let at = &results[16 * index..][..16];
    let number = |from: usize| u32::from_le_bytes(at[from..from + 4].try_into().unwrap());
    (number(0), number(4), u64::from_le_bytes(at[8..].try_into().unwrap()))
}

/// Compiles virtio.c into `directory`; the path of what goes to [`ENTRY`] in long mode.
pub fn virtio(directory: &Path) -> PathBuf {
    compile("virtio", directory)
}

/// The same of hostile.c.
pub fn hostile(directory: &Path) -> PathBuf {
    compile("hostile", directory)
}

fn compile(what: &str, directory: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/guests/{what}.c"));
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("{what}-guest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let out = directory.join(name);
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-ffreestanding", "-fno-pic", "-no-pie"]);
    cc.args(["-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none"]);
    cc.args([
        "-fno-asynchronous-unwind-tables",
        "-fno-tree-loop-distribute-patterns",
        "-nostdlib",
        "-static",
    ]);
    cc.args(["-Wl,--oformat=binary,--build-id=none,-e,guest"]).arg(format!("-Wl,-Ttext={ENTRY:#x}"));
    let output = cc.arg(source).arg("-o").arg(&out).output().expect("cc should start");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    out
}

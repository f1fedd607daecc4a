//! The ABI of today against the baseline in `tests/c/abi/`.
//!
//! libabigail compares what C compilers make of the header, not the library itself: Rust's debug information names
//! Rust's types, which change with compilers and with code that no program sees. A library that stands in for ours
//! is made from the header: the same functions with empty bodies. That it says the truth about ours follows from
//! two tests: `tests/header.rs` (the header is what `src/capi` declares), and the one here that both export the
//! same symbols.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Stage, generate, header, run, text};

const HOW: &str = "\
Programs that were built against an earlier header run with this library no more. Before 1.0 that may be, with a new \
SONAME: change it in build.rs, Makefile and the header's introduction, delete tests/c/abi/vmbed.abi and \
tests/c/abi/names, copy include/vmbed.h over tests/c/abi/vmbed.h, and run `make abi`. Otherwise take the change back: \
add a function beside the old one, or a field at the end of a structure that carries its size.";

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/abi").join(name)
}

/// Nothing that a program may use has been removed or changed, and what was added is in the baseline.
pub fn compatible(stage: &Stage) {
    let now = stand_in(stage);
    let update = std::env::var_os("VMBED_UPDATE_ABI").is_some();
    let names = names(stage, &header());
    let (old_abi, old_names) = (kept("vmbed.abi"), kept("names"));
    let old = std::fs::read_to_string(&old_names).unwrap_or_default();
    if !update || old_abi.exists() {
        let gone: Vec<_> = old.lines().filter(|line| !names.contains(*line)).collect();
        assert!(gone.is_empty(), "removed or changed: {gone:?}\n{HOW}");
        let growth = kept("growth.ini").display().to_string();
        let (same, report) = compare(&old_abi, &now, &["--no-added-syms", "--suppressions", &growth]);
        assert!(same, "{report}\n{HOW}");
    }
    if update {
        std::fs::copy(&now, &old_abi).unwrap();
        std::fs::write(&old_names, names.iter().map(|name| format!("{name}\n")).collect::<String>()).unwrap();
    }
    let (same, report) = compare(&old_abi, &now, &[]);
    let listed = std::fs::read_to_string(&old_names).unwrap_or_default();
    let new: Vec<_> = names.iter().filter(|name| !listed.lines().any(|line| line == *name)).collect();
    assert!(
        same && new.is_empty(),
        "the ABI has grown, which is fine: run `make abi` and commit tests/c/abi with it. New: {new:?}\n{report}"
    );
}

/// A program that is as old as the baseline's header runs with today's library.
pub fn an_old_program_runs(stage: &Stage) {
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-g", "-I"]).arg(kept("")).arg(kept("program.c"));
    cc.arg("-o").arg(stage.directory.join("old")).arg(stage.directory.join("usr/lib/libvmbed.so"));
    run(&mut cc);
    assert_eq!(text(run(&mut stage.program("old", &[]))), "an old program runs\n");
}

/// A library with what the header declares, and libabigail's account of it.
fn stand_in(stage: &Stage) -> PathBuf {
    let (source, library) = (stage.directory.join("stand-in.c"), stage.directory.join("stand-in.so"));
    std::fs::write(&source, generate::stand_in(&header())).unwrap();
    let mut cc = Command::new("cc");
    // The oldest format of debug information that says everything: newer defaults differ among compilers.
    cc.args(["-std=c11", "-gdwarf-4", "-O0", "-shared", "-fPIC", "-Wl,-soname,libvmbed.so.0"]);
    run(cc.arg("-I").arg(stage.directory.join("usr/include")).arg(&source).arg("-o").arg(&library));
    let (ours, theirs) = (exported(&stage.directory.join("usr/lib/libvmbed.so")), exported(&library));
    assert_eq!(ours, theirs, "the library exports what the header declares");
    let abi = stage.directory.join("now.abi");
    let mut abidw = Command::new("abidw");
    abidw.args(["--no-corpus-path", "--no-comp-dir-path", "--no-show-locs", "--no-elf-needed"]);
    run(abidw.args(["--type-id-style", "hash", "--out-file"]).arg(&abi).arg(&library));
    abi
}

/// Whether libabigail finds no difference, and what it says.
fn compare(old: &Path, now: &Path, options: &[&str]) -> (bool, String) {
    let mut abidiff = Command::new("abidiff");
    abidiff.args(options).arg(old).arg(now);
    let output = abidiff.output().expect("abidiff (Debian: abigail-tools; tests/setup) can be started");
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), said)
}

fn exported(library: &Path) -> BTreeSet<String> {
    let symbols = text(run(Command::new("nm").args(["-D", "--defined-only"]).arg(library)));
    symbols.lines().filter_map(|line| line.split_whitespace().last()).map(str::to_owned).collect()
}

/// The functions of the library, and the constants of its header with their values.
fn names(stage: &Stage, header: &str) -> BTreeSet<String> {
    let mut names = exported(&stage.directory.join("usr/lib/libvmbed.so"));
    let constants = header.lines().filter_map(|line| line.strip_prefix("#define ")).filter(|constant| {
        constant.starts_with("VMBED_") && constant.contains(' ') && !constant.starts_with("VMBED_VERSION_")
    });
    names.extend(constants.map(str::to_owned));
    names
}

//! `include/vmbed.h` is what cbindgen makes of `src/capi`, and C and C++ compilers like it.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The sections in the order in which a reader wants them: a file of `src/capi` and its title.
const SECTIONS: [(&str, &str); 20] = [
    ("library", "The library"),
    ("error", "Errors"),
    ("device", "Devices of your own"),
    ("log", "Log lines"),
    ("host", "The host"),
    ("config", "What a VM is to be"),
    ("memory", "What memory is made of"),
    ("disk", "Disks"),
    ("block", "Disks of your own"),
    ("net", "Network cards, and networks of your own"),
    ("switch", "A switch in your process"),
    ("traffic", "What its ports carry"),
    ("wiring", "Bridges and TAP interfaces of the host"),
    ("vm", "A VM's life"),
    ("drive", "Loops and threads of your own"),
    ("ledger", "What was promised, and what is there"),
    ("balloon", "How guests give memory back"),
    ("reclaim", "When memory gets short"),
    ("sandbox", "A sandbox for a VM's threads"),
    ("events", "What happened"),
];

/// The header that `src/capi` asks for.
fn made() -> String {
    let introduction = std::fs::read_to_string(root().join("src/capi/introduction.h")).unwrap();
    let mut header = format!("/* SPDX-License-Identifier: Apache-2.0 OR MIT */\n{introduction}");
    header += "#ifndef VMBED_H\n#define VMBED_H\n\n#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n\n";
    header += "#ifdef __cplusplus\nextern \"C\" {\n#endif\n";
    // Handles first: functions of all sections name them.
    let (mut handles, mut sections) = (title("Handles"), String::new());
    for (file, name) in SECTIONS {
        sections += &title(name);
        for item in section(file).split("\n\n").map(str::trim).filter(|item| !item.is_empty()) {
            let handle =
                item.lines().last().is_some_and(|l| l.starts_with("typedef struct") && !l.contains('{'));
            let target = if handle { &mut handles } else { &mut sections };
            *target += &format!("\n{}\n", short_comment(item));
        }
    }
    header + &handles + &sections + "\n#ifdef __cplusplus\n}\n#endif\n\n#endif\n"
}

fn title(name: &str) -> String {
    format!("\n/* {} {} */\n", name, "-".repeat(105 - name.len()))
}

/// What cbindgen makes of one file.
fn section(file: &str) -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_config(config);
    let bindings = builder.with_src(root().join(format!("src/capi/{file}.rs"))).generate().unwrap();
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).unwrap()
}

/// A comment of one line on one line.
fn short_comment(item: &str) -> String {
    let lines: Vec<_> = item.lines().collect();
    let mut out = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        let indent = &lines[at][..lines[at].len() - lines[at].trim_start().len()];
        let short = lines[at].trim() == "/**" && lines.get(at + 2).is_some_and(|l| l.trim() == "*/");
        if short {
            out.push(format!("{indent}/** {} */", lines[at + 1].trim().trim_start_matches("* ")));
            at += 3;
        } else {
            out.push(lines[at].to_owned());
            at += 1;
        }
    }
    out.join("\n")
}

#[test]
fn the_header_is_up_to_date() {
    let path = root().join("include/vmbed.h");
    let made = made();
    if std::env::var_os("VMBED_UPDATE_HEADER").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let line = kept.lines().zip(made.lines()).position(|(a, b)| a != b).map_or(0, |n| n + 1);
    assert!(kept == made, "include/vmbed.h differs from src/capi from line {line} on: run `make header`");
}

#[test]
fn compilers_like_the_header() {
    let scratch = Scratch::new();
    let source = scratch.0.join("t");
    for (compiler, standard, language) in
        [("cc", "c11", "c"), ("cc", "c17", "c"), ("c++", "c++17", "c++"), ("c++", "c++20", "c++")]
    {
        std::fs::write(&source, "#include <vmbed.h>\n#include <vmbed.h>\nint main() { return 0; }\n")
            .unwrap();
        let output = Command::new(compiler)
            .args(["-x", language, &format!("-std={standard}"), "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
            .args(["-fsyntax-only", "-I"])
            .arg(root().join("include"))
            .arg(&source)
            .output()
            .unwrap_or_else(|e| panic!("{compiler} cannot be started: {e}"));
        assert!(output.status.success(), "{standard}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vmbed-header-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

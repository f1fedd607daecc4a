//! The modules' one direction: an arrow points left only.
//!
//! `ARCHITECTURE.md` explains the order. A file may use its own module, any module of a group further
//! left, and (between siblings of the first three groups, which are small leaves) nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// From left to right. Modules of one group may not use each other, unless [`WITHIN`] says so.
const GROUPS: [&[&str]; 10] = [
    &["sys", "error", "units", "config", "budget"],
    &["memory", "irq", "ioapic", "reactor", "events", "console", "bus", "rate"],
    &["block", "net", "pci", "legacy"],
    &["virtio"],
    &["vcpu", "boot"],
    &["snapshot"],
    &["vm"],
    &["sandbox", "host"],
    &["capi"],
    &["internals"],
];

/// Who may use whom within a group: from the first to the second.
const WITHIN: [(&str, &str); 14] = [
    ("error", "sys"),
    ("units", "error"),
    ("config", "error"),
    ("config", "units"),
    ("budget", "sys"),
    ("budget", "error"),
    ("budget", "units"),
    ("events", "reactor"),
    ("reactor", "events"),
    ("ioapic", "irq"),
    ("ioapic", "bus"),
    ("console", "reactor"),
    ("console", "events"),
    ("host", "sandbox"),
];

/// Uses against the direction, each with its reason. Keep it short.
const EXCEPTIONS: [(&str, &str, &str); 1] =
    [("config", "memory", "validation names the guest-physical layout, which is constants only")];

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The product's code: where it is, and its files.
fn sources() -> (PathBuf, Vec<PathBuf>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&root, &mut files);
    (root, files)
}

/// The modules that a line of code names as `crate::module`.
fn named(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap_or("");
    let mut names = Vec::new();
    for part in code.split("crate::").skip(1) {
        let list = match part.strip_prefix('{') {
            // use crate::{a::B, c::D}: the names at depth one.
            Some(list) => top_level(list),
            None => vec![part],
        };
        for item in list {
            let name: String = item.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.chars().next().is_some_and(char::is_lowercase) {
                names.push(name);
            }
        }
    }
    names
}

fn top_level(list: &str) -> Vec<&str> {
    let (mut depth, mut start, mut items) = (0, 0, Vec::new());
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(&list[start..at]);
                return items;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items.push(&list[start..]);
    items
}

/// Joins `use crate::{` lists that span lines, so that [`named`] sees them whole.
fn statements(text: &str) -> Vec<(usize, String)> {
    let mut out: Vec<(usize, String)> = Vec::new();
    let mut open = false;
    for (number, line) in text.lines().enumerate() {
        match out.last_mut() {
            Some((_, statement)) if open => statement.push_str(line),
            _ => out.push((number + 1, line.to_owned())),
        }
        let current = &out[out.len() - 1].1;
        let is_use = current.trim_start().starts_with("use ") || current.trim_start().starts_with("pub use ");
        open = is_use && !current.contains(';');
    }
    out
}

fn allowed(rank: &BTreeMap<&str, usize>, from: &str, to: &str) -> Result<bool, String> {
    let place = |m: &str| {
        rank.get(m).copied().ok_or_else(|| format!("module '{m}' is in no group of tests/layers.rs"))
    };
    let (from_rank, to_rank) = (place(from)?, place(to)?);
    Ok(from == to
        || to_rank < from_rank
        || WITHIN.contains(&(from, to))
        || EXCEPTIONS.iter().any(|(f, t, _)| (*f, *t) == (from, to)))
}

#[test]
fn modules_use_only_what_is_left_of_them() {
    let rank: BTreeMap<&str, usize> =
        GROUPS.iter().enumerate().flat_map(|(i, group)| group.iter().map(move |m| (*m, i))).collect();
    let (root, files) = sources();
    assert!(files.len() > 20, "the sources were not found");
    let mut wrong = Vec::new();
    for file in files {
        let path = file.strip_prefix(&root).unwrap();
        let module = path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        // Tests may reach anywhere.
        let product = text.split("#[cfg(test)]\nmod ").next().unwrap();
        for (number, statement) in statements(product) {
            for name in named(&statement) {
                match allowed(&rank, module, &name) {
                    Ok(true) => {}
                    Ok(false) => wrong.push(format!("src/{}:{number}: {module} uses {name}", path.display())),
                    Err(why) => wrong.push(format!("src/{}:{number}: {why}", path.display())),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "against the direction:\n{}", wrong.join("\n"));
}

#[test]
fn every_file_outside_sys_and_capi_forbids_unsafe_code() {
    let (root, files) = sources();
    let open = |file: &Path| {
        let path = file.strip_prefix(&root).unwrap();
        let first = path.iter().next().unwrap().to_str().unwrap();
        matches!(first, "sys" | "capi" | "lib.rs")
    };
    for file in files.iter().filter(|f| !open(f)) {
        let text = fs::read_to_string(file).unwrap();
        // Test support may need unsafe code for a foreign trait; it is compiled into nothing else.
        let support = text.contains("#![cfg(test)]");
        assert!(
            support || text.starts_with("#![forbid(unsafe_code)]"),
            "{} must begin with it",
            file.display()
        );
    }
}

#[test]
fn a_use_is_found_however_it_is_written() {
    assert_eq!(named("use crate::memory::Memory;"), ["memory"]);
    assert_eq!(named("use crate::{bus::{Bus, Device}, sys, Error};"), ["bus", "sys"]);
    assert_eq!(named("    let x = crate::sys::lock(&crate::irq::A);"), ["sys", "irq"]);
    assert_eq!(statements("use crate::{\n  a::B,\n  c,\n};\nlet x = 1;").len(), 2);
}

/// What is set up somehow in one language is drawn, and set up in the others as well. That their lines compile is for the doctests,
/// `tests/c.rs` and `tests/python.rs`.
#[test]
fn every_network_has_a_drawing_and_lines_in_three_languages() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/networking.md")).unwrap();
    let parts = [("```text\n", "a drawing"), ("```rust", "Rust"), ("```c\n", "C"), ("```python\n", "Python")];
    let mut complete = 0;
    for section in page.replace("\n### ", "\n## ").split("\n## ") {
        let missing: Vec<_> =
            parts.iter().filter(|(fence, _)| !section.contains(fence)).map(|(_, what)| what).collect();
        let title = section.lines().next().unwrap_or_default();
        assert!(missing.is_empty() || missing.len() == parts.len(), "'{title}' lacks {missing:?}");
        complete += usize::from(missing.is_empty());
    }
    assert_eq!(complete, 15, "sections with all of it: a set-up that is gone, or new");
}

/// The embedder's logger never runs on a thread in the sandbox: by the name `log`, a file has `crate::sys::log`, which knows.
#[test]
fn records_go_by_the_way_that_knows_of_the_sandbox() {
    let (_, files) = sources();
    let logs = |code: &str| {
        ["error", "warn", "info", "debug", "trace"].iter().any(|level| {
            code.match_indices(&format!("log::{level}!")).any(|(at, _)| !code[..at].ends_with("::"))
        })
    };
    let knows = |text: &str| {
        statements(text).iter().any(|(_, line)| {
            let names = |list: &str| {
                list.split([',', '{', '}', ';', ' ']).any(|word| matches!(word, "log" | "log::self"))
            };
            let from =
                ["use crate::sys::", "use super::"].iter().find_map(|start| line.trim().strip_prefix(start));
            from.is_some_and(names) || line.contains("use crate::sys::log::{self")
        })
    };
    let wrong: Vec<_> = files
        .iter()
        .filter(|file| !file.ends_with("sys/log.rs"))
        .filter(|file| {
            let text = fs::read_to_string(file).unwrap();
            logs(&text) && !knows(&text)
        })
        .collect();
    assert!(files.len() > 100 && wrong.is_empty(), "these call the crate `log` itself: {wrong:?}");
}

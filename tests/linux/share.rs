//! Two labs share the trials: each takes the next that nobody has, so that both end at about the same time. A lab whose
//! emulator stood still, and that was started again, goes on where it was.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::time::Duration;

/// The directory in which they say what they took; both see it. Absent where one process runs all.
pub const DIRECTORY: &str = "VMBED_LINUX_TESTS_SHARED";
/// Who a process is, for that directory.
pub const LAB: &str = "VMBED_LINUX_TESTS_LAB";

/// What there is to do about a trial.
pub enum Turn {
    Mine,
    /// It runs, or ran, elsewhere, or here before a new start.
    Done(&'static str),
    /// It failed before a new start, which takes nothing back.
    Failed,
}

pub struct Share {
    directory: PathBuf,
    lab: String,
}

impl Share {
    /// Where there is one.
    pub fn given() -> Option<Self> {
        let directory = std::env::var_os(DIRECTORY)?.into();
        Some(Self { directory, lab: std::env::var(LAB).expect("a lab that shares has a name") })
    }

    fn file(&self, trial: &str, state: &str) -> PathBuf {
        self.directory.join(format!("{trial}.{state}"))
    }

    pub fn turn(&self, trial: &str) -> Turn {
        let path = self.file(trial, "taken");
        match File::create_new(&path) {
            Ok(mut file) => {
                file.write_all(self.lab.as_bytes()).unwrap_or_else(|e| panic!("{path:?}: {e}"));
                return Turn::Mine;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{path:?}: {error}"),
        }
        if fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")) != self.lab {
            Turn::Done("the other lab's")
        } else if self.file(trial, "failed").exists() {
            Turn::Failed
        } else if self.file(trial, "passed").exists() {
            Turn::Done("passed before this lab's new start")
        } else {
            Turn::Mine
        }
    }

    pub fn say(&self, trial: &str, passed: bool, took: Duration) {
        let path = self.file(trial, if passed { "passed" } else { "failed" });
        fs::write(&path, took.as_secs().to_string()).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    }
}

/// Of all that was taken: the trials that passed with the seconds they took, the slowest first, and those that did not.
pub fn outcome(directory: &PathBuf) -> (Vec<(u64, String)>, Vec<String>) {
    let (mut passed, mut not) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(directory).expect("what the labs share").flatten() {
        let name = entry.file_name().into_string().expect("a trial's name");
        let Some(trial) = name.strip_suffix(".taken") else { continue };
        match fs::read_to_string(directory.join(format!("{trial}.passed"))) {
            Ok(seconds) => passed.push((seconds.parse().expect("seconds"), trial.to_owned())),
            Err(_) => not.push(trial.to_owned()),
        }
    }
    passed.sort_by(|a, b| b.cmp(a));
    (passed, not)
}

/// The seconds of each part's trials together, by what stands before their names.
pub fn parts(passed: &[(u64, String)]) -> BTreeMap<&str, u64> {
    let mut parts = BTreeMap::new();
    for (seconds, trial) in passed {
        *parts.entry(trial.split("::").next().unwrap_or(trial)).or_default() += seconds;
    }
    parts
}

//! A part of these tests in a process and a cgroup of its own, where the kernel's accounts are of it alone.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Says which part a process is to do.
pub const PART: &str = "VMBED_LINUX_TESTS_PART";

/// A cgroup with limits on memory, and swap; gone when it is dropped.
pub struct Cage {
    cgroup: PathBuf,
    swap: bool,
}

impl Cage {
    pub fn new(high: u64, max: u64, swap: bool) -> Self {
        let root = PathBuf::from("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").expect("root, and cgroups of version 2");
        let cgroup = root.join(format!("vmbed-cage-{}", std::process::id()));
        fs::create_dir(&cgroup).expect("a cgroup of that name");
        let cage = Self { cgroup, swap };
        cage.set("memory.high", high);
        cage.set("memory.max", max);
        if swap {
            sh(
                "modprobe zram num_devices=1; echo 512M >/sys/block/zram0/disksize && mkswap /dev/zram0 && swapon /dev/zram0",
            );
        }
        cage
    }

    /// Runs a part of this program in it, alone; what that said.
    pub fn run(&self, part: &str) -> String {
        let script = format!("echo $$ >{}/cgroup.procs && exec \"$0\"", self.cgroup.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(std::env::current_exe().unwrap()).env(PART, part);
        let output = command.output().expect("this program once more");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{}: {said}", output.status);
        said
    }

    fn set(&self, file: &str, value: u64) {
        fs::write(self.cgroup.join(file), value.to_string()).unwrap_or_else(|e| panic!("{file}: {e}"));
    }

    pub fn event(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.cgroup.join("memory.events")).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(&format!("{name} "))).map(str::to_owned);
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        if self.swap {
            sh("swapoff /dev/zram0 && echo 1 >/sys/block/zram0/reset && modprobe -r zram");
        }
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn sh(script: &str) {
    let output = Command::new("sh").args(["-c", script]).output().expect("sh");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || std::thread::panicking(), "{script}: {said}");
}

/// What a file of this process's cgroup has on the line that starts so, or on its only line.
pub fn charged(file: &str, line: &str) -> u64 {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = format!("/sys/fs/cgroup{}/{file}", own.trim().strip_prefix("0::").unwrap());
    let text = fs::read_to_string(path).unwrap();
    let number =
        text.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("{line} in {text}"));
    number.trim().parse().unwrap()
}

/// A setting of the kernel's, until it is dropped.
pub struct Setting {
    file: PathBuf,
    before: String,
}

impl Setting {
    pub fn of(file: impl Into<PathBuf>, value: &str) -> Self {
        let file = file.into();
        let before = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        // One of several, the one in brackets.
        let chosen = before.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        let before = chosen.map_or(before.trim(), |(one, _)| one).to_owned();
        fs::write(&file, value).unwrap_or_else(|e| panic!("{}: root may set it: {e}", file.display()));
        Self { file, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(&self.file, &self.before);
    }
}

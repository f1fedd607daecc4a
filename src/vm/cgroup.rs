#![forbid(unsafe_code)]
//! The cgroup of one VM's threads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::CgroupConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::events::VmId;
use crate::sys::fork;
use crate::sys::log;

/// How long the kernel may take to see that the last thread is gone.
const LAST_THREAD: Duration = Duration::from_millis(500);

/// A threaded cgroup; gone when it is dropped, after the threads in it.
pub(super) struct Cgroup {
    path: PathBuf,
    process: u64,
}

impl Cgroup {
    /// Makes the cgroup of VM `id`.
    pub fn make(id: VmId, config: &CgroupConfig) -> Result<Self> {
        let parent = config.parent.clone().map_or_else(own, Ok)?;
        let path = parent.join(format!("vmbed-{}-{}", std::process::id(), id.0));
        let mut made = fs::create_dir(&path);
        if made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
            // Of a process that had this number before, and was killed: where it is not in use, it goes.
            match fs::remove_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    let why = format!("cgroup: {}: it is there already, and in use", path.display());
                    return Err(Error::os(why, error));
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&path, "removing it, which another process left behind", error));
                }
                _ => made = fs::create_dir(&path),
            }
        }
        made.map_err(|e| failed(&path, "making it", e))?;
        let made = Self { path, process: fork::process() };
        // Before the parent's controllers: with processes in it, it can have threaded children only.
        made.write("cgroup.type", "threaded")?;
        let control = parent.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&control).map_err(|e| failed(&control, "reading it", e))?;
        if !enabled.split_whitespace().any(|name| name == "cpu") {
            fs::write(&control, "+cpu")
                .map_err(|e| failed(&control, "enabling the cpu controller in it", e))?;
        }
        made.write("cpu.weight", &config.weight.to_string())?;
        if let Some(quota) = config.quota {
            made.write("cpu.max", &format!("{} {}", quota.as_micros(), config.period.as_micros()))?;
        }
        Ok(made)
    }

    /// Moves the calling thread into it.
    pub fn enter(&self) -> Result<()> {
        self.write("cgroup.threads", "0")
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|e| failed(&path, &format!("writing {value:?} to it"), e))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A child of a fork has a copy; the VM goes on in its parent.
        if self.process != fork::process() {
            return;
        }
        let end = Instant::now() + LAST_THREAD;
        while let Err(error) = fs::remove_dir(&self.path) {
            if error.kind() != io::ErrorKind::ResourceBusy || Instant::now() >= end {
                log::warn!("removing the cgroup {}: {error}", self.path.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The directory of the process's own cgroup.
fn own() -> Result<PathBuf> {
    let why = |what: &str| format!("cgroup.parent: {what}: name the directory of a cgroup of version 2");
    let text = fs::read_to_string("/proc/self/cgroup")
        .map_err(|e| Error::os(why("the process's own cgroup cannot be read from /proc/self/cgroup"), e))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or_else(|| Error::new(ErrorKind::Unsupported, why("the process has no own one")))?;
    let root = Path::new("/sys/fs/cgroup");
    // Where version 1 is mounted there, version 2 may be below.
    let sign = root.join("cgroup.controllers");
    let is_second = sign.try_exists();
    let is_second = is_second.map_err(|e| Error::os(why(&format!("looking for {}", sign.display())), e))?;
    Ok(if is_second { root.join(path) } else { root.join("unified").join(path) })
}

fn failed(path: &Path, what: &str, error: io::Error) -> Error {
    let hint = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => ": the process may not; have it delegated",
        Some(libc::EOPNOTSUPP | libc::EBUSY) => {
            ": the parent has controllers that know no threads (memory, io) enabled for its children, or the process \
             is not in or below it"
        }
        Some(libc::ENOENT) => ": no cgroup of version 2, or one without the cpu controller",
        _ => "",
    };
    Error::os(format!("cgroup: {}: {what}{hint}", path.display()), error)
}

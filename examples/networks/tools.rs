//! Programs of the host's: each is gone when what it belongs to is.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Done;

/// Runs a program to its end; what it printed.
pub fn run(words: &str) -> Done<String> {
    let words: Vec<_> = words.split_whitespace().collect();
    let output =
        Command::new(words[0]).args(&words[1..]).output().map_err(|e| format!("{}: {e}", words[0]))?;
    if !output.status.success() {
        return Err(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// One that runs until it is dropped.
pub struct Service(Child);

impl Service {
    pub fn start(words: &str) -> Done<Self> {
        let words: Vec<_> = words.split_whitespace().collect();
        let started =
            Command::new(words[0]).args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Self(started.map_err(|e| format!("{}: {e}", words[0]))?))
    }

    /// Asks it to end, as a terminal would, and waits.
    fn end(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status();
            let end = Instant::now() + Duration::from_secs(10);
            while Instant::now() < end && matches!(self.0.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.end();
    }
}

/// A network namespace.
pub struct Namespace(Child);

impl Namespace {
    pub fn new() -> Done<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo ready; exec sleep 100000"]);
        let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| format!("unshare: {e}"))?;
        let mut line = String::new();
        let output = child.stdout.take().ok_or("it is piped")?;
        let space = Self(child);
        BufReader::new(output).read_line(&mut line)?;
        if line.trim() != "ready" {
            return Err("unshare --net: it wants to be root".into());
        }
        Ok(space)
    }

    /// For `ip link ... netns`.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Runs a program in there.
    pub fn run(&self, words: &str) -> Done<String> {
        run(&format!("nsenter --net=/proc/{}/ns/net {words}", self.pid()))
    }

    /// This thread is there from now on.
    pub fn enter(&self) -> Done<()> {
        let space = std::fs::File::open(format!("/proc/{}/ns/net", self.pid()))?;
        Ok(rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&space),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )?)
    }

    /// The same, until it is dropped.
    pub fn start(&self, words: &str) -> Done<Service> {
        Service::start(&format!("nsenter --net=/proc/{}/ns/net {words}", self.pid()))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory that is gone in the end.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Done<Self> {
        let path = std::env::temp_dir().join(format!("vmbed-networks-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Frames that `tcpdump` has recorded, or the switch: a line each.
pub fn recorded(file: &Path, filter: &str) -> Done<Vec<String>> {
    let text = run(&format!("tcpdump -Z root -t -n -e -r {} {filter}", file.display()))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Prints some of the ARP requests that were heard in a place, and says whether those of `own` are among them, and none of the `others`.
pub fn heard(place: &str, frames: &[String], own: &str, others: &[&str]) -> bool {
    let of = |mac: &str| frames.iter().filter(|line| line.starts_with(mac)).count();
    println!("{place} heard {} ARP frames, {} of them its own:", frames.len(), of(own));
    for line in frames.iter().take(4) {
        println!("  {}", line.chars().take(110).collect::<String>());
    }
    let strange: usize = others.iter().map(|mac| of(mac)).sum();
    println!("  and {strange} from another VLAN");
    of(own) > 0 && strange == 0
}

#![forbid(unsafe_code)]
//! What the kernel says about memory: how much this process may use, what is charged for it, what is free.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::budget::Headroom;
use crate::error::{Error, Result};
use crate::memory::Roll;
use crate::sys::lock;

/// The smaller of the machine's memory and the limits of the cgroups above this process.
///
/// # Errors
/// The machine does not say.
pub(super) fn memory_total() -> Result<u64> {
    let unknown = |e| {
        Error::os(
            "reading /proc/meminfo, for the machine's memory; HostConfig::memory may say what there is",
            e,
        )
    };
    let text = fs::read_to_string("/proc/meminfo").map_err(unknown)?;
    let machine = meminfo(&text, "MemTotal:").ok_or_else(|| unknown(io::ErrorKind::InvalidData.into()))?;
    let limits = groups(&membership(), Path::new("/sys/fs/cgroup")).into_iter().filter_map(|g| g.limit());
    Ok(limits.min().map_or(machine, |limit| limit.min(machine)))
}

fn membership() -> String {
    fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
}

/// A line of `/proc/meminfo`, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A directory of the memory controller, of either version.
struct Group {
    path: PathBuf,
    limit: &'static str,
    usage: &'static str,
    /// The line of `memory.stat` that counts file pages, which the kernel takes back by itself.
    file: [&'static str; 2],
}

impl Group {
    fn limit(&self) -> Option<u64> {
        self.read(self.limit)
    }

    /// Where the kernel begins to hold its processes back (version 2): beyond it nothing is free for guests.
    fn throttle(&self) -> Option<u64> {
        self.read("memory.high")
    }

    fn read(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }
}

/// The groups from the process's own to the root, the own ones first.
fn groups(membership: &str, root: &Path) -> Vec<Group> {
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (base, limit, usage, file) = match controllers {
            "" => (root.to_owned(), "memory.max", "memory.current", ["inactive_file", "active_file"]),
            c if c.split(',').any(|c| c == "memory") => {
                let file = ["total_inactive_file", "total_active_file"];
                (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", file)
            }
            _ => continue,
        };
        let group = base.join(path.trim_start_matches('/'));
        found.extend(group.ancestors().take_while(|d| d.starts_with(&base)).map(|d| Group {
            path: d.to_owned(),
            limit,
            usage,
            file,
        }));
    }
    found
}

/// The pressure file of the cgroup that this process is in, where there is one (version 2).
pub(super) fn own_pressure_file() -> Option<PathBuf> {
    let own = groups(&membership(), Path::new("/sys/fs/cgroup")).into_iter().next()?;
    Some(own.path.join("memory.pressure")).filter(|path| path.exists())
}

/// A file of the kernel's that is read again and again.
struct Source(File);

impl Source {
    fn open(path: impl AsRef<Path>) -> Option<Self> {
        File::open(path).ok().map(Self)
    }

    /// The first `N` bytes.
    fn read<const N: usize, R>(&self, parse: impl FnOnce(&[u8]) -> Option<R>) -> Option<R> {
        let mut buffer = [0; N];
        let count = self.0.read_at(&mut buffer, 0).ok()?;
        parse(buffer.get(..count)?)
    }

    fn number(&self) -> Option<u64> {
        self.read::<32, _>(leading)
    }
}

/// The number that a text begins with. Short, since usage is asked for often.
fn leading(text: &[u8]) -> Option<u64> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit());
    let add = |sum: u64, digit: &u8| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0'));
    text.first().filter(|byte| byte.is_ascii_digit())?;
    digits.into_iter().try_fold(0, add)
}

/// What memory is charged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChargedBy {
    /// The process's cgroup: everything of all processes in it.
    Cgroup,
    /// The machine, where no cgroup counts: everything that is not available to others.
    Machine,
}

/// The files that samples are read from, held open.
pub(super) struct Samples {
    meminfo: Option<Source>,
    statm: Option<Source>,
    group: Option<OwnGroup>,
    roll: Arc<Roll>,
    pace: Mutex<Pace>,
}

/// The nearest group that counts this process's memory.
struct OwnGroup {
    usage: Source,
    stat: Option<Source>,
    file: [&'static str; 2],
    limit: Option<u64>,
}

/// How fast guests touch memory.
#[derive(Default)]
struct Pace {
    /// When what was backed, last time.
    last: Option<(Instant, u64)>,
    /// Bytes a second, over the last interval that was long enough.
    rate: u64,
}

/// What is wanted of `/proc/meminfo` is in its first three lines.
const MEMINFO: usize = 192;
/// Two samples nearer than this say nothing about a rate.
const INTERVAL: Duration = Duration::from_millis(100);

impl Samples {
    pub fn open(roll: Arc<Roll>) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let own = groups(&membership(), root).into_iter().find_map(|g| {
            let usage = Source::open(g.path.join(g.usage))?;
            usage.number()?;
            // A limit that is no limit is larger than any machine.
            let limit = g.limit().into_iter().chain(g.throttle()).min().filter(|limit| *limit < 1 << 60);
            Some(OwnGroup { usage, stat: Source::open(g.path.join("memory.stat")), file: g.file, limit })
        });
        Self {
            meminfo: Source::open("/proc/meminfo"),
            statm: Source::open("/proc/self/statm"),
            group: own,
            roll,
            pace: Mutex::default(),
        }
    }

    /// What is charged for this process's memory and its guests', and by whom. 0 where nobody says.
    pub fn charged(&self) -> (u64, ChargedBy) {
        if let Some(group) = &self.group
            && let Some(bytes) = group.usage.number()
        {
            return (bytes, ChargedBy::Cgroup);
        }
        let used = self.meminfo.as_ref().and_then(|m| {
            m.read::<MEMINFO, _>(|text| {
                let text = std::str::from_utf8(text).ok()?;
                Some(meminfo(text, "MemTotal:")?.saturating_sub(meminfo(text, "MemAvailable:")?))
            })
        });
        (used.unwrap_or(0), ChargedBy::Machine)
    }

    /// The process's own memory beside its guests': anonymous pages that are resident.
    pub fn process(&self) -> u64 {
        let pages = self.statm.as_ref().and_then(|s| {
            s.read::<128, _>(|text| {
                let mut numbers = text.split(|byte| *byte == b' ').skip(1);
                let (resident, shared) = (leading(numbers.next()?)?, leading(numbers.next()?)?);
                Some(resident.saturating_sub(shared))
            })
        });
        pages.unwrap_or(0).saturating_mul(4096)
    }

    /// What is free, of the machine and below the own cgroup's limit, file pages included; and how much of it
    /// must stay so.
    pub fn headroom(&self, reaction: Duration) -> Headroom {
        let machine = self.meminfo.as_ref();
        let machine = machine.and_then(|m| m.read::<MEMINFO, _>(available));
        let group = self.group.as_ref().and_then(|g| {
            let pages = g.stat.as_ref();
            let pages = pages.and_then(|s| {
                s.read::<4096, _>(|text| Some(file_pages(std::str::from_utf8(text).ok()?, &g.file)))
            });
            let kept = g.usage.number()?.saturating_sub(pages.unwrap_or(0));
            Some(g.limit?.saturating_sub(kept))
        });
        let needed = if reaction.is_zero() { 0 } else { self.needed(reaction) };
        Headroom { free: [machine, group].into_iter().flatten().min(), needed }
    }

    fn needed(&self, reaction: Duration) -> u64 {
        let rate = lock(&self.pace).measure(Instant::now(), self.roll.backing());
        (rate as f64 * reaction.as_secs_f64()) as u64
    }
}

impl Pace {
    /// The rate in bytes a second, with one more sample.
    fn measure(&mut self, now: Instant, backing: u64) -> u64 {
        match self.last {
            Some((then, before)) => {
                let time = now.saturating_duration_since(then);
                if time >= INTERVAL {
                    self.rate = (backing.saturating_sub(before) as f64 / time.as_secs_f64()) as u64;
                    self.last = Some((now, backing));
                }
            }
            None => self.last = Some((now, backing)),
        }
        self.rate
    }
}

fn available(text: &[u8]) -> Option<u64> {
    meminfo(std::str::from_utf8(text).ok()?, "MemAvailable:")
}

fn file_pages(stat: &str, names: &[&str; 2]) -> u64 {
    let of = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        names.contains(&name).then(|| value.trim().parse::<u64>().ok()).flatten()
    };
    stat.lines().filter_map(of).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_how_much_it_has() {
        assert_eq!(
            meminfo("MemTotal:       24683520 kB\nMemFree: 1 kB\n", "MemTotal:"),
            Some(24_683_520 * 1024)
        );
        assert_eq!(meminfo("MemTotal: lots", "MemTotal:"), None);
        assert!(memory_total().unwrap() > 64 << 20);
    }

    #[test]
    fn the_smallest_cgroup_limit_above_us_counts() {
        let root = std::env::temp_dir().join(format!("vmbed-cgroup-{}", std::process::id()));
        let (v2, v1) = (root.join("a/b"), root.join("memory/x"));
        fs::create_dir_all(&v2).unwrap();
        fs::create_dir_all(&v1).unwrap();
        fs::write(root.join("a/memory.max"), "4096\n").unwrap();
        fs::write(v2.join("memory.max"), "max\n").unwrap();
        fs::write(v1.join("memory.limit_in_bytes"), "8192\n").unwrap();
        let limit = |membership: &str, root: &Path| {
            groups(membership, root).into_iter().filter_map(|g| g.limit()).min()
        };
        assert_eq!(limit("0::/a/b\n", &root), Some(4096));
        assert_eq!(limit("9:cpu,memory:/x\n", &root), Some(8192));
        assert_eq!(limit("9:cpu:/x\nnonsense\n0::/none\n", &root), None);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_rate_is_that_of_the_last_interval() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert_eq!(pace.measure(start, 1 << 30), 0, "one sample has no rate");
        assert_eq!(pace.measure(start + INTERVAL / 2, 2 << 30), 0, "too near");
        assert_eq!(pace.measure(start + Duration::from_secs(2), 3 << 30), 1 << 30);
        assert_eq!(pace.measure(start + Duration::from_secs(3), 1 << 30), 0, "given back");
    }

    #[test]
    fn the_kernel_says_what_is_free_and_what_is_charged() {
        let samples = Samples::open(Arc::default());
        let headroom = samples.headroom(Duration::from_secs(1));
        assert!(headroom.free.unwrap() > 1 << 20 && headroom.free.unwrap() <= memory_total().unwrap());
        assert_eq!(headroom.needed, 0, "no guest, no rate");
        assert_eq!(
            [&b"12 3"[..], b"7\n", b"x1", b"", b"99999999999999999999"].map(leading),
            [Some(12), Some(7), None, None, None]
        );
        assert!(samples.charged().0 > 1 << 20 && samples.process() > 4096);
        assert_eq!(
            file_pages("cache 5\ninactive_file 4096\nactive_file 8192\n", &["inactive_file", "active_file"]),
            12288
        );
    }
}

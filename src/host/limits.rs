#![forbid(unsafe_code)]
//! How much memory this process may use at most: the machine's, or its cgroup's.

use std::fs;
use std::path::Path;

/// The smaller of the machine's memory and the limits of the cgroups above this process; 0 when the
/// machine does not say.
pub(super) fn memory_total() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_total(&text)).unwrap_or(0);
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    cgroup_limit(&membership, Path::new("/sys/fs/cgroup")).map_or(machine, |limit| limit.min(machine))
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The smallest limit on the way from the process's cgroup to the root, of either version.
fn cgroup_limit(membership: &str, root: &Path) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (base, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            c if c.split(',').any(|c| c == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        let group = base.join(path.trim_start_matches('/'));
        for directory in group.ancestors().take_while(|d| d.starts_with(&base)) {
            let limit = fs::read_to_string(directory.join(file)).ok();
            let limit = limit.and_then(|text| text.trim().parse::<u64>().ok());
            least = [least, limit].into_iter().flatten().min();
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_how_much_it_has() {
        assert_eq!(mem_total("MemTotal:       24683520 kB\nMemFree: 1 kB\n"), Some(24_683_520 * 1024));
        assert_eq!(mem_total("MemTotal: lots"), None);
        assert!(memory_total() > 64 << 20);
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
        assert_eq!(cgroup_limit("0::/a/b\n", &root), Some(4096));
        assert_eq!(cgroup_limit("9:cpu,memory:/x\n", &root), Some(8192));
        assert_eq!(cgroup_limit("9:cpu:/x\nnonsense\n0::/none\n", &root), None);
        fs::remove_dir_all(&root).unwrap();
    }
}

//! Where the images of guests' disks lie in a lab, whose own file system is a tmpfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const MIB: u64 = 1 << 20;

/// Runs a program to its end, which must be a good one. Without udev: the lab has none.
pub fn run(words: &[&str]) -> String {
    let output = Command::new(words[0])
        .args(&words[1..])
        .env("DM_DISABLE_UDEV", "1")
        .output()
        .unwrap_or_else(|e| panic!("{words:?}: {e}"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {}: {said}", output.status);
    said.trim().to_owned()
}

/// A file system that can do what disks ask for (holes, O_DIRECT), which the lab's tmpfs cannot.
pub struct Storage {
    /// Where it is mounted.
    pub directory: PathBuf,
    file: PathBuf,
    loops: Vec<String>,
    /// Its name in the device mapper, where its power can be cut.
    mapped: Option<String>,
}

impl Storage {
    pub fn new() -> Self {
        Self::made(false)
    }

    /// On a device that can be told to drop what is written to it.
    pub fn made(mapped: bool) -> Self {
        if run(&["uname", "-r"]).contains("amd64") {
            let _ = Command::new("modprobe").arg("loop").status();
        }
        let directory = std::env::temp_dir().join(format!("vmbed-storage-{}", std::process::id()));
        let file = directory.with_extension("img");
        let mut storage = Self { directory, file, loops: Vec::new(), mapped: None };
        fs::File::create(&storage.file).unwrap().set_len(4096 * MIB).unwrap();
        fs::create_dir_all(&storage.directory).unwrap();
        run(&["mkfs.ext4", "-q", storage.file.to_str().unwrap()]);
        let mut device = storage.device(&storage.file.clone());
        if mapped {
            let _ = Command::new("modprobe").arg("dm-flakey").status();
            let name = format!("vmbed-{}", std::process::id());
            let table = storage.table(&device, "1000000 0");
            storage.mapped = Some(name.clone());
            run(&["dmsetup", "create", &name, "--table", &table]);
            device = format!("/dev/mapper/{name}");
        }
        run(&["mount", "-t", "ext4", &device, storage.directory.to_str().unwrap()]);
        storage
    }

    fn table(&self, device: &str, mode: &str) -> String {
        format!("0 {} flakey {device} 0 {mode}", fs::metadata(&self.file).unwrap().len() / 512)
    }

    /// From now on nothing that is written arrives.
    pub fn cut_the_power(&self) {
        self.behave("0 1000000 1 drop_writes");
    }

    fn behave(&self, mode: &str) {
        let name = self.mapped.as_deref().expect("a mapped one");
        let table = self.table(&self.loops[0], mode);
        // First: what fails leaves nothing suspended.
        run(&["dmsetup", "load", name, "--table", &table]);
        run(&["dmsetup", "suspend", "--nolockfs", "--noflush", name]);
        run(&["dmsetup", "resume", name]);
    }

    /// From now on whatever is read or written is an error, and a file system that meets one goes read-only.
    pub fn fail(&self) {
        run(&["mount", "-o", "remount,errors=remount-ro", self.directory.to_str().unwrap()]);
        self.behave("0 1000000");
    }

    /// As it was.
    pub fn recover(&self) {
        self.behave("1000000 0");
    }

    /// As the machine finds it when it starts again.
    pub fn restart(&mut self) {
        run(&["umount", self.directory.to_str().unwrap()]);
        let name = self.mapped.take().expect("a mapped one");
        run(&["dmsetup", "remove", "--retry", &name]);
        run(&["mount", "-t", "ext4", &self.loops[0], self.directory.to_str().unwrap()]);
    }

    /// A block device of that file's bytes.
    pub fn device(&mut self, file: &Path) -> String {
        let device = run(&["losetup", "--find", "--show", file.to_str().unwrap()]);
        self.loops.push(device.clone());
        device
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let quietly = |words: &[&str]| {
            let _ = Command::new(words[0]).args(&words[1..]).stderr(Stdio::null()).status();
        };
        if let Some(name) = &self.mapped {
            quietly(&["dmsetup", "resume", name]);
        }
        // Those on the file system before the one below it.
        self.loops.iter().skip(1).for_each(|device| quietly(&["losetup", "-d", device]));
        quietly(&["umount", self.directory.to_str().unwrap()]);
        if let Some(name) = &self.mapped {
            quietly(&["dmsetup", "remove", "--retry", name]);
        }
        self.loops.iter().take(1).for_each(|device| quietly(&["losetup", "-d", device]));
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_dir(&self.directory);
    }
}

//! Which line of src a thread's system call comes from: the innermost one that its stack returns to.
#![expect(unsafe_code, reason = "it looks at other threads' stacks")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::frames::{self, Frame, Row};

/// Says where the directory is that has where the calls of places return to (`returns`), and a file with the rows of each part of the program.
pub const PLACES: &str = "VMBED_FAULT_PLACES";

/// What this process is made of, with what its file begins with in its place.
struct Part {
    base: u64,
    rows: Vec<Row>,
}

struct Known {
    /// Addresses in this process, in their order, with the number of the place.
    returns: Vec<(u64, u32)>,
    parts: Vec<Part>,
}

static KNOWN: OnceLock<Known> = OnceLock::new();

/// The program and the C library.
pub fn parts() -> [PathBuf; 2] {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let library = maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5));
    let library =
        library.map(Path::new).find(|path| path.file_name().is_some_and(|name| name == "libc.so.6"));
    [std::env::current_exe().expect("this program"), library.expect("the C library's map").to_owned()]
}

/// Makes that directory.
pub fn make(directory: &Path, returns: &str) {
    std::fs::create_dir_all(directory).expect("a directory of places");
    std::fs::write(directory.join("returns"), returns).expect("a file of places");
    for path in parts() {
        let file = directory.join(path.file_name().unwrap());
        std::fs::write(file, frames::of(&path)).expect("a file of frames");
    }
}

/// Must have been called before [`place`].
pub fn learn() {
    let directory = PathBuf::from(std::env::var_os(PLACES).expect("a directory of places"));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let base = |path: &Path| {
        let own = maps.lines().find(|line| line.ends_with(path.to_str().unwrap())).expect("its own map");
        u64::from_str_radix(own.split('-').next().unwrap(), 16).unwrap()
    };
    let parts = parts().map(|path| {
        let bytes = std::fs::read(directory.join(path.file_name().unwrap())).unwrap();
        Part { base: base(&path), rows: bytes.chunks_exact(Row::SIZE).map(Row::parse).collect() }
    });
    let text = std::fs::read_to_string(directory.join("returns")).unwrap();
    let numbers = text.lines().map(|line| line.split_once(' ').unwrap());
    let address = |at: &str| parts[0].base + at.parse::<u64>().unwrap();
    let returns = numbers.map(|(at, place)| (address(at), place.parse().unwrap())).collect();
    assert!(KNOWN.set(Known { returns, parts: parts.into() }).is_ok());
}

/// The place of a thread that waits in a system call of that number; allocates nothing. 0: none of src.
pub fn place(thread: u32, call: libc::c_long) -> u32 {
    let known = KNOWN.get().unwrap();
    // It says what it calls before it sleeps.
    let end = Instant::now() + PATIENCE;
    let (mut stack, mut instruction) = loop {
        match registers(thread) {
            Some(registers) => break registers,
            None if Instant::now() > end => return LOST,
            None => std::thread::yield_now(),
        }
    };
    if let Some(place) = known.place(instruction) {
        return place;
    }
    let mut words = Words { begin: 0, count: 0, words: [0; 512] };
    // Nobody knows the frame pointer before somebody who has kept it has been left.
    let mut pointer = None;
    for frame in 0..MOST {
        let row = known.row(instruction);
        let begin = match row.frame {
            Frame::None => return 0,
            // Where a thread is made, for the sake of the new one's stack.
            Frame::Unknown if frame == 0 && [libc::SYS_clone, libc::SYS_clone3].contains(&call) => {
                Some(stack + 8)
            }
            Frame::Unknown => None,
            Frame::Stack(offset) => Some(stack.wrapping_add_signed(offset.into())),
            Frame::Pointer(offset, below) => {
                let by_pointer = pointer.map(|at: u64| at.wrapping_add_signed(offset.into()));
                by_pointer.or(below.map(|below| stack.wrapping_add_signed(below.into())))
            }
        };
        let Some(begin) = begin else { return LOST };
        if let Some(offset) = row.kept {
            pointer = words.at(begin.wrapping_add_signed(offset.into()));
        }
        let Some(returns) = words.at(begin.wrapping_sub(8)) else { return LOST };
        if let Some(place) = known.place(returns) {
            return place;
        }
        // The call is the last of what holds there.
        (stack, instruction) = (begin, returns.wrapping_sub(1));
    }
    LOST
}

/// For a thread to sleep.
const PATIENCE: Duration = Duration::from_secs(30);
/// Frames that are looked at.
const MOST: usize = 1000;
/// A stack that does not say who called.
pub const LOST: u32 = u32::MAX - 1;

impl Known {
    fn place(&self, address: u64) -> Option<u32> {
        self.returns.binary_search_by_key(&address, |(at, _)| *at).ok().map(|index| self.returns[index].1)
    }

    /// What holds at that address.
    fn row(&self, address: u64) -> Row {
        let part = self.parts.iter().filter(|part| part.base <= address).max_by_key(|part| part.base);
        let row = part.and_then(|part| {
            let next = part.rows.partition_point(|row| part.base + row.start <= address);
            Some(part.rows[next.checked_sub(1)?])
        });
        row.unwrap_or(Row { start: 0, frame: Frame::Unknown, kept: None })
    }
}

/// A piece of this process's memory as it was.
struct Words {
    begin: u64,
    count: usize,
    words: [u64; 512],
}

impl Words {
    fn at(&mut self, address: u64) -> Option<u64> {
        let index = |words: &Self| {
            let index = usize::try_from(address.checked_sub(words.begin)? / 8).ok()?;
            (index < words.count).then_some(index)
        };
        if index(self).is_none() {
            self.begin = address.saturating_sub(64) & !7;
            self.count = read(self.begin, &mut self.words);
        }
        Some(self.words[index(self)?])
    }
}
/// Its stack pointer, and the instruction that it goes on with; not yet where it runs.
fn registers(thread: u32) -> Option<(u64, u64)> {
    let (mut path, mut text) = ([0u8; 64], [0u8; 256]);
    write!(&mut path[..63], "/proc/self/task/{thread}/syscall").ok()?;
    // SAFETY: the path ends with a zero, and what is opened here is closed here.
    let length = unsafe {
        let fd = libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        let length = libc::read(fd, text.as_mut_ptr().cast(), text.len());
        libc::close(fd);
        length
    };
    let text = std::str::from_utf8(text.get(..usize::try_from(length).ok()?)?).ok()?;
    if text.starts_with("running") {
        return None;
    }
    let mut last = text.trim().rsplit(' ').map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
    let instruction = last.next()?.ok()?;
    Some((last.next()?.ok()?, instruction))
}

/// How many words of this process's memory could be read.
fn read(at: u64, words: &mut [u64]) -> usize {
    let local = libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: size_of_val(words) };
    let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: size_of_val(words) };
    // SAFETY: room for as much as is asked for; what cannot be read is an error or less than that.
    let length =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(length).unwrap_or(0) / size_of::<u64>()
}

//! Which line of src a thread's system call comes from: the innermost one that its stack returns to.
#![expect(unsafe_code, reason = "it looks at other threads' stacks")]

use std::io::Write;
use std::sync::OnceLock;

/// The file that has where the calls of places return to (`places.rs`).
pub const PLACES: &str = "VMBED_FAULT_PLACES";

/// Addresses in this process, in their order, with the number of the place.
static RETURNS: OnceLock<Vec<(u64, u32)>> = OnceLock::new();

/// Must have been called before [`place`].
pub fn learn() {
    let text = std::fs::read_to_string(std::env::var_os(PLACES).expect("a file of places")).unwrap();
    let program = std::env::current_exe().unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let own = maps.lines().find(|line| line.ends_with(program.to_str().unwrap())).expect("its own map");
    let begin = u64::from_str_radix(own.split('-').next().unwrap(), 16).unwrap();
    let numbers = text.lines().map(|line| line.split_once(' ').unwrap());
    let returns = numbers.map(|(at, place)| (begin + at.parse::<u64>().unwrap(), place.parse().unwrap()));
    RETURNS.set(returns.collect()).unwrap();
}

/// The place of a thread that waits in a system call; allocates nothing. 0: none of src.
///
/// What an earlier call has left on the stack may be taken for a later one's: then that was made, too.
pub fn place(thread: u32) -> u32 {
    // It says what it calls before it sleeps.
    let Some((stack, instruction)) = (0..100_000).find_map(|_| registers(thread)) else { return 0 };
    if let Some(place) = of(instruction) {
        return place;
    }
    let mut words = [0u64; 512];
    for piece in 0..16 {
        let length = read(stack + piece * size_of_val(&words) as u64, &mut words);
        if let Some(place) = words[..length].iter().find_map(|word| of(*word)) {
            return place;
        }
        if length < words.len() {
            break;
        }
    }
    0
}

fn of(address: u64) -> Option<u32> {
    let returns = RETURNS.get()?;
    returns.binary_search_by_key(&address, |(at, _)| *at).ok().map(|index| returns[index].1)
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
        std::thread::yield_now();
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

//! Which process this is. A child of a fork has copies of its parent's objects, but none of its threads and guests,
//! and locks that nobody will ever unlock.

use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// Holds this process's number; children find 0 there.
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());
/// The last number that this process or one before it in its line took.
static LAST: AtomicU64 = AtomicU64::new(0);

/// A number that none of the processes has that this one was forked from. Takes no lock, and makes no system call
/// but the first time.
pub(crate) fn process() -> u64 {
    // SAFETY: NULL, or the page that `make_page` mapped, which nobody unmaps once it is here.
    match unsafe { PAGE.load(Ordering::Acquire).as_ref() }.or_else(|| make_page().ok()) {
        Some(page) => match page.load(Ordering::Relaxed) {
            0 => number(page),
            process => process,
        },
        // Without a page of that sort (before Linux 4.14) the system must be asked each time.
        // SAFETY: no arguments, cannot fail.
        None => unsafe { libc::getpid() }.unsigned_abs().into(),
    }
}

fn number(page: &AtomicU64) -> u64 {
    let new = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    page.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed).map_or_else(|theirs| theirs, |_| new)
}

#[cold]
fn make_page() -> io::Result<&'static AtomicU64> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let size = size_of::<AtomicU64>();
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let page = unsafe { libc::mmap(null_mut(), size, prot, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping of the line above; the advice changes what children find in it, and nothing here.
    let advise = || unsafe { libc::madvise(page, size, libc::MADV_WIPEONFORK) };
    // Miri knows no such advice, nor any fork.
    if !cfg!(miri) && advise() < 0 {
        let error = io::Error::last_os_error();
        // SAFETY: the mapping of above, which nobody else knows.
        unsafe { libc::munmap(page, size) };
        return Err(error);
    }
    let page = page.cast();
    let kept = match PAGE.compare_exchange(null_mut(), page, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => page,
        Err(theirs) => {
            // SAFETY: as above: another thread's page is the one that everybody uses.
            unsafe { libc::munmap(page.cast(), size) };
            theirs
        }
    };
    // SAFETY: aligned, zeroed, and mapped for as long as the process lives.
    Ok(unsafe { &*kept })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_another_process() {
        let before = process();
        assert_eq!(process(), before);
        // SAFETY: the child calls nothing but what is tested, which takes no lock, and ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let (first, second) = (process(), process());
            // SAFETY: ends this process, without what `exit` would run.
            unsafe { libc::_exit(i32::from(first == before || first != second)) };
        }
        let mut status = -1;
        // SAFETY: a child of this process, and a valid place for its status.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        assert_eq!(process(), before);
    }
}

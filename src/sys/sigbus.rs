//! SIGBUS on mappings whose pages can be lost or cannot be had: the page is replaced by one of zeroes, whoever
//! touched it goes on, and somebody else is told. A fault elsewhere goes to the handler that was there before.

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use vm_memory::mmap::MmapRegion;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{fork, lock};

/// One mapping that is watched. Places are never freed, only used again: the handler may look at any of them at any
/// moment, and can take no lock.
struct Place {
    next: AtomicPtr<Place>,
    taken: AtomicBool,
    process: AtomicU64,
    start: AtomicUsize,
    /// 0 while nothing is watched here. Written last, and cleared first.
    end: AtomicUsize,
    /// What one page of it is.
    page: AtomicUsize,
    /// The first byte that was lost, counted from 1.
    lost: AtomicUsize,
}

static PLACES: AtomicPtr<Place> = AtomicPtr::new(null_mut());

/// Every place that there is, taken or not.
fn places() -> impl Iterator<Item = &'static Place> {
    // SAFETY: NULL, or a place that `watch` leaked.
    let reference = |place: *mut Place| unsafe { place.as_ref() };
    std::iter::successors(reference(PLACES.load(Ordering::Acquire)), move |place| {
        reference(place.next.load(Ordering::Acquire))
    })
}

/// A mapping that is watched, until this is dropped: before the mapping is.
pub(crate) struct Watched(&'static Place);

/// Watches a mapping whose pages have `page` bytes.
pub(crate) fn watch(region: &MmapRegion, page: usize) -> Watched {
    let free = |place: &&Place| {
        place.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    let place = places().find(free).unwrap_or_else(another);
    let start = region.as_ptr().addr();
    place.process.store(fork::process(), Ordering::Relaxed);
    place.start.store(start, Ordering::Relaxed);
    place.page.store(page, Ordering::Relaxed);
    place.lost.store(0, Ordering::Relaxed);
    place.end.store(start + region.size(), Ordering::Release);
    Watched(place)
}

#[cold]
fn another() -> &'static Place {
    let place = Box::leak(Box::new(Place {
        next: AtomicPtr::new(PLACES.load(Ordering::Acquire)),
        taken: AtomicBool::new(true),
        process: AtomicU64::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicUsize::new(0),
    }));
    let mut next = place.next.load(Ordering::Relaxed);
    while let Err(newer) = PLACES.compare_exchange(next, place, Ordering::AcqRel, Ordering::Acquire) {
        place.next.store(newer, Ordering::Relaxed);
        next = newer;
    }
    place
}

impl Watched {
    /// Where in the mapping the first page was lost that anybody touched.
    pub fn lost(&self) -> Option<usize> {
        self.0.lost.load(Ordering::Acquire).checked_sub(1)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

/// Finds whose mapping an address is in, and where in it.
fn find(at: usize) -> Option<(&'static Place, usize)> {
    places().find_map(|place| {
        let end = place.end.load(Ordering::Acquire);
        let start = place.start.load(Ordering::Acquire);
        // The same as before: the start belongs to this end.
        let whole = place.end.load(Ordering::Acquire) == end;
        (whole && start <= at && at < end).then(|| (place, at - start))
    })
}

/// What the handler needs, set before it is installed and never changed after.
struct Installed {
    before: UnsafeCell<MaybeUninit<libc::sigaction>>,
    bell: AtomicUsize,
}

// SAFETY: `before` is written once, under the lock of `install`, before the handler that reads it is installed.
unsafe impl Sync for Installed {}

static INSTALLED: Installed =
    Installed { before: UnsafeCell::new(MaybeUninit::uninit()), bell: AtomicUsize::new(usize::MAX) };

/// Handles SIGBUS in this process from now on, unless that is so already. `start` gets the eventfd that counts what was
/// lost, before there can be anything.
pub(crate) fn install(start: impl FnOnce(EventFd) -> io::Result<()>) -> io::Result<()> {
    static PROCESS: Mutex<u64> = Mutex::new(0);
    let mut process = lock(&PROCESS);
    if *process == fork::process() {
        return Ok(());
    }
    let first = *process == 0;
    let bell = EventFd::new(EFD_CLOEXEC)?;
    // The handler's end of it, which stays open for as long as the process lives. In a child the parent's takes no
    // signal any more, since what the parent watches is not there.
    let theirs = bell.try_clone()?;
    start(bell)?;
    INSTALLED.bell.store(theirs.as_raw_fd() as usize, Ordering::Release);
    std::mem::forget(theirs);
    if first {
        // SAFETY: the action is all zeroes but for what is set; `before` has room for one, is written by nobody else
        // (the lock), and read by the handler only, which this very call installs.
        let result = unsafe {
            libc::sigaction(libc::SIGBUS, null_mut(), INSTALLED.before.get().cast::<libc::sigaction>());
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &action, null_mut())
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    *process = fork::process();
    Ok(())
}

/// The handler. Nothing here takes a lock or memory: it may have come in the middle of either.
extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's own structure, valid while the handler runs; the errno of this thread.
    let (code, at, errno) = unsafe { ((*info).si_code, (*info).si_addr().addr(), *libc::__errno_location()) };
    // One that somebody sent is about no address.
    let ours = code > 0 && find(at).is_some_and(|(place, offset)| replace(place, offset));
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !ours {
        pass_on(signal, info, context);
    }
}

/// Puts a page of zeroes where none can be had; whether that worked.
fn replace(place: &Place, offset: usize) -> bool {
    if place.process.load(Ordering::Relaxed) != fork::process() {
        return false;
    }
    let page = place.page.load(Ordering::Relaxed);
    let at: *mut libc::c_void =
        without_provenance_mut(place.start.load(Ordering::Relaxed) + offset / page * page);
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the page lies in a mapping that is watched, and so is there; it is accessed as volatile bytes only, and
    // those of this page are lost. It goes with the mapping around it. mmap is a system call and no more.
    if unsafe { libc::mmap(at, page, prot, flags, -1, 0) } == libc::MAP_FAILED {
        return false;
    }
    let _ = place.lost.compare_exchange(0, offset + 1, Ordering::AcqRel, Ordering::Relaxed);
    let one = 1u64;
    // SAFETY: eight bytes to an eventfd that stays open; it holds far more than there can be pages.
    unsafe { libc::write(INSTALLED.bell.load(Ordering::Acquire) as i32, (&raw const one).cast(), 8) };
    true
}

/// Does with the signal what would have been done without us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: written before this handler was installed, and not since; the functions are what the program itself
    // wanted called with these arguments. sigaction and raise may be called in handlers (signal-safety(7)).
    unsafe {
        let before = (*INSTALLED.before.get()).assume_init_ref();
        let sent = (*info).si_code <= 0;
        match before.sa_sigaction {
            libc::SIG_IGN if sent => {}
            // What a thread itself has done wrong cannot be ignored: it would do it for ever.
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &action, null_mut());
                if sent {
                    libc::raise(signal);
                }
            }
            function if before.sa_flags & libc::SA_SIGINFO != 0 => {
                type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                std::mem::transmute::<usize, Full>(function)(signal, info, context);
            }
            function => std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(function)(signal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::{Source, map_inside, reserve, sealed_memfd};

    const PAGE: usize = 4096;

    /// Four pages, the last two of which no file stands behind.
    fn short() -> (MmapRegion, MmapRegion) {
        let space = reserve(5 * PAGE).unwrap();
        let file = sealed_memfd(c"vmbed-test", 2 * PAGE as u64).unwrap();
        let region = map_inside(&space, PAGE, Source::File(file), 4 * PAGE).unwrap();
        (region, space)
    }

    fn touch(region: &MmapRegion, page: usize) -> u8 {
        // SAFETY: within the mapping, which nobody else knows.
        unsafe { region.as_ptr().add(page * PAGE + 7).read_volatile() }
    }

    /// How a child that does this ends, as wait(2) says it.
    fn ends(body: impl FnOnce() -> i32) -> i32 {
        // SAFETY: the child takes no lock that a thread of this process holds: `install`'s is taken by children only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let status = body();
            // SAFETY: ends this process, without what `exit` would run.
            unsafe { libc::_exit(status) };
        }
        let mut status = -1;
        // SAFETY: a child of this process, and a valid place for its status.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        status
    }

    fn on_sigbus(action: usize) {
        // SAFETY: zeroes are an action, and it is what one of the tests below wants to have.
        unsafe {
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = action;
            assert_eq!(libc::sigaction(libc::SIGBUS, &new, null_mut()), 0);
        }
    }

    #[test]
    fn a_lost_page_becomes_zeroes_and_is_told() {
        let status = ends(|| {
            let (region, space) = short();
            let mut bell = None;
            install(|made| {
                bell = Some(made);
                Ok(())
            })
            .unwrap();
            install(|_| panic!("once")).unwrap();
            drop(watch(&space, PAGE));
            let watched = watch(&region, PAGE);
            let before = watched.lost();
            let read = [touch(&region, 1), touch(&region, 3), touch(&region, 2), touch(&region, 3)];
            let told = bell.unwrap().read().unwrap();
            i32::from((before, read, watched.lost(), told) != (None, [0; 4], Some(3 * PAGE + 7), 2))
        });
        assert_eq!(status, 0);
    }

    #[test]
    fn other_faults_go_where_they_went() {
        extern "C" fn leave(_: libc::c_int) {
            // SAFETY: ends this process.
            unsafe { libc::_exit(42) };
        }
        let fault = |action: usize, watched: bool| {
            ends(|| {
                let (region, _space) = short();
                on_sigbus(action);
                install(|_| Ok(())).unwrap();
                // One that is not watched any more is like any other.
                let kept = watch(&region, PAGE);
                if !watched {
                    drop(kept);
                }
                touch(&region, 2).into()
            })
        };
        assert!(libc::WEXITSTATUS(fault(leave as *const () as usize, false)) == 42);
        for action in [libc::SIG_DFL, libc::SIG_IGN] {
            let status = fault(action, false);
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "{status:#x}");
        }
        let sent = |action: usize| {
            ends(|| {
                on_sigbus(action);
                install(|_| Ok(())).unwrap();
                // SAFETY: an integer.
                unsafe { libc::raise(libc::SIGBUS) }
            })
        };
        assert_eq!(libc::WEXITSTATUS(sent(leave as *const () as usize)), 42);
        assert_eq!(sent(libc::SIG_IGN), 0);
        assert_eq!(libc::WTERMSIG(sent(libc::SIG_DFL)), libc::SIGBUS);
    }

    #[test]
    fn places_are_used_again() {
        let (region, _space) = short();
        for _ in 0..100 {
            drop([watch(&region, PAGE), watch(&region, PAGE)]);
        }
        // Other tests have some, too.
        assert!(places().count() < 150);
    }
}

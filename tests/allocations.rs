//! A disk's requests allocate nothing, once there were a few; and what is kept for those that wait is known.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};

use vmbed::internals::Part;
use vmbed::{DiskConfig, DiskEngine};

#[path = "../benches/figures/disk_rig.rs"]
#[allow(dead_code, reason = "the figures use all of it")]
mod rig;
use rig::{Load, Rig, SIZE};

thread_local! {
    /// Allocations of this thread, and the bytes that it has and has not freed.
    static COUNTED: Cell<(u64, i64)> = const { Cell::new((0, 0)) };
}

struct Counting;

fn count(calls: u64, bytes: i64) {
    // While a thread ends there is nothing left to count.
    let _ = COUNTED.try_with(|counted| {
        let (so_far, live) = counted.get();
        counted.set((so_far + calls, live + bytes));
    });
}

// SAFETY: all is done by the system's allocator, as it was asked.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(1, layout.size() as i64);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, -(layout.size() as i64));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(1, size as i64 - layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A file of the disk's size, gone with the test.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_request_allocates_nothing() {
    let path =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("vmbed-allocations-{}", std::process::id()));
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let scratch = Scratch(path);
    for engine in [DiskEngine::Sync, DiskEngine::IoUring] {
        let before = COUNTED.get().1;
        let mut config = DiskConfig::new(&scratch.0);
        (config.engine, config.readonly) = (engine, true);
        let mut rig = Rig::new(Part::Configured(config)).unwrap();
        let load = Load { block: 4096, depth: 32, sequential: false, count: 500 };
        // Where things have to grow, they do so now.
        rig.run(load).unwrap();
        let (calls, live) = COUNTED.get();
        for depth in [1, 32] {
            rig.run(Load { depth, count: 2000, ..load }).unwrap();
        }
        let (after, left) = COUNTED.get();
        assert_eq!((after - calls, left - live), (0, 0), "{engine:?}: 4000 requests");
        // With its board: a queue's 256 entries, and at most a page for each.
        assert!(live - before < 1 << 20, "{engine:?}: {} bytes", live - before);
        println!("{engine:?}: {} bytes with a board", live - before);
    }
}

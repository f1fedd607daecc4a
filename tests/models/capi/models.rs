//! Handles in every order of calls and frees: an object ends once, after the last call on it, and a freed handle has none.

use std::sync::Arc;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::handle::{Handle, Spare, make, object, take};
use crate::sys::sync::check;

crate::models! {
    a_call_that_races_a_free_finds_the_object_or_an_error,
    of_two_frees_one_has_it,
    a_slot_is_of_one_object_at_a_time,
}

/// Counts what ended.
struct Thing(u32, Arc<AtomicUsize>);

impl Drop for Thing {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

struct Opaque;

loom::lazy_static! {
    static ref SPARE: Spare<Thing> = Spare::new();
}

impl Handle for Opaque {
    type Object = Thing;
    const NAME: &'static str = "thing";
    fn spare() -> &'static Spare<Thing> {
        &SPARE
    }
}

/// What C passes between its threads.
#[derive(Clone, Copy)]
struct Pointer(*mut Opaque);

// SAFETY: handles may be used by any thread: that is what is tested.
unsafe impl Send for Pointer {}

impl Pointer {
    fn number(self) -> Option<u32> {
        object(self.0).ok().map(|thing| thing.0)
    }

    fn free(self) -> bool {
        take(self.0).is_some()
    }
}

fn a_call_that_races_a_free_finds_the_object_or_an_error() {
    check(3, || {
        let ended = Arc::new(AtomicUsize::new(0));
        let handle = Pointer(make(Thing(1, ended.clone())));
        let free = thread::spawn(move || handle.free());
        if let Ok(thing) = object(handle.0) {
            assert_eq!((thing.0, ended.load(Ordering::SeqCst)), (1, 0), "it lives while a call is on it");
        }
        assert!(free.join().unwrap());
        assert_eq!((handle.number(), ended.load(Ordering::SeqCst)), (None, 1));
    });
}

fn of_two_frees_one_has_it() {
    check(3, || {
        let ended = Arc::new(AtomicUsize::new(0));
        let handle = Pointer(make(Thing(1, ended.clone())));
        let other = thread::spawn(move || handle.free());
        assert!(handle.free() != other.join().unwrap());
        assert_eq!(ended.load(Ordering::SeqCst), 1);
    });
}

fn a_slot_is_of_one_object_at_a_time() {
    check(3, || {
        let ended = Arc::new(AtomicUsize::new(0));
        let first = Pointer(make(Thing(1, ended.clone())));
        let count = ended.clone();
        let other = thread::spawn(move || {
            assert!(first.free());
            Pointer(make(Thing(2, count)))
        });
        let third = Pointer(make(Thing(3, ended.clone())));
        let second = other.join().unwrap();
        assert_ne!(second.0, third.0);
        assert_eq!((second.number(), third.number()), (Some(2), Some(3)));
        assert!(second.free() && third.free());
        assert_eq!(ended.load(Ordering::SeqCst), 3);
    });
}

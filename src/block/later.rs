#![forbid(unsafe_code)]
//! A disk for tests that completes requests later, in the reverse order, when it is told to.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Backend, BlockOp, IoRequest, Submitted};
use crate::sys::{fd, lock};

/// Wraps another backend.
pub(crate) struct Later<B> {
    inner: B,
    control: Control,
}

/// A request's tag and outcome.
type Ended = (u64, io::Result<()>);

/// Holds requests back and lets them go.
#[derive(Clone)]
pub(crate) struct Control {
    held: Arc<Mutex<Vec<Ended>>>,
    /// Everything that was asked for.
    pub asked: Arc<Mutex<Vec<BlockOp>>>,
    released: Arc<AtomicBool>,
    event: Arc<EventFd>,
}

impl Control {
    pub fn held(&self) -> usize {
        lock(&self.held).len()
    }

    /// Holds them back again.
    pub fn hold(&self) {
        self.released.store(false, Ordering::SeqCst);
    }

    /// Also reports what nobody asked for, as a faulty backend of an embedder might.
    pub fn release(&self, extra: &[u64]) {
        lock(&self.held).extend(extra.iter().map(|&tag| (tag, Ok(()))));
        self.released.store(true, Ordering::SeqCst);
        self.event.write(1).unwrap();
    }
}

impl<B> Later<B> {
    pub fn new(inner: B) -> (Self, Control) {
        let control = Control {
            held: Arc::default(),
            asked: Arc::default(),
            released: Arc::default(),
            event: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        };
        (Self { inner, control: control.clone() }, control)
    }
}

impl<B: Backend> Backend for Later<B> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn readonly(&self) -> bool {
        self.inner.readonly()
    }

    fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        let tag = request.tag;
        lock(&self.control.asked).push(request.op);
        match self.inner.submit(request) {
            Submitted::Done(outcome) => lock(&self.control.held).push((tag, outcome)),
            Submitted::Pending => unreachable!("the inner disk is synchronous"),
        }
        Submitted::Pending
    }

    fn completions(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        let _ = self.control.event.read();
        if self.control.released.load(Ordering::SeqCst) {
            let held = std::mem::take(&mut *lock(&self.control.held));
            held.into_iter().rev().for_each(|(tag, outcome)| done(tag, outcome));
        }
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(fd::borrow(&self.control.event))
    }
}

//! Where log lines go: nowhere, until an embedder asks for them.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex};

use ::log::{LevelFilter, Log, Metadata, Record};

use super::arguments::invalid;
use super::call;
use super::device::UserData;
use super::error::{c_text, vmbed_error};
use crate::error::{Error, ErrorKind};
use crate::sys::lock;

/// No log lines.
pub const VMBED_LOG_OFF: i32 = 0;
/// What the embedder should look at.
pub const VMBED_LOG_ERROR: i32 = 1;
/// What is odd.
pub const VMBED_LOG_WARN: i32 = 2;
/// What happens, rarely.
pub const VMBED_LOG_INFO: i32 = 3;
/// What helps to find a mistake.
pub const VMBED_LOG_DEBUG: i32 = 4;
/// Everything.
pub const VMBED_LOG_TRACE: i32 = 5;

/// Takes one log line without a line feed; `target` is the part of vmbed that says it. Both are gone when it
/// returns. Called on any thread, also on several at once.
pub type vmbed_log_fn = Option<
    unsafe extern "C" fn(user: *mut c_void, level: i32, target: *const c_char, message: *const c_char),
>;

struct Callback {
    function: unsafe extern "C" fn(*mut c_void, i32, *const c_char, *const c_char),
    user: UserData,
}

struct Forwarder(Mutex<Option<Arc<Callback>>>);

static FORWARDER: Forwarder = Forwarder(Mutex::new(None));

impl Log for Forwarder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= ::log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let Some(callback) = lock(&self.0).clone() else { return };
        let (target, message) = (c_text(record.target()), c_text(record.args().to_string()));
        // SAFETY: the embedder's function with its own data, which lives as long as `callback` does.
        unsafe {
            (callback.function)(
                callback.user.pointer(),
                record.level() as i32,
                target.as_ptr(),
                message.as_ptr(),
            );
        }
    }

    fn flush(&self) {}
}

/// Sends the library's log lines up to `level`, one of VMBED_LOG_*, to `function`; it replaces the one before. With
/// VMBED_LOG_OFF, or `function` NULL, there are none, which is how the library begins. `destroy`, where it is not NULL,
/// is called exactly once with `user`: when another function takes its place and no line is on its way to it any more,
/// or at once where this call fails.
///
/// VMBED_ERR_BUSY where the program is written in Rust itself and has a logger: the lines go there already.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_log_set(
    level: i32,
    function: vmbed_log_fn,
    user: *mut c_void,
    destroy: super::device::vmbed_destroy_fn,
    error: *mut *mut vmbed_error,
) -> i32 {
    let user = UserData::new(user, destroy);
    call(error, move || {
        let levels = [
            LevelFilter::Off,
            LevelFilter::Error,
            LevelFilter::Warn,
            LevelFilter::Info,
            LevelFilter::Debug,
            LevelFilter::Trace,
        ];
        let filter = usize::try_from(level).ok().and_then(|i| levels.get(i));
        let filter = *filter.ok_or_else(|| invalid(format!("level is {level}, not one of VMBED_LOG_*")))?;
        if ::log::set_logger(&FORWARDER).is_err() && !is_ours() {
            return Err(Error::new(ErrorKind::Busy, "this program has a logger of its own"));
        }
        let callback = function.map(|function| Arc::new(Callback { function, user }));
        ::log::set_max_level(if callback.is_some() { filter } else { LevelFilter::Off });
        let old = std::mem::replace(&mut *lock(&FORWARDER.0), callback);
        drop(old);
        Ok(())
    })
}

/// Whether an earlier call has put ours in place.
fn is_ours() -> bool {
    std::ptr::addr_eq(::log::logger(), &raw const FORWARDER)
}

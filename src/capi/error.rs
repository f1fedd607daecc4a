//! Errors, as C sees them.

use std::ffi::{CString, c_char};

use super::answer;
use super::handle::{self, handle};
use super::ledger::vmbed_verdict;
use crate::budget::Verdict;
use crate::error::{Error, ErrorKind};

/// It worked.
pub const VMBED_OK: i32 = 0;
/// An argument or a field of a configuration is wrong; vmbed_error_field() names every bad field.
pub const VMBED_ERR_INVALID_ARGUMENT: i32 = -1;
/// The call does not fit the state that the VM is in.
pub const VMBED_ERR_INVALID_STATE: i32 = -2;
/// A file, a network interface or a device that was named does not exist.
pub const VMBED_ERR_NOT_FOUND: i32 = -3;
/// The process may not do this.
pub const VMBED_ERR_PERMISSION_DENIED: i32 = -4;
/// Someone else holds what was asked for.
pub const VMBED_ERR_BUSY: i32 = -5;
/// This host, kernel or version of vmbed cannot do it.
pub const VMBED_ERR_UNSUPPORTED: i32 = -6;
/// A file's content is malformed.
pub const VMBED_ERR_BAD_IMAGE: i32 = -7;
/// The host ran out of something: memory, file descriptors, threads, disk.
pub const VMBED_ERR_EXHAUSTED: i32 = -8;
/// The ledger refused: it would break one of the promises that the host has made.
pub const VMBED_ERR_REFUSED: i32 = -9;
/// The wait ended before what was waited for happened.
pub const VMBED_ERR_TIMED_OUT: i32 = -10;
/// A system call failed for another reason; see vmbed_error_errno().
pub const VMBED_ERR_OS: i32 = -11;
/// A defect in vmbed.
pub const VMBED_ERR_INTERNAL: i32 = -12;

pub(super) fn status(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::InvalidArgument => VMBED_ERR_INVALID_ARGUMENT,
        ErrorKind::InvalidState => VMBED_ERR_INVALID_STATE,
        ErrorKind::NotFound => VMBED_ERR_NOT_FOUND,
        ErrorKind::PermissionDenied => VMBED_ERR_PERMISSION_DENIED,
        ErrorKind::Busy => VMBED_ERR_BUSY,
        ErrorKind::Unsupported => VMBED_ERR_UNSUPPORTED,
        ErrorKind::BadImage => VMBED_ERR_BAD_IMAGE,
        ErrorKind::Exhausted => VMBED_ERR_EXHAUSTED,
        ErrorKind::Refused => VMBED_ERR_REFUSED,
        ErrorKind::TimedOut => VMBED_ERR_TIMED_OUT,
        ErrorKind::Os => VMBED_ERR_OS,
        ErrorKind::Internal => VMBED_ERR_INTERNAL,
    }
}

/// The kind that an embedder's callback means with a status.
pub(super) fn kind(status: i32) -> ErrorKind {
    let kinds = [
        ErrorKind::InvalidArgument,
        ErrorKind::InvalidState,
        ErrorKind::NotFound,
        ErrorKind::PermissionDenied,
        ErrorKind::Busy,
        ErrorKind::Unsupported,
        ErrorKind::BadImage,
        ErrorKind::Exhausted,
        ErrorKind::Refused,
        ErrorKind::TimedOut,
        ErrorKind::Os,
    ];
    kinds.into_iter().find(|kind| self::status(*kind) == status).unwrap_or(ErrorKind::Internal)
}

/// Text for C: terminated, with what a NUL would hide.
pub(super) fn c_text(text: impl Into<String>) -> CString {
    let mut bytes = text.into().into_bytes();
    bytes.retain(|byte| *byte != 0);
    CString::new(bytes).unwrap_or_default()
}

/// What an error holds.
pub(super) struct Failure {
    status: i32,
    errno: i32,
    message: CString,
    chain: Vec<CString>,
    fields: Vec<[CString; 3]>,
    pub(super) verdict: Option<vmbed_verdict>,
}

/// Why a call failed. Every function that can fail takes a `vmbed_error **error` last: NULL if you do not want
/// to know, else it is set to NULL where the call works, and to an error where it fails, which is yours to free.
pub struct vmbed_error(());

handle!(vmbed_error holds Failure);

pub(super) fn make(error: Error) -> *mut vmbed_error {
    let sources = std::iter::successors(std::error::Error::source(&error), |e| e.source());
    handle::make(Failure {
        status: status(error.kind()),
        errno: error.errno().unwrap_or(0),
        chain: sources.map(|e| c_text(e.to_string())).collect(),
        fields: error
            .fields()
            .iter()
            .map(|f| [&f.field, &f.problem, &f.remedy].map(|t| c_text(t.as_str())))
            .collect(),
        verdict: Verdict::of(&error).map(vmbed_verdict::of),
        message: c_text(error.to_string()),
    })
}

/// What `read` finds in the error; `otherwise` for NULL. What it points to lives as long as the error.
fn look<T>(error: *const vmbed_error, otherwise: T, read: impl FnOnce(&Failure) -> Option<T>) -> T
where
    T: Copy,
{
    answer(otherwise, || handle::object(error).ok().and_then(|failure| read(&failure)).unwrap_or(otherwise))
}

/// The status that the call returned, one of VMBED_ERR_*; VMBED_OK for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_status(error: *const vmbed_error) -> i32 {
    look(error, VMBED_OK, |e| Some(e.status))
}

/// The errno of the system call that failed; 0 where none did, and for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_errno(error: *const vmbed_error) -> i32 {
    look(error, 0, |e| Some(e.errno))
}

/// What failed, on what, and what would be right, for a person to read; bad fields have a line each. It belongs to the
/// error. Never NULL: empty for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_message(error: *const vmbed_error) -> *const c_char {
    look(error, c"".as_ptr(), |e| Some(e.message.as_ptr()))
}

/// The `index`th cause below the error, from 0: what the next layer down said. NULL past the last. It belongs to
/// the error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_source(error: *const vmbed_error, index: usize) -> *const c_char {
    look(error, std::ptr::null(), |e| Some(e.chain.get(index)?.as_ptr()))
}

/// The `index`th bad field of a configuration, from 0, as one would write it: `disks[1].path`; of a refusal by the
/// ledger the `index`th constraint, whose problem is how it stands. NULL past the last.
/// It belongs to the error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_field(error: *const vmbed_error, index: usize) -> *const c_char {
    look(error, std::ptr::null(), |e| Some(e.fields.get(index)?[0].as_ptr()))
}

/// What is wrong with the `index`th bad field. NULL past the last. It belongs to the error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_problem(error: *const vmbed_error, index: usize) -> *const c_char {
    look(error, std::ptr::null(), |e| Some(e.fields.get(index)?[1].as_ptr()))
}

/// What would be right for the `index`th bad field; empty where the problem says it already. NULL past the last.
/// It belongs to the error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_remedy(error: *const vmbed_error, index: usize) -> *const c_char {
    look(error, std::ptr::null(), |e| Some(e.fields.get(index)?[2].as_ptr()))
}

/// Frees an error. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_error_free(error: *mut vmbed_error) {
    answer((), || drop(handle::take(error)));
}

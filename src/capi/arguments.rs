//! What comes in by pointer, checked.

use std::ffi::{CStr, OsStr, c_char};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

pub(super) fn invalid(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, why)
}

/// Bytes that end with a NUL.
pub(super) fn bytes<'a>(text: *const c_char, name: &str) -> Result<&'a [u8]> {
    if text.is_null() {
        return Err(invalid(format!("{name} is NULL")));
    }
    // SAFETY: not NULL, so it is a terminated string that lives through the call: the header says so.
    Ok(unsafe { CStr::from_ptr(text) }.to_bytes())
}

pub(super) fn text<'a>(text: *const c_char, name: &str) -> Result<&'a str> {
    std::str::from_utf8(bytes(text, name)?)
        .map_err(|e| invalid(format!("{name} is not UTF-8")).with_source(e))
}

/// A path is bytes, whatever they spell.
pub(super) fn path<'a>(text: *const c_char, name: &str) -> Result<&'a Path> {
    Ok(Path::new(OsStr::from_bytes(bytes(text, name)?)))
}

/// `None` for NULL.
pub(super) fn optional<T>(
    text: *const c_char,
    name: &str,
    read: impl FnOnce(*const c_char, &str) -> Result<T>,
) -> Result<Option<T>> {
    if text.is_null() { Ok(None) } else { read(text, name).map(Some) }
}

fn check_length(null: bool, length: usize, name: &str) -> Result<()> {
    match length {
        1.. if null => Err(invalid(format!("{name} is NULL, but has a length of {length}"))),
        _ if length > isize::MAX as usize => Err(invalid(format!("{name} has a length of {length}"))),
        _ => Ok(()),
    }
}

pub(super) fn slice<'a>(data: *const u8, length: usize, name: &str) -> Result<&'a [u8]> {
    check_length(data.is_null(), length, name)?;
    if length == 0 {
        return Ok(&[]);
    }
    // SAFETY: not NULL, so `length` bytes are there through the call: the header says so.
    Ok(unsafe { std::slice::from_raw_parts(data, length) })
}

/// The same for plain values of C's: every bit pattern is one.
pub(super) fn array<'a, T: Copy>(data: *const T, length: usize, name: &str) -> Result<&'a [T]> {
    check_length(data.is_null(), length, name)?;
    match length {
        0 => Ok(&[]),
        _ if !data.is_aligned() || length > isize::MAX as usize / size_of::<T>() => {
            Err(invalid(format!("{name} is not an array of {length}")))
        }
        // SAFETY: not NULL and aligned, so `length` values are there through the call: the header says so.
        _ => Ok(unsafe { std::slice::from_raw_parts(data, length) }),
    }
}

/// The same for handles.
pub(super) fn handles<'a, H: super::handle::Handle>(
    list: *const *const H,
    length: usize,
    name: &str,
) -> Result<&'a [*const H]> {
    check_length(list.is_null(), length, name)?;
    match length {
        0 => Ok(&[]),
        _ if !list.is_aligned() || length > isize::MAX as usize / size_of::<usize>() => {
            Err(invalid(format!("{name} is not an array of {length} handles")))
        }
        // SAFETY: not NULL and aligned, so `length` pointers are there through the call: the header says so.
        _ => Ok(unsafe { std::slice::from_raw_parts(list, length) }),
    }
}

pub(super) fn slice_mut<'a>(data: *mut u8, length: usize, name: &str) -> Result<&'a mut [u8]> {
    check_length(data.is_null(), length, name)?;
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: not NULL, so `length` bytes are there through the call, and nobody else's: the header says so.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, length) })
}

/// Where a result goes.
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub fn new(pointer: *mut T, name: &str) -> Result<Self> {
        if pointer.is_null() { Err(invalid(format!("{name} is NULL"))) } else { Ok(Self(pointer)) }
    }

    pub fn put(self, value: T) {
        // SAFETY: not NULL, so it is valid for a write: the header says so.
        unsafe { self.0.write(value) }
    }
}

/// Writes where NULL means that nobody wants to know.
pub(super) fn put_optional<T>(pointer: *mut T, value: T) {
    if let Ok(out) = Out::new(pointer, "") {
        out.put(value);
    }
}

/// A structure that begins with its own size, `size_t`, as `openat2`'s: an older caller's is shorter, a
/// newer one's may be longer as long as the rest is zero.
///
/// # Safety
/// `repr(C)`, its first field is `size: usize`, and all zeroes is a value of it.
pub(super) unsafe trait Sized_: Copy {
    /// How long its first version was.
    const FIRST: usize;
    const NAME: &'static str;
}

fn size_of_struct<T: Sized_>(pointer: *const T) -> Result<usize> {
    if pointer.is_null() {
        return Err(invalid(format!("{} is NULL", T::NAME)));
    }
    if !pointer.cast::<usize>().is_aligned() {
        return Err(invalid(format!("{} is at {pointer:p}, which is not aligned", T::NAME)));
    }
    // SAFETY: not NULL, so at least its size is there: the header says so.
    let size = unsafe { pointer.cast::<usize>().read() };
    if size < T::FIRST || size > 1 << 16 {
        let why = format!("{}: its size is {size}; set it to sizeof(struct {})", T::NAME, T::NAME);
        return Err(invalid(why));
    }
    Ok(size)
}

/// Whether one can be filled, before anything is done for it.
pub(super) fn check_size<T: Sized_>(pointer: *const T) -> Result<()> {
    size_of_struct(pointer).map(drop)
}

/// Reads one.
pub(super) fn structure<T: Sized_>(pointer: *const T) -> Result<T> {
    let size = size_of_struct(pointer)?;
    let known = size.min(size_of::<T>());
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: `size` bytes are there, as its caller says; at most as many are copied as `T` has.
    unsafe { pointer.cast::<u8>().copy_to_nonoverlapping(value.as_mut_ptr().cast(), known) };
    // SAFETY: within the `size` bytes that are there.
    let tail = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if tail.iter().any(|byte| *byte != 0) {
        let why = format!("{}: it sets fields that this version of vmbed does not know", T::NAME);
        return Err(Error::new(ErrorKind::Unsupported, why));
    }
    // SAFETY: zeroes, or what the caller wrote; the trait promises that any of it is a value.
    Ok(unsafe { value.assume_init() })
}

/// Fills one: as much as the caller's size says, and zeroes beyond what is known here. Its size stays.
pub(super) fn fill<T: Sized_>(pointer: *mut T, value: &T) -> Result<()> {
    let size = size_of_struct(pointer)?;
    let known = size.min(size_of::<T>());
    let head = size_of::<usize>();
    // SAFETY: `size` bytes are there, as its caller says; `known` of them and of the value are copied.
    unsafe {
        let from = std::ptr::from_ref(value).cast::<u8>();
        let to = pointer.cast::<u8>();
        from.add(head).copy_to_nonoverlapping(to.add(head), known - head);
        to.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// An fd that the caller goes on owning.
pub(super) fn fd<'a>(fd: i32, name: &str) -> Result<BorrowedFd<'a>> {
    // SAFETY: F_GETFD looks at the table of descriptors and at nothing else.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(invalid(format!("{name} is {fd}, which is no open file descriptor")));
    }
    // SAFETY: it was open a moment ago, and the caller keeps it so through the call: the header says so.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Milliseconds; negative is for ever.
pub(super) fn timeout(milliseconds: i64) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

#[cfg(test)]
mod tests;

//! What C may pass, and what it must not: each of these reads no byte beyond what its caller says is there, which Miri looks at (`make miri`).

use std::ffi::CString;
use std::ptr::{null, null_mut};

use super::*;

/// As the second version of a structure: callers of the first know nothing of `new`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct Options {
    size: usize,
    old: u32,
    padding: u32,
    new: u64,
}

// SAFETY: repr(C), the size first, and numbers only.
unsafe impl Sized_ for Options {
    const FIRST: usize = 16;
    const NAME: &'static str = "options";
}

/// A caller's memory for a structure of `size` bytes, no byte more, with that size in it.
fn caller(size: usize, rest: &[u8]) -> Vec<u64> {
    let mut words = vec![0u64; size.div_ceil(8)];
    words[0] = size as u64;
    for (at, byte) in rest.iter().enumerate() {
        words[1 + at / 8] |= u64::from(*byte) << (8 * (at % 8));
    }
    words
}

fn read(words: &[u64]) -> Result<Options> {
    structure(words.as_ptr().cast::<Options>())
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().expect("it must be refused").kind()
}

#[test]
fn a_structure_may_be_older_or_newer_than_the_library() {
    let old = read(&caller(16, &[7, 0, 0, 0])).unwrap();
    assert_eq!(old, Options { size: 16, old: 7, padding: 0, new: 0 });
    let same = read(&caller(24, &[7, 0, 0, 0, 0, 0, 0, 0, 9])).unwrap();
    assert_eq!((same.old, same.new), (7, 9));
    let newer = read(&caller(40, &[7, 0, 0, 0, 0, 0, 0, 0, 9])).unwrap();
    assert_eq!((newer.size, newer.old, newer.new), (40, 7, 9));
    let mut set = caller(40, &[7]);
    set[4] = 1 << 56;
    assert_eq!(kind(read(&set)), ErrorKind::Unsupported);
}

#[test]
fn a_structure_is_where_structures_may_be() {
    let whole = caller(40, &[7]);
    let odd = whole.as_ptr().cast::<u8>().wrapping_add(4).cast::<Options>();
    let error = structure(odd).expect_err("it must be refused");
    assert!(
        error.kind() == ErrorKind::InvalidArgument && error.to_string().contains("not aligned"),
        "{error}"
    );
}

#[test]
fn a_size_that_cannot_be_is_refused_before_anything_else_is_read() {
    for size in [0, 8, 15, (1 << 16) + 1, usize::MAX] {
        let only = size as u64;
        assert_eq!(kind(structure((&raw const only).cast::<Options>())), ErrorKind::InvalidArgument);
        assert!(check_size((&raw const only).cast::<Options>()).is_err(), "{size}");
    }
    let error = structure(null::<Options>()).unwrap_err();
    assert!(error.to_string().contains("options is NULL"), "{error}");
}

#[test]
fn a_result_fills_as_much_as_its_caller_knows() {
    let value = Options { size: 0, old: 7, padding: 0, new: 9 };
    let mut old = caller(16, &[0xff; 8]);
    fill(old.as_mut_ptr().cast(), &value).unwrap();
    assert_eq!(old, [16, 7]);
    let mut newer = caller(40, &[0xff; 32]);
    fill(newer.as_mut_ptr().cast(), &value).unwrap();
    assert_eq!(newer, [40, 7, 9, 0, 0], "what is not known here is zero");
    assert!(fill(null_mut(), &value).is_err());
}

#[test]
fn lists_are_of_their_length_and_where_they_can_be() {
    let bytes = [1u8, 2, 3];
    assert_eq!(slice(bytes.as_ptr(), 3, "data").unwrap(), bytes);
    assert!(
        slice(null(), 0, "data").unwrap().is_empty() && array::<u64>(null(), 0, "list").unwrap().is_empty()
    );
    for length in [1, isize::MAX as usize, usize::MAX] {
        assert!(slice(null(), length, "data").is_err() && array::<u64>(null(), length, "list").is_err());
    }
    assert!(slice(bytes.as_ptr(), usize::MAX, "data").is_err(), "longer than memory");
    let words = [1u64, 2];
    assert_eq!(array(words.as_ptr(), 2, "list").unwrap(), words);
    assert!(array(words.as_ptr(), usize::MAX / 8, "list").is_err(), "its bytes are more than memory has");
    let odd = words.as_ptr().cast::<u8>().wrapping_add(1).cast::<u64>();
    assert!(array(odd, 1, "list").is_err(), "not where a number can be");
    assert!(array(odd, 0, "list").unwrap().is_empty());
    let mut room = [0u8; 2];
    slice_mut(room.as_mut_ptr(), 2, "room").unwrap().copy_from_slice(&[8, 9]);
    assert_eq!(room, [8, 9]);
    assert!(
        slice_mut(null_mut(), 1, "room").is_err() && slice_mut(null_mut(), 0, "room").unwrap().is_empty()
    );
}

#[test]
fn text_is_utf_8_and_a_path_is_any_bytes() {
    let good = CString::new("gr\u{fc}n").unwrap();
    assert_eq!(text(good.as_ptr(), "name").unwrap(), "gr\u{fc}n");
    let bad = CString::new([b'a', 0xff]).unwrap();
    assert!(text(bad.as_ptr(), "name").unwrap_err().to_string().contains("name is not UTF-8"));
    assert_eq!(path(bad.as_ptr(), "path").unwrap().as_os_str().as_bytes(), [b'a', 0xff]);
    assert!(text(null(), "name").is_err() && path(null(), "path").is_err());
    assert_eq!(optional(null(), "name", text).unwrap(), None);
    assert_eq!(optional(good.as_ptr(), "name", text).unwrap(), Some("gr\u{fc}n"));
    assert!(optional(bad.as_ptr(), "name", text).is_err());
}

#[test]
fn results_go_where_they_are_wanted() {
    let mut place = 0u32;
    Out::new(&raw mut place, "out").unwrap().put(7);
    assert_eq!(place, 7);
    put_optional(&raw mut place, 8);
    put_optional(null_mut::<u32>(), 9);
    assert_eq!(place, 8);
    assert!(Out::new(null_mut::<u32>(), "out").err().unwrap().to_string().contains("out is NULL"));
    assert_eq!((timeout(-1), timeout(i64::MIN), timeout(5)), (None, None, Some(Duration::from_millis(5))));
}

#![forbid(unsafe_code)]
//! How bytes move between guest memory and an open file. Engines know no format.

pub(super) mod sync;

#![forbid(unsafe_code)]
//! The one error type: a small stable kind to match on, a context that says what failed and where,
//! and the source below it.

use std::fmt;
use std::io;

/// The result of everything in vmbed that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it was. Callers match on this; the text is for people.
///
/// New failures get a new context, rarely a new kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument or a field of a configuration is wrong; [`Error::fields`] lists every bad field.
    InvalidArgument,
    /// The call does not fit the state that the VM is in (resuming a VM that is not paused, say).
    InvalidState,
    /// A file, a network interface or a device that was named does not exist.
    NotFound,
    /// The process may not do this: permissions, capabilities or a security module.
    PermissionDenied,
    /// Someone else holds what was asked for (a TAP interface in use, a locked image).
    Busy,
    /// This host, kernel or build cannot do it.
    Unsupported,
    /// A file's content is malformed (a truncated kernel, an image of another architecture).
    BadImage,
    /// The host ran out of something: memory, file descriptors, threads, disk.
    Exhausted,
    /// The ledger refused: it would break one of the promises that the host has made.
    Refused,
    /// The wait ended before what was waited for happened.
    TimedOut,
    /// A system call failed for a reason that fits none of the above; see [`Error::errno`].
    Os,
    /// A defect in vmbed, or in an embedder's callback that panicked.
    Internal,
}

impl ErrorKind {
    /// A short name, stable, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid argument",
            Self::InvalidState => "invalid state",
            Self::NotFound => "not found",
            Self::PermissionDenied => "permission denied",
            Self::Busy => "busy",
            Self::Unsupported => "unsupported",
            Self::BadImage => "bad image",
            Self::Exhausted => "exhausted",
            Self::Refused => "refused",
            Self::TimedOut => "timed out",
            Self::Os => "system call failed",
            Self::Internal => "internal error",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One wrong field of a configuration: which, why, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FieldError {
    /// The field as one would write it in code: `disks[1].path`.
    pub field: String,
    /// What is wrong with its value.
    pub problem: String,
    /// What would be right; empty where the problem says it already.
    pub remedy: String,
}

impl FieldError {
    pub(crate) fn new(
        field: impl Into<String>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { field: field.into(), problem: problem.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

/// Why a call failed: [`kind`](Error::kind) to decide on, [`Display`](fmt::Display) to read, and
/// [`source`](std::error::Error::source) for the chain below.
///
/// One pointer wide, so that a `Result<(), Error>` travels in a register.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    fields: Vec<FieldError>,
}

impl Error {
    /// An error of `kind`; `context` says what was attempted, on what, and what would be right.
    ///
    /// Embedders make these in their own devices and backends.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, context: context.into(), source: None, fields: Vec::new() }))
    }

    /// The same error with the failure that caused it below.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// A failed system call: the kind is taken from its errno.
    pub fn os(context: impl Into<String>, source: io::Error) -> Self {
        Self::new(kind_of(&source), context).with_source(source)
    }

    /// The same for a call that leaves its errno behind (vmm-sys-util, kvm-ioctls).
    pub(crate) fn errno_of(context: impl Into<String>, errno: vmm_sys_util::errno::Error) -> Self {
        Self::os(context, io::Error::from_raw_os_error(errno.errno()))
    }

    /// Every bad field of a configuration at once.
    pub(crate) fn invalid_fields(fields: Vec<FieldError>) -> Self {
        let mut error = Self::new(ErrorKind::InvalidArgument, "the configuration is not valid");
        error.0.fields = fields;
        error
    }

    /// The same error with what it has to say about single fields.
    pub(crate) fn with_fields(mut self, fields: Vec<FieldError>) -> Self {
        self.0.fields = fields;
        self
    }

    /// What sort of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The bad fields of a configuration; of a refusal by the ledger every constraint by its name, with how it
    /// stands. Empty for every other error.
    pub fn fields(&self) -> &[FieldError] {
        &self.0.fields
    }

    /// The errno of the system call at the bottom of the chain, if one failed.
    pub fn errno(&self) -> Option<i32> {
        let mut below: Option<&(dyn std::error::Error + 'static)> =
            self.0.source.as_ref().map(|s| s.as_ref() as _);
        while let Some(error) = below {
            if let Some(io) = error.downcast_ref::<io::Error>() {
                return io.raw_os_error();
            }
            if let Some(errno) = error.downcast_ref::<Error>().and_then(Error::errno) {
                return Some(errno);
            }
            below = error.source();
        }
        None
    }

    /// The same failure, with what was being done around it put in front.
    #[must_use]
    pub(crate) fn context(mut self, what: impl fmt::Display) -> Self {
        self.0.context = format!("{what}: {}", self.0.context);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.context)?;
        for field in &self.0.fields {
            write!(f, "\n  {field}")?;
        }
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}, \"{self}\")", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| s.as_ref() as _)
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::ETXTBSY | libc::EADDRINUSE) => ErrorKind::Busy,
        Some(
            libc::EMFILE
            | libc::ENFILE
            | libc::ENOMEM
            | libc::ENOSPC
            | libc::EAGAIN
            | libc::EFBIG
            | libc::EDQUOT,
        ) => ErrorKind::Exhausted,
        Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY) => ErrorKind::Unsupported,
        _ => match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            io::ErrorKind::InvalidInput => ErrorKind::InvalidArgument,
            io::ErrorKind::TimedOut => ErrorKind::TimedOut,
            _ => ErrorKind::Os,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_pointer_wide() {
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }

    #[test]
    fn the_errno_is_found_below_any_number_of_contexts() {
        let low = Error::os("opening disk0", io::Error::from_raw_os_error(libc::EMFILE));
        let high = Error::new(ErrorKind::Exhausted, "building vm").with_source(low);
        assert_eq!(high.errno(), Some(libc::EMFILE));
        assert_eq!(high.kind(), ErrorKind::Exhausted);
        assert!(high.to_string().starts_with("building vm: opening disk0: "), "{high}");
    }

    #[test]
    fn every_bad_field_is_listed() {
        let error = Error::invalid_fields(vec![
            FieldError::new("cpus.count", "is 0", "1 to 254"),
            FieldError::new("disks[0].path", "is empty", ""),
        ]);
        assert_eq!(error.fields().len(), 2);
        assert!(error.to_string().contains("cpus.count: is 0 (1 to 254)"), "{error}");
    }
}

#![forbid(unsafe_code)]
//! Why the kernel does not do it, and what would help.

use std::io;

use crate::error::{Error, ErrorKind};
use crate::sys::netlink::Refusal;

pub(super) enum Refused {
    NoRight,
    NoModule(&'static str),
    NoFiltering,
    Exists,
    Other(ErrorKind),
}

/// Found by ourselves.
pub(super) fn of_ours(kind: ErrorKind, who: &str, what: &str) -> Error {
    Error::new(kind, format!("the host's network: {who}: {what}"))
}

impl Refused {
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NoRight,
            Some(libc::EEXIST) => Self::Exists,
            Some(libc::ENODEV) => Self::Other(ErrorKind::NotFound),
            Some(libc::EINVAL | libc::ERANGE | libc::EADDRNOTAVAIL | libc::ELOOP) => {
                Self::Other(ErrorKind::InvalidArgument)
            }
            Some(libc::EOPNOTSUPP) => Self::Other(ErrorKind::Unsupported),
            Some(libc::EBUSY) => Self::Other(ErrorKind::Busy),
            _ => Self::Other(ErrorKind::Os),
        }
    }

    /// Where an interface was to be made of a kind that may be missing.
    pub fn of_kind(error: &io::Error, missing: Self) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT) => missing,
            _ => Self::of(error),
        }
    }

    /// The same for /dev/net/tun.
    pub fn of_tap(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoModule("tun"),
            Some(libc::EBUSY) => Self::Exists,
            _ => Self::of(error),
        }
    }

    /// The error, for who was to be changed how.
    pub fn at(&self, who: &str, doing: &str) -> Error {
        let (kind, remedy) = match self {
            Self::NoRight => (
                ErrorKind::PermissionDenied,
                "; this needs CAP_NET_ADMIN in the network namespace, as root has".to_owned(),
            ),
            Self::NoModule(module) => {
                (ErrorKind::Unsupported, format!("; the kernel lacks it: modprobe {module}, as root"))
            }
            Self::NoFiltering => (
                ErrorKind::Unsupported,
                "; the kernel has no bridges (modprobe bridge, as root), or was built without CONFIG_BRIDGE_VLAN_FILTERING".to_owned(),
            ),
            Self::Exists => (ErrorKind::Busy, "; there is one already".to_owned()),
            Self::Other(kind) => (*kind, String::new()),
        };
        Error::new(kind, format!("the host's network: {who}: {doing}{remedy}"))
    }

    pub fn because(&self, who: &str, doing: &str, refusal: Refusal) -> Error {
        let Refusal { error, words } = refusal;
        let said = if words.is_empty() { doing.to_owned() } else { format!("{doing} ({words})") };
        self.at(who, &said).with_source(error)
    }
}

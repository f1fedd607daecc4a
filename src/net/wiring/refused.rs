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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a user reads, by what the kernel said where.
    #[test]
    fn what_is_missing_is_named() {
        type Reading = fn(&io::Error) -> Refused;
        let (plain, tap): (Reading, Reading) = (Refused::of, Refused::of_tap);
        let vlan: Reading = |error| Refused::of_kind(error, Refused::NoModule("8021q"));
        let filtering: Reading = |error| Refused::of_kind(error, Refused::NoFiltering);
        let none = ";;";
        for (reading, errno, kind, words) in [
            (plain, libc::EPERM, ErrorKind::PermissionDenied, "CAP_NET_ADMIN"),
            (plain, libc::EACCES, ErrorKind::PermissionDenied, "CAP_NET_ADMIN"),
            (plain, libc::EEXIST, ErrorKind::Busy, "there is one already"),
            (plain, libc::ENODEV, ErrorKind::NotFound, none),
            (plain, libc::ERANGE, ErrorKind::InvalidArgument, none),
            (plain, libc::EOPNOTSUPP, ErrorKind::Unsupported, none),
            (plain, libc::EBUSY, ErrorKind::Busy, none),
            (plain, libc::ENOMEM, ErrorKind::Os, none),
            (vlan, libc::EOPNOTSUPP, ErrorKind::Unsupported, "the kernel lacks it: modprobe 8021q, as root"),
            (vlan, libc::EAFNOSUPPORT, ErrorKind::Unsupported, "modprobe 8021q"),
            (vlan, libc::EPERM, ErrorKind::PermissionDenied, "CAP_NET_ADMIN"),
            (vlan, libc::EEXIST, ErrorKind::Busy, "there is one already"),
            (filtering, libc::EOPNOTSUPP, ErrorKind::Unsupported, "CONFIG_BRIDGE_VLAN_FILTERING"),
            (filtering, libc::EOPNOTSUPP, ErrorKind::Unsupported, "modprobe bridge"),
            (filtering, libc::EPERM, ErrorKind::PermissionDenied, "CAP_NET_ADMIN"),
            (tap, libc::ENOENT, ErrorKind::Unsupported, "modprobe tun"),
            (tap, libc::ENODEV, ErrorKind::Unsupported, "modprobe tun"),
            (tap, libc::ENXIO, ErrorKind::Unsupported, "modprobe tun"),
            (tap, libc::EBUSY, ErrorKind::Busy, "there is one already"),
            (tap, libc::EPERM, ErrorKind::PermissionDenied, "CAP_NET_ADMIN"),
            (tap, libc::EINVAL, ErrorKind::InvalidArgument, none),
        ] {
            let raw = io::Error::from_raw_os_error(errno);
            let refusal = Refusal { error: io::Error::from_raw_os_error(errno), words: "no!".to_owned() };
            let error = reading(&raw).because("tap 'vnet0'", "making it", refusal);
            let said = error.to_string();
            assert!(error.kind() == kind, "{raw}: {error:?}");
            assert!(said.starts_with("the host's network: tap 'vnet0': making it (no!)"), "{said}");
            let remedy = said.split_once(';').map(|(_, remedy)| remedy);
            assert!(remedy.map_or(words == none, |remedy| remedy.contains(words)), "{raw}: {said}");
        }
    }
}

#![forbid(unsafe_code)]
//! What an embedder says of it.

use std::time::Duration;

use crate::budget::reclaim::Thresholds;
use crate::error::{Error, FieldError, Result};
use crate::units::Bytes;

/// What a host does when its memory gets short ([`Host::set_reclaim`](crate::Host::set_reclaim)).
///
/// "Free" is what the kernel calls available, or what is left below the own cgroup's limit if that is less. Each stage goes
/// on until a quarter more is free than where it begins. A stage whose threshold is 0 never begins.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ReclaimConfig {
    /// Below it, guests with a balloon are asked for what they do not use; when half as much again is free, they have it
    /// back. Default 1 GiB.
    pub balloon_below: Bytes,
    /// Below it, what VMs have above their guarantees is paged out, where there is swap. Default 512 MiB.
    pub page_out_below: Bytes,
    /// Below it, VMs above their guarantees are paused, one after the other. Default 0: never.
    pub pause_below: Bytes,
    /// Below it, VMs that may be stopped ([`PromiseConfig::victim`](crate::PromiseConfig)) are, one after the other.
    /// Default 0: never.
    pub stop_below: Bytes,
    /// How much of what a guest does not use may be asked for: 0 to below 1. The higher, the more an idle guest gives for a
    /// busy one. Default 0.75.
    pub idle_tax: f64,
    /// How long a VM may be paused. Then it goes on, or is stopped if it may be. Default 10 s.
    pub pause_deadline: Duration,
    /// How often the host's memory is looked at, besides whenever the kernel reports pressure. Default 1 s, at least
    /// 10 ms.
    pub interval: Duration,
    /// Whether the thread is in a sandbox. Default `Off`.
    pub sandbox: ReclaimSandbox,
}

/// Whether the thread that does something when memory gets short is in a sandbox: it may make the system calls that its work needs and
/// no others (seccomp), and open no file (Landlock). A call that is refused fails with EPERM, and ends the thread: VMs that it has paused
/// go on, and each VM that there is has an event ([`EventKind::ReclaimFailed`](crate::EventKind)). `docs/sandbox.md` has the list.
///
/// VMs are paused, and your logger is called, on threads that are not in it. As long as it is there, do not change the process's user or
/// groups with the C library's functions: they would have each thread do the same, which is refused, and end the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReclaimSandbox {
    /// It is not.
    #[default]
    Off,
    /// As far as the kernel has what it takes: [`Host::reclaim_sandbox`](crate::Host::reclaim_sandbox) says what is in force.
    IfPresent,
    /// The thread does not begin where the kernel lacks something of it.
    Required,
}

impl Default for ReclaimConfig {
    fn default() -> Self {
        Self {
            balloon_below: Bytes::mib(1024),
            page_out_below: Bytes::mib(512),
            pause_below: Bytes(0),
            stop_below: Bytes(0),
            idle_tax: 0.75,
            pause_deadline: Duration::from_secs(10),
            interval: Duration::from_secs(1),
            sandbox: ReclaimSandbox::Off,
        }
    }
}

impl ReclaimConfig {
    pub(super) fn validate(&self) -> Result<()> {
        let mut fields = Vec::new();
        if !(0.0..1.0).contains(&self.idle_tax) {
            fields.push(FieldError::new("idle_tax", format!("is {}", self.idle_tax), "0 to below 1"));
        }
        if self.interval < Duration::from_millis(10) {
            fields.push(FieldError::new("interval", format!("is {:?}", self.interval), "at least 10 ms"));
        }
        if fields.is_empty() { Ok(()) } else { Err(Error::invalid_fields(fields)) }
    }

    pub(super) fn thresholds(&self) -> Thresholds {
        Thresholds {
            balloon: self.balloon_below.get(),
            page_out: self.page_out_below.get(),
            pause: self.pause_below.get(),
            stop: self.stop_below.get(),
            tax: self.idle_tax,
            deadline: self.pause_deadline,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_thresholds_are_named_together() {
        let config = ReclaimConfig { idle_tax: 1.0, interval: Duration::ZERO, ..ReclaimConfig::default() };
        let error = config.validate().unwrap_err();
        let fields: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
        assert_eq!(fields, ["idle_tax", "interval"]);
        assert!(ReclaimConfig { idle_tax: f64::NAN, ..ReclaimConfig::default() }.validate().is_err());
    }
}

#![forbid(unsafe_code)]
//! The embedder's code and the sandbox: which of it would run on which of the VM's threads.

use super::builder::VmBuilder;
use super::machine::Machine;
use super::sources::Network;
use crate::console::Output;
use crate::error::{Error, ErrorKind, FieldError, Result};

const VCPUS: &str = "sandbox.vcpus";
const DEVICES: &str = "sandbox.devices";
const DISKS: &str = "sandbox.disks";

impl VmBuilder {
    /// Whether no code of the embedder's would run in the sandbox.
    ///
    /// # Errors
    /// `InvalidArgument` with the fields that would have it run there, and what it is.
    pub(super) fn check_foreign_code(&self) -> Result<()> {
        let Some(sandbox) = &self.config.sandbox else { return Ok(()) };
        #[cfg(feature = "internals")]
        if self.trusted {
            return Ok(());
        }
        let on = [(VCPUS, sandbox.vcpus), (DEVICES, sandbox.devices), (DISKS, sandbox.disks)];
        let found = self.foreign_code().into_iter().filter(|(field, ..)| on.contains(&(*field, true)));
        let found: Vec<_> = found
            .map(|(field, what, instead)| {
                let problem =
                    format!("is true, and the threads that it confines would run code of yours: {what}");
                FieldError::new(field, problem, format!("false{instead}"))
            })
            .collect();
        if found.is_empty() { Ok(()) } else { Err(Error::invalid_fields(found)) }
    }

    /// By the field that must be false for it: what it is, and what else would do.
    fn foreign_code(&self) -> Vec<(&'static str, String, &'static str)> {
        let mut found = Vec::new();
        for device in self.pio.iter().chain(&self.mmio).filter(|device| !device.ours) {
            found.push((VCPUS, format!("the device '{}'", device.name), ", or a doorbell"));
        }
        if self.caller_vcpus {
            found.push((VCPUS, "your own threads run them (caller_vcpus)".to_owned(), ""));
        }
        for index in self.wiring.sources.own_nets() {
            let what = || format!("the NetBackend of net{index}");
            found.extend([VCPUS, DEVICES].map(|field| (field, what(), ", or a socket (net_fd)")));
        }
        if matches!(self.wiring.output, Some(Output::Callback(_))) {
            found.push((DEVICES, "the console's callback".to_owned(), ", or a descriptor (console_output)"));
        }
        if self.wiring.dispatcher.is_some() {
            found.push((DEVICES, "your own loop serves them (dispatcher)".to_owned(), ""));
        }
        for index in self.wiring.sources.own_disks() {
            found.push((DISKS, format!("the BlockBackend of disk{index}"), ", or a descriptor (disk_fd)"));
        }
        found
    }
}

impl Machine {
    /// Whether a card may be put on that network while the VM is in its sandbox.
    ///
    /// # Errors
    /// It is code of the embedder's.
    pub(super) fn may_change_net(&self, network: &Network) -> Result<()> {
        let Some(supervisor) = &self.supervisor else { return Ok(()) };
        let sandbox = supervisor.config();
        if !matches!(network, Network::Backend(_)) || !(sandbox.vcpus || sandbox.devices) {
            return Ok(());
        }
        let why = "change_net: sandbox: code of yours would run on threads in it: use a socket (Network::Fd)";
        Err(Error::new(ErrorKind::InvalidArgument, why))
    }
}

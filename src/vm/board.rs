#![forbid(unsafe_code)]
use super::builder::{Buses, Threads};
use crate::{config::*, error::*, events::*, ioapic::Ioapic, memory::Memory};
use kvm_ioctls::VmFd;
use std::sync::Arc;
#[derive(Default)]
pub(super) struct Console;
pub(super) struct BoardPlan<'a> {
    pub config: &'a VmConfig,
    pub vm: &'a Arc<VmFd>,
    pub memory: &'a Memory,
    pub reporter: &'a Reporter,
    pub stop: &'a StopLine,
    pub threads: &'a Threads,
}
pub(super) struct Board;
impl Board {
    pub fn make(_p: BoardPlan<'_>, _c: Console, _b: &mut Buses) -> Result<Self> {
        Ok(Board)
    }
    pub fn ioapic(&self) -> Option<Arc<Ioapic>> {
        None
    }
    pub fn describe(&self, _c: &VmConfig) -> crate::boot::Machine {
        loop {}
    }
    pub fn start(&self) -> Result<()> {
        Ok(())
    }
    pub fn pause(&self) -> Result<()> {
        Ok(())
    }
    pub fn resume(&self) -> Result<()> {
        Ok(())
    }
    pub fn stop(&self) {}
    pub fn join(&self) {}
    pub fn press_power_button(&self) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "shutdown: a bare platform has no power button"))
    }
}

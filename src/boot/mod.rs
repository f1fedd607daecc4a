use crate::config::*;
use crate::error::*;
use crate::memory::Memory;
use vm_memory::{Bytes, GuestAddress};
pub(crate) struct Entry {
    pub mode: CpuMode,
    pub rip: u64,
    pub stack: u64,
}
impl Entry {
    pub fn start(&self, i: u32) -> crate::vcpu::regs::Start {
        crate::vcpu::regs::Start {
            mode: self.mode,
            rip: self.rip,
            rsp: self.stack,
            rdi: i as u64,
            ..Default::default()
        }
    }
}
pub(crate) fn linux(_m: &Memory, _l: &LinuxBoot, _d: &()) -> Result<Entry> {
    Err(Error::new(ErrorKind::Unsupported, "x"))
}
pub(crate) fn bare(m: &Memory, b: &BareBoot) -> Result<Entry> {
    for (a, d) in &b.images {
        m.write_slice(d, GuestAddress(*a))
            .map_err(|e| Error::new(ErrorKind::InvalidArgument, "i").with_source(e))?;
    }
    Ok(Entry { mode: b.mode, rip: b.entry, stack: b.stack })
}

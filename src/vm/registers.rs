#![forbid(unsafe_code)]
//! What an embedder may see and set of a guest that stands still.

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::vcpu::Vcpu;

/// The general registers of a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// Copies every register by name from one structure into another.
macro_rules! copy_registers {
    ($from:expr => $into:ident) => {{
        let r = $from;
        $into {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rsp: r.rsp,
            rbp: r.rbp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
        }
    }};
}

pub(super) fn get(vcpu: &Vcpu) -> Result<Registers> {
    let failed = |e| Error::errno_of("reading registers (KVM_GET_REGS)", e);
    let regs = vcpu.with(|fd| fd.get_regs()).map_err(failed)?;
    Ok(copy_registers!(&regs => Registers))
}

pub(super) fn set(vcpu: &Vcpu, registers: &Registers) -> Result<()> {
    let regs = copy_registers!(registers => kvm_regs);
    vcpu.with(|fd| fd.set_regs(&regs)).map_err(|e| Error::errno_of("setting registers (KVM_SET_REGS)", e))
}

pub(super) fn read_memory(memory: &Memory, address: u64, data: &mut [u8]) -> Result<()> {
    memory.read_slice(data, GuestAddress(address)).map_err(|e| outside(address, data.len(), e))?;
    memory.intact()
}

pub(super) fn write_memory(memory: &Memory, address: u64, data: &[u8]) -> Result<()> {
    if !memory.check_range(GuestAddress(address), data.len()) {
        return Err(outside(
            address,
            data.len(),
            vm_memory::GuestMemoryError::InvalidGuestAddress(GuestAddress(address)),
        ));
    }
    memory.write_slice(data, GuestAddress(address)).map_err(|e| outside(address, data.len(), e))?;
    memory.intact()
}

fn outside(address: u64, length: usize, source: vm_memory::GuestMemoryError) -> Error {
    let what = format!("{length} bytes at {address:#x} are not all guest memory");
    Error::new(ErrorKind::InvalidArgument, what).with_source(source)
}

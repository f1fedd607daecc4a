#![forbid(unsafe_code)]
//! The registers that a vCPU starts with.

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::config::CpuMode;
use crate::error::{Error, Result};

const CR0_PE: u64 = 1;
const CR0_NE: u64 = 1 << 5;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Where a vCPU begins and with what in its registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Start {
    pub mode: CpuMode,
    pub rip: u64,
    pub rsp: u64,
    pub rbx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// The page tables' root; long mode only.
    pub cr3: u64,
    /// Where a descriptor table lies in guest memory and its limit; 0 for none.
    pub gdt: (u64, u16),
}

/// Selectors in the table that boot loaders leave for Linux (boot protocol, 64-bit: `__BOOT_CS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Puts `start` into the vCPU's registers.
pub(crate) fn set_start(vcpu: &VcpuFd, start: &Start) -> Result<()> {
    let failed = |what: &'static str| move |e| Error::errno_of(format!("setting a vCPU's {what}"), e);
    let mut sregs = vcpu.get_sregs().map_err(failed("start registers (KVM_GET_SREGS)"))?;
    match start.mode {
        CpuMode::Real => {
            for segment in
                [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss]
            {
                (segment.base, segment.selector) = (0, 0);
            }
        }
        CpuMode::Protected | CpuMode::Long => {
            let long = start.mode == CpuMode::Long;
            let data = flat(DATA_SELECTOR, 0x3, false);
            sregs.cs = flat(CODE_SELECTOR, 0xb, long);
            (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
            // A busy 32-bit task state segment, which processors insist on at VM entry.
            sregs.tr = kvm_segment {
                type_: 0xb,
                present: 1,
                limit: 0x67,
                selector: TASK_SELECTOR,
                ..Default::default()
            };
            (sregs.gdt.base, sregs.gdt.limit) = start.gdt;
            (sregs.idt.base, sregs.idt.limit) = (0, 0);
            sregs.cr0 = CR0_PE | CR0_ET | CR0_NE;
            if long {
                sregs.cr0 |= CR0_PG;
                sregs.cr3 = start.cr3;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
    }
    vcpu.set_sregs(&sregs).map_err(failed("start registers (KVM_SET_SREGS)"))?;
    let regs = kvm_regs {
        rip: start.rip,
        rsp: start.rsp,
        rbx: start.rbx,
        rsi: start.rsi,
        rdi: start.rdi,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("start registers (KVM_SET_REGS)"))
}

/// Lets a secondary vCPU run at once instead of waiting for the guest's SIPI.
pub(crate) fn set_runnable(vcpu: &VcpuFd) -> Result<()> {
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
        .map_err(|e| Error::errno_of("waking a secondary vCPU (KVM_SET_MP_STATE)", e))
}

fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        db: u8::from(!long),
        l: u8::from(long),
        ..Default::default()
    }
}

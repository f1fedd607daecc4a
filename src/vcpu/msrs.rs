#![forbid(unsafe_code)]
//! The model-specific registers that firmware would have set.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{Error, ErrorKind, Result};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: without it Linux takes memory for uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets what an operating system expects to find set.
pub(crate) fn set_boot(vcpu: &VcpuFd) -> Result<()> {
    let set = [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)];
    let entries = set.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries)
        .map_err(|e| Error::new(ErrorKind::Internal, format!("MSR list: {e:?}")))?;
    let done = vcpu.set_msrs(&msrs).map_err(|e| Error::errno_of("setting MSRs (KVM_SET_MSRS)", e))?;
    match entries.get(done) {
        None => Ok(()),
        Some(refused) => {
            let what = format!("KVM refused to set MSR {:#x}", refused.index);
            Err(Error::new(ErrorKind::Unsupported, what))
        }
    }
}

#![forbid(unsafe_code)]
//! The guest-physical address map, in one place.
//!
//! ```text
//! 0x0000_0000  RAM, the first 3 GiB (a Linux guest: boot parameters and tables below 1 MiB)
//! 0xc000_0000  PCI memory window, 32 bit
//! 0xe800_0000  ECAM of PCI segment 0, bus 0
//! 0xfec0_0000  IOAPIC
//! 0xfee0_0000  local APICs, message-signalled interrupts
//! 0xfffb_c000  KVM's own pages (Intel)
//! 0x1_0000_0000  RAM, what is left of it
//!      …       PCI memory window, 64 bit, from the next 1 GiB boundary
//! ```

use std::ops::Range;

/// Where the RAM below 4 GiB ends at the latest and the devices begin.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// Where the rest of the RAM goes on.
pub(crate) const HIGH_RAM_START: u64 = 1 << 32;

/// 32-bit PCI memory window.
pub(crate) const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express configuration space of bus 0 (32 devices × 8 functions × 4 KiB).
pub(crate) const ECAM: Range<u64> = 0xe800_0000..0xe810_0000;
/// The IOAPIC's registers.
pub(crate) const IOAPIC: Range<u64> = 0xfec0_0000..0xfec0_1000;
/// The local APIC's page.
pub(crate) const LAPIC: u64 = 0xfee0_0000;
/// Three pages for KVM's task state segment in real mode (Intel), after the identity-map page.
pub(crate) const KVM_TSS: u64 = 0xfffb_d000;
/// One page for KVM's identity map (Intel).
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// What a PC has there is the kernel's: no device of anybody's gets to see an access.
pub(crate) const KERNELS: [(&str, Range<u64>); 2] =
    [("local APIC", LAPIC..LAPIC + 0x1000), ("KVM's own pages", KVM_IDENTITY_MAP..KVM_TSS + 0x3000)];

/// What an x86 PC keeps for firmware: no RAM for the guest's kernel, but ours to put tables in.
pub(crate) const FIRMWARE_AREA: Range<u64> = 0x9_fc00..0x10_0000;
/// The RSDP and the ACPI tables; an operating system searches 0xe0000-0xfffff for the RSDP.
pub(crate) const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// The SMBIOS entry point and tables, in the range that is searched for `_SM3_`.
pub(crate) const SMBIOS_TABLES: Range<u64> = 0xf_0000..0x10_0000;

/// The size of the 64-bit PCI memory window.
const PCI_MMIO64_SIZE: u64 = 16 << 30;

/// The RAM ranges of a guest with `size` bytes of memory.
pub(crate) fn ram(size: u64) -> Vec<Range<u64>> {
    let low = 0..size.min(LOW_RAM_END);
    let high = HIGH_RAM_START..HIGH_RAM_START + size.saturating_sub(LOW_RAM_END);
    [low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

/// The 64-bit PCI memory window above that RAM.
pub(crate) fn pci_mmio64(size: u64) -> Range<u64> {
    let ram_end = ram(size).last().map_or(0, |r| r.end).max(HIGH_RAM_START);
    let start = ram_end.next_multiple_of(1 << 30);
    start..start + PCI_MMIO64_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_and_loses_nothing() {
        for size in [4096, 512 << 20, LOW_RAM_END, LOW_RAM_END + 4096, 5 << 30, 1 << 40] {
            let ram = ram(size);
            assert_eq!(ram.iter().map(|r| r.end - r.start).sum::<u64>(), size);
            assert!(ram.iter().all(|r| r.end <= LOW_RAM_END || r.start >= HIGH_RAM_START));
            assert!(pci_mmio64(size).start >= ram.last().unwrap().end.max(HIGH_RAM_START));
        }
    }

    #[test]
    fn windows_do_not_overlap() {
        let [(_, apic), (_, pages)] = KERNELS;
        let mut all = [PCI_MMIO32, ECAM, IOAPIC, apic, pages];
        all.sort_by_key(|r| r.start);
        assert!(all.windows(2).all(|w| w[0].end <= w[1].start));
        assert!(all[0].start >= LOW_RAM_END && all[4].end <= HIGH_RAM_START);
    }
}

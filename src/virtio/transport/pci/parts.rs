#![forbid(unsafe_code)]
//! What lies where in the BAR, and the capabilities that tell a driver (virtio 1.2, 4.1.4).

use crate::error::Result;
use crate::pci::{ConfigSpace, Identity};

/// The parts of the BAR, each on a page of its own: a driver may map them apart.
pub(super) const COMMON: u64 = 0x0000;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const MSIX_TABLE: u64 = 0x4000;
pub(super) const MSIX_PENDING: u64 = 0x5000;
pub(super) const PAGE: u64 = 0x1000;

/// The BAR's size: a power of two.
pub(crate) const BAR_SIZE: u64 = 0x8000;
/// Bytes between the notify addresses of two queues (`notify_off_multiplier`).
const NOTIFY_STRIDE: u64 = 4;
/// The most queues whose notify addresses and MSI-X entries fit into their pages.
pub(super) const MAX_QUEUES: usize = (PAGE / 16) as usize - 1;

const VENDOR: u16 = 0x1af4;
/// The device id of type 0 (4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// Modern devices only: the revision is at least 1, the subsystem at least 0x40 (4.1.2.1).
const REVISION: u8 = 1;
const SUBSYSTEM_BASE: u16 = 0x40;

/// Vendor-specific (PCI Local Bus 3.0, appendix H).
const CAP_VENDOR: u8 = 9;
/// `cfg_type` of a virtio capability (4.1.4).
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;

/// The length of the common configuration, without what VIRTIO_F_NOTIF_CONFIG_DATA and
/// VIRTIO_F_RING_RESET add: they are not offered.
pub(super) const COMMON_LEN: u64 = 0x38;

/// Who a device of type `kind` is.
pub(super) fn identity(kind: u32) -> Identity {
    let class = match kind {
        // Ethernet, mass storage, communication, and what has no class of its own.
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x80, 0x00],
        3 => [0x07, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE.wrapping_add(kind as u16),
        revision: REVISION,
        class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM_BASE.wrapping_add(kind as u16),
    }
}

/// Where the notify address of a queue is, in a BAR at `base`.
pub(super) fn notify_address(base: u64, queue: u16) -> u64 {
    base + NOTIFY + u64::from(queue) * NOTIFY_STRIDE
}

/// The queue whose notify address holds `offset` from the first one.
pub(super) fn notified_queue(offset: u64) -> usize {
    // Within a page: it fits.
    (offset / NOTIFY_STRIDE) as usize
}

/// Adds the five virtio capabilities. Returns the window's.
pub(super) fn add_capabilities(config: &mut ConfigSpace, queues: u16) -> Result<Window> {
    let mut add = |kind: u8, offset: u64, length: u64, more: &[u8], writable: &[u8]| {
        // Length of the capability, type, BAR 0, id, padding, offset and length of the part.
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        config.add_capability(CAP_VENDOR, &body, writable)
    };
    add(VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_LEN, &[], &[])?;
    add(VIRTIO_PCI_CAP_ISR_CFG, ISR, 1, &[], &[])?;
    add(VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE, PAGE, &[], &[])?;
    let stride = (NOTIFY_STRIDE as u32).to_le_bytes();
    add(VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, u64::from(queues) * NOTIFY_STRIDE, &stride, &[])?;
    // BAR, offset, length and data are the driver's.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    Ok(Window(add(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, &[0; 4], &writable)?))
}

/// The capability through which configuration space reaches the BAR (`VIRTIO_PCI_CAP_PCI_CFG`, 4.1.4.9):
/// where it is.
#[derive(Clone, Copy)]
pub(super) struct Window(usize);

impl Window {
    /// Where `pci_cfg_data` is in the capability.
    const DATA: usize = 16;

    /// Where in the BAR a configuration access goes that is one through the window. None where it is not,
    /// or where the driver has pointed the window at nothing.
    pub fn target(self, config: &ConfigSpace, offset: usize, length: usize) -> Option<u64> {
        if offset != self.0 + Self::DATA {
            return None;
        }
        let mut cap = [0; Self::DATA];
        config.read(self.0, &mut cap);
        let [.., bar, _, _, _, a, b, c, d, e, f, g, h] = cap;
        let (at, wanted) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let good = bar == 0 && matches!(wanted, 1 | 2 | 4) && wanted as usize == length;
        let inside = u64::from(at) + u64::from(wanted) <= BAR_SIZE;
        (good && inside && at.is_multiple_of(wanted)).then_some(at.into())
    }
}

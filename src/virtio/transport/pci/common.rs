#![forbid(unsafe_code)]
//! The common configuration structure (virtio 1.2, 4.1.4.3): the state machine's registers, byte by byte.

use super::super::core::{Change, Core, NO_VECTOR, QueueRegisters};
use super::parts::COMMON_LEN;
use crate::pci::Msix;
use crate::virtio::read_config_space;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
/// What lies behind the first half of a 64-bit register.
const HIGH: u64 = 4;

/// Reads any piece of the structure. Beyond it there is nothing: zeroes.
pub(super) fn read(core: &mut Core, config_vector: u16, offset: u64, data: &mut [u8]) {
    let mut space = [0; COMMON_LEN as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = at as usize;
        space[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(DEVICE_FEATURE_SELECT, &core.device_feature_select.to_le_bytes());
    put(DEVICE_FEATURE, &core.device_features().to_le_bytes());
    put(DRIVER_FEATURE_SELECT, &core.driver_feature_select.to_le_bytes());
    put(DRIVER_FEATURE, &core.driver_features().to_le_bytes());
    put(CONFIG_MSIX_VECTOR, &config_vector.to_le_bytes());
    put(NUM_QUEUES, &(core.queues().len() as u16).to_le_bytes());
    put(DEVICE_STATUS, &[core.status()]);
    put(CONFIG_GENERATION, &[core.signals().config_generation()]);
    put(QUEUE_SELECT, &core.queue_select.to_le_bytes());
    if let Some(queue) = core.queue() {
        put(QUEUE_SIZE, &queue.size.to_le_bytes());
        put(QUEUE_MSIX_VECTOR, &queue.vector.to_le_bytes());
        put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
        put(QUEUE_NOTIFY_OFF, &core.queue_select.to_le_bytes());
        put(QUEUE_DESC, &queue.desc.to_le_bytes());
        put(QUEUE_DRIVER, &queue.avail.to_le_bytes());
        put(QUEUE_DEVICE, &queue.used.to_le_bytes());
    }
    data.fill(0);
    read_config_space(&space, offset, data);
}

/// Writes one register, in its own width, or a 64-bit one in two halves (4.1.3.1). Another access writes
/// nothing.
pub(super) fn write(
    core: &mut Core,
    msix: &Msix,
    config_vector: &mut u16,
    offset: u64,
    data: &[u8],
) -> Change {
    match (offset, data) {
        (DEVICE_FEATURE_SELECT, &[a, b, c, d]) => {
            core.device_feature_select = u32::from_le_bytes([a, b, c, d]);
        }
        (DRIVER_FEATURE_SELECT, &[a, b, c, d]) => {
            core.driver_feature_select = u32::from_le_bytes([a, b, c, d]);
        }
        (DRIVER_FEATURE, &[a, b, c, d]) => core.set_driver_features(u32::from_le_bytes([a, b, c, d])),
        (CONFIG_MSIX_VECTOR, &[a, b]) => {
            let index = u16::from_le_bytes([a, b]);
            let vector = msix.vector(index);
            *config_vector = if vector.is_some() { index } else { NO_VECTOR };
            core.signals().set_config_interrupt(vector);
        }
        (DEVICE_STATUS, &[status]) => return core.set_status(status),
        (QUEUE_SELECT, &[a, b]) => core.queue_select = u16::from_le_bytes([a, b]),
        (QUEUE_MSIX_VECTOR, &[a, b]) => {
            if let Some(queue) = core.queue_vector_mut() {
                let value = u16::from_le_bytes([a, b]);
                queue.interrupt = msix.vector(value);
                // What reads back tells the driver whether it got it.
                queue.vector = if queue.interrupt.is_some() { value } else { NO_VECTOR };
            }
        }
        _ => {
            if let Some(queue) = core.queue_mut() {
                write_queue(queue, offset, data);
            }
        }
    }
    Change::None
}

fn write_queue(queue: &mut QueueRegisters, offset: u64, data: &[u8]) {
    match *data {
        [a, b] => {
            let value = u16::from_le_bytes([a, b]);
            match offset {
                QUEUE_SIZE => queue.set_size(value),
                QUEUE_ENABLE if value == 1 => queue.enable(),
                _ => {}
            }
        }
        [a, b, c, d] => {
            let value = u64::from(u32::from_le_bytes([a, b, c, d]));
            let Some(address) = address_register(queue, offset & !HIGH) else { return };
            *address = match offset & HIGH {
                0 => *address & !0xffff_ffff | value,
                _ => *address & 0xffff_ffff | value << 32,
            };
        }
        [a, b, c, d, e, f, g, h] => {
            if let Some(address) = address_register(queue, offset) {
                *address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            }
        }
        _ => {}
    }
}

fn address_register(queue: &mut QueueRegisters, offset: u64) -> Option<&mut u64> {
    match offset {
        QUEUE_DESC => Some(&mut queue.desc),
        QUEUE_DRIVER => Some(&mut queue.avail),
        QUEUE_DEVICE => Some(&mut queue.used),
        _ => None,
    }
}

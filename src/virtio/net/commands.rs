#![forbid(unsafe_code)]
//! The control queue (virtio 1.2, 5.1.6.5): what the driver says of the card beside its frames.

use std::sync::{Arc, Mutex};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
};

use super::control::Control;
use super::filter::{Filter, Mode};
use super::worker::Worker;
use crate::config::MacAddress;
use crate::memory::Memory;
use crate::sys::lock;
use crate::virtio::Signals;
use crate::virtio::chain::{BadBuffer, Reader};
use crate::virtio::queue::{Chain, Next, Queue, QueueFault};
use crate::virtio::server::Serve;

/// `VIRTIO_NET_OK` and `VIRTIO_NET_ERR`.
const OK: u8 = 0;
const ERR: u8 = 1;
/// Commands of classes that have only one or two.
const ADD: u8 = 0;
const DELETE: u8 = 1;
const ACKNOWLEDGE: u8 = 0;
const PAIRS_SET: u8 = 0;

/// Who obeys.
pub(super) struct Commander {
    pub control: Arc<Control>,
    /// What the driver has accepted.
    pub features: u64,
    /// Who serves the pairs of queues. It waits for the end of their turns, and they never for it.
    pub pairs: Vec<Arc<Mutex<Worker>>>,
}

impl Serve for Commander {
    fn serve(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        chain: &Chain,
        _: &Signals,
    ) -> Result<Next, QueueFault> {
        let mut reader = chain.reader(memory);
        let obeyed = obey(&self.control, self.features, &self.pairs, &mut reader).unwrap_or(false);
        answer(queue, memory, chain, if obeyed { OK } else { ERR })
    }
}

/// The last byte of what the driver lets the device write; others are for answers that no command here has.
fn answer(queue: &mut Queue, memory: &Memory, chain: &Chain, ack: u8) -> Result<Next, QueueFault> {
    let written = u32::from(chain.writer(memory).write(&[ack]).is_ok());
    queue.complete(memory, chain.head, written).map(|()| Next::More)
}

/// Does what a command says; `false` where it is not known, not agreed on, or wrong.
fn obey(
    control: &Control,
    features: u64,
    pairs: &[Arc<Mutex<Worker>>],
    reader: &mut Reader<'_>,
) -> Result<bool, BadBuffer> {
    let [class, command] = reader.read_array()?;
    let agreed = |feature: u32| features & 1 << feature != 0;
    let class = u32::from(class);
    Ok(match class {
        VIRTIO_NET_CTRL_RX => {
            let modes = [
                Mode::Promiscuous,
                Mode::AllMulticast,
                Mode::AllUnicast,
                Mode::NoMulticast,
                Mode::NoUnicast,
                Mode::NoBroadcast,
            ];
            let feature = if command < 2 { VIRTIO_NET_F_CTRL_RX } else { VIRTIO_NET_F_CTRL_RX_EXTRA };
            let [on] = reader.read_array()?;
            let mode = modes.get(usize::from(command)).filter(|_| agreed(feature) && on < 2);
            mode.map(|mode| control.filter(|filter| filter.set(*mode, on == 1))).is_some()
        }
        VIRTIO_NET_CTRL_MAC if u32::from(command) == VIRTIO_NET_CTRL_MAC_TABLE_SET => {
            let (unicast, multicast) = (table(reader)?, table(reader)?);
            let set = || control.filter(|filter| filter.set_tables(unicast, multicast));
            agreed(VIRTIO_NET_F_CTRL_RX).then(set).is_some()
        }
        VIRTIO_NET_CTRL_MAC if u32::from(command) == VIRTIO_NET_CTRL_MAC_ADDR_SET => {
            let mac: [u8; 6] = reader.read_array()?;
            let good = agreed(VIRTIO_NET_F_CTRL_MAC_ADDR) && mac[0] & 1 == 0 && mac != [0; 6];
            good.then(|| control.filter(|filter| filter.mac = MacAddress(mac))).is_some()
        }
        VIRTIO_NET_CTRL_VLAN if matches!(command, ADD | DELETE) => {
            let vlan = u16::from_le_bytes(reader.read_array()?);
            let agreed = agreed(VIRTIO_NET_F_CTRL_VLAN);
            agreed && control.filter(|filter| filter.set_vlan(vlan, command == ADD))
        }
        VIRTIO_NET_CTRL_ANNOUNCE if command == ACKNOWLEDGE && agreed(VIRTIO_NET_F_GUEST_ANNOUNCE) => {
            control.announced();
            true
        }
        VIRTIO_NET_CTRL_MQ if command == PAIRS_SET => {
            let count = usize::from(u16::from_le_bytes(reader.read_array()?));
            let good = agreed(VIRTIO_NET_F_MQ) && (1..=pairs.len()).contains(&count);
            if good {
                // Those that begin come first: what is on its way finds a queue at any time.
                control.set_used(count);
                let each = pairs.iter().enumerate();
                each.clone().take(count).for_each(|(_, pair)| lock(pair).set_active(true));
                each.skip(count).for_each(|(_, pair)| lock(pair).set_active(false));
            }
            good
        }
        _ => false,
    })
}

/// `struct virtio_net_ctrl_mac`; the inner `None` where there are more than are kept.
fn table(reader: &mut Reader<'_>) -> Result<Option<Vec<[u8; 6]>>, BadBuffer> {
    let count = u32::from_le_bytes(reader.read_array()?);
    if Filter::has_room(count) {
        return (0..count).map(|_| reader.read_array()).collect::<Result<_, _>>().map(Some);
    }
    reader.skip(u64::from(count) * 6)?;
    Ok(None)
}

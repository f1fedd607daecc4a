#![forbid(unsafe_code)]
//! What a card has carried.

use crate::units::Count;

/// What a card has carried since the VM was built. Bytes count from the Ethernet header on. What the host's kernel carries by itself
/// ([`NetConfig::vhost`](crate::NetConfig::vhost)) is not counted here, but at the TAP interface (`ip -s link`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetStatistics {
    /// Frames that the guest received.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames for the guest that vmbed read and could not deliver: too short, too long for the guest's buffers. What
    /// the guest gives no buffers for is dropped where it waits, and counted there (`ip -s link` for a TAP interface).
    pub rx_dropped: u64,
    /// Frames that the guest's driver has said that it does not want: for other addresses or VLANs.
    pub rx_filtered: u64,
    /// Frames that the guest sent.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest's that did not go out: malformed, or the network failed or was gone.
    pub tx_dropped: u64,
    /// Pairs of queues that the host's kernel serves now; 0 while the VM is paused, and before its guest's driver has begun.
    pub vhost: u16,
}

/// The same, while it is being counted: for each pair of queues by its thread alone, read by anyone.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(super) filtered: Count,
    pub(super) rx: Way,
    pub(super) tx: Way,
}

/// One way.
#[derive(Debug, Default)]
pub(super) struct Way {
    frames: Count,
    bytes: Count,
    dropped: Count,
}

impl Way {
    pub fn carried(&self, bytes: u64) {
        self.frames.add(1);
        self.bytes.add(bytes);
    }

    pub fn dropped(&self) {
        self.dropped.add(1);
    }

    pub fn carried_if(&self, delivered: bool, bytes: u64) {
        if delivered { self.carried(bytes) } else { self.dropped() }
    }
}

impl NetStatistics {
    /// With what another pair of queues has counted.
    pub(super) fn plus(self, pair: &Counters) -> Self {
        let Counters { filtered, rx, tx } = pair;
        Self {
            rx_frames: self.rx_frames + rx.frames.get(),
            rx_bytes: self.rx_bytes + rx.bytes.get(),
            rx_dropped: self.rx_dropped + rx.dropped.get(),
            rx_filtered: self.rx_filtered + filtered.get(),
            tx_frames: self.tx_frames + tx.frames.get(),
            tx_bytes: self.tx_bytes + tx.bytes.get(),
            tx_dropped: self.tx_dropped + tx.dropped.get(),
            vhost: self.vhost,
        }
    }
}

#![forbid(unsafe_code)]
//! How vCPUs are numbered: threads within cores within sockets, each level rounded up to a power of two
//! as the x2APIC id wants it (Intel SDM volume 3, 9.9.1).

use super::CpuConfig;

/// The APIC id widths and counts that follow from a [`CpuConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    pub threads_per_core: u32,
    pub cores_per_socket: u32,
    /// Bits of the APIC id that number the thread within its core.
    pub thread_bits: u32,
    /// Bits that number the core within its socket.
    pub core_bits: u32,
}

impl Topology {
    /// `cpus` is valid but for the ids being too large, which [`Topology::last_apic_id`] tells.
    pub fn new(cpus: &CpuConfig) -> Self {
        let threads_per_core = u32::from(cpus.threads_per_core.max(1));
        let cores = u32::from(cpus.count) / threads_per_core;
        let cores_per_socket = (cores / u32::from(cpus.sockets.max(1))).max(1);
        let bits = |n: u32| n.next_power_of_two().trailing_zeros();
        Self {
            threads_per_core,
            cores_per_socket,
            thread_bits: bits(threads_per_core),
            core_bits: bits(cores_per_socket),
        }
    }

    pub fn threads_per_socket(&self) -> u32 {
        self.threads_per_core * self.cores_per_socket
    }

    /// Thread, core and socket of vCPU `index`.
    pub fn place(&self, index: u32) -> (u32, u32, u32) {
        let core = index / self.threads_per_core;
        (index % self.threads_per_core, core % self.cores_per_socket, core / self.cores_per_socket)
    }

    /// The APIC id of vCPU `index`, which is its id for KVM too.
    pub fn apic_id(&self, index: u32) -> u32 {
        let (thread, core, socket) = self.place(index);
        thread | core << self.thread_bits | socket << (self.thread_bits + self.core_bits)
    }

    /// The largest APIC id of `count` vCPUs.
    pub fn last_apic_id(&self, count: u16) -> u32 {
        self.apic_id(u32::from(count).saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: u16, threads_per_core: u16, sockets: u16) -> Vec<u32> {
        let cpus = CpuConfig { count, threads_per_core, sockets, ..CpuConfig::default() };
        let topology = Topology::new(&cpus);
        (0..u32::from(count)).map(|i| topology.apic_id(i)).collect()
    }

    #[test]
    fn ids_leave_gaps_where_a_level_is_no_power_of_two() {
        assert_eq!(ids(4, 1, 1), [0, 1, 2, 3]);
        assert_eq!(ids(6, 2, 1), [0, 1, 2, 3, 4, 5]);
        assert_eq!(ids(6, 1, 2), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(8, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ids(12, 2, 2), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(ids(254, 2, 1).last(), Some(&253));
    }
}

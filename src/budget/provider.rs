#![forbid(unsafe_code)]
//! What a host has to give, with the arithmetic of OpenStack Placement.

/// One resource, as Placement's inventories have it. Units are the resource's own: bytes, vCPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Inventory {
    pub total: u64,
    pub reserved: u64,
    /// Positive and finite; anything else leaves nothing to give.
    pub ratio: f64,
    /// The least that one consumer may have.
    pub min_unit: u64,
    /// The most that one consumer may have, whatever the ratio.
    pub max_unit: u64,
    /// What one consumer has is a multiple of it. 0 counts as 1.
    pub step_size: u64,
}

impl Inventory {
    /// All of `total`, once, in any amounts.
    pub const fn new(total: u64) -> Self {
        Self { total, reserved: 0, ratio: 1.0, min_unit: 1, max_unit: u64::MAX, step_size: 1 }
    }

    /// What is there beside the reserve.
    pub fn usable(&self) -> u64 {
        self.total.saturating_sub(self.reserved)
    }

    /// (total − reserved) × ratio in floating point, rounded down, as Placement computes and reports it.
    ///
    /// Placement compares use with the product before rounding; use is whole, so that is the same.
    pub fn capacity(&self) -> u128 {
        // Saturates at both ends; a ratio that is not a number gives 0.
        let capacity = (self.usable() as f64 * self.ratio) as u128;
        capacity.min(i128::MAX as u128 / 2)
    }

    /// How far `wanted` is within the unit rules; negative where it breaks one.
    pub fn unit_slack(&self, wanted: u64) -> i128 {
        let wanted = i128::from(wanted);
        let over = wanted % i128::from(self.step_size.max(1));
        let step = if over == 0 { i128::MAX } else { -over };
        step.min(i128::from(self.max_unit) - wanted).min(wanted - i128::from(self.min_unit))
    }
}

/// What a host has to give in all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Provider {
    pub memory: Inventory,
    /// Swap space, in bytes, that guests may be paged out to.
    pub swap: u64,
    /// vCPUs that share cores; `None`: not limited.
    pub vcpus: Option<Inventory>,
    /// Cores that are given away whole, one a vCPU.
    pub dedicated: u64,
}

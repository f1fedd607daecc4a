#![forbid(unsafe_code)]
//! A VM's balloon, as its embedder handles it.

use std::time::{Duration, Instant};

use super::Vm;
use crate::error::{Error, ErrorKind, Result};
use crate::units::Bytes;
use crate::virtio::balloon::{BalloonStatistics, Control, GuestMemory};

impl Vm {
    /// Asks the guest to give up `target` bytes of its memory in all, in whole pages of 4 KiB; less than before gives it
    /// some back. Returns at once: the guest does it in its own time, as far as it can, and
    /// [`EventKind::Balloon`](crate::EventKind::Balloon) tells when it has. A guest without a driver does nothing. What
    /// was asked stays so over a reset of the guest's driver.
    ///
    /// Neither entitlement nor guarantee changes: a guest that takes its memory back is not stopped by this.
    ///
    /// # Errors
    /// `InvalidArgument` for more than the VM's memory; `Unsupported` where the configuration has no balloon.
    pub fn set_balloon(&self, target: Bytes) -> Result<()> {
        self.balloon_control()?.set_target(target)
    }

    /// What the balloon has moved so far. In every state. Costs nothing worth mentioning: reads counters.
    ///
    /// # Errors
    /// `Unsupported` where the configuration has no balloon.
    pub fn balloon_statistics(&self) -> Result<BalloonStatistics> {
        Ok(self.balloon_control()?.statistics())
    }

    /// Asks the guest for an account of its memory, and waits for it. With a `timeout` of 0 it does not wait, and answers
    /// the last one that came; the next one is on its way then.
    ///
    /// # Errors
    /// `TimedOut` where the guest has not answered by then, or never yet; `Unsupported` where the configuration has no
    /// balloon, or the guest no driver for it; `InvalidState` when called from the VM's own callback, and where the VM has ended, also
    /// while this waits.
    pub fn guest_memory(&self, timeout: Duration) -> Result<GuestMemory> {
        let control = self.balloon_control()?;
        if timeout.is_zero() {
            control.ask();
            let none =
                || Error::new(ErrorKind::TimedOut, "the guest has not given an account of its memory yet");
            return control.last_guest_memory().ok_or_else(none);
        }
        self.machine.not_from_within("guest_memory")?;
        control.guest_memory(deadline(timeout))
    }

    /// Asks the guest for all pages that are free now, and gives them back to the host; the guest has them again when it
    /// touches them. Waits until that is done, and answers how much the host has got. See
    /// [`BalloonConfig::hinting`](crate::BalloonConfig::hinting) for what it may cost.
    ///
    /// # Errors
    /// `TimedOut`: what was given back by then stays so. `Busy` while another thread asks. `Unsupported` where the
    /// configuration does not allow it, or the guest has no driver for it; `InvalidState` when called from the VM's own
    /// callback, and where the VM has ended, also while this waits.
    pub fn discard_free_pages(&self, timeout: Duration) -> Result<Bytes> {
        let control = self.balloon_control()?;
        self.machine.not_from_within("discard_free_pages")?;
        control.discard_free_pages(deadline(timeout))
    }

    fn balloon_control(&self) -> Result<&Control> {
        let none = || {
            Error::new(ErrorKind::Unsupported, "the VM has no balloon: set `balloon` in its configuration")
        };
        self.machine.board.balloon.as_deref().ok_or_else(none)
    }
}

/// A year is as long as for ever.
fn deadline(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + Duration::from_secs(365 * 24 * 3600))
}

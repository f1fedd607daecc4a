#![forbid(unsafe_code)]
//! What was done, and how it is undone: as far as nobody else has changed it since.

use super::links::{Link, Links, Setting, Vlan};
use super::refused::Refused;
use crate::error::{Error, Result};
use crate::sys::netlink::Refusal;

#[derive(Debug)]
pub(super) enum Step {
    /// It is deleted, unless it is to stay.
    Made {
        index: u32,
        name: String,
        stays: bool,
    },
    Set {
        index: u32,
        before: Setting,
        after: Setting,
    },
    /// `after` is not known where it was taken from its bridge.
    Vlans {
        index: u32,
        before: Vec<Vlan>,
        after: Option<Vec<Vlan>>,
    },
}

impl Step {
    pub fn made(link: &Link, stays: bool) -> Self {
        Self::Made { index: link.index, name: link.name.clone(), stays }
    }

    pub fn index(&self) -> u32 {
        match self {
            Self::Made { index, .. } | Self::Set { index, .. } | Self::Vlans { index, .. } => *index,
        }
    }

    fn undo(&self, links: &mut Links) -> std::result::Result<(), Refusal> {
        // The kernel does not give an index to another interface until they have all been used.
        let link = match links.numbered(self.index()) {
            Err(refusal) if refusal.error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            link => link?,
        };
        match self {
            Self::Made { stays: true, .. } => Ok(()),
            // Another namespace's interface may have that number by now.
            Self::Made { index, name, .. } if link.name == *name => links.delete(*index),
            Self::Made { .. } => Ok(()),
            Self::Set { index, before, after } => {
                if after.now(&link) != Some(*after) {
                    return Ok(());
                }
                links.set(*index, *before)
            }
            Self::Vlans { index, before, after } => {
                let now = links.vlans(*index)?;
                if link.master.is_none() && link.filters.is_none()
                    || after.as_ref().is_some_and(|after| now != *after)
                {
                    return Ok(());
                }
                links.set_vlans(&link, &now, before)
            }
        }
    }
}

/// Undoes all steps but the first `keep`, the last first; of what fails, says what failed first.
pub(super) fn undo(links: &mut Links, done: &mut Vec<Step>, keep: usize) -> Result<()> {
    let mut result = Ok(());
    for step in done.drain(keep..).rev() {
        if let Err(refusal) = step.undo(links) {
            let name = links.numbered(step.index()).map_or_else(|_| String::new(), |link| link.name);
            let error: Error = Refused::of(&refusal.error).because(
                &format!("interface '{name}'"),
                "undoing what was done to it",
                refusal,
            );
            result = result.and(Err(error));
        }
    }
    result
}

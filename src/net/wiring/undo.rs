#![forbid(unsafe_code)]
//! What was done, and how it is undone: as far as nobody else has changed it since.

use super::kept::{Entry, Paths, Port};
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
    Vlans {
        index: u32,
        before: Vec<Vlan>,
        after: Vec<Vlan>,
    },
    /// It was taken from its bridge.
    Taken {
        index: u32,
        master: u32,
        port: Port,
    },
    /// What is behind it on that bridge: when it is in its VLANs again.
    Entries {
        index: u32,
        master: u32,
        entries: Vec<Entry>,
    },
    /// What it lost by the step that follows.
    Paths {
        index: u32,
        paths: Paths,
    },
}

impl Step {
    pub fn made(link: &Link) -> Self {
        Self::Made { index: link.index, name: link.name.clone(), stays: false }
    }

    /// What was made with that number is not to be undone.
    pub fn stays(&mut self, number: u32) {
        if let Self::Made { index, stays, .. } = self
            && *index == number
        {
            *stays = true;
        }
    }

    pub fn index(&self) -> u32 {
        match self {
            Self::Made { index, .. }
            | Self::Set { index, .. }
            | Self::Vlans { index, .. }
            | Self::Taken { index, .. }
            | Self::Entries { index, .. }
            | Self::Paths { index, .. } => *index,
        }
    }

    /// Whether others have set it otherwise since.
    fn is_left_to_others(&self, links: &mut Links) -> bool {
        let Self::Set { index, after, .. } = self else { return false };
        matches!(there(links, *index), Ok(Some(link)) if after.now(&link) != Some(*after))
    }

    /// What is to be given back when all else is undone goes to `last`.
    fn undo(&self, links: &mut Links, last: &mut Vec<Self>) -> std::result::Result<(), Refusal> {
        let Some(link) = there(links, self.index())? else { return Ok(()) };
        match self {
            Self::Made { stays: true, .. } => Ok(()),
            // Another namespace's interface may have that number by now.
            Self::Made { index, name, .. } if link.name == *name => links.delete(*index),
            Self::Made { .. } => Ok(()),
            Self::Set { index, before, after } => {
                if after.now(&link) != Some(*after) {
                    return Ok(());
                }
                if before.takes_paths() {
                    last.push(Self::Paths { index: *index, paths: links.paths(*index)? });
                }
                links.set(*index, *before)
            }
            Self::Vlans { index, before, after } => {
                let now = links.vlans(*index)?;
                if link.master.is_none() && link.filters.is_none() || now != *after {
                    return Ok(());
                }
                links.set_vlans(&link, &now, before)
            }
            // Others have put it on another one, or on the same, as they want it there.
            Self::Taken { .. } if link.master.is_some() => Ok(()),
            Self::Taken { index, master, port } => {
                if there(links, *master)?.is_none() {
                    return Ok(());
                }
                links.set(*index, Setting::Master(Some(*master)))?;
                let (index, master, entries) = (*index, *master, port.entries.clone());
                last.push(Self::Entries { index, master, entries });
                links.restore_port(index, port)
            }
            Self::Entries { index, master, entries } if link.master == Some(*master) => {
                links.restore_entries(*index, entries)
            }
            Self::Entries { .. } => Ok(()),
            Self::Paths { paths, .. } if link.up => links.restore_paths(paths),
            Self::Paths { .. } => Ok(()),
        }
    }
}

/// The kernel does not give an index to another interface until they have all been used.
fn there(links: &mut Links, index: u32) -> std::result::Result<Option<Link>, Refusal> {
    match links.numbered(index) {
        Err(refusal) if refusal.error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        link => link.map(Some),
    }
}

/// Undoes all steps but the first `keep`, the last first; of what fails, says what failed first. Where an interface is down only between
/// two of them, what others have given it meanwhile comes back as well.
pub(super) fn undo(links: &mut Links, done: &mut Vec<Step>, keep: usize) -> Result<()> {
    let (mut result, mut last, mut left) = (Ok(()), Vec::new(), None);
    for step in done.drain(keep..).rev() {
        // Where others have set an interface otherwise, what it has is as they want it, too.
        if left == Some(step.index()) && matches!(step, Step::Paths { .. }) {
            continue;
        }
        left = step.is_left_to_others(links).then(|| step.index());
        attempt(links, &step, &mut last, &mut result);
    }
    for step in std::mem::take(&mut last) {
        attempt(links, &step, &mut last, &mut result);
    }
    result
}

fn attempt(links: &mut Links, step: &Step, last: &mut Vec<Step>, result: &mut Result<()>) {
    if let Err(refusal) = step.undo(links, last) {
        let name = links.numbered(step.index()).map_or_else(|_| String::new(), |link| link.name);
        let error: Error = Refused::of(&refusal.error).because(
            &format!("interface '{name}'"),
            "undoing what was done to it",
            refusal,
        );
        *result = std::mem::replace(result, Ok(())).and(Err(error));
    }
}

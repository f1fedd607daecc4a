#![forbid(unsafe_code)]
//! What the embedder attached to disks and cards that the configuration leaves open.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use super::builder::VmBuilder;
use crate::block::{self, BlockBackend, OwnDisk, RawDisk};
use crate::config::{DiskConfig, NetConfig, VmConfig};
use crate::error::{Error, ErrorKind, FieldError, Result};
use crate::net::switch::SwitchPort;
use crate::net::{self, NetBackend, Stream, Tap};
use crate::reactor::Place;
use crate::sys::fd;

enum DiskSource {
    Fd(OwnedFd),
    Own(Box<dyn BlockBackend>),
}

/// A network that a card can be put on while its guest runs ([`Vm::change_net`](super::Vm::change_net)).
#[non_exhaustive]
pub enum Network {
    /// A TAP interface of the host, as [`NetConfig::tap`].
    Tap(String),
    /// A network in user space, as [`NetConfig::stream`].
    Stream(PathBuf),
    /// A queue of a TAP interface, or a connected Unix socket, as [`VmBuilder::net_fd`].
    Fd(OwnedFd),
    /// A port of a [`Switch`](crate::Switch).
    Port(SwitchPort),
    /// Code of yours.
    Backend(Box<dyn NetBackend>),
}

impl Network {
    /// Opens it for the card `id`, as many times as the card has pairs of queues, where it can be. What has gone is opened again there.
    pub(super) fn open(self, id: &str, queues: u16, opens: &Place) -> Result<Vec<Box<dyn NetBackend>>> {
        let one: Box<dyn NetBackend> = match self {
            Self::Tap(name) => {
                let all = Tap::open_all(id, &name, queues)?;
                let boxed = |tap: Tap| Box::new(tap.reopened_at(opens.clone())) as Box<dyn NetBackend>;
                return Ok(all.into_iter().map(boxed).collect());
            }
            Self::Stream(path) => Box::new(Stream::connect(id, path)?.reopened_at(opens.clone())),
            Self::Fd(fd) => net::adopt(id, fd, opens)?,
            Self::Port(port) => Box::new(port.plug().map_err(|e| e.context(id))?),
            Self::Backend(backend) => backend,
        };
        Ok(vec![one])
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tap(_) => "Tap",
            Self::Stream(_) => "Stream",
            Self::Fd(_) => "Fd",
            Self::Port(_) => "Port",
            Self::Backend(_) => "Backend",
        })
    }
}

/// By the index of the disk or card.
#[derive(Default)]
pub(super) struct Sources {
    disks: Vec<(usize, DiskSource)>,
    nets: Vec<(usize, Network)>,
}

impl VmBuilder {
    /// Backs the disk `disks[index]`, one of [`DiskConfig::attached`], by an open file or block device in raw format, as
    /// [`DiskConfig::path`] does by name. `fd` is duplicated; it must be open for reading, and unless the disk is
    /// read-only for writing (without O_APPEND), too.
    ///
    /// [`build`](Self::build) answers `InvalidArgument` where there is no such disk, it has a path or something else
    /// already, or the descriptor is of another kind.
    ///
    /// # Errors
    /// `Exhausted` when the process has no file descriptor left.
    pub fn disk_fd(mut self, index: usize, fd: impl AsFd) -> Result<Self> {
        self.set_disk_fd(index, fd)?;
        Ok(self)
    }

    /// Backs the disk `disks[index]`, one of [`DiskConfig::attached`], by code of yours.
    ///
    /// ```no_run
    /// # struct Ram(Vec<u8>);
    /// # impl vmbed::BlockBackend for Ram {
    /// #     fn size(&self) -> u64 { 0 }
    /// #     fn submit(&mut self, _: vmbed::BlockRequest) {}
    /// # }
    /// use vmbed::{DiskConfig, Host, LinuxBoot, VmConfig};
    ///
    /// let mut config = VmConfig::linux(LinuxBoot::new("/boot/vmlinuz"));
    /// config.disks.push(DiskConfig::attached());
    /// let vm = Host::open()?.builder(config).disk_backend(0, Ram(vec![0; 64 << 20])).build()?;
    /// # Ok::<(), vmbed::Error>(())
    /// ```
    ///
    /// [`build`](Self::build) answers `InvalidArgument` where there is no such disk, it has a path or something else
    /// already, or its size is not a multiple of 512.
    pub fn disk_backend(mut self, index: usize, backend: impl BlockBackend) -> Self {
        self.set_disk_backend(index, Box::new(backend));
        self
    }

    /// Puts the card `nets[index]`, one of [`NetConfig::attached`], on an open descriptor, which is duplicated: one queue
    /// of a TAP interface that somebody attached (`TUNSETIFF` with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; it becomes
    /// nonblocking), or a connected Unix socket of the kind `SOCK_SEQPACKET` or `SOCK_DGRAM`, on which each message is a
    /// frame as [`NetBackend`] describes it; or one of the kind `SOCK_STREAM`, with the protocol of
    /// [`NetConfig::stream`](crate::NetConfig::stream). When the other end of a `SOCK_SEQPACKET` or `SOCK_STREAM` is closed, the network is
    /// gone.
    /// Called once for each of [`NetConfig::queues`](crate::NetConfig::queues), with as many queues of one TAP interface.
    ///
    /// [`build`](Self::build) answers `InvalidArgument` where there is no such card, it has a network already, or the
    /// descriptor is of another kind.
    ///
    /// # Errors
    /// `Exhausted` when the process has no file descriptor left.
    pub fn net_fd(mut self, index: usize, fd: impl AsFd) -> Result<Self> {
        self.set_net_fd(index, fd)?;
        Ok(self)
    }

    /// Puts the card `nets[index]`, one of [`NetConfig::attached`], on a network of yours.
    ///
    /// [`build`](Self::build) answers `InvalidArgument` where there is no such card or it has a network already.
    pub fn net_backend(mut self, index: usize, backend: impl NetBackend) -> Self {
        self.set_net_backend(index, Box::new(backend));
        self
    }

    /// Puts the card `nets[index]`, one of [`NetConfig::attached`], on a port of a [`Switch`](crate::Switch). The port is
    /// free again when the VM is dropped.
    ///
    /// [`build`](Self::build) answers `InvalidArgument` where there is no such card or it has a network already, `Busy`
    /// where the port is in use, `NotFound` where it was removed.
    pub fn net_port(mut self, index: usize, port: &SwitchPort) -> Self {
        self.set_net_port(index, port);
        self
    }

    pub(crate) fn set_net_port(&mut self, index: usize, port: &SwitchPort) {
        self.wiring.sources.nets.push((index, Network::Port(port.clone())));
    }

    pub(crate) fn set_disk_fd(&mut self, index: usize, fd: impl AsFd) -> Result<()> {
        let fd = fd::duplicate(fd).map_err(|e| Error::os(format!("duplicating the fd of disk{index}"), e))?;
        self.wiring.sources.disks.push((index, DiskSource::Fd(fd)));
        Ok(())
    }

    pub(crate) fn set_disk_backend(&mut self, index: usize, backend: Box<dyn BlockBackend>) {
        self.wiring.sources.disks.push((index, DiskSource::Own(backend)));
    }

    pub(crate) fn set_net_fd(&mut self, index: usize, fd: impl AsFd) -> Result<()> {
        let fd = fd::duplicate(fd).map_err(|e| Error::os(format!("duplicating the fd of net{index}"), e))?;
        self.wiring.sources.nets.push((index, Network::Fd(fd)));
        Ok(())
    }

    pub(crate) fn set_net_backend(&mut self, index: usize, backend: Box<dyn NetBackend>) {
        self.wiring.sources.nets.push((index, Network::Backend(backend)));
    }
}

impl Sources {
    /// Whether each disk and card has exactly one thing behind it.
    ///
    /// # Errors
    /// `InvalidArgument` with every one that has none or two, and what is attached to none.
    pub fn check(&self, config: &VmConfig) -> Result<()> {
        let mut found = Vec::new();
        let disks: Vec<_> = config.disks.iter().map(|d| d.path.is_some()).collect();
        let nets: Vec<_> = config.nets.iter().map(|n| n.tap.is_some() || n.stream.is_some()).collect();
        let attached = |sources: &[usize], index| sources.iter().filter(|i| **i == index).count();
        let kinds = [
            (
                "disks",
                "path",
                disks,
                self.disks.iter().map(|(i, _)| *i).collect::<Vec<_>>(),
                "disk_fd or disk_backend",
            ),
            ("nets", "tap", nets, self.networks(), "net_fd, net_port or net_backend"),
        ];
        for (list, field, named, sources, how) in kinds {
            for (i, named) in named.iter().enumerate() {
                let field = format!("{list}[{i}].{field}");
                match usize::from(*named) + attached(&sources, i) {
                    0 => found.push(FieldError::new(
                        field,
                        "is none",
                        format!("one, or attach something ({how})"),
                    )),
                    1 => {}
                    _ if *named => {
                        found.push(FieldError::new(field, "is set, and something is attached", "one of both"))
                    }
                    _ => found.push(FieldError::new(field, "has more than one thing attached", "one")),
                }
            }
            if let Some(i) = sources.iter().find(|i| **i >= named.len()) {
                let problem =
                    format!("does not exist, and something is attached to it: there are {}", named.len());
                found.push(FieldError::new(format!("{list}[{i}]"), problem, "an index below that"));
            }
        }
        if found.is_empty() { Ok(()) } else { Err(Error::invalid_fields(found)) }
    }

    /// The cards that have something attached. Several descriptors of one are its queues.
    fn networks(&self) -> Vec<usize> {
        let is_fd = |source: &Network| matches!(source, Network::Fd(_));
        let before = |at: usize, index| self.nets[..at].iter().any(|(i, s)| *i == index && is_fd(s));
        let each = self.nets.iter().enumerate();
        each.filter(|(at, (i, s))| !(is_fd(s) && before(*at, *i))).map(|(_, (i, _))| *i).collect()
    }

    /// The disks that code of the embedder's is behind.
    pub fn own_disks(&self) -> impl Iterator<Item = usize> {
        self.disks.iter().filter(|(_, source)| matches!(source, DiskSource::Own(_))).map(|(i, _)| *i)
    }

    /// The cards that are on networks of the embedder's.
    pub fn own_nets(&self) -> impl Iterator<Item = usize> {
        self.nets.iter().filter(|(_, network)| matches!(network, Network::Backend(_))).map(|(i, _)| *i)
    }

    /// Opens what is behind `disks[index]`.
    pub fn disk(&mut self, index: usize, disk: &DiskConfig) -> Result<Box<dyn block::Backend>> {
        let id = format!("disk{index}");
        let given = self.disks.iter().position(|(i, _)| *i == index).map(|at| self.disks.swap_remove(at).1);
        Ok(match (given, &disk.path) {
            (Some(DiskSource::Fd(fd)), _) => Box::new(RawDisk::adopt(&id, fd, disk)?),
            (Some(DiskSource::Own(backend)), _) => Box::new(OwnDisk::new(&id, backend, disk.readonly)?),
            (None, Some(path)) => block::open(&id, path, disk)?,
            (None, None) => return Err(nothing(&id)),
        })
    }

    /// Opens what is behind `nets[index]`: for each pair of queues. What has gone is opened again there.
    pub fn net(&mut self, index: usize, net: &NetConfig, opens: &Place) -> Result<Vec<Box<dyn NetBackend>>> {
        let id = format!("net{index}");
        let (given, others) = self.nets.drain(..).partition(|(i, _)| *i == index);
        self.nets = others;
        let given: Vec<(usize, Network)> = given;
        let named = [net.stream.clone().map(Network::Stream), net.tap.clone().map(Network::Tap)];
        let mut opened = Vec::new();
        for network in given.into_iter().map(|(_, network)| network).chain(named.into_iter().flatten()) {
            opened.extend(network.open(&id, net.queues, opens)?);
        }
        match opened.len() {
            0 => Err(nothing(&id)),
            count if count == usize::from(net.queues) => Ok(opened),
            count => {
                let why = format!(
                    "{id}: nets[{index}].queues is {}, and what is attached has {count}: only a TAP interface has several, by name, or by \
                     a descriptor for each",
                    net.queues
                );
                Err(Error::new(ErrorKind::InvalidArgument, why))
            }
        }
    }
}

/// `check` has seen to it that this does not happen.
fn nothing(id: &str) -> Error {
    Error::new(ErrorKind::Internal, format!("{id} has nothing behind it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LinuxBoot;

    #[test]
    fn each_disk_and_card_has_exactly_one_thing_behind_it() {
        let mut config = VmConfig::linux(LinuxBoot::new("k"));
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut sources = Sources::default();
        sources.check(&config).unwrap();
        config.disks = vec![DiskConfig::new("a"), DiskConfig::attached(), DiskConfig::attached()];
        config.nets = vec![NetConfig::attached(), NetConfig::tap("tap0")];
        let bad = |sources: &Sources| {
            let error = sources.check(&config).err();
            error.map_or(vec![], |e| e.fields().iter().map(|f| f.field.clone()).collect())
        };
        assert_eq!(bad(&sources), ["disks[1].path", "disks[2].path", "nets[0].tap"]);
        sources.disks = [0, 1, 1, 2, 3].map(|i| (i, DiskSource::Fd(fd()))).into();
        sources.nets = vec![(1, Network::Fd(fd()))];
        assert_eq!(
            bad(&sources),
            ["disks[0].path", "disks[1].path", "disks[3]", "nets[0].tap", "nets[1].tap"]
        );
        sources.disks = [2, 1].map(|i| (i, DiskSource::Fd(fd()))).into();
        sources.nets = vec![(0, Network::Fd(fd()))];
        assert_eq!(bad(&sources), Vec::<String>::new());
    }
}

#![forbid(unsafe_code)]
//! A virtual machine: its life, its events, its console.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

mod accounts;
mod answers;
mod balloon;
mod board;
mod builder;
mod cgroup;
mod clock;
mod devices;
mod doorbell;
mod foreign;
mod herd;
mod machine;
mod registers;
mod sources;
mod supervisor;
mod threads;

pub use accounts::{VcpuStatistics, VmMemory};
pub(crate) use answers::Verdict;
#[cfg(feature = "internals")]
pub(crate) use board::describe;
pub(crate) use builder::HostParts;
pub use builder::VmBuilder;
pub(crate) use herd::Herd;
use machine::{BOUND, Machine};
pub use machine::{VcpuReturn, VmState};
pub use registers::Registers;
pub use sources::Network;
pub use supervisor::SandboxReport;
pub(crate) use supervisor::{Confinement, Door, Entered, Supervisor, Waiting};
pub(crate) use threads::Duty;
pub use threads::{ThreadInfo, ThreadRole};

use crate::config::{DiskFormat, RateLimit};
use crate::error::{Error, ErrorKind, Result};
use crate::events::{EventStream, StopCause, VmId};
use crate::reactor::{Place, own};
use crate::sys::log;
use crate::sys::signal::Shield;
use crate::units::Bytes;
pub use crate::virtio::balloon::{BalloonStatistics, GivenBack, GuestMemory};
use crate::virtio::blk::Control;
pub use crate::virtio::blk::DiskStatistics;
use crate::virtio::net;
pub use crate::virtio::net::NetStatistics;

/// A virtual machine in this process.
///
/// Every method may be called from any thread, at the same time as any other. Dropping it ends the guest,
/// joins every thread, closes every file descriptor and unmaps its memory before it returns, which takes as
/// long as a request that hangs in the host or in a device of the embedder; dropped from one of its own
/// callbacks, that happens right after the callback has returned.
///
/// A child of a fork has no part in its parent's VMs: there, calls that change or wait answer `InvalidState`, dropping
/// does nothing, and event streams stay empty; nothing else may be asked. It may build VMs of its own, from a
/// [`Host`](crate::Host) that it has opened itself.
///
/// Methods that wait for the VM (`pause`, `stop`, `wait`, …) answer `InvalidState` when a callback of this
/// same VM calls them, since they would wait for themselves; [`request_stop`](Vm::request_stop) never waits.
///
/// A SIGURG sent to the whole process may be taken by a vCPU that runs its guest, and is lost then: vmbed
/// wakes vCPUs with that signal. The kernel asks the main thread first if it does not block it; one sent to
/// a thread always arrives there.
pub struct Vm {
    machine: Arc<Machine>,
}

impl Vm {
    /// A number that no other VM of this process has had; events carry it.
    pub fn id(&self) -> VmId {
        self.machine.id
    }

    /// Where the VM is in its life. Never blocks.
    pub fn state(&self) -> VmState {
        self.machine.state()
    }

    /// What is in force of its sandbox; `None` where it has none. Never blocks.
    pub fn sandbox(&self) -> Option<SandboxReport> {
        self.machine.supervisor.as_ref().map(|supervisor| supervisor.report())
    }

    /// Lets the vCPUs run. Returns at once.
    ///
    /// # Errors
    /// `InvalidState` unless the VM has just been built.
    pub fn start(&self) -> Result<()> {
        self.machine.start()
    }

    /// Stops the guest's time: every vCPU, every device, every clock. Returns when all stand still,
    /// usually within a millisecond; a request that a device has begun is finished first, however long the
    /// host takes for it.
    ///
    /// # Errors
    /// `InvalidState` unless it runs. `TimedOut` after 10 s when a device or a disk of the embedder's does not
    /// answer: then the VM goes on running.
    pub fn pause(&self) -> Result<()> {
        self.machine.pause()
    }

    /// Lets a paused guest go on. Its clocks go on from where they stood. Returns at once.
    ///
    /// # Errors
    /// `InvalidState` unless it is paused.
    pub fn resume(&self) -> Result<()> {
        self.machine.resume()
    }

    /// Runs a vCPU on the calling thread, in a VM that was built with
    /// [`caller_vcpus`](VmBuilder::caller_vcpus). Blocks until it returns for one of the reasons of
    /// [`VcpuReturn`]; before the start and through a pause it waits inside. Devices of yours are called on
    /// this thread.
    ///
    /// Each vCPU may be run by one thread at a time, by another one the next time (which costs KVM some
    /// milliseconds). Signals that the thread does not block come through, and their handlers run. SIGURG is
    /// blocked meanwhile: vmbed sends it to the thread.
    ///
    /// ```no_run
    /// # use vmbed::{BareBoot, CpuMode, Host, VcpuReturn, VmConfig};
    /// # let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xf4]));
    /// let vm = Host::open()?.builder(config).caller_vcpus().build()?;
    /// vm.start()?;
    /// while vm.run_vcpu(0)? == VcpuReturn::Interrupted { /* your thread's other work */ }
    /// println!("{}", vm.wait()?);
    /// # Ok::<(), vmbed::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such vCPU. `InvalidState` when another thread runs it, when the
    /// VM's vCPUs have threads of the library's, or when any VM's callback calls.
    pub fn run_vcpu(&self, vcpu: u32) -> Result<VcpuReturn> {
        self.machine.run_vcpu(vcpu)
    }

    /// Makes [`Vm::run_vcpu`] return on the thread that runs this vCPU; where none does, on the next one at once.
    /// Never blocks. Not for signal handlers: a signal alone has the same effect.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such vCPU. `InvalidState` when the VM's vCPUs have threads of the
    /// library's.
    pub fn interrupt_vcpu(&self, vcpu: u32) -> Result<()> {
        self.machine.interrupt_vcpu(vcpu)
    }

    /// Presses the power button. Returns at once; a guest that listens to it ends with
    /// [`StopCause::GuestPoweroff`] in its own time, another does nothing.
    ///
    /// # Errors
    /// `InvalidState` unless it runs; `Unsupported` for a bare platform, which has no power button.
    pub fn shutdown(&self) -> Result<()> {
        let machine = &self.machine;
        match machine.state() {
            VmState::Running => machine.board.press_power_button(),
            state => {
                let why =
                    format!("shutdown: the VM is {state:?}; only a running guest can hear its power button");
                Err(Error::new(ErrorKind::InvalidState, why))
            }
        }
    }

    /// Ends the guest now, whatever it does, as pulling the plug would: what it had not flushed is lost.
    /// Returns its cause: [`StopCause::HostStop`], or what came before.
    ///
    /// # Errors
    /// `TimedOut` after 10 s when something of the host's hangs (a disk, a device of the embedder); the
    /// end stays requested. `InvalidState` when called from the VM's own callback: then nothing has changed.
    pub fn stop(&self) -> Result<StopCause> {
        let machine = &self.machine;
        machine.not_from_within("stop")?;
        machine.request_stop();
        machine.wait(Some(BOUND))?.ok_or_else(|| {
            let why = format!("stop: a vCPU or a device of the VM has not come to its end for {BOUND:?}");
            Error::new(ErrorKind::TimedOut, why)
        })
    }

    /// Asks for the end and returns at once; for callbacks. The `Stopped` event tells when it is done. Does
    /// nothing when the VM has ended.
    pub fn request_stop(&self) {
        self.machine.request_stop();
    }

    /// Waits until the guest has ended, and says why. Blocks as long as the guest runs.
    ///
    /// # Errors
    /// `InvalidState` when called from the VM's own callback.
    pub fn wait(&self) -> Result<StopCause> {
        let ended = self.machine.wait(None)?;
        ended.ok_or_else(|| Error::new(ErrorKind::Internal, "an endless wait has ended"))
    }

    /// The same as [`Vm::wait`] for at most `timeout`; `None` when the guest has not ended by then.
    ///
    /// # Errors
    /// `InvalidState` when called from the VM's own callback.
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<StopCause>> {
        self.machine.wait(Some(timeout))
    }

    /// The VM's events: poll the stream's fd, then drain it. Never blocks.
    pub fn events(&self) -> &EventStream {
        &self.machine.events
    }

    /// The last 64 KiB that the guest wrote to its console; empty for a bare platform. Never blocks.
    pub fn console_tail(&self) -> Vec<u8> {
        self.machine.board.console.tail()
    }

    /// Types `bytes` on the guest's console. Returns how many were taken: what the guest has not read yet
    /// is bounded (4 KiB), the rest may be offered again. Never blocks.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.machine.board.console.push_input(bytes)
    }

    /// When the guest first reached for a device outside of it: a port, or an address without memory. `None`
    /// until then. Never blocks.
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.around.first_exit.get().copied()
    }

    /// The guest's memory size in bytes.
    pub fn memory_size(&self) -> u64 {
        self.machine.memory.size()
    }

    /// What the VM's memory was promised, and what of it is really there. In every state. Costs microseconds and
    /// a walk over page tables: milliseconds for each GiB that is there in small pages.
    pub fn memory(&self) -> VmMemory {
        self.machine.memory_accounts()
    }

    /// Changes how much memory the VM will always have. Less than before always passes. `generation`, if given, is
    /// the [`VmMemory::generation`] that the change is based on. Answers the new one. Never blocks for long.
    ///
    /// # Errors
    /// `InvalidArgument` for more than the VM's memory; `Refused` by the ledger; `InvalidState` when the generation is
    /// another one by now. Then nothing has changed.
    pub fn set_guarantee(&self, guarantee: Bytes, generation: Option<u64>) -> Result<u64> {
        self.machine.set_guarantee(guarantee, generation)
    }

    /// How much of the host vCPU `vcpu` got. In every state; the times stand still once it runs no more. Never
    /// blocks for long.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such vCPU.
    pub fn vcpu_statistics(&self, vcpu: u32) -> Result<VcpuStatistics> {
        self.machine.vcpu_accounts(vcpu)
    }

    /// What the disk `disks[index]` of the configuration has done so far. In every state. Costs nothing worth
    /// mentioning: reads counters.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such disk.
    pub fn disk_statistics(&self, index: usize) -> Result<DiskStatistics> {
        Ok(self.disk(index)?.statistics())
    }

    /// Gives the disk `disks[index]` of the configuration another size, in bytes, a multiple of 512; its guest is told at once, also
    /// while requests are under way. A file grows with it; one that is larger keeps its length, and what lies beyond. A
    /// block device must have grown before. A disk of code of yours must have that size from now on. In every state. Never
    /// blocks for long.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such disk, or the size is none; what the host answers where its file cannot grow.
    pub fn resize_disk(&self, index: usize, size: Bytes) -> Result<()> {
        let _shield = Shield::raise();
        self.disk(index)?.resize(size)
    }

    /// Limits the disk `disks[index]` of the configuration from now on, as [`DiskConfig::rate`](crate::DiskConfig::rate) does from
    /// the beginning. In every state. Never blocks.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such disk.
    pub fn set_disk_rate(&self, index: usize, limit: RateLimit) -> Result<()> {
        self.disk(index)?.set_rate(limit);
        Ok(())
    }

    /// Saves the disk `disks[index]` of the configuration, as it is at one instant, to a new image at `path`: standalone and sparse. A guest
    /// that runs is paused for that instant, with no request on its way, as if its power were cut; from then on it runs while
    /// the image is made, and what it changes is copied before. `progress` hears of the bytes that are behind and of all, and
    /// may end it by answering `false`.
    ///
    /// Whether it is complete; where it was ended, or fails, the image is gone. Blocks until then, for as long as the disk's size
    /// takes; other calls on the VM go on meanwhile.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such disk; `Unsupported` of a disk of code of yours; `Busy` while it is being saved
    /// already; `InvalidState` where C frees the VM meanwhile; as [`pause`](Self::pause); what the host answers where the image cannot be
    /// made or written, or the VM cannot be resumed: then it stays paused, and the text says so.
    pub fn save_disk(
        &self,
        index: usize,
        path: impl AsRef<Path>,
        format: DiskFormat,
        mut progress: impl FnMut(Bytes, Bytes) -> bool,
    ) -> Result<bool> {
        let _shield = Shield::raise();
        let disk = self.disk(index)?;
        let copy = disk.copy_to(path.as_ref(), format)?;
        // On this thread, and before it returns: the disk's may have the copy in its hands still.
        let copy = Abandoned(copy);
        self.save(disk, &copy.0, &mut progress)
    }

    fn save(
        &self,
        disk: &Arc<Control>,
        copy: &Arc<crate::block::Saving>,
        progress: &mut dyn FnMut(Bytes, Bytes) -> bool,
    ) -> Result<bool> {
        let mut paused = false;
        if self.state() == VmState::Running {
            match self.pause() {
                Ok(()) => paused = true,
                // It has ended, or somebody else pauses it: at rest all the same.
                Err(_) if self.state() != VmState::Running => {}
                Err(error) => return Err(error),
            }
        }
        let begun = disk.begin_saving(copy);
        if paused && let Err(error) = self.resume() {
            if self.state() == VmState::Paused {
                return Err(error.context("saving a disk: its VM stays paused"));
            }
            // Somebody else has resumed or ended it.
            log::debug!("resuming a VM whose disk is saved: {error}");
        }
        let _saving = begun?;
        // Not the disk's, which may have grown since.
        let size = copy.size();
        loop {
            match copy.step() {
                Ok(behind) if !progress(Bytes(behind), Bytes(size)) => break Ok(false),
                Ok(behind) if behind >= size => break copy.finish().map(|()| true),
                Ok(_) if self.machine.dropped.load(Ordering::SeqCst) => {
                    break Err(Error::new(ErrorKind::InvalidState, "saving a disk: its VM has been freed"));
                }
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        }
    }

    fn disk(&self, index: usize) -> Result<&Arc<Control>> {
        let disks = &self.machine.board.disks;
        disks.get(index).ok_or_else(|| no_such("disk", index, disks.len()))
    }

    /// What the card `nets[index]` of the configuration has carried so far. In every state. Costs nothing worth
    /// mentioning: reads counters.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such card.
    pub fn net_statistics(&self, index: usize) -> Result<NetStatistics> {
        Ok(self.net(index)?.statistics())
    }

    /// Plugs the cable of the card `nets[index]` of the configuration in or out; its guest is told. What is sent to or by a card without
    /// one is dropped, and counted. In every state. Never blocks.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such card.
    pub fn set_link(&self, index: usize, up: bool) -> Result<()> {
        self.net(index)?.set_link(up);
        Ok(())
    }

    /// Puts the card `nets[index]` of the configuration on another network while the guest runs, which notices nothing but what it finds
    /// there; [`announce_net`](Self::announce_net) has it say where it is now, and [`set_link`](Self::set_link) before and after has it look
    /// for itself. A frame that was read already is delivered. The network before is given up when this returns. In every state. Waits for
    /// the frame that is under way, and up to 10 s for a call that pauses or resumes the VM.
    ///
    /// ```no_run
    /// # fn move_it(vm: &vmbed::Vm) -> vmbed::Result<()> {
    /// vm.change_net(0, vmbed::Network::Tap("tap1".into()))?;
    /// vm.announce_net(0)
    /// # }
    /// ```
    ///
    /// # Errors
    /// The card stays where it is: `InvalidArgument` when there is no such card, or the network does not know the offloads that the
    /// guest's driver was offered, or it is code of yours and the VM in a sandbox (`docs/sandbox.md`); `InvalidState` in a callback of the VM's; what opening it finds wrong, as
    /// [`VmBuilder::build`].
    pub fn change_net(&self, index: usize, network: Network) -> Result<()> {
        let card = self.net(index)?;
        self.machine.may_change_net(&network)?;
        let control = self.machine.control("change_net")?;
        let inside = own::enter(self.machine.id);
        let queues = u16::try_from(card.pairs()).unwrap_or(u16::MAX);
        let opens = self.machine.supervisor.as_ref().map_or(Place::Caller, |supervisor| supervisor.outside());
        let opened = network.open(&format!("net{index}"), queues, &opens)?;
        if let Err((error, refused)) = card.put_ready(opened) {
            drop((inside, control));
            drop(refused);
            return Err(error);
        }
        let done = self.machine.board.refit_net(index);
        // Dropped with no lock held: it may be the embedder's.
        let before = std::mem::take(&mut *card.spare());
        drop((inside, control));
        drop(before);
        done
    }

    /// Has the guest tell the network of the card `nets[index]` of the configuration where it is (gratuitous ARP and the like), as after a
    /// move to another port or host: where its driver knows how (VIRTIO_NET_F_GUEST_ANNOUNCE), once it is served. In every state.
    /// Never blocks.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such card.
    pub fn announce_net(&self, index: usize) -> Result<()> {
        self.net(index)?.announce();
        Ok(())
    }

    /// Limits what the card `nets[index]` of the configuration may receive and send from now on, as
    /// [`NetConfig::receive_rate`](crate::NetConfig::receive_rate) and `send_rate` do from the beginning. In every state.
    /// Never blocks.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no such card.
    pub fn set_net_rates(&self, index: usize, receive: RateLimit, send: RateLimit) -> Result<()> {
        self.net(index)?.set_rates(receive, send);
        Ok(())
    }

    fn net(&self, index: usize) -> Result<&Arc<net::Control>> {
        let nets = &self.machine.board.nets;
        nets.get(index).ok_or_else(|| no_such("net", index, nets.len()))
    }

    /// A vCPU's general registers. Waits for a `pause` or `resume` in progress, for nothing else.
    ///
    /// # Errors
    /// `InvalidState` while the VM runs, or when called from the VM's own callback; `InvalidArgument` when
    /// there is no such vCPU.
    pub fn registers(&self, vcpu: u32) -> Result<Registers> {
        self.machine.with_standing_vcpu(vcpu, registers::get)
    }

    /// Sets a vCPU's general registers. Waits as [`Vm::registers`] does.
    ///
    /// # Errors
    /// As [`Vm::registers`].
    pub fn set_registers(&self, vcpu: u32, registers: &Registers) -> Result<()> {
        self.machine.with_standing_vcpu(vcpu, |v| registers::set(v, registers))
    }

    /// Copies guest memory from the guest-physical `address` into `data`. The guest may change it meanwhile.
    /// Works in every state, and waits for nothing but the host's paging.
    ///
    /// # Errors
    /// `InvalidArgument` when the range is not all guest memory; `Exhausted` when some of the guest's memory is lost
    /// ([`handle_sigbus`](crate::handle_sigbus)).
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> Result<()> {
        registers::read_memory(&self.machine.memory, address, data)
    }

    /// Copies `data` into guest memory at the guest-physical `address`, in every state, as
    /// [`Vm::read_memory`] does.
    ///
    /// # Errors
    /// `InvalidArgument` when the range is not all guest memory; then none of it is written. `Exhausted` as
    /// [`Vm::read_memory`].
    pub fn write_memory(&self, address: u64, data: &[u8]) -> Result<()> {
        registers::write_memory(&self.machine.memory, address, data)
    }
}

fn no_such(kind: &str, index: usize, count: usize) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("there is no {kind}{index}: the VM has {count}"))
}

impl Vm {
    /// What `f` answers on the thread of that loop, if there is one.
    #[cfg(feature = "internals")]
    pub(crate) fn on_loop<R: Send + 'static>(
        &self,
        index: usize,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> Option<R> {
        self.machine.board.on_loop(index, f)
    }

    /// Whether this thread is one of the VM's own, in a callback.
    pub(crate) fn is_own_thread(&self) -> bool {
        self.machine.is_own_thread()
    }

    /// Ends everything but what a call in progress holds, as dropping does.
    pub(crate) fn end(&self) {
        let machine = &self.machine;
        machine.dropped.store(true, Ordering::SeqCst);
        if !machine.is_here() {
            return;
        }
        machine.request_stop();
        if !machine.is_own_thread() {
            machine.join();
            return;
        }
        // A thread cannot wait for itself: someone else does, as soon as this callback returns.
        let machine = machine.clone();
        let reaper = crate::sys::thread::spawn("vmbed-reaper".to_owned(), move || machine.join());
        if let Err(error) = reaper {
            self.machine.host.herd.leave_soon(self.machine.id.0);
            // Whoever still works on it is not to have the last of it.
            std::mem::forget(self.machine.clone());
            log::error!("no thread to end a VM that was dropped in its own callback: {error}");
        }
    }
}

/// A copy of a disk that is given up, unless it is finished.
struct Abandoned(Arc<crate::block::Saving>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _shield = Shield::raise();
        self.end();
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("id", &self.id()).field("state", &self.state()).finish_non_exhaustive()
    }
}

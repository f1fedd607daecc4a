//! Networks of the embedder's, by descriptor or as code, and what each card has carried.

use std::ffi::{c_char, c_void};
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::arguments::{Sized_, fd, fill, invalid, optional, path, structure, text};
use super::block::{outcome, vmbed_piece};
use super::call;
use super::config::{attach, change, reserved, vmbed_builder, vmbed_config};
use super::device::{UserData, vmbed_destroy_fn};
use super::disk::vmbed_rate;
use super::error::vmbed_error;
use super::handle;
use super::switch::vmbed_port;
use super::vm::vmbed_vm;
use crate::config::{NetConfig, Vhost};
use crate::error::{Error, Result};
use crate::net::{NetBackend, Offloads};
use crate::sys::io::IoList;
use crate::vm::Network;

/// vmbed serves the card.
pub const VMBED_VHOST_OFF: i32 = 0;
/// The host's kernel does (vhost-net) where `/dev/vhost-net` is there and may be opened, and the card is on a TAP interface;
/// vmbed_vm_get_net_statistics() says whether.
pub const VMBED_VHOST_IF_PRESENT: i32 = 1;
/// The same; the VM is not built where it cannot.
pub const VMBED_VHOST_REQUIRED: i32 = 2;

/// A virtio-net card.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_net {
    /// sizeof(struct vmbed_net)
    pub size: usize,
    /// The name of an existing TAP interface, with a single queue or with several (see `queues`). NULL where something is attached with
    /// vmbed_builder_net_fd() or vmbed_builder_net_backend().
    pub tap: *const c_char,
    /// The guest's MAC address, `52:54:00:12:34:56`. NULL: a stable one that follows from the VM's UUID.
    pub mac: *const c_char,
    /// Where on the PCI bus, `00:04.0`. NULL: the first free place.
    pub pci: *const c_char,
    /// The largest packet that the guest's driver is to send, 68 to 65535 bytes, without the Ethernet header; its network's. 0: it
    /// takes 1500.
    pub mtu: u32,
    /// What the guest shows as the card's speed, in Mbit/s, full duplex; it limits nothing. 0: nothing.
    pub speed: u32,
    /// Other than 0: the cable is not plugged in; vmbed_vm_set_link() changes it.
    pub link_down: u32,
    /// Pairs of queues, each with a thread of its own, 1 to 16: more than one for a TAP interface that was made so (`ip tuntap add ...
    /// multi_queue`), or for as many descriptors of one, vmbed_builder_net_fd() for each. How many its guest uses is up to it. 0: 1.
    pub queues: u32,
    /// How much the guest may receive; operations are frames. vmbed_vm_set_net_rates() changes it. What is beyond it waits in the
    /// network, and is dropped there when that is full.
    pub receive_rate: vmbed_rate,
    /// How much it may send; what is beyond it waits in the guest's queue.
    pub send_rate: vmbed_rate,
    /// The path of the Unix socket of a network in user space that speaks the protocol of QEMU's `-netdev stream`, as passt does
    /// (`passt --socket PATH`): it needs no privilege. It is looked for again when it goes away. Instead of `tap`; NULL: none.
    pub stream: *const c_char,
    /// Whether the host's kernel carries the frames itself, between the guest's queues and a TAP interface, one of VMBED_VHOST_*. It
    /// counts nothing and knows no addresses: statistics have only what it did not carry, and the guest gets whatever comes through
    /// the interface. While there is something that it cannot do (a limit, a cable that is not plugged in), and after it has found a
    /// queue malformed, vmbed serves the card as it serves others.
    pub vhost: i32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_net {
    const FIRST: usize = offset_of!(Self, mtu);
    const NAME: &'static str = "vmbed_net";
}

/// Adds a card; events call them `net0`, `net1`, ... What it points to is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_add_net(
    config: *mut vmbed_config,
    net: *const vmbed_net,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        let given = structure(net)?;
        let mut net = NetConfig::attached();
        net.tap = optional(given.tap, "vmbed_net.tap", text)?.map(str::to_owned);
        net.stream = optional(given.stream, "vmbed_net.stream", path)?.map(Path::to_owned);
        net.mac = optional(given.mac, "vmbed_net.mac", text)?.map(str::parse).transpose()?;
        net.pci = optional(given.pci, "vmbed_net.pci", text)?.map(str::parse).transpose()?;
        let field = |number: u32| (number > 0).then_some(number);
        let queues = u16::try_from(given.queues.max(1));
        net.queues = queues.map_err(|_| invalid(format!("vmbed_net.queues is {}; 1 to 16", given.queues)))?;
        let mtu = field(given.mtu).map(u16::try_from).transpose();
        net.mtu = mtu.map_err(|_| invalid(format!("vmbed_net.mtu is {}; 68 to 65535", given.mtu)))?;
        net.speed = field(given.speed);
        net.link = given.link_down == 0;
        (net.receive_rate, net.send_rate) = (given.receive_rate.limit(), given.send_rate.limit());
        reserved("vmbed_net", given.reserved)?;
        net.vhost = match given.vhost {
            VMBED_VHOST_OFF => Vhost::Off,
            VMBED_VHOST_IF_PRESENT => Vhost::IfPresent,
            VMBED_VHOST_REQUIRED => Vhost::Required,
            other => return Err(invalid(format!("vmbed_net.vhost is {other}, not one of VMBED_VHOST_*"))),
        };
        c.nets.push(net);
        Ok(())
    })
}

/// Puts card `index`, added without a TAP interface, on an open descriptor, which is duplicated: one queue of a TAP
/// interface that somebody attached (TUNSETIFF with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; it becomes nonblocking), or a
/// connected Unix socket of the kind SOCK_SEQPACKET or SOCK_DGRAM, on which each message is a frame as vmbed_net_ops
/// describes it; or one of the kind SOCK_STREAM, with the protocol of vmbed_net.stream. When the other end of a SOCK_SEQPACKET or
/// SOCK_STREAM is closed, the network is gone. Called once for each of the card's
/// `queues`, with as many queues of one TAP interface. vmbed_builder_build() says whether it is one of these, and whether there is such a card.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_net_fd(
    builder: *mut vmbed_builder,
    index: u32,
    fd: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| builder.set_net_fd(index as usize, self::fd(fd, "fd")?))
}

/// Plugs the cable of card `index` in or out; its guest is told. What is sent to or by a card without one is dropped, and
/// counted. In every state; never blocks. VMBED_ERR_INVALID_ARGUMENT where there is no such card.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_set_link(
    vm: *const vmbed_vm,
    index: u32,
    up: bool,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(vm)?.vm().set_link(index as usize, up))
}

/// Has the guest tell the network of card `index` where it is (gratuitous ARP and the like), as after a move to another port or
/// host: where its driver knows how (VIRTIO_NET_F_GUEST_ANNOUNCE). In every state; never blocks. VMBED_ERR_INVALID_ARGUMENT where there
/// is no such card.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_announce_net(
    vm: *const vmbed_vm,
    index: u32,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(vm)?.vm().announce_net(index as usize))
}

/// Puts card `index` on another network while the guest runs, which notices nothing but what it finds there;
/// vmbed_vm_announce_net() has it say where it is now. Of `net`, `tap` and `stream` are looked at, one of which is set. A frame that
/// was read already is delivered; the network before is given up when this returns. In every state; waits for the frame that is
/// under way. Where it fails, the card stays where it is: VMBED_ERR_INVALID_ARGUMENT where there is no such card, or the network
/// does not know the offloads that the guest's driver was offered; VMBED_ERR_INVALID_STATE in a callback of the VM's; what opening
/// it finds wrong.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_change_net(
    vm: *const vmbed_vm,
    index: u32,
    net: *const vmbed_net,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let given = structure(net)?;
        let tap = optional(given.tap, "vmbed_net.tap", text)?.map(|name| Network::Tap(name.to_owned()));
        let stream = optional(given.stream, "vmbed_net.stream", path)?;
        let network = match (tap, stream.map(|path| Network::Stream(path.to_owned()))) {
            (Some(network), None) | (None, Some(network)) => network,
            _ => return Err(invalid("vmbed_net: one of tap and stream says where to".to_owned())),
        };
        handle::object(vm)?.vm().change_net(index as usize, network)
    })
}

/// The same, on an open descriptor, which is duplicated, as vmbed_builder_net_fd() has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_change_net_fd(
    vm: *const vmbed_vm,
    index: u32,
    fd: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let own = self::fd(fd, "fd")?.try_clone_to_owned();
        let own = own.map_err(|e| Error::os(format!("duplicating the fd for net{index}"), e))?;
        handle::object(vm)?.vm().change_net(index as usize, Network::Fd(own))
    })
}

/// The same, on a port of a switch, as vmbed_builder_net_port() has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_change_net_port(
    vm: *const vmbed_vm,
    index: u32,
    port: *const vmbed_port,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let port = handle::object(port)?.port.clone();
        handle::object(vm)?.vm().change_net(index as usize, Network::Port(port))
    })
}

/// The same, on a network of yours, as vmbed_builder_net_backend() has it. Its destroy function is called also where this fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_change_net_backend(
    vm: *const vmbed_vm,
    index: u32,
    ops: *const vmbed_net_ops,
    fd: i32,
    user: *mut c_void,
    error: *mut *mut vmbed_error,
) -> i32 {
    // First of all, so that the network's data end also where anything else is wrong.
    let net = ForeignNet::new(ops, fd, user);
    call(error, || handle::object(vm)?.vm().change_net(index as usize, Network::Backend(Box::new(net?))))
}

/// Limits what card `index` may receive and send from now on; NULL for no limit. In every state; never blocks.
/// VMBED_ERR_INVALID_ARGUMENT where there is no such card.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_set_net_rates(
    vm: *const vmbed_vm,
    index: u32,
    receive: *const vmbed_rate,
    send: *const vmbed_rate,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let [receive, send] = [receive, send].map(vmbed_rate::or_none);
        handle::object(vm)?.vm().set_net_rates(index as usize, receive, send)
    })
}

/// A frame's TCP or UDP checksum is to be completed: from the header's `csum_start` on. Without it, none of the others.
pub const VMBED_OFFLOAD_CSUM: u32 = 1;
/// A frame is to be cut into segments: TCP over IPv4.
pub const VMBED_OFFLOAD_TSO4: u32 = 2;
/// TCP over IPv6.
pub const VMBED_OFFLOAD_TSO6: u32 = 4;
/// TSO of connections with explicit congestion notification.
pub const VMBED_OFFLOAD_ECN: u32 = 8;
/// A frame is to be cut into UDP datagrams.
pub const VMBED_OFFLOAD_USO: u32 = 16;

/// A network of your own. A frame is one message: a header of 12 bytes (`struct virtio_net_hdr_v1`) and the frame from its
/// Ethernet header on, without its checksum; at most 65,557 bytes behind the header. A header says what is left to do on its
/// frame: nothing, so that it is all zero, but for the `offloads` that both sides know.
///
/// The functions are called on a device thread of the VM's, one at a time for each card, and must not block. They return 0
/// or an errno. Where frames come from other threads, a pair of connected sockets does all of this:
/// vmbed_builder_net_fd().
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_net_ops {
    /// sizeof(struct vmbed_net_ops)
    pub size: usize,
    /// Puts the next frame with its header into the `count` pieces, which are long enough for the longest, and its length
    /// into `length`. EAGAIN when there is none: then the descriptor is not readable before there is one. Another
    /// errno: the network is gone; a second later it is called again. Not NULL.
    pub receive: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            pieces: *const vmbed_piece,
            count: usize,
            length: *mut usize,
        ) -> i32,
    >,
    /// Sends the frame with its header that is in the `count` pieces, which are not to be written to. EAGAIN when there is
    /// no room: the same frame comes again when the descriptor is writable. Another errno: this frame is lost. Not NULL.
    pub send:
        Option<unsafe extern "C" fn(user: *mut c_void, pieces: *const vmbed_piece, count: usize) -> i32>,
    /// Ends the network's data, see vmbed_destroy_fn. May be NULL.
    pub destroy: vmbed_destroy_fn,
    /// VMBED_OFFLOAD_*: what it does itself on frames that a guest sends, and may leave to do on those for a guest. 0: nothing.
    pub offloads: u32,
    /// Zero.
    pub reserved: u32,
    /// Says what of it the guest's driver takes: a frame for it that leaves anything else to do is dropped. Called when a driver begins,
    /// before anything else, on the thread that has the device serve it: a vCPU's, yours within vmbed_vm_resume() and
    /// vmbed_vm_change_net(), or one of the library's that has the VM go on, which was paused for want of memory. It must not call into
    /// the VM. May be NULL.
    pub set_offloads: Option<unsafe extern "C" fn(user: *mut c_void, taken: u32)>,
}

// SAFETY: it is repr(C) with its size first, and of functions NULL is a value.
unsafe impl Sized_ for vmbed_net_ops {
    const FIRST: usize = offset_of!(Self, offloads);
    const NAME: &'static str = "vmbed_net_ops";
}

/// Puts card `index`, added without a TAP interface, on a network of yours. `fd`, which is duplicated, polls readable while
/// a frame waits and writable while there is room: an eventfd will do. The table is copied; its destroy function as
/// for vmbed_builder_disk_backend(). vmbed_builder_build() says whether there is such a card.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_net_backend(
    builder: *mut vmbed_builder,
    index: u32,
    ops: *const vmbed_net_ops,
    fd: i32,
    user: *mut c_void,
    error: *mut *mut vmbed_error,
) -> i32 {
    // First of all, so that the network's data end also where anything else is wrong.
    let net = ForeignNet::new(ops, fd, user);
    attach(builder, error, |builder| {
        builder.set_net_backend(index as usize, Box::new(net?));
        Ok(())
    })
}

/// A network behind the table of functions.
struct ForeignNet {
    receive: unsafe extern "C" fn(*mut c_void, *const vmbed_piece, usize, *mut usize) -> i32,
    send: unsafe extern "C" fn(*mut c_void, *const vmbed_piece, usize) -> i32,
    offloads: Offloads,
    set_offloads: Option<unsafe extern "C" fn(*mut c_void, u32)>,
    fd: OwnedFd,
    user: UserData,
}

impl ForeignNet {
    fn new(ops: *const vmbed_net_ops, fd: i32, user: *mut c_void) -> Result<Self> {
        let ops = structure(ops)?;
        let user = UserData::new(user, ops.destroy);
        let missing = |name: &str| invalid(format!("vmbed_net_ops: {name} is NULL"));
        let receive = ops.receive.ok_or_else(|| missing("receive"))?;
        let send = ops.send.ok_or_else(|| missing("send"))?;
        let offloads = Offloads::from_bits(ops.offloads).ok_or_else(|| {
            invalid(format!("vmbed_net_ops.offloads is {:#x}, not of VMBED_OFFLOAD_*", ops.offloads))
        })?;
        reserved("vmbed_net_ops", ops.reserved)?;
        let fd = crate::sys::fd::duplicate(self::fd(fd, "fd")?)
            .map_err(|e| Error::os("duplicating the network's fd", e))?;
        Ok(Self { receive, send, offloads, set_offloads: ops.set_offloads, fd, user })
    }
}

impl NetBackend for ForeignNet {
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize> {
        let (pieces, mut length) = (room.raw(), 0);
        let (at, count) = (pieces.as_ptr().cast(), pieces.len());
        // SAFETY: the embedder's function with its own data; the pieces and the place are there through the call.
        outcome(unsafe { (self.receive)(self.user.pointer(), at, count, &mut length) })?;
        Ok(length.min(room.len()))
    }

    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()> {
        let pieces = frame.raw();
        // SAFETY: as above.
        outcome(unsafe { (self.send)(self.user.pointer(), pieces.as_ptr().cast(), pieces.len()) })
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, taken: Offloads) {
        if let Some(function) = self.set_offloads {
            // SAFETY: the embedder's function with its own data.
            unsafe { function(self.user.pointer(), taken.bits()) }
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a card has carried since the VM was built. Bytes count from the Ethernet header on. What the host's kernel carries by itself
/// (vmbed_net.vhost) is not counted here, but at the TAP interface (`ip -s link`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_net_statistics {
    /// sizeof(struct vmbed_net_statistics)
    pub size: usize,
    /// Frames that the guest received.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames for the guest that vmbed read and could not deliver: too short, too long for the guest's buffers. What the
    /// guest gives no buffers for is dropped where it waits, and counted there (`ip -s link` for a TAP interface).
    pub rx_dropped: u64,
    /// Frames that the guest sent.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest's that did not go out: malformed, or the network failed or was gone.
    pub tx_dropped: u64,
    /// Frames that the guest's driver has said that it does not want: for other addresses or VLANs.
    pub rx_filtered: u64,
    /// Pairs of queues that the host's kernel serves now; 0 while the VM is paused, and before its guest's driver has begun.
    pub vhost: u64,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_net_statistics {
    const FIRST: usize = offset_of!(Self, rx_filtered);
    const NAME: &'static str = "vmbed_net_statistics";
}

/// Fills `statistics`, whose size is set, with what card `index` has carried. In every state; reads counters only.
/// VMBED_ERR_INVALID_ARGUMENT where there is no such card.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_net_statistics(
    vm: *const vmbed_vm,
    index: u32,
    statistics: *mut vmbed_net_statistics,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(vm)?.vm().net_statistics(index as usize)?;
        let value = vmbed_net_statistics {
            size: 0,
            rx_frames: now.rx_frames,
            rx_bytes: now.rx_bytes,
            rx_dropped: now.rx_dropped,
            tx_frames: now.tx_frames,
            tx_bytes: now.tx_bytes,
            tx_dropped: now.tx_dropped,
            rx_filtered: now.rx_filtered,
            vhost: now.vhost.into(),
        };
        fill(statistics, &value)
    })
}

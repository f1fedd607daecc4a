//! The functions themselves, called as C calls them: what is converted on the way in and out, and handles that are freed. `tests/c`
//! asks more of them, with programs that Miri cannot run (`make miri`).

use std::ffi::{CStr, c_char, c_void};
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::Mutex;

use super::arguments::Sized_;
use super::config::*;
use super::device::{Foreign, vmbed_device_ops};
use super::disk::*;
use super::error::*;
use super::events::*;
use super::host::{host_config, vmbed_host_options};
use super::ledger::*;
use super::net::*;
use super::{call, handle};
use crate::budget::{Claim, Headroom, Inventory, Ledger, Provider};
use crate::bus::{Access, Device};
use crate::config::{DiskFormat, VmConfig};
use crate::error::{Error, ErrorKind};
use crate::events::{EventKind, EventStream, Reporter, StopCause, VmId};
use crate::sys::lock;
use crate::units::Bytes;

fn said<'a>(text: *const c_char) -> Option<&'a str> {
    // SAFETY: NULL, or text of an object that the test holds for longer than it looks.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_str().unwrap())
}

/// One at a time: what uses a handle that was freed would meet another test's in its place.
fn turn() -> impl Drop {
    static TURN: Mutex<()> = Mutex::new(());
    lock(&TURN)
}

/// A configuration of a Linux guest.
fn linux() -> *mut vmbed_config {
    let mut config = null_mut();
    // SAFETY: text that is terminated, a place for the result, and nobody wants to know why.
    assert_eq!(unsafe { vmbed_config_new_linux(c"/vmlinuz".as_ptr(), &mut config, null_mut()) }, VMBED_OK);
    config
}

fn config_of(config: *const vmbed_config) -> VmConfig {
    lock(&handle::object(config).unwrap()).clone()
}

/// That a call failed so, and why.
fn refused(status: i32, error: *mut vmbed_error, why: &str) {
    // SAFETY: an error that the call of before made, or NULL; freed once.
    unsafe {
        assert_eq!(vmbed_error_status(error), status);
        let message = said(vmbed_error_message(error)).unwrap();
        assert!(message.contains(why), "{message}");
        vmbed_error_free(error);
    }
}

#[test]
fn what_c_says_is_in_the_configuration() {
    let _turn = turn();
    let config = linux();
    let (uuid, cpus) = ([7u8; 16], [1u32, 3]);
    let mut error = null_mut();
    // SAFETY: a handle, text that is terminated, and arrays of their length.
    unsafe {
        assert_eq!(vmbed_config_set_name(config, c"guest".as_ptr(), &mut error), VMBED_OK);
        assert_eq!(vmbed_config_set_uuid(config, uuid.as_ptr(), &mut error), VMBED_OK);
        assert_eq!(vmbed_config_set_cmdline(config, c"console=ttyS0".as_ptr(), &mut error), VMBED_OK);
        assert_eq!(vmbed_config_set_affinity(config, 1, cpus.as_ptr(), cpus.len(), &mut error), VMBED_OK);
        assert_eq!(vmbed_config_set_cgroup(config, c"/vms".as_ptr(), 9, 0, 0, &mut error), VMBED_OK);
        assert_eq!(vmbed_config_set_promise(config, 4096, 255, &mut error), VMBED_OK);
        assert!(error.is_null());
        let status = vmbed_config_set_console(config, 7, &mut error);
        refused(status, error, "console is 7");
        let status = vmbed_config_add_image(config, 0, uuid.as_ptr(), 16, &mut error);
        refused(status, error, "bare guests");
        let status = vmbed_config_set_promise(config, 0, 256, &mut error);
        refused(status, error, "victim is 256");
    }
    let made = config_of(config);
    assert_eq!((made.name.as_str(), made.uuid.unwrap().0), ("guest", uuid));
    assert_eq!(made.cpus.affinity, [vec![], cpus.to_vec()]);
    assert_eq!((made.promise.guarantee, made.promise.victim), (Bytes(4096), Some(255)));
    assert_eq!(made.cgroup.unwrap().parent.as_deref(), Some(Path::new("/vms")));
    // SAFETY: freed twice, which the second time finds nothing.
    unsafe {
        vmbed_config_free(config);
        vmbed_config_free(config);
        let status = vmbed_config_set_rng(config, true, &mut error);
        refused(status, error, "vmbed_config was freed");
    }
}

#[test]
fn a_bare_guests_bytes_are_copied() {
    let _turn = turn();
    let (mut config, mut error) = (null_mut(), null_mut());
    let code = vec![0xf4u8; 5];
    // SAFETY: bytes of their length, which are gone before the configuration is looked at.
    unsafe {
        let status =
            vmbed_config_new_bare(VMBED_MODE_LONG, 0x1000, code.as_ptr(), 5, &mut config, &mut error);
        assert_eq!(status, VMBED_OK);
        assert_eq!(vmbed_config_add_image(config, 0x2000, code.as_ptr().add(3), 2, &mut error), VMBED_OK);
        drop(code);
        let crate::config::Boot::Bare(bare) = config_of(config).boot else { panic!("it is bare") };
        assert_eq!(bare.images.last().unwrap(), &(0x2000, vec![0xf4; 2]));
        vmbed_config_free(config);
        let status = vmbed_config_new_bare(3, 0, null(), 0, &mut config, &mut error);
        refused(status, error, "mode is 3");
    }
}

#[test]
fn a_disk_with_all_that_it_points_to_is_copied() {
    let _turn = turn();
    let config = linux();
    let mut error = null_mut();
    let below = [c"/middle", c"/base"].map(|path| vmbed_backing_file {
        path: path.as_ptr(),
        format: VMBED_DISK_QCOW2,
        reserved: 0,
    });
    let passphrases = [c"open".as_ptr(), c"sesame".as_ptr()];
    // SAFETY: of all zeroes; then everything that it points to is there.
    unsafe {
        let mut disk = vmbed_disk { size: size_of::<vmbed_disk>(), ..zeroed() };
        (disk.path, disk.serial, disk.pci) = (c"/top".as_ptr(), c"s1".as_ptr(), c"00:05.0".as_ptr());
        (disk.format, disk.rate.ops_per_second) = (VMBED_DISK_QCOW2, 100);
        (disk.backing, disk.backing_count) = (below.as_ptr(), below.len());
        (disk.passphrases, disk.passphrase_count) = (passphrases.as_ptr(), passphrases.len());
        assert_eq!(vmbed_config_add_disk(config, &disk, &mut error), VMBED_OK);
        disk.cache = 4;
        let status = vmbed_config_add_disk(config, &disk, &mut error);
        refused(status, error, "vmbed_disk.cache is 4; there are 0 to 3");
        (disk.cache, disk.backing) = (0, null());
        let status = vmbed_config_add_disk(config, &disk, &mut error);
        refused(status, error, "vmbed_disk.backing is NULL");
        // An older caller's is no longer than this.
        let mut old = vec![0usize; vmbed_disk::FIRST / size_of::<usize>()];
        old[0] = vmbed_disk::FIRST;
        assert_eq!(vmbed_config_add_disk(config, old.as_ptr().cast(), &mut error), VMBED_OK);
    }
    let disks = config_of(config).disks;
    assert_eq!((disks.len(), disks[0].serial.as_str(), disks[1].format), (2, "s1", DiskFormat::Raw));
    assert_eq!(disks[0].backing.len(), 2);
    assert_eq!(disks[0].backing[1].path, Path::new("/base"));
    assert_eq!(disks[0].passphrases.len(), 2);
    // SAFETY: freed once.
    unsafe { vmbed_config_free(config) };
}

#[test]
fn a_card_and_its_limits_are_converted_and_bad_fields_are_named() {
    let _turn = turn();
    let config = linux();
    let mut error = null_mut();
    // SAFETY: of all zeroes; text that is terminated.
    unsafe {
        let mut net = vmbed_net { size: size_of::<vmbed_net>(), ..zeroed() };
        (net.tap, net.mac) = (c"tap0".as_ptr(), c"52:54:00:12:34:56".as_ptr());
        (net.mtu, net.send_rate.bytes_per_second) = (9000, 7);
        assert_eq!(vmbed_config_add_net(config, &net, &mut error), VMBED_OK);
        net.mtu = 65536;
        let status = vmbed_config_add_net(config, &net, &mut error);
        refused(status, error, "vmbed_net.mtu is 65536");
        (net.mtu, net.tap) = (0, c"\xff".as_ptr());
        let status = vmbed_config_add_net(config, &net, &mut error);
        refused(status, error, "vmbed_net.tap is not UTF-8");
        assert_eq!(config_of(config).nets[0].mtu, Some(9000));
        assert_eq!(vmbed_config_set_memory(config, 4097, &mut error), VMBED_OK);
        assert_eq!(vmbed_config_validate(config, &mut error), VMBED_ERR_INVALID_ARGUMENT);
        assert_eq!(said(vmbed_error_field(error, 0)), Some("memory"));
        assert!(
            said(vmbed_error_problem(error, 0)).is_some() && said(vmbed_error_remedy(error, 0)).is_some()
        );
        assert_eq!(said(vmbed_error_field(error, 99)), None);
        vmbed_error_free(error);
        vmbed_config_free(config);
        // A limit is read wherever it lies.
        let mut room = [0u8; size_of::<vmbed_rate>() + 1];
        room[1] = 5;
        let limit = vmbed_rate::or_none(room.as_ptr().add(1).cast());
        assert_eq!((limit.bytes_per_second, vmbed_rate::or_none(null()).bytes_per_second), (5, 0));
    }
}

#[test]
fn a_hosts_shares_are_converted() {
    let _turn = turn();
    let cpus = [2u32, 5];
    // SAFETY: of all zeroes; an array of its length.
    let mut options = unsafe { vmbed_host_options { size: size_of::<vmbed_host_options>(), ..zeroed() } };
    (options.kvm, options.memory_ratio, options.swap) = (c"/dev/other".as_ptr(), 1.5, 4096);
    (options.dedicated_cpus, options.dedicated_count) = (cpus.as_ptr(), cpus.len());
    let config = host_config(&options).unwrap();
    assert_eq!((config.kvm.as_path(), config.memory_ratio), (Path::new("/dev/other"), 1.5));
    assert_eq!((config.swap, config.dedicated_cpus), (Bytes(4096), cpus.to_vec()));
    options.dedicated_count = usize::MAX / 4;
    assert_eq!(host_config(&options).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert!(host_config(null()).unwrap().dedicated_cpus.is_empty());
}

#[test]
fn an_error_says_its_causes_and_its_verdict() {
    let _turn = turn();
    let provider = Provider { memory: Inventory::new(100), swap: 0, vcpus: None, dedicated: 0 };
    let ledger = Ledger::new(provider, [].into());
    let claim = Claim { memory: Bytes(101), vcpus: 1, ..Claim::default() };
    let mut error = null_mut();
    let fail = || Err(ledger.claim(claim, Headroom::default()).err().unwrap());
    assert_eq!(call(&mut error, fail), VMBED_ERR_REFUSED);
    // SAFETY: an error that was made; room of its size, of which nothing is set but that.
    unsafe {
        let mut verdict = MaybeUninit::<vmbed_verdict>::uninit();
        (&raw mut (*verdict.as_mut_ptr()).size).write(size_of::<vmbed_verdict>());
        assert!(vmbed_error_verdict(error, verdict.as_mut_ptr()));
        let verdict = verdict.assume_init();
        assert_eq!((verdict.binding, verdict.count), (VMBED_CONSTRAINT_NOMINAL, 8));
        assert_eq!(verdict.slack[VMBED_CONSTRAINT_NOMINAL as usize].left, -1);
        assert!(!vmbed_error_verdict(null(), null_mut()));
        vmbed_error_free(error);
        let below = std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(call(&mut error, || Err(Error::os("op\0ening", below))), VMBED_ERR_NOT_FOUND);
        assert_eq!(vmbed_error_errno(error), libc::ENOENT);
        assert!(
            said(vmbed_error_message(error)).unwrap().starts_with("opening"),
            "a NUL would hide the rest"
        );
        assert!(said(vmbed_error_source(error, 0)).is_some() && said(vmbed_error_source(error, 9)).is_none());
        vmbed_error_free(error);
        // Miri finds that what a panic carries is never freed, which is meant so.
        if !cfg!(miri) {
            assert_eq!(call(&mut error, || panic!("a defect")), VMBED_ERR_INTERNAL);
            refused(VMBED_ERR_INTERNAL, error, "a defect");
        }
        assert_eq!(said(vmbed_error_message(null())), Some(""));
    }
}

#[test]
fn events_come_out_as_they_went_in() {
    let _turn = turn();
    let stream = EventStream::new().unwrap();
    let reporter = Reporter::new(VmId(3), stream.clone());
    let events = handle::make::<vmbed_events>(stream);
    reporter.device("disk0").backend_error(libc::EIO, 512);
    let why = "one\ntwo".to_owned();
    reporter.report(EventKind::Stopped(StopCause::DeviceFault { device: "net0".into(), why }));
    // SAFETY: handles that are there, and places for results.
    unsafe {
        let next = || {
            let mut event = null_mut();
            assert_eq!(vmbed_events_next(events, 0, &mut event, null_mut()), VMBED_OK);
            event
        };
        let (error, stopped) = (next(), next());
        assert_eq!((vmbed_event_kind(error), vmbed_event_vm_id(error)), (VMBED_EVENT_BACKEND_ERROR, 3));
        assert_eq!((vmbed_event_errno(error), vmbed_event_offset(error)), (libc::EIO, 512));
        assert_eq!(said(vmbed_event_device(error)), Some("disk0"));
        assert_eq!(vmbed_event_cause(stopped), VMBED_CAUSE_DEVICE_FAULT);
        assert!(said(vmbed_event_text(stopped)).unwrap().contains("one two"));
        assert!(next().is_null());
        [error, stopped].into_iter().for_each(|event| vmbed_event_free(event));
        assert_eq!(vmbed_event_kind(error), 0, "it was freed");
        vmbed_events_free(events);
        assert_eq!(vmbed_events_fd(events), -1);
    }
}

unsafe extern "C" fn fill(user: *mut c_void, _: u32, _: u64, data: *mut u8, length: usize) -> i32 {
    // SAFETY: the device's bytes; a counter of the test's.
    unsafe {
        data.write_bytes(0x5a, length);
        *user.cast::<u32>() += 1;
    }
    VMBED_OK
}

unsafe extern "C" fn refuse(_: *mut c_void, _: u32, _: u64, data: *const u8, length: usize) -> i32 {
    // SAFETY: the driver's bytes.
    assert_eq!(unsafe { std::slice::from_raw_parts(data, length) }, [1, 2, 3]);
    VMBED_ERR_BUSY
}

unsafe extern "C" fn destroy(user: *mut c_void) {
    // SAFETY: a counter of the test's.
    unsafe { *user.cast::<u32>() += 100 };
}

#[test]
fn a_device_in_c_gets_the_bytes_and_ends_once() {
    let _turn = turn();
    let mut count = 0u32;
    let user = (&raw mut count).cast();
    let mut ops = vmbed_device_ops {
        size: size_of::<vmbed_device_ops>(),
        read: Some(fill),
        write: Some(refuse),
        destroy: Some(destroy),
    };
    let device = Foreign::new(&ops, user).unwrap();
    let mut data = [0xff; 4];
    device.read(Access::at(8), &mut data[1..]).unwrap();
    assert_eq!(data, [0xff, 0x5a, 0x5a, 0x5a]);
    assert_eq!(device.write(Access::at(8), &[1, 2, 3]).unwrap_err().kind(), ErrorKind::Busy);
    drop(device);
    ops.read = None;
    assert!(Foreign::new(&ops, user).is_err());
    assert_eq!(count, 201, "one read, two ends");
}

struct Shared(*mut vmbed_config);

// SAFETY: handles may be used by any thread.
unsafe impl Sync for Shared {}

/// One thread frees what others use: each of their calls finds the object, or says that there is none.
#[test]
fn a_handle_is_freed_while_it_is_used() {
    let _turn = turn();
    for round in 0..if cfg!(miri) { 3 } else { 200 } {
        let config = Shared(linux());
        let at = move |shared: &Shared| shared.0;
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for memory in 0..10 {
                        // SAFETY: a handle that is there, or was: its slot is never given back.
                        let status =
                            unsafe { vmbed_config_set_memory(at(&config), memory << 12, null_mut()) };
                        assert!(matches!(status, VMBED_OK | VMBED_ERR_INVALID_ARGUMENT), "{round}: {status}");
                    }
                });
            }
            // SAFETY: as above.
            scope.spawn(|| unsafe { vmbed_config_free(at(&config)) });
        });
        // SAFETY: as above; another is made in its place.
        unsafe {
            let again = linux();
            assert_eq!(vmbed_config_validate(null(), null_mut()), VMBED_ERR_INVALID_ARGUMENT);
            vmbed_config_free(again);
        }
    }
}

#[test]
fn descriptors_are_duplicated_or_refused() {
    let _turn = turn();
    let stream = EventStream::new().unwrap();
    let own = super::arguments::fd(stream.as_raw_fd(), "fd").unwrap();
    assert!(own.try_clone_to_owned().is_ok());
    for none in [-1, i32::MIN, 1 << 20] {
        assert!(super::arguments::fd(none, "fd").is_err(), "{none}");
    }
}

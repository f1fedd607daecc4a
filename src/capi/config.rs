//! What a VM is to be.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex};

use super::arguments::{Out, fd, invalid, optional, path, slice, text};
use super::device::{Foreign, UserData, vmbed_destroy_fn, vmbed_device_ops};
use super::error::vmbed_error;
use super::events::vmbed_events;
use super::handle::{self, handle};
use super::host::vmbed_host;
use super::vm::{Machine, vmbed_vm};
use super::{answer, call};
use crate::config::{
    BareBoot, Boot, ConsoleKind, CpuMode, CpuidMask, CpuidRegister, LinuxBoot, Platform, Uuid, VmConfig,
};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;
use crate::units::Bytes;
use crate::vm::{ThreadInfo, ThreadRole, VmBuilder};

/// Everything about a VM that is data. A VM does not depend on the configuration that it was built from: free it,
/// or build more VMs from it.
pub struct vmbed_config(());

handle!(vmbed_config holds Mutex<VmConfig>);

pub(super) fn change(
    config: *const vmbed_config,
    error: *mut *mut vmbed_error,
    f: impl FnOnce(&mut VmConfig) -> Result<()>,
) -> i32 {
    call(error, || f(&mut lock(&*handle::object(config)?)))
}

/// A PC that boots the Linux kernel at `kernel`, a bzImage or an ELF image with a PVH entry: 1 vCPU, 256 MiB, a serial
/// console, a random number generator. It is yours to free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_new_linux(
    kernel: *const c_char,
    config: *mut *mut vmbed_config,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(config, "config")?;
        let boot = LinuxBoot::new(path(kernel, "kernel")?);
        out.put(handle::make(Mutex::new(VmConfig::linux(boot))));
        Ok(())
    })
}

/// A bare guest starts in 16-bit real mode, segment bases 0; the entry must be below 64 KiB.
pub const VMBED_MODE_REAL: i32 = 0;
/// In 32-bit protected mode, flat segments, paging off; the entry must be below 4 GiB.
pub const VMBED_MODE_PROTECTED: i32 = 1;
/// In 64-bit long mode, flat segments, the first 4 GiB identity-mapped with 2 MiB pages. The page tables occupy the
/// last 24 KiB of memory below 3 GiB.
pub const VMBED_MODE_LONG: i32 = 2;

/// A bare guest: 1 vCPU, 2 MiB of memory, no device but yours. It starts in `mode`, one of VMBED_MODE_*, at the
/// guest-physical address `entry`, where `length` bytes of `code` are put; they are copied. Every vCPU starts there, with
/// its index in RDI. The configuration is yours to free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_new_bare(
    mode: i32,
    entry: u64,
    code: *const u8,
    length: usize,
    config: *mut *mut vmbed_config,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(config, "config")?;
        let mode = match mode {
            VMBED_MODE_REAL => CpuMode::Real,
            VMBED_MODE_PROTECTED => CpuMode::Protected,
            VMBED_MODE_LONG => CpuMode::Long,
            other => return Err(invalid(format!("mode is {other}, not one of VMBED_MODE_*"))),
        };
        let boot = BareBoot::new(mode, entry, slice(code, length, "code")?);
        out.put(handle::make(Mutex::new(VmConfig::bare(boot))));
        Ok(())
    })
}

/// Sets the VM's name, for messages and the guest's SMBIOS; at most 64 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_name(
    config: *mut vmbed_config,
    name: *const c_char,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.name = text(name, "name")?.to_owned();
        Ok(())
    })
}

/// Sets the VM's identity in SMBIOS: 16 bytes, most significant first. NULL: made up for each VM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_uuid(
    config: *mut vmbed_config,
    uuid: *const u8,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.uuid = if uuid.is_null() {
            None
        } else {
            slice(uuid, 16, "uuid")?.first_chunk().map(|bytes| Uuid(*bytes))
        };
        Ok(())
    })
}

/// Sets the size of the guest's memory in bytes, a multiple of 4 KiB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_memory(
    config: *mut vmbed_config,
    bytes: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.memory = Bytes(bytes);
        Ok(())
    })
}

/// Sets the number of vCPUs, 1 to 254, and how the guest sees them: threads per core, 1 or 2, and sockets. They must
/// divide the number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_cpus(
    config: *mut vmbed_config,
    count: u16,
    threads_per_core: u16,
    sockets: u16,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        (c.cpus.count, c.cpus.threads_per_core, c.cpus.sockets) = (count, threads_per_core, sockets);
        Ok(())
    })
}

/// The register EAX of the CPUID instruction.
pub const VMBED_CPUID_EAX: i32 = 0;
/// EBX.
pub const VMBED_CPUID_EBX: i32 = 1;
/// ECX.
pub const VMBED_CPUID_ECX: i32 = 2;
/// EDX.
pub const VMBED_CPUID_EDX: i32 = 3;

/// Changes bits of a CPUID register, one of VMBED_CPUID_*, over what KVM and vmbed offer:
/// `value = (value & ~clear) | set`. Setting what the processor lacks is your risk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_mask_cpuid(
    config: *mut vmbed_config,
    leaf: u32,
    subleaf: u32,
    register: i32,
    clear: u32,
    set: u32,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        let register = match register {
            VMBED_CPUID_EAX => CpuidRegister::Eax,
            VMBED_CPUID_EBX => CpuidRegister::Ebx,
            VMBED_CPUID_ECX => CpuidRegister::Ecx,
            VMBED_CPUID_EDX => CpuidRegister::Edx,
            other => return Err(invalid(format!("register is {other}, not one of VMBED_CPUID_*"))),
        };
        c.cpus.masks.push(CpuidMask { leaf, subleaf, register, clear, set });
        Ok(())
    })
}

/// Local APICs, IOAPIC, PCI Express, hardware-reduced ACPI, serial port, clock, pvpanic.
pub const VMBED_PLATFORM_PC: i32 = 0;
/// vCPUs and memory only. HLT ends a vCPU, since nothing could wake it.
pub const VMBED_PLATFORM_BARE: i32 = 1;

/// Sets what surrounds the vCPUs, one of VMBED_PLATFORM_*. A Linux guest has VMBED_PLATFORM_PC and a bare one
/// VMBED_PLATFORM_BARE unless this says otherwise; Linux needs a PC.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_platform(
    config: *mut vmbed_config,
    platform: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.platform = match platform {
            VMBED_PLATFORM_PC => Platform::Pc,
            VMBED_PLATFORM_BARE => Platform::Bare,
            other => return Err(invalid(format!("platform is {other}, not one of VMBED_PLATFORM_*"))),
        };
        Ok(())
    })
}

/// A 16550 at 0x3f8, `console=ttyS0`: works from the first instruction on.
pub const VMBED_CONSOLE_SERIAL: i32 = 0;
/// virtio-console, `console=hvc0`: cheaper per byte, but needs the guest's driver.
pub const VMBED_CONSOLE_VIRTIO: i32 = 1;

/// Sets what the guest's console is, one of VMBED_CONSOLE_*.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_console(
    config: *mut vmbed_config,
    console: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.console = match console {
            VMBED_CONSOLE_SERIAL => ConsoleKind::Serial,
            VMBED_CONSOLE_VIRTIO => ConsoleKind::Virtio,
            other => return Err(invalid(format!("console is {other}, not one of VMBED_CONSOLE_*"))),
        };
        Ok(())
    })
}

/// Says whether the guest has a virtio-rng, fed from the host's getrandom().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_rng(
    config: *mut vmbed_config,
    rng: bool,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        c.rng = rng;
        Ok(())
    })
}

fn linux<'a>(config: &'a mut VmConfig, what: &str) -> Result<&'a mut LinuxBoot> {
    match &mut config.boot {
        Boot::Linux(linux) => Ok(linux),
        Boot::Bare(_) => {
            Err(invalid(format!("{what} is for Linux guests; this configuration is a bare guest's")))
        }
    }
}

fn bare<'a>(config: &'a mut VmConfig, what: &str) -> Result<&'a mut BareBoot> {
    match &mut config.boot {
        Boot::Bare(bare) => Ok(bare),
        Boot::Linux(_) => Err(invalid(format!("{what} is for bare guests; this configuration boots Linux"))),
    }
}

/// Sets the path of a Linux guest's initial RAM disk; NULL for none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_initrd(
    config: *mut vmbed_config,
    initrd: *const c_char,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        linux(c, "an initrd")?.initrd = optional(initrd, "initrd", path)?.map(|p| p.to_owned());
        Ok(())
    })
}

/// Sets a Linux guest's command line; at most 2047 bytes. `console=ttyS0` (or `hvc0`) is yours to say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_cmdline(
    config: *mut vmbed_config,
    cmdline: *const c_char,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        linux(c, "a command line")?.cmdline = text(cmdline, "cmdline")?.to_owned();
        Ok(())
    })
}

/// Lets a Linux guest's own decompressor run, which also randomizes the kernel's addresses. Off by default: vmbed
/// unpacks LZ4 images itself, which boots faster but at fixed addresses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_kaslr(
    config: *mut vmbed_config,
    kaslr: bool,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        linux(c, "address randomization")?.kaslr = kaslr;
        Ok(())
    })
}

/// Puts `length` more bytes of `data` into a bare guest's memory, at the guest-physical `address`. They are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_add_image(
    config: *mut vmbed_config,
    address: u64,
    data: *const u8,
    length: usize,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        bare(c, "an image")?.images.push((address, slice(data, length, "data")?.to_vec()));
        Ok(())
    })
}

/// Sets a bare guest's stack pointer at the entry; 0 for none. vCPU n starts n * 4096 bytes below it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_stack(
    config: *mut vmbed_config,
    stack: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        bare(c, "a stack")?.stack = stack;
        Ok(())
    })
}

pub(super) fn reserved(name: &str, value: u32) -> Result<()> {
    if value == 0 { Ok(()) } else { Err(invalid(format!("{name}.reserved is {value}; it must be zero"))) }
}

/// Checks everything that can be checked without opening anything; vmbed_builder_build() does so too. The error names
/// every bad field, with what would be right.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_validate(
    config: *const vmbed_config,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || lock(&*handle::object(config)?).validate())
}

/// Frees a configuration. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_free(config: *mut vmbed_config) {
    answer((), || drop(handle::take(config)));
}

/// A VM in the making: a configuration, and what is not data. It makes one VM. A destroy function that one of its calls
/// calls, of what it refuses or replaces, does not use the same builder.
pub struct vmbed_builder(());

handle!(vmbed_builder holds Mutex<Option<VmBuilder>>);

/// A builder for a VM on `host` with a copy of `config`. It is yours to free; it keeps what it needs of both.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_new(
    host: *const vmbed_host,
    config: *const vmbed_config,
    builder: *mut *mut vmbed_builder,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(builder, "builder")?;
        let (host, config) = (handle::object(host)?, handle::object(config)?);
        let config = lock(&config).clone();
        out.put(handle::make(Mutex::new(Some(host.builder(config)))));
        Ok(())
    })
}

/// Changes a builder that has not built yet.
pub(super) fn attach(
    builder: *const vmbed_builder,
    error: *mut *mut vmbed_error,
    f: impl FnOnce(&mut VmBuilder) -> Result<()>,
) -> i32 {
    call(error, || {
        let builder = handle::object(builder)?;
        f(lock(&builder).as_mut().ok_or_else(has_built)?)
    })
}

fn has_built() -> Error {
    Error::new(ErrorKind::InvalidState, "this vmbed_builder has built its VM: make another one")
}

/// Attaches a device of your own to `length` ports from `port`; `name` is for messages and causes. The table is copied.
/// Its destroy function, where the table is good enough to name one, is called exactly once with `user`: after the VM has
/// been freed, or when this call or the build fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_add_pio(
    builder: *mut vmbed_builder,
    name: *const c_char,
    port: u16,
    length: u16,
    ops: *const vmbed_device_ops,
    user: *mut c_void,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach_device(builder, name, ops, user, error, |builder, name, device| {
        builder.add_pio(name, port, length, device);
    })
}

/// Attaches a device of your own to `length` bytes of guest-physical addresses from `address`, where there is no
/// memory; otherwise as vmbed_builder_add_pio().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_add_mmio(
    builder: *mut vmbed_builder,
    name: *const c_char,
    address: u64,
    length: u64,
    ops: *const vmbed_device_ops,
    user: *mut c_void,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach_device(builder, name, ops, user, error, |builder, name, device| {
        builder.add_mmio(name, address, length, device);
    })
}

/// Reports what the guest writes to `length` ports from `port` as VMBED_EVENT_DOORBELL with this `name` in the VM's
/// events: how a guest calls for the thread that polls them, with data in its memory or in the value. The guest does not
/// wait for a reader. Reads find all-ones.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_add_pio_doorbell(
    builder: *mut vmbed_builder,
    name: *const c_char,
    port: u16,
    length: u16,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| {
        builder.add_pio_doorbell(text(name, "name")?.to_owned(), port, length);
        Ok(())
    })
}

/// The same for `length` bytes of guest-physical addresses from `address`, where there is no memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_add_mmio_doorbell(
    builder: *mut vmbed_builder,
    name: *const c_char,
    address: u64,
    length: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| {
        builder.add_mmio_doorbell(text(name, "name")?.to_owned(), address, length);
        Ok(())
    })
}

fn attach_device(
    builder: *const vmbed_builder,
    name: *const c_char,
    ops: *const vmbed_device_ops,
    user: *mut c_void,
    error: *mut *mut vmbed_error,
    add: impl FnOnce(&mut VmBuilder, String, Arc<Foreign>),
) -> i32 {
    // First of all, so that the device's data ends also where anything else is wrong.
    let device = Foreign::new(ops, user);
    attach(builder, error, |builder| {
        let device = Arc::new(device?);
        let name = text(name, "name")?.to_owned();
        add(builder, name, device);
        Ok(())
    })
}

/// Sends the VM's events to a stream that it may share with others, instead of one of its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_set_events(
    builder: *mut vmbed_builder,
    events: *const vmbed_events,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| {
        builder.set_events(&*handle::object(events)?);
        Ok(())
    })
}

/// Writes the guest's console to `fd`, which is duplicated: a file, pipe, terminal or socket. Its flags stay as they
/// are. When nobody takes the output, the oldest is dropped; the guest never waits for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_console_output(
    builder: *mut vmbed_builder,
    fd: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| builder.set_console_output(self::fd(fd, "fd")?))
}

/// Reads the guest's console input from `fd`, which is duplicated. What the guest does not read stays there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_console_input(
    builder: *mut vmbed_builder,
    fd: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| builder.set_console_input(self::fd(fd, "fd")?))
}

/// Takes a piece of a guest's console output, in order, on a device thread of that VM. The bytes are gone when it
/// returns. It must not wait for this VM.
pub type vmbed_console_fn = Option<unsafe extern "C" fn(user: *mut c_void, data: *const u8, length: usize)>;

/// Hands the guest's console output to `function` instead of an fd. `destroy` as for every callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_console_callback(
    builder: *mut vmbed_builder,
    function: vmbed_console_fn,
    user: *mut c_void,
    destroy: vmbed_destroy_fn,
    error: *mut *mut vmbed_error,
) -> i32 {
    let user = UserData::new(user, destroy);
    attach(builder, error, move |builder| {
        let function = function.ok_or_else(|| invalid("function is NULL"))?;
        builder.set_console_callback(move |bytes: &[u8]| {
            // SAFETY: the embedder's function with its own data; the bytes are there through the call.
            unsafe { function(user.pointer(), bytes.as_ptr(), bytes.len()) }
        });
        Ok(())
    })
}

/// The thread runs a vCPU.
pub const VMBED_THREAD_VCPU: i32 = 0;
/// The thread serves devices.
pub const VMBED_THREAD_DEVICE: i32 = 1;
/// The thread waits for the end of a VM whose vCPUs run on threads of yours.
pub const VMBED_THREAD_CONTROL: i32 = 2;
/// The thread answers for the others, which are in a sandbox (vmbed_config_set_sandbox()), tells of what was refused, or hands their
/// records to your logger: it is outside.
pub const VMBED_THREAD_SUPERVISOR: i32 = 3;

/// Called on each thread of the library before it does anything else: the place to set its affinity, cgroup or
/// scheduler. `role` is one of VMBED_THREAD_*, `index` counts the VM's threads of one role (for a vCPU its index), `tid`
/// is the kernel's id.
pub type vmbed_thread_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, vm_id: u64, role: i32, index: u32, tid: i32)>;

/// Has `function` called at the start of each thread of the VM. `destroy` as for every callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_on_thread_start(
    builder: *mut vmbed_builder,
    function: vmbed_thread_fn,
    user: *mut c_void,
    destroy: vmbed_destroy_fn,
    error: *mut *mut vmbed_error,
) -> i32 {
    let user = UserData::new(user, destroy);
    attach(builder, error, move |builder| {
        let function = function.ok_or_else(|| invalid("function is NULL"))?;
        builder.set_thread_hook(move |info: &ThreadInfo| {
            let role = match info.role {
                ThreadRole::Vcpu => VMBED_THREAD_VCPU,
                ThreadRole::Device => VMBED_THREAD_DEVICE,
                ThreadRole::Control => VMBED_THREAD_CONTROL,
                ThreadRole::Supervisor => VMBED_THREAD_SUPERVISOR,
            };
            // SAFETY: the embedder's function with its own data.
            unsafe { function(user.pointer(), info.vm.0, role, info.index, info.tid) }
        });
        Ok(())
    })
}

/// Makes the VM: books its memory and vCPUs in the host's ledger, opens its disks and network interfaces, loads what it
/// boots. Nothing runs yet. It is yours to free; the builder is done, also where this fails. Blocks for milliseconds, most
/// of them for loading, or for as long as the host needs to read the files.
///
/// VMBED_ERR_INVALID_ARGUMENT with every bad field; VMBED_ERR_REFUSED by the ledger; VMBED_ERR_NOT_FOUND,
/// VMBED_ERR_PERMISSION_DENIED, VMBED_ERR_BUSY or VMBED_ERR_BAD_IMAGE with the device or file at fault. Whatever had been
/// made is taken back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_build(
    builder: *mut vmbed_builder,
    vm: *mut *mut vmbed_vm,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(vm, "vm")?;
        let builder = lock(&*handle::object(builder)?).take().ok_or_else(has_built)?;
        out.put(handle::make(Machine::new(builder.build()?)));
        Ok(())
    })
}

/// Frees a builder. The VM that it made goes on. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_free(builder: *mut vmbed_builder) {
    answer((), || drop(handle::take(builder)));
}

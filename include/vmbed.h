/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * vmbed: the virtual machine monitor that you embed.
 *
 * A program that links libvmbed runs KVM virtual machines inside its own process: no daemon, no global state, no
 * opinion about the process. Build with `cc program.c $(pkg-config --cflags --libs vmbed)`.
 *
 *     #include <stdio.h>
 *     #include <vmbed.h>
 *
 *     int main(void)
 *     {
 *         vmbed_error *error = NULL;
 *         vmbed_host *host = NULL;
 *         vmbed_config *config = NULL;
 *         vmbed_builder *builder = NULL;
 *         vmbed_vm *vm = NULL;
 *         int32_t cause;
 *
 *         if (vmbed_host_open(NULL, &host, &error) ||
 *             vmbed_config_new_linux("vmlinuz", &config, &error) ||
 *             vmbed_config_set_cmdline(config, "console=ttyS0", &error) ||
 *             vmbed_builder_new(host, config, &builder, &error) ||
 *             vmbed_builder_console_output(builder, 1, &error) ||
 *             vmbed_builder_build(builder, &vm, &error) ||
 *             vmbed_vm_start(vm, &error) ||
 *             vmbed_vm_wait(vm, -1, &cause, &error))
 *             fprintf(stderr, "%s\n", vmbed_error_message(error));
 *         else
 *             printf("the guest has ended: cause %d\n", cause);
 *         int status = error != NULL;
 *         vmbed_vm_free(vm);
 *         vmbed_builder_free(builder);
 *         vmbed_config_free(config);
 *         vmbed_host_free(host);
 *         vmbed_error_free(error);
 *         return status;
 *     }
 *
 * Statuses. A function that can fail returns VMBED_OK (0) or one of VMBED_ERR_* (negative), and takes a
 * `vmbed_error **error` last. That may be NULL; else it is set to NULL, or to an error that is yours to free.
 *
 * Handles. Each opaque type has its own _free; NULL is a no-op there, and the order does not matter. Results are given
 * through a pointer that is not NULL and is set only where the call works. A call on a handle that was freed answers
 * VMBED_ERR_INVALID_ARGUMENT as long as no new handle of that type has taken its place.
 *
 * Pointers. A pointer may be NULL only where its comment says so; elsewhere NULL is answered with
 * VMBED_ERR_INVALID_ARGUMENT. Text is UTF-8 and ends with a NUL; paths are bytes. What goes in is copied before the call
 * returns. Text that comes out lives as long as the handle that it belongs to.
 *
 * Structures begin with their own size. Set it, zero the rest, fill in what you need: a newer library finds your older
 * structure shorter, an older one accepts your newer structure as long as what it does not know is zero.
 *
 * Callbacks are a function, its data and a destroy function. The destroy function may be NULL; else it is called exactly
 * once, when the data are needed no more, also where the call that they were given to fails.
 *
 * Threads. Every function may be called from any thread at any time, on the same handle too. Unless its comment says
 * otherwise it does not block. The library blocks all signals on its own threads, and installs no handlers.
 *
 * Forks. A child of a fork has no part in its parent's VMs: there every call on a handle of the parent's answers
 * VMBED_ERR_INVALID_STATE, and every _free of one does nothing. It may open a host and run VMs of its own.
 *
 * fds are duplicated: yours stay yours.
 */
#ifndef VMBED_H
#define VMBED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Handles -------------------------------------------------------------------------------------------------- */

/**
 * Why a call failed. Every function that can fail takes a `vmbed_error **error` last: NULL if you do not want
 * to know, else it is set to NULL where the call works, and to an error where it fails, which is yours to free.
 */
typedef struct vmbed_error vmbed_error;

/**
 * The machine's KVM, and the ledger of what the VMs made from it are promised. A process may have several, each
 * with its own share. It may be freed before its VMs are.
 */
typedef struct vmbed_host vmbed_host;

/** What this machine can and cannot do, and how to mend what it cannot. */
typedef struct vmbed_probe vmbed_probe;

/**
 * A VM in the making: a configuration, and what is not data. It makes one VM. A destroy function that one of its calls
 * calls, of what it refuses or replaces, does not use the same builder.
 */
typedef struct vmbed_builder vmbed_builder;

/**
 * Everything about a VM that is data. A VM does not depend on the configuration that it was built from: free it,
 * or build more VMs from it.
 */
typedef struct vmbed_config vmbed_config;

/**
 * A disk of yours that serves a VM: what vmbed_block_complete() needs to know whose requests it ends. It is the
 * library's.
 */
typedef struct vmbed_block vmbed_block;

/** What passes through ports, while it is being written to a file. */
typedef struct vmbed_capture vmbed_capture;

/** A port of a switch: for the card of a VM (vmbed_builder_net_port()), or with a TAP interface of the host's on it. */
typedef struct vmbed_port vmbed_port;

/**
 * A learning Ethernet switch with VLANs (802.1Q) inside of the process: it needs no privilege, and nothing of the host's
 * network but for its uplinks. Its functions may be called from any thread and do not block for long, save where they
 * say so.
 */
typedef struct vmbed_switch vmbed_switch;

/**
 * What this process has made of the host's network, and changed in it: bridges, TAP interfaces and VLAN interfaces, what is on which
 * bridge, and in which VLANs. When it is released or freed, all of that is undone, in reverse: what it made is gone, and what was there
 * before is as it was. What others have changed meanwhile stays as they left it.
 *
 * It works in the network namespace of the thread that makes it; its functions are for threads of that namespace. They want the
 * capability CAP_NET_ADMIN there (VMBED_ERR_PERMISSION_DENIED), may be called from any thread, and do not block for long. A
 * call that fails has changed nothing.
 */
typedef struct vmbed_wiring vmbed_wiring;

/**
 * A virtual machine in this process. Every function may be called from any thread, at the same time as any other,
 * vmbed_vm_free() included: calls that wait then come back with VMBED_ERR_INVALID_ARGUMENT or the VM's end.
 *
 * Functions that wait for the VM answer VMBED_ERR_INVALID_STATE when a callback of this same VM calls them, since
 * they would wait for themselves.
 */
typedef struct vmbed_vm vmbed_vm;

/** An event loop without a thread: serves the devices of VMs on your own loop. Any number of VMs may share one. */
typedef struct vmbed_dispatcher vmbed_dispatcher;

/** Something that happened to a VM. */
typedef struct vmbed_event vmbed_event;

/** The reading end of a stream of events, of one VM or of several: poll its fd, then drain it. */
typedef struct vmbed_events vmbed_events;

/* The library ---------------------------------------------------------------------------------------------- */

/**
 * The header's version: major, minor and patch. A library of the same major (while that is 0: minor) version
 * does all that it says.
 */
#define VMBED_VERSION_MAJOR 0

/** See VMBED_VERSION_MAJOR. */
#define VMBED_VERSION_MINOR 1

/** See VMBED_VERSION_MAJOR. */
#define VMBED_VERSION_PATCH 0

/** The library's version, `major << 16 | minor << 8 | patch`. */
uint32_t vmbed_version(void);

/**
 * The `index`th thing that this library can do, from 0: `linux`, `bare`, `blk-raw`, `net-tap`, ... NULL past the
 * last. Static.
 */
const char *vmbed_feature(size_t index);

/** Whether vmbed_feature() lists `name`. Not for NULL. */
bool vmbed_has_feature(const char *name);

/**
 * Has the process survive SIGBUS on guest memory: a page of failing hardware, one that swap cannot give back, a huge page
 * that is gone from the administrator's pool after the guest gave it to the host. Whoever touched it finds zeroes there, and
 * the VM that it belongs to stops with VMBED_CAUSE_DEVICE_FAULT of the device `memory`. Without it, the kernel ends the
 * process.
 *
 * It installs a handler for the signal, since nothing does that unasked, and starts one thread that sleeps. Any other
 * SIGBUS goes to the handler that was there before, or ends the process as before. So install your own first; one that
 * comes later must pass on what is not its own, with all three arguments. Threads of yours that touch guest memory must
 * not block SIGBUS. To call it again does nothing; in a child of a fork, it begins anew.
 *
 * VMBED_ERR_EXHAUSTED where the process is out of threads or file descriptors.
 */
int32_t vmbed_handle_sigbus(vmbed_error **error);

/* Errors --------------------------------------------------------------------------------------------------- */

/** It worked. */
#define VMBED_OK 0

/** An argument or a field of a configuration is wrong; vmbed_error_field() names every bad field. */
#define VMBED_ERR_INVALID_ARGUMENT -1

/** The call does not fit the state that the VM is in. */
#define VMBED_ERR_INVALID_STATE -2

/** A file, a network interface or a device that was named does not exist. */
#define VMBED_ERR_NOT_FOUND -3

/** The process may not do this. */
#define VMBED_ERR_PERMISSION_DENIED -4

/** Someone else holds what was asked for. */
#define VMBED_ERR_BUSY -5

/** This host, kernel or version of vmbed cannot do it. */
#define VMBED_ERR_UNSUPPORTED -6

/** A file's content is malformed. */
#define VMBED_ERR_BAD_IMAGE -7

/** The host ran out of something: memory, file descriptors, threads, disk. */
#define VMBED_ERR_EXHAUSTED -8

/** The ledger refused: it would break one of the promises that the host has made. */
#define VMBED_ERR_REFUSED -9

/** The wait ended before what was waited for happened. */
#define VMBED_ERR_TIMED_OUT -10

/** A system call failed for another reason; see vmbed_error_errno(). */
#define VMBED_ERR_OS -11

/** A defect in vmbed. */
#define VMBED_ERR_INTERNAL -12

/** The status that the call returned, one of VMBED_ERR_*; VMBED_OK for NULL. */
int32_t vmbed_error_status(const vmbed_error *error);

/** The errno of the system call that failed; 0 where none did, and for NULL. */
int32_t vmbed_error_errno(const vmbed_error *error);

/**
 * What failed, on what, and what would be right, for a person to read; bad fields have a line each. It belongs to the
 * error. Never NULL: empty for NULL.
 */
const char *vmbed_error_message(const vmbed_error *error);

/**
 * The `index`th cause below the error, from 0: what the next layer down said. NULL past the last. It belongs to
 * the error.
 */
const char *vmbed_error_source(const vmbed_error *error,
                               size_t index);

/**
 * The `index`th bad field of a configuration, from 0, as one would write it: `disks[1].path`; of a refusal by the
 * ledger the `index`th constraint, whose problem is how it stands. NULL past the last.
 * It belongs to the error.
 */
const char *vmbed_error_field(const vmbed_error *error,
                              size_t index);

/** What is wrong with the `index`th bad field. NULL past the last. It belongs to the error. */
const char *vmbed_error_problem(const vmbed_error *error, size_t index);

/**
 * What would be right for the `index`th bad field; empty where the problem says it already. NULL past the last.
 * It belongs to the error.
 */
const char *vmbed_error_remedy(const vmbed_error *error,
                               size_t index);

/** Frees an error. NULL is a no-op. */
void vmbed_error_free(vmbed_error *error);

/* Devices of your own -------------------------------------------------------------------------------------- */

/**
 * Ends the life of a callback's data: called exactly once, when no callback with it runs or will ever run, also
 * where the call that it was given to fails.
 */
typedef void (*vmbed_destroy_fn)(void *user);

/**
 * A port-I/O or MMIO device of your own. The VM calls it on the thread of the vCPU whose instruction touched the
 * device's range; that vCPU waits for the answer, the others go on and may call at the same time. `offset` counts bytes
 * from the start of the range. `length` is 1, 2 or 4 for ports and 1 to 8 for MMIO; the bytes are the guest's,
 * little-endian, and gone when the function returns.
 *
 * A function returns VMBED_OK, or one of VMBED_ERR_* to stop this VM with VMBED_CAUSE_DEVICE_FAULT. It may call
 * vmbed_vm_request_stop() and whatever else never blocks; functions that wait for this VM answer
 * VMBED_ERR_INVALID_STATE.
 */
typedef struct {
    /** sizeof(struct vmbed_device_ops) */
    size_t size;
    /** The guest reads; `data` holds all-ones on entry. Not NULL. */
    int32_t (*read)(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length);
    /** The guest writes. Not NULL. */
    int32_t (*write)(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length);
    /** Ends the device's data, see vmbed_destroy_fn. May be NULL. */
    vmbed_destroy_fn destroy;
} vmbed_device_ops;

/* Log lines ------------------------------------------------------------------------------------------------ */

/** No log lines. */
#define VMBED_LOG_OFF 0

/** What the embedder should look at. */
#define VMBED_LOG_ERROR 1

/** What is odd. */
#define VMBED_LOG_WARN 2

/** What happens, rarely. */
#define VMBED_LOG_INFO 3

/** What helps to find a mistake. */
#define VMBED_LOG_DEBUG 4

/** Everything. */
#define VMBED_LOG_TRACE 5

/**
 * Takes one log line without a line feed; `target` is the part of vmbed that says it. Both are gone when it
 * returns. Called on any thread, also on several at once.
 */
typedef void (*vmbed_log_fn)(void *user, int32_t level, const char *target, const char *message);

/**
 * Sends the library's log lines up to `level`, one of VMBED_LOG_*, to `function`; it replaces the one before. With
 * VMBED_LOG_OFF, or `function` NULL, there are none, which is how the library begins. `destroy`, where it is not NULL,
 * is called exactly once with `user`: when another function takes its place and no line is on its way to it any more,
 * or at once where this call fails.
 *
 * VMBED_ERR_BUSY where the program is written in Rust itself and has a logger: the lines go there already.
 */
int32_t vmbed_log_set(int32_t level,
                      vmbed_log_fn function,
                      void *user,
                      vmbed_destroy_fn destroy,
                      vmbed_error **error);

/* The host ------------------------------------------------------------------------------------------------- */

/** Memory is charged to the process's cgroup: everything of all processes in it. */
#define VMBED_CHARGED_BY_CGROUP 1

/** No cgroup counts: everything of the machine's that is not available to others. */
#define VMBED_CHARGED_BY_MACHINE 2

/** What a host may give to its VMs. Zero a field, or all but the size, for its default. */
typedef struct {
    /** sizeof(struct vmbed_host_options) */
    size_t size;
    /** The path of the KVM device. NULL: `/dev/kvm`. */
    const char *kvm;
    /**
     * Memory to share out, in bytes. 0: the smaller of the machine's and of the limits of this process's cgroup and
     * those above it.
     */
    uint64_t memory;
    /** What of it is kept for the host itself, in bytes. 0: 512 MiB; 1 for none. */
    uint64_t memory_reserved;
    /** How often the rest may be promised (OpenStack's ram_allocation_ratio). 0: 1.0. */
    double memory_ratio;
    /** How many vCPUs a core may carry (cpu_allocation_ratio). 0: as many as you like. */
    double vcpu_ratio;
    /** The least memory that one VM may have, in bytes (Placement's min_unit). 0: 1. */
    uint64_t memory_min_unit;
    /** The most memory that one VM may have, whatever the ratio, in bytes (max_unit). 0: `memory`. */
    uint64_t memory_max_unit;
    /** A VM's memory is a multiple of it, in bytes (step_size). 0: 1. */
    uint64_t memory_step;
    /** Swap space that guests may be paged out to, in bytes. */
    uint64_t swap;
    /**
     * How long the host takes to react when memory gets short, in milliseconds: what guests have lately touched in
     * such a time must stay free beside a newcomer's guarantee.
     */
    uint64_t reaction_time;
    /** The numbers of the host's CPUs that are kept for VMs with dedicated vCPUs. NULL: none. */
    const uint32_t *dedicated_cpus;
    /** How many they are. */
    size_t dedicated_count;
} vmbed_host_options;

/** What the VMs of a host hold, what there is, and how much of it is really there. Sizes are in bytes. */
typedef struct {
    /** sizeof(struct vmbed_usage) */
    size_t size;
    /** The sum of the VMs' memory sizes, in bytes. */
    uint64_t memory;
    /** (total - reserved) x ratio, in bytes. */
    uint64_t memory_capacity;
    /** The sum of the VMs' vCPUs. */
    uint64_t vcpus;
    /** cores x ratio; UINT64_MAX where vCPUs are not limited. */
    uint64_t vcpu_capacity;
    /** vCPUs that have a core each. */
    uint64_t dedicated_vcpus;
    /** Cores that are kept for such. */
    uint64_t dedicated_cpus;
    /** Counts every change of the ledger, for vmbed_host_set_shares(). */
    uint64_t generation;
    /** How many VMs there are, or are being built. */
    uint64_t vms;
    /** total - reserved: what guarantees and overhead must fit into. */
    uint64_t memory_usable;
    /** Swap space that guests may be paged out to. */
    uint64_t swap;
    /** The sum of what guests can touch without anybody's consent. */
    uint64_t entitlement;
    /** The sum of what VMs will always have. */
    uint64_t guarantee;
    /** The sum of what VMs cost beside their memory, as the ledger's model has it. */
    uint64_t overhead;
    /** Guest memory that exists, resident or swapped out. */
    uint64_t backing;
    /** Guest memory that KVM has mapped for guests; 0 where its statistics say nothing. */
    uint64_t stage2;
    /** Guest memory that cannot be paged out. */
    uint64_t pinned;
    /** This process's own resident memory beside its guests'. */
    uint64_t process;
    /** What the kernel charges. */
    uint64_t charged;
    /**
     * What is charged less backing and process: kernel memory, files, other processes. Negative while guests are
     * swapped out, which nobody is charged for as memory.
     */
    int64_t unattributed;
    /** To whom it is charged, one of VMBED_CHARGED_BY_*. */
    int32_t charged_by;
    /** 0. */
    int32_t unused;
    /** The sum of what guests say that they have given up to their balloons: advisory, no promise depends on it. */
    uint64_t loaned;
} vmbed_usage;

/**
 * Looks at what VMs need of this machine, without building anything. `kvm` is the device's path, NULL for
 * `/dev/kvm`. The probe is yours to free. Does not block.
 */
int32_t vmbed_probe_new(const char *kvm, vmbed_probe **probe, vmbed_error **error);

/**
 * What was looked at, in the order in which it matters, from 0. NULL past the last, and for NULL. It belongs to the
 * probe.
 */
const char *vmbed_probe_what(const vmbed_probe *probe,
                             size_t index);

/**
 * Why the `index`th finding will not do; NULL where it will. VMs may be had all the same, where only a sandbox needs it:
 * vmbed_probe_is_usable() knows. It belongs to the probe.
 */
const char *vmbed_probe_problem(const vmbed_probe *probe,
                                size_t index);

/**
 * How to mend the `index`th finding; empty where there is nothing to mend. NULL past the last. It belongs to the
 * probe.
 */
const char *vmbed_probe_remedy(const vmbed_probe *probe,
                               size_t index);

/** Whether VMs can be built here: no finding is a problem, but perhaps for those that ask for a sandbox. Not for NULL. */
bool vmbed_probe_is_usable(const vmbed_probe *probe);

/** Frees a probe. NULL is a no-op. */
void vmbed_probe_free(vmbed_probe *probe);

/**
 * Opens a host, with `options` NULL for the defaults. It is yours to free. Does not block.
 *
 * VMBED_ERR_NOT_FOUND, VMBED_ERR_PERMISSION_DENIED or VMBED_ERR_UNSUPPORTED with the remedy that vmbed_probe_new()
 * finds; VMBED_ERR_INVALID_ARGUMENT with every bad field.
 */
int32_t vmbed_host_open(const vmbed_host_options *options,
                        vmbed_host **host,
                        vmbed_error **error);

/** Fills `usage`, whose size is set. Does not block. */
int32_t vmbed_host_usage(const vmbed_host *host, vmbed_usage *usage, vmbed_error **error);

/** Frees a host. Its VMs go on, and keep what they need of it. NULL is a no-op. */
void vmbed_host_free(vmbed_host *host);

/* What a VM is to be --------------------------------------------------------------------------------------- */

/** A bare guest starts in 16-bit real mode, segment bases 0; the entry must be below 64 KiB. */
#define VMBED_MODE_REAL 0

/** In 32-bit protected mode, flat segments, paging off; the entry must be below 4 GiB. */
#define VMBED_MODE_PROTECTED 1

/**
 * In 64-bit long mode, flat segments, the first 4 GiB identity-mapped with 2 MiB pages. The page tables occupy the
 * last 24 KiB of memory below 3 GiB.
 */
#define VMBED_MODE_LONG 2

/** The register EAX of the CPUID instruction. */
#define VMBED_CPUID_EAX 0

/** EBX. */
#define VMBED_CPUID_EBX 1

/** ECX. */
#define VMBED_CPUID_ECX 2

/** EDX. */
#define VMBED_CPUID_EDX 3

/** Local APICs, IOAPIC, PCI Express, hardware-reduced ACPI, serial port, clock, pvpanic. */
#define VMBED_PLATFORM_PC 0

/** vCPUs and memory only. HLT ends a vCPU, since nothing could wake it. */
#define VMBED_PLATFORM_BARE 1

/** A 16550 at 0x3f8, `console=ttyS0`: works from the first instruction on. */
#define VMBED_CONSOLE_SERIAL 0

/** virtio-console, `console=hvc0`: cheaper per byte, but needs the guest's driver. */
#define VMBED_CONSOLE_VIRTIO 1

/** The thread runs a vCPU. */
#define VMBED_THREAD_VCPU 0

/** The thread serves devices. */
#define VMBED_THREAD_DEVICE 1

/** The thread waits for the end of a VM whose vCPUs run on threads of yours. */
#define VMBED_THREAD_CONTROL 2

/**
 * The thread answers for the others, which are in a sandbox (vmbed_config_set_sandbox()), tells of what was refused, or hands their
 * records to your logger: it is outside.
 */
#define VMBED_THREAD_SUPERVISOR 3

/**
 * Takes a piece of a guest's console output, in order, on a device thread of that VM. The bytes are gone when it
 * returns. It must not wait for this VM.
 */
typedef void (*vmbed_console_fn)(void *user, const uint8_t *data, size_t length);

/**
 * Called on each thread of the library before it does anything else: the place to set its affinity, cgroup or
 * scheduler. `role` is one of VMBED_THREAD_*, `index` counts the VM's threads of one role (for a vCPU its index), `tid`
 * is the kernel's id.
 */
typedef void (*vmbed_thread_fn)(void *user, uint64_t vm_id, int32_t role, uint32_t index, int32_t tid);

/**
 * A PC that boots the Linux kernel at `kernel`, a bzImage or an ELF image with a PVH entry: 1 vCPU, 256 MiB, a serial
 * console, a random number generator. It is yours to free.
 */
int32_t vmbed_config_new_linux(const char *kernel,
                               vmbed_config **config,
                               vmbed_error **error);

/**
 * A bare guest: 1 vCPU, 2 MiB of memory, no device but yours. It starts in `mode`, one of VMBED_MODE_*, at the
 * guest-physical address `entry`, where `length` bytes of `code` are put; they are copied. Every vCPU starts there, with
 * its index in RDI. The configuration is yours to free.
 */
int32_t vmbed_config_new_bare(int32_t mode,
                              uint64_t entry,
                              const uint8_t *code,
                              size_t length,
                              vmbed_config **config,
                              vmbed_error **error);

/** Sets the VM's name, for messages and the guest's SMBIOS; at most 64 bytes. */
int32_t vmbed_config_set_name(vmbed_config *config, const char *name, vmbed_error **error);

/** Sets the VM's identity in SMBIOS: 16 bytes, most significant first. NULL: made up for each VM. */
int32_t vmbed_config_set_uuid(vmbed_config *config, const uint8_t *uuid, vmbed_error **error);

/** Sets the size of the guest's memory in bytes, a multiple of 4 KiB. */
int32_t vmbed_config_set_memory(vmbed_config *config, uint64_t bytes, vmbed_error **error);

/**
 * Sets the number of vCPUs, 1 to 254, and how the guest sees them: threads per core, 1 or 2, and sockets. They must
 * divide the number.
 */
int32_t vmbed_config_set_cpus(vmbed_config *config,
                              uint16_t count,
                              uint16_t threads_per_core,
                              uint16_t sockets,
                              vmbed_error **error);

/**
 * Changes bits of a CPUID register, one of VMBED_CPUID_*, over what KVM and vmbed offer:
 * `value = (value & ~clear) | set`. Setting what the processor lacks is your risk.
 */
int32_t vmbed_config_mask_cpuid(vmbed_config *config,
                                uint32_t leaf,
                                uint32_t subleaf,
                                int32_t register_,
                                uint32_t clear,
                                uint32_t set,
                                vmbed_error **error);

/**
 * Sets what surrounds the vCPUs, one of VMBED_PLATFORM_*. A Linux guest has VMBED_PLATFORM_PC and a bare one
 * VMBED_PLATFORM_BARE unless this says otherwise; Linux needs a PC.
 */
int32_t vmbed_config_set_platform(vmbed_config *config, int32_t platform, vmbed_error **error);

/** Sets what the guest's console is, one of VMBED_CONSOLE_*. */
int32_t vmbed_config_set_console(vmbed_config *config, int32_t console, vmbed_error **error);

/** Says whether the guest has a virtio-rng, fed from the host's getrandom(). */
int32_t vmbed_config_set_rng(vmbed_config *config, bool rng, vmbed_error **error);

/** Sets the path of a Linux guest's initial RAM disk; NULL for none. */
int32_t vmbed_config_set_initrd(vmbed_config *config, const char *initrd, vmbed_error **error);

/** Sets a Linux guest's command line; at most 2047 bytes. `console=ttyS0` (or `hvc0`) is yours to say. */
int32_t vmbed_config_set_cmdline(vmbed_config *config, const char *cmdline, vmbed_error **error);

/**
 * Lets a Linux guest's own decompressor run, which also randomizes the kernel's addresses. Off by default: vmbed
 * unpacks LZ4 images itself, which boots faster but at fixed addresses.
 */
int32_t vmbed_config_set_kaslr(vmbed_config *config,
                               bool kaslr,
                               vmbed_error **error);

/** Puts `length` more bytes of `data` into a bare guest's memory, at the guest-physical `address`. They are copied. */
int32_t vmbed_config_add_image(vmbed_config *config,
                               uint64_t address,
                               const uint8_t *data,
                               size_t length,
                               vmbed_error **error);

/** Sets a bare guest's stack pointer at the entry; 0 for none. vCPU n starts n * 4096 bytes below it. */
int32_t vmbed_config_set_stack(vmbed_config *config, uint64_t stack, vmbed_error **error);

/**
 * Checks everything that can be checked without opening anything; vmbed_builder_build() does so too. The error names
 * every bad field, with what would be right.
 */
int32_t vmbed_config_validate(const vmbed_config *config,
                              vmbed_error **error);

/** Frees a configuration. NULL is a no-op. */
void vmbed_config_free(vmbed_config *config);

/** A builder for a VM on `host` with a copy of `config`. It is yours to free; it keeps what it needs of both. */
int32_t vmbed_builder_new(const vmbed_host *host,
                          const vmbed_config *config,
                          vmbed_builder **builder,
                          vmbed_error **error);

/**
 * Attaches a device of your own to `length` ports from `port`; `name` is for messages and causes. The table is copied.
 * Its destroy function, where the table is good enough to name one, is called exactly once with `user`: after the VM has
 * been freed, or when this call or the build fails.
 */
int32_t vmbed_builder_add_pio(vmbed_builder *builder,
                              const char *name,
                              uint16_t port,
                              uint16_t length,
                              const vmbed_device_ops *ops,
                              void *user,
                              vmbed_error **error);

/**
 * Attaches a device of your own to `length` bytes of guest-physical addresses from `address`, where there is no
 * memory; otherwise as vmbed_builder_add_pio().
 */
int32_t vmbed_builder_add_mmio(vmbed_builder *builder,
                               const char *name,
                               uint64_t address,
                               uint64_t length,
                               const vmbed_device_ops *ops,
                               void *user,
                               vmbed_error **error);

/**
 * Reports what the guest writes to `length` ports from `port` as VMBED_EVENT_DOORBELL with this `name` in the VM's
 * events: how a guest calls for the thread that polls them, with data in its memory or in the value. The guest does not
 * wait for a reader. Reads find all-ones.
 */
int32_t vmbed_builder_add_pio_doorbell(vmbed_builder *builder,
                                       const char *name,
                                       uint16_t port,
                                       uint16_t length,
                                       vmbed_error **error);

/** The same for `length` bytes of guest-physical addresses from `address`, where there is no memory. */
int32_t vmbed_builder_add_mmio_doorbell(vmbed_builder *builder,
                                        const char *name,
                                        uint64_t address,
                                        uint64_t length,
                                        vmbed_error **error);

/** Sends the VM's events to a stream that it may share with others, instead of one of its own. */
int32_t vmbed_builder_set_events(vmbed_builder *builder, const vmbed_events *events, vmbed_error **error);

/**
 * Writes the guest's console to `fd`, which is duplicated: a file, pipe, terminal or socket. Its flags stay as they
 * are. When nobody takes the output, the oldest is dropped; the guest never waits for it.
 */
int32_t vmbed_builder_console_output(vmbed_builder *builder,
                                     int32_t fd,
                                     vmbed_error **error);

/** Reads the guest's console input from `fd`, which is duplicated. What the guest does not read stays there. */
int32_t vmbed_builder_console_input(vmbed_builder *builder, int32_t fd, vmbed_error **error);

/** Hands the guest's console output to `function` instead of an fd. `destroy` as for every callback. */
int32_t vmbed_builder_console_callback(vmbed_builder *builder,
                                       vmbed_console_fn function,
                                       void *user,
                                       vmbed_destroy_fn destroy,
                                       vmbed_error **error);

/** Has `function` called at the start of each thread of the VM. `destroy` as for every callback. */
int32_t vmbed_builder_on_thread_start(vmbed_builder *builder,
                                      vmbed_thread_fn function,
                                      void *user,
                                      vmbed_destroy_fn destroy,
                                      vmbed_error **error);

/**
 * Makes the VM: books its memory and vCPUs in the host's ledger, opens its disks and network interfaces, loads what it
 * boots. Nothing runs yet. It is yours to free; the builder is done, also where this fails. Blocks for milliseconds, most
 * of them for loading, or for as long as the host needs to read the files.
 *
 * VMBED_ERR_INVALID_ARGUMENT with every bad field; VMBED_ERR_REFUSED by the ledger; VMBED_ERR_NOT_FOUND,
 * VMBED_ERR_PERMISSION_DENIED, VMBED_ERR_BUSY or VMBED_ERR_BAD_IMAGE with the device or file at fault. Whatever had been
 * made is taken back.
 */
int32_t vmbed_builder_build(vmbed_builder *builder,
                            vmbed_vm **vm,
                            vmbed_error **error);

/** Frees a builder. The VM that it made goes on. NULL is a no-op. */
void vmbed_builder_free(vmbed_builder *builder);

/* What memory is made of ----------------------------------------------------------------------------------- */

/** A memfd, sealed against resizing: exact accounts at the cost of one system call. */
#define VMBED_BACKING_MEMFD 0

/**
 * Anonymous memory, of which the kernel makes huge pages by itself where it is set up so, and which it may merge.
 * Accounts cost a walk over page tables.
 */
#define VMBED_BACKING_ANONYMOUS 1

/**
 * Pages of 2 MiB from the pool that the host's administrator set aside (vm.nr_hugepages). They are never swapped, so the
 * ledger counts the whole VM as pinned; its memory is a multiple of 2 MiB. A balloon frees whole pages only; when the
 * guest takes one back that the pool has no more, its VM ends with VMBED_CAUSE_DEVICE_FAULT of `memory`.
 */
#define VMBED_BACKING_HUGE_2M 2

/** The same with pages of 1 GiB. */
#define VMBED_BACKING_HUGE_1G 3

/** Transparent huge pages for what the loader fills, and where a kernel boots; elsewhere as the host's kernel is set up. */
#define VMBED_HUGE_AUTO 0

/**
 * For all of it. Where the kernel makes huge pages of shared memory for nobody (shmem_enabled is "never"), that of a
 * memfd has them where it is prefaulted.
 */
#define VMBED_HUGE_ALWAYS 1

/** For none of it. */
#define VMBED_HUGE_NEVER 2

/** What a VM's memory is made of. All zeroes but the size are the defaults. */
typedef struct {
    /** sizeof(struct vmbed_backing) */
    size_t size;
    /** Where its pages come from, one of VMBED_BACKING_*. */
    int32_t kind;
    /** What to ask transparent huge pages for, one of VMBED_HUGE_*. */
    int32_t huge;
    /** Other than 0: all of the memory is there when the VM is built, made by several threads at once. */
    uint32_t prefault;
    /**
     * Other than 0: the kernel may merge pages of the same content (KSM), of anonymous memory only. It saves memory, and
     * lets a guest find out by time what others hold.
     */
    uint32_t mergeable;
    /** The host's NUMA nodes that the pages may come from, by their array, below 1024. NULL for any. */
    const uint32_t *numa_nodes;
    /** How many they are. */
    size_t numa_node_count;
} vmbed_backing;

/**
 * Says what the VM's memory is made of; a sealed memfd by default. What `backing` points to is copied.
 *
 * What the host has not got is an error of vmbed_builder_build(): VMBED_ERR_EXHAUSTED where the pool of huge pages is too
 * small, VMBED_ERR_INVALID_ARGUMENT for a NUMA node that there is not, VMBED_ERR_UNSUPPORTED for what its kernel lacks.
 */
int32_t vmbed_config_set_backing(vmbed_config *config,
                                 const vmbed_backing *backing,
                                 vmbed_error **error);

/* Disks ---------------------------------------------------------------------------------------------------- */

/** The bytes of the disk, one to one. */
#define VMBED_DISK_RAW 0

/** QEMU's format, version 2 or 3. Only where vmbed_has_feature("qcow2"). */
#define VMBED_DISK_QCOW2 1

/** Through the host's page cache; on stable storage when the guest flushes. */
#define VMBED_CACHE_WRITEBACK 0

/** Through the host's page cache; each write is on stable storage before it is answered, unless the guest chooses otherwise. */
#define VMBED_CACHE_WRITETHROUGH 1

/**
 * Past the host's page cache (O_DIRECT); on stable storage when the guest flushes. What is not aligned as the storage wants
 * it goes through the page cache all the same.
 */
#define VMBED_CACHE_DIRECT 2

/** Flushes are answered and not done: for data that nobody misses after a power cut. */
#define VMBED_CACHE_UNSAFE 3

/** io_uring where the host has it and allows it, else synchronous. */
#define VMBED_ENGINE_AUTO 0

/** One system call for each request, on the disk's thread, which waits for it. */
#define VMBED_ENGINE_SYNC 1

/** Many requests on their way at a time. VMBED_ERR_UNSUPPORTED by vmbed_builder_build() where the host does not allow it. */
#define VMBED_ENGINE_IO_URING 2

/** Elements of a histogram of latencies. */
#define VMBED_DISK_LATENCIES 24

/** How much may pass. Over any time t, at most the burst, the rate times t, and one more. */
typedef struct {
    /** Bytes a second; 0 for any number. */
    uint64_t bytes_per_second;
    /** Bytes at once after a rest. 0: a tenth of a second's. */
    uint64_t bytes_burst;
    /** Operations a second, which are requests of a disk, frames of a network; 0 for any number. */
    uint64_t ops_per_second;
    /** Operations at once after a rest. 0: a tenth of a second's. */
    uint64_t ops_burst;
} vmbed_rate;

/** A file that a qcow2 image is based on. */
typedef struct {
    /** Where it is. */
    const char *path;
    /** What it holds, VMBED_DISK_*. */
    int32_t format;
    /** Zero. */
    uint32_t reserved;
} vmbed_backing_file;

/** A virtio-blk disk. */
typedef struct {
    /** sizeof(struct vmbed_disk) */
    size_t size;
    /**
     * A regular file or a block device, a multiple of 512 bytes long. NULL where something is attached with
     * vmbed_builder_disk_fd() or vmbed_builder_disk_backend().
     */
    const char *path;
    /** At most 20 bytes of ASCII, the guest's /sys/block/vda/serial. NULL for none. */
    const char *serial;
    /** Where on the PCI bus, `00:03.0`. NULL: the first free place. */
    const char *pci;
    /** Other than 0: the guest may not write. */
    uint32_t readonly;
    /** Zero. */
    uint32_t reserved;
    /** What the file holds, VMBED_DISK_*: said by you, never guessed. */
    int32_t format;
    /** When a write is on stable storage, VMBED_CACHE_*. Not for a disk of code of yours. */
    int32_t cache;
    /** How data is moved, VMBED_ENGINE_*. Not for a disk of code of yours. */
    int32_t engine;
    /**
     * Queues that the guest may use at a time, each with a thread of its own: 1 to 16. 0 stands for 1, which is what code of
     * yours has.
     */
    uint32_t queues;
    /** Other than 0: the guest is told that the disk knows no discard. By default what it discards becomes free on the host. */
    uint32_t no_discard;
    /**
     * Other than 0: a file named by path is not locked. By default it is, as QEMU does it: a writer has it alone, readers
     * share it.
     */
    uint32_t no_lock;
    /** How much may be transferred, reads and writes together, over all queues. */
    vmbed_rate rate;
    /**
     * What a qcow2 image is based on, the nearest first. Only these are opened, whatever the image itself says, and one that says
     * that it is based on another is refused where that one does not stand here. NULL for none.
     */
    const vmbed_backing_file *backing;
    /** How many they are. */
    size_t backing_count;
    /**
     * Where the qcow2 image at path keeps its data, if not in itself. Only this file is opened, whatever the image says; an image
     * that keeps its data elsewhere is refused where this is NULL.
     */
    const char *data_file;
    /**
     * UTF-8 that opens the encrypted images among path and backing: each is tried with each, which takes the seconds that the image
     * wants it to take. Such images can only be read, also by a writable one on top, which is not encrypted itself. NULL for none.
     */
    const char *const *passphrases;
    /** How many they are. */
    size_t passphrase_count;
} vmbed_disk;

/** Hears how many bytes are behind, and how many there are in all; false ends it. */
typedef bool (*vmbed_progress_fn)(void *user, uint64_t behind, uint64_t all);

/** What a disk has done since the VM was built. A request counts when it is answered. */
typedef struct {
    /** sizeof(struct vmbed_disk_statistics) */
    size_t size;
    /** Reads that succeeded. */
    uint64_t reads;
    /** Their bytes. */
    uint64_t read_bytes;
    /** Writes that succeeded. */
    uint64_t writes;
    /** Their bytes. */
    uint64_t written_bytes;
    /** Flushes that succeeded. */
    uint64_t flushes;
    /** Requests that were answered with an error: the host failed, or what the driver asked for was nonsense. */
    uint64_t errors;
    /** Discards and zeroings that succeeded. */
    uint64_t discards;
    /** Their bytes. */
    uint64_t discarded_bytes;
    /**
     * How long requests took, from their parsing to their answer: element 0 counts those below 1 us, element i those of
     * 2^(i-1) to below 2^i us, the last one also all that took longer.
     */
    uint64_t latency[VMBED_DISK_LATENCIES];
} vmbed_disk_statistics;

/**
 * Adds a disk; the guest's drivers see them in this order, events call them `disk0`, `disk1`, ... What it points to
 * is copied.
 */
int32_t vmbed_config_add_disk(vmbed_config *config,
                              const vmbed_disk *disk,
                              vmbed_error **error);

/**
 * Makes an image for a disk of `bytes` bytes, a multiple of 512: sparse, all zeroes, or, in qcow2, a layer on `backing`, of which it
 * keeps the path as it stands here (QEMU takes it as relative to the image). With a backing file, 0 bytes stand for that one's.
 * NULL for no backing file. The image must not be there yet. Blocks for as long as the file system does.
 */
int32_t vmbed_disk_create(const char *path,
                          int32_t format,
                          uint64_t bytes,
                          const vmbed_backing_file *backing,
                          vmbed_error **error);

/**
 * Gives disk `index` another size, in bytes, a multiple of 512; its guest is told at once, also while requests are under way.
 * A file grows with it; one that is larger keeps its length, and what lies beyond. A block device must have grown before. A
 * disk of code of yours must have that size from now on. In every state; never blocks for long.
 * VMBED_ERR_INVALID_ARGUMENT where there is no such disk, or the size is none.
 */
int32_t vmbed_vm_resize_disk(const vmbed_vm *vm,
                             uint32_t index,
                             uint64_t bytes,
                             vmbed_error **error);

/**
 * Limits disk `index` from now on; NULL for no limit. In every state; never blocks.
 * VMBED_ERR_INVALID_ARGUMENT where there is no such disk.
 */
int32_t vmbed_vm_set_disk_rate(const vmbed_vm *vm,
                               uint32_t index,
                               const vmbed_rate *rate,
                               vmbed_error **error);

/**
 * Saves disk `index`, as it is at one instant, to a new image at `path`: standalone and sparse. A guest that runs is paused for that
 * instant, with no request on its way, as if its power were cut; from then on it runs while the image is made.
 * `progress`, which may be NULL, is called on this thread with `user`. `complete`, which may be NULL, is false where it was
 * ended; then, and where this fails, the image is gone. Blocks for as long as the disk's size takes.
 *
 * VMBED_ERR_UNSUPPORTED of a disk of code of yours, VMBED_ERR_BUSY while it is being saved already, VMBED_ERR_INVALID_STATE
 * where the VM is freed meanwhile. Where the VM cannot be resumed, it stays paused, and the error's text says so.
 */
int32_t vmbed_vm_save_disk(const vmbed_vm *vm,
                           uint32_t index,
                           const char *path,
                           int32_t format,
                           vmbed_progress_fn progress,
                           void *user,
                           bool *complete,
                           vmbed_error **error);

/**
 * Fills `statistics`, whose size is set, with what disk `index` has done. In every state; reads counters only.
 * VMBED_ERR_INVALID_ARGUMENT where there is no such disk.
 */
int32_t vmbed_vm_get_disk_statistics(const vmbed_vm *vm,
                                     uint32_t index,
                                     vmbed_disk_statistics *statistics,
                                     vmbed_error **error);

/* Disks of your own ---------------------------------------------------------------------------------------- */

/** The request goes on; vmbed_block_complete() ends it. */
#define VMBED_BLOCK_PENDING -1

/**
 * A piece of a guest's memory, laid out as POSIX's `struct iovec`, so that preadv(), pwritev() and the like take it. The
 * guest may change it at any moment: what was read once may read differently the next time.
 */
typedef struct {
    /** Where it is. */
    void *base;
    /** Its bytes. */
    size_t length;
} vmbed_piece;

/**
 * A request to a disk of yours. The structure is gone when the function that gets it returns; `pieces` and the memory
 * behind them stay until the request has ended, also when the VM has.
 */
typedef struct {
    /** The disk, for vmbed_block_complete(). */
    vmbed_block *disk;
    /** The name of the request, for vmbed_block_complete(): no other one has had it. */
    uint64_t tag;
    /** Where on the disk, in bytes, a multiple of 512. */
    uint64_t offset;
    /** How many bytes, a multiple of 512: all pieces together, where there are any. 0 for a flush. */
    uint64_t length;
    /** The guest's memory, to be filled or written out in this order. NULL where no data moves. */
    const vmbed_piece *pieces;
    /** How many pieces. */
    size_t count;
    /** Of a write or a zeroing: other than 0 where it must be on stable storage when it ends, since the driver has no way to flush. */
    uint32_t durable;
    /** Of a zeroing: other than 0 where what was there may be given back to the host. */
    uint32_t unmap;
} vmbed_block_request;

/**
 * A disk of your own. Its functions are called on a device thread of the VM's, one at a time for each disk, and must not
 * wait for this VM; they return 0 when they have done the request, an errno when it failed, or VMBED_BLOCK_PENDING when
 * vmbed_block_complete() will end it: later, in any order, from any thread, or already within the call. What comes lies
 * within the disk, and a read-only one gets no writes. There are at most 256 requests at a time and no order among
 * them: a flush is about the writes that had ended before it came.
 *
 * Until a request has ended its memory is yours, and the guest waits: also when its driver resets the device. Who pauses
 * the VM waits, too (VMBED_ERR_TIMED_OUT after 10 s). The end of the VM gives up on it after 5 s.
 */
typedef struct {
    /** sizeof(struct vmbed_block_ops) */
    size_t size;
    /** Fills the pieces. Not NULL. */
    int32_t (*read)(void *user, const vmbed_block_request *request);
    /** Writes the pieces out. NULL only for a disk that is read-only. */
    int32_t (*write)(void *user, const vmbed_block_request *request);
    /** Brings what was written to stable storage. NULL where writes are as durable as they will ever be. */
    int32_t (*flush)(void *user, const vmbed_block_request *request);
    /**
     * Ends the disk's data, see vmbed_destroy_fn. Requests may be pending then; they are still yours to complete, as to
     * nobody. May be NULL.
     */
    vmbed_destroy_fn destroy;
    /**
     * The guest no longer needs what is there, and takes whatever it reads from there afterwards. There are no pieces. NULL,
     * or `write_zeroes` NULL: the guest is told that the disk knows no such thing.
     */
    int32_t (*discard)(void *user, const vmbed_block_request *request);
    /** Makes it read as zeroes. There are no pieces. */
    int32_t (*write_zeroes)(void *user, const vmbed_block_request *request);
} vmbed_block_ops;

/**
 * Backs disk `index`, added without a path, by an open file or block device in raw format. `fd` is duplicated; it must be
 * open for reading, and unless the disk is read-only for writing (without O_APPEND), too. vmbed_builder_build() says
 * whether it is of that kind, and whether there is such a disk.
 */
int32_t vmbed_builder_disk_fd(vmbed_builder *builder,
                              uint32_t index,
                              int32_t fd,
                              vmbed_error **error);

/**
 * Backs disk `index`, added without a path, by code of yours. The disk is `capacity` bytes large, a multiple of 512. The
 * table is copied; its destroy function, where the table is good enough to name one, is called exactly once with `user`:
 * after the VM has been freed, or when this call or the build fails. vmbed_builder_build() says whether there is such a
 * disk.
 */
int32_t vmbed_builder_disk_backend(vmbed_builder *builder,
                                   uint32_t index,
                                   const vmbed_block_ops *ops,
                                   uint64_t capacity,
                                   bool readonly,
                                   void *user,
                                   vmbed_error **error);

/**
 * Ends the pending request `tag` of `disk`: well where `error_number` is 0, else with that errno, which the guest sees as an
 * I/O error and the VM's events as VMBED_EVENT_BACKEND_ERROR. From any thread; never blocks. Its pieces are not to be
 * touched any more.
 *
 * VMBED_ERR_INVALID_STATE where nobody waits for it any more: the VM has ended.
 * VMBED_ERR_INVALID_ARGUMENT where no such request is pending: it has ended before.
 */
int32_t vmbed_block_complete(vmbed_block *disk,
                             uint64_t tag,
                             int32_t error_number,
                             vmbed_error **error);

/* Network cards, and networks of your own ------------------------------------------------------------------ */

/** vmbed serves the card. */
#define VMBED_VHOST_OFF 0

/**
 * The host's kernel does (vhost-net) where `/dev/vhost-net` is there and may be opened, and the card is on a TAP interface;
 * vmbed_vm_get_net_statistics() says whether.
 */
#define VMBED_VHOST_IF_PRESENT 1

/** The same; the VM is not built where it cannot. */
#define VMBED_VHOST_REQUIRED 2

/** A frame's TCP or UDP checksum is to be completed: from the header's `csum_start` on. Without it, none of the others. */
#define VMBED_OFFLOAD_CSUM 1

/** A frame is to be cut into segments: TCP over IPv4. */
#define VMBED_OFFLOAD_TSO4 2

/** TCP over IPv6. */
#define VMBED_OFFLOAD_TSO6 4

/** TSO of connections with explicit congestion notification. */
#define VMBED_OFFLOAD_ECN 8

/** A frame is to be cut into UDP datagrams. */
#define VMBED_OFFLOAD_USO 16

/** A virtio-net card. */
typedef struct {
    /** sizeof(struct vmbed_net) */
    size_t size;
    /**
     * The name of an existing TAP interface, with a single queue or with several (see `queues`). NULL where something is attached with
     * vmbed_builder_net_fd() or vmbed_builder_net_backend().
     */
    const char *tap;
    /** The guest's MAC address, `52:54:00:12:34:56`. NULL: a stable one that follows from the VM's UUID. */
    const char *mac;
    /** Where on the PCI bus, `00:04.0`. NULL: the first free place. */
    const char *pci;
    /**
     * The largest packet that the guest's driver is to send, 68 to 65535 bytes, without the Ethernet header; its network's. 0: it
     * takes 1500.
     */
    uint32_t mtu;
    /** What the guest shows as the card's speed, in Mbit/s, full duplex; it limits nothing. 0: nothing. */
    uint32_t speed;
    /** Other than 0: the cable is not plugged in; vmbed_vm_set_link() changes it. */
    uint32_t link_down;
    /**
     * Pairs of queues, each with a thread of its own, 1 to 16: more than one for a TAP interface that was made so (`ip tuntap add ...
     * multi_queue`), or for as many descriptors of one, vmbed_builder_net_fd() for each. How many its guest uses is up to it. 0: 1.
     */
    uint32_t queues;
    /**
     * How much the guest may receive; operations are frames. vmbed_vm_set_net_rates() changes it. What is beyond it waits in the
     * network, and is dropped there when that is full.
     */
    vmbed_rate receive_rate;
    /** How much it may send; what is beyond it waits in the guest's queue. */
    vmbed_rate send_rate;
    /**
     * The path of the Unix socket of a network in user space that speaks the protocol of QEMU's `-netdev stream`, as passt does
     * (`passt --socket PATH`): it needs no privilege. It is looked for again when it goes away. Instead of `tap`; NULL: none.
     */
    const char *stream;
    /**
     * Whether the host's kernel carries the frames itself, between the guest's queues and a TAP interface, one of VMBED_VHOST_*. It
     * counts nothing and knows no addresses: statistics have only what it did not carry, and the guest gets whatever comes through
     * the interface. While there is something that it cannot do (a limit, a cable that is not plugged in), and after it has found a
     * queue malformed, vmbed serves the card as it serves others.
     */
    int32_t vhost;
    /** Zero. */
    uint32_t reserved;
} vmbed_net;

/**
 * A network of your own. A frame is one message: a header of 12 bytes (`struct virtio_net_hdr_v1`) and the frame from its
 * Ethernet header on, without its checksum; at most 65,557 bytes behind the header. A header says what is left to do on its
 * frame: nothing, so that it is all zero, but for the `offloads` that both sides know.
 *
 * The functions are called on a device thread of the VM's, one at a time for each card, and must not block. They return 0
 * or an errno. Where frames come from other threads, a pair of connected sockets does all of this:
 * vmbed_builder_net_fd().
 */
typedef struct {
    /** sizeof(struct vmbed_net_ops) */
    size_t size;
    /**
     * Puts the next frame with its header into the `count` pieces, which are long enough for the longest, and its length
     * into `length`. EAGAIN when there is none: then the descriptor is not readable before there is one. Another
     * errno: the network is gone; a second later it is called again. Not NULL.
     */
    int32_t (*receive)(void *user, const vmbed_piece *pieces, size_t count, size_t *length);
    /**
     * Sends the frame with its header that is in the `count` pieces, which are not to be written to. EAGAIN when there is
     * no room: the same frame comes again when the descriptor is writable. Another errno: this frame is lost. Not NULL.
     */
    int32_t (*send)(void *user, const vmbed_piece *pieces, size_t count);
    /** Ends the network's data, see vmbed_destroy_fn. May be NULL. */
    vmbed_destroy_fn destroy;
    /** VMBED_OFFLOAD_*: what it does itself on frames that a guest sends, and may leave to do on those for a guest. 0: nothing. */
    uint32_t offloads;
    /** Zero. */
    uint32_t reserved;
    /**
     * Says what of it the guest's driver takes: a frame for it that leaves anything else to do is dropped. Called when a driver begins,
     * before anything else, on the thread that has the device serve it: a vCPU's, yours within vmbed_vm_resume() and
     * vmbed_vm_change_net(), or one of the library's that has the VM go on, which was paused for want of memory. It must not call into
     * the VM. May be NULL.
     */
    void (*set_offloads)(void *user, uint32_t taken);
} vmbed_net_ops;

/**
 * What a card has carried since the VM was built. Bytes count from the Ethernet header on. What the host's kernel carries by itself
 * (vmbed_net.vhost) is not counted here, but at the TAP interface (`ip -s link`).
 */
typedef struct {
    /** sizeof(struct vmbed_net_statistics) */
    size_t size;
    /** Frames that the guest received. */
    uint64_t rx_frames;
    /** Their bytes. */
    uint64_t rx_bytes;
    /**
     * Frames for the guest that vmbed read and could not deliver: too short, too long for the guest's buffers. What the
     * guest gives no buffers for is dropped where it waits, and counted there (`ip -s link` for a TAP interface).
     */
    uint64_t rx_dropped;
    /** Frames that the guest sent. */
    uint64_t tx_frames;
    /** Their bytes. */
    uint64_t tx_bytes;
    /** Frames of the guest's that did not go out: malformed, or the network failed or was gone. */
    uint64_t tx_dropped;
    /** Frames that the guest's driver has said that it does not want: for other addresses or VLANs. */
    uint64_t rx_filtered;
    /** Pairs of queues that the host's kernel serves now; 0 while the VM is paused, and before its guest's driver has begun. */
    uint64_t vhost;
} vmbed_net_statistics;

/** Adds a card; events call them `net0`, `net1`, ... What it points to is copied. */
int32_t vmbed_config_add_net(vmbed_config *config, const vmbed_net *net, vmbed_error **error);

/**
 * Puts card `index`, added without a TAP interface, on an open descriptor, which is duplicated: one queue of a TAP
 * interface that somebody attached (TUNSETIFF with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; it becomes nonblocking), or a
 * connected Unix socket of the kind SOCK_SEQPACKET or SOCK_DGRAM, on which each message is a frame as vmbed_net_ops
 * describes it; or one of the kind SOCK_STREAM, with the protocol of vmbed_net.stream. When the other end of a SOCK_SEQPACKET or
 * SOCK_STREAM is closed, the network is gone. Called once for each of the card's
 * `queues`, with as many queues of one TAP interface. vmbed_builder_build() says whether it is one of these, and whether there is such a card.
 */
int32_t vmbed_builder_net_fd(vmbed_builder *builder,
                             uint32_t index,
                             int32_t fd,
                             vmbed_error **error);

/**
 * Plugs the cable of card `index` in or out; its guest is told. What is sent to or by a card without one is dropped, and
 * counted. In every state; never blocks. VMBED_ERR_INVALID_ARGUMENT where there is no such card.
 */
int32_t vmbed_vm_set_link(const vmbed_vm *vm,
                          uint32_t index,
                          bool up,
                          vmbed_error **error);

/**
 * Has the guest tell the network of card `index` where it is (gratuitous ARP and the like), as after a move to another port or
 * host: where its driver knows how (VIRTIO_NET_F_GUEST_ANNOUNCE). In every state; never blocks. VMBED_ERR_INVALID_ARGUMENT where there
 * is no such card.
 */
int32_t vmbed_vm_announce_net(const vmbed_vm *vm,
                              uint32_t index,
                              vmbed_error **error);

/**
 * Puts card `index` on another network while the guest runs, which notices nothing but what it finds there;
 * vmbed_vm_announce_net() has it say where it is now. Of `net`, `tap` and `stream` are looked at, one of which is set. A frame that
 * was read already is delivered; the network before is given up when this returns. In every state; waits for the frame that is
 * under way. Where it fails, the card stays where it is: VMBED_ERR_INVALID_ARGUMENT where there is no such card, or the network
 * does not know the offloads that the guest's driver was offered; VMBED_ERR_INVALID_STATE in a callback of the VM's; what opening
 * it finds wrong.
 */
int32_t vmbed_vm_change_net(const vmbed_vm *vm,
                            uint32_t index,
                            const vmbed_net *net,
                            vmbed_error **error);

/** The same, on an open descriptor, which is duplicated, as vmbed_builder_net_fd() has it. */
int32_t vmbed_vm_change_net_fd(const vmbed_vm *vm, uint32_t index, int32_t fd, vmbed_error **error);

/** The same, on a port of a switch, as vmbed_builder_net_port() has it. */
int32_t vmbed_vm_change_net_port(const vmbed_vm *vm,
                                 uint32_t index,
                                 const vmbed_port *port,
                                 vmbed_error **error);

/** The same, on a network of yours, as vmbed_builder_net_backend() has it. Its destroy function is called also where this fails. */
int32_t vmbed_vm_change_net_backend(const vmbed_vm *vm,
                                    uint32_t index,
                                    const vmbed_net_ops *ops,
                                    int32_t fd,
                                    void *user,
                                    vmbed_error **error);

/**
 * Limits what card `index` may receive and send from now on; NULL for no limit. In every state; never blocks.
 * VMBED_ERR_INVALID_ARGUMENT where there is no such card.
 */
int32_t vmbed_vm_set_net_rates(const vmbed_vm *vm,
                               uint32_t index,
                               const vmbed_rate *receive,
                               const vmbed_rate *send,
                               vmbed_error **error);

/**
 * Puts card `index`, added without a TAP interface, on a network of yours. `fd`, which is duplicated, polls readable while
 * a frame waits and writable while there is room: an eventfd will do. The table is copied; its destroy function as
 * for vmbed_builder_disk_backend(). vmbed_builder_build() says whether there is such a card.
 */
int32_t vmbed_builder_net_backend(vmbed_builder *builder,
                                  uint32_t index,
                                  const vmbed_net_ops *ops,
                                  int32_t fd,
                                  void *user,
                                  vmbed_error **error);

/**
 * Fills `statistics`, whose size is set, with what card `index` has carried. In every state; reads counters only.
 * VMBED_ERR_INVALID_ARGUMENT where there is no such card.
 */
int32_t vmbed_vm_get_net_statistics(const vmbed_vm *vm,
                                    uint32_t index,
                                    vmbed_net_statistics *statistics,
                                    vmbed_error **error);

/* A switch in your process --------------------------------------------------------------------------------- */

/** What a whole switch is told. All zeroes but the size are the defaults. */
typedef struct {
    /** sizeof(struct vmbed_switch_options) */
    size_t size;
    /** How many addresses are remembered, at most 1,048,576; each costs 48 bytes. 0: 8192. */
    uint32_t addresses;
    /** How many seconds an address is remembered that is not heard of. 0: 300. */
    uint32_t ageing;
} vmbed_switch_options;

/**
 * What one port is told. All zeroes but the size are the defaults: a port in VLAN 1, without tags. What it points to is
 * copied.
 */
typedef struct {
    /** sizeof(struct vmbed_port_options) */
    size_t size;
    /**
     * Without `trunk`: the one VLAN of the port, 1 to 4094, of which the station knows nothing; 0: VLAN 1. With it: the VLAN
     * of frames without a tag; 0 drops them.
     */
    uint32_t vlan;
    /** How many VLANs `trunk` has. */
    uint32_t trunk_length;
    /** The VLANs that have tags here, each 1 to 4094. NULL: an access port, on which no frame has a tag. */
    const uint32_t *trunk;
    /** Other than 0: reaches ports that are not isolated, and not the others that are. */
    uint32_t isolated;
    /** Other than 0: frames to addresses that nobody has been heard from do not go here. Broadcasts and multicasts do. */
    uint32_t no_unknown_unicast;
    /** How many addresses behind this port are remembered. Further ones still send and receive. 0: 1024. */
    uint32_t max_addresses;
    /** Other than 0: a guarded station may say that it is a router (advertisements and redirects of IPv6). */
    uint32_t guard_router;
    /**
     * Who the station may claim to be: its MAC addresses, with spaces between them. NULL: anybody. Nobody else on the
     * switch may use them, but ports that list them too.
     */
    const char *guard_macs;
    /**
     * Its IP addresses of both families, with spaces between them: `192.0.2.7 2001:db8::/64`. NULL: any. The link-local ones
     * that follow from `guard_macs` belong to them. What a station says before it has an address passes.
     */
    const char *guard_addresses;
    /** How much the station may send. More is dropped. */
    vmbed_rate rate_in;
    /** How much goes to the station. More is dropped. */
    vmbed_rate rate_out;
    /**
     * How much the station may send of what goes to many: broadcasts, multicasts and unknown addresses. All zeroes: 10,000
     * frames a second in bursts of 2,000; for no limit, UINT64_MAX frames a second.
     */
    vmbed_rate storm;
} vmbed_port_options;

/**
 * A switch without ports; `options` may be NULL. It is yours to free. It has no thread before it has an uplink or a capture.
 * VMBED_ERR_INVALID_ARGUMENT with every bad option.
 */
int32_t vmbed_switch_new(const vmbed_switch_options *options,
                         vmbed_switch **new_switch,
                         vmbed_error **error);

/**
 * Frees this end of a switch. VMs on it go on reaching each other; its uplinks and captures end with the last handle of
 * the switch, of its ports and of its captures. NULL is a no-op.
 */
void vmbed_switch_free(vmbed_switch *old_switch);

/**
 * Adds a port with nothing on it. `name` is for errors, captures and people; `options` may be NULL. The handle is yours to
 * free, which leaves the port there.
 *
 * VMBED_ERR_INVALID_ARGUMENT with every bad option; VMBED_ERR_EXHAUSTED beyond 1024 ports, or where the process has no file
 * descriptor left.
 */
int32_t vmbed_switch_add_port(vmbed_switch *on_switch,
                              const char *name,
                              const vmbed_port_options *options,
                              vmbed_port **port,
                              vmbed_error **error);

/**
 * Adds a port with a TAP interface of the host's on it, which must exist, have a single queue and be in nobody else's use.
 * Frames to it keep their segmentation and checksum offloads, as far as the host's kernel knows them, which does them then; frames
 * from it come with theirs, which the switch does for whom does not. One thread, `vmbed-switch`, serves all uplinks of a switch. An
 * interface that goes away is looked for once a second; meanwhile, and while it is down, frames to it are counted at the port
 * (VMBED_DROP_UPLINK). There is no event, since a switch is no VM's: only a line in the log when it goes away.
 *
 * As for vmbed_switch_add_port(); VMBED_ERR_NOT_FOUND, VMBED_ERR_BUSY or VMBED_ERR_PERMISSION_DENIED for the interface.
 */
int32_t vmbed_switch_add_tap(vmbed_switch *on_switch,
                             const char *name,
                             const char *tap,
                             const vmbed_port_options *options,
                             vmbed_port **port,
                             vmbed_error **error);

/**
 * Adds a port with a network in user space on it, which listens on the Unix socket `path` and speaks the protocol of QEMU's `-netdev
 * stream`, as passt does: a way out that needs no privilege. It is looked for once a second where it goes away. Frames to it are complete,
 * with their checksums, and no longer than its stations' MTU.
 *
 * As for vmbed_switch_add_port(); VMBED_ERR_NOT_FOUND or what else the host says where nobody listens there.
 */
int32_t vmbed_switch_add_stream(vmbed_switch *on_switch,
                                const char *name,
                                const char *path,
                                const vmbed_port_options *options,
                                vmbed_port **port,
                                vmbed_error **error);

/**
 * Adds a port with what is behind a descriptor on it, which is duplicated: a connected Unix socket of the kind SOCK_SEQPACKET or SOCK_DGRAM,
 * on which each message is a frame as vmbed_net_ops describes it; one of the kind SOCK_STREAM, as vmbed_switch_add_stream() has it; or
 * a queue of a TAP interface that somebody attached. Frames to a socket are complete, with their checksums.
 *
 * As for vmbed_switch_add_port(); VMBED_ERR_INVALID_ARGUMENT where it is none of these.
 */
int32_t vmbed_switch_add_fd(vmbed_switch *on_switch,
                            const char *name,
                            int32_t fd,
                            const vmbed_port_options *options,
                            vmbed_port **port,
                            vmbed_error **error);

/**
 * Puts card `index`, added without a TAP interface, on a port of a switch. The port is free again when the VM is freed.
 * vmbed_builder_build() says whether there is such a card, and answers VMBED_ERR_BUSY where the port is in use,
 * VMBED_ERR_NOT_FOUND where it was removed.
 */
int32_t vmbed_builder_net_port(vmbed_builder *builder,
                               uint32_t index,
                               const vmbed_port *port,
                               vmbed_error **error);

/** The name that a port was given. It belongs to the handle. NULL for NULL. */
const char *vmbed_port_name(const vmbed_port *port);

/**
 * Tells a port something else, from the next frame on; NULL for the defaults. The addresses behind it are forgotten; what
 * its limits have used up stays so.
 *
 * VMBED_ERR_INVALID_ARGUMENT with every bad option; VMBED_ERR_NOT_FOUND where it was removed.
 */
int32_t vmbed_port_set_options(vmbed_port *port,
                               const vmbed_port_options *options,
                               vmbed_error **error);

/**
 * Copies what comes in and goes out at `port` to `monitor` as well, as it is seen here; NULL ends that. A port to which
 * others are mirrored gets nothing else, and what its station sends is dropped.
 *
 * VMBED_ERR_INVALID_ARGUMENT for itself or a port of another switch; VMBED_ERR_INVALID_STATE where `monitor` is mirrored to a
 * third, or others are mirrored to this one; VMBED_ERR_NOT_FOUND where one of them was removed.
 */
int32_t vmbed_port_mirror_to(vmbed_port *port,
                             const vmbed_port *monitor,
                             vmbed_error **error);

/**
 * Takes a port away from its switch. A VM that is on it has a card without a cable from then on; an uplink is closed, for
 * which this waits. The second time it does nothing. The handle is still yours to free.
 */
int32_t vmbed_port_remove(vmbed_port *port,
                          vmbed_error **error);

/** Frees this end of a port; the port stays. NULL is a no-op. */
void vmbed_port_free(vmbed_port *port);

/**
 * Writes what passes through the `count` ports (through all that there are, where it is 0) to `fd`, which is duplicated, as a
 * pcapng file that Wireshark opens: each frame once for each of the ports that it comes in or goes out of, as it is seen
 * there. Frames that left segmentation or a checksum to others are in it as they were. A thread, `vmbed-capture`, does
 * the writing; what comes faster is counted and left out, forwarding never waits. The handle is yours to free.
 *
 * VMBED_ERR_INVALID_ARGUMENT for a port of another switch; what the host says where the beginning cannot be written.
 */
int32_t vmbed_switch_capture(vmbed_switch *on_switch,
                             const vmbed_port *const *ports,
                             size_t count,
                             int32_t fd,
                             vmbed_capture **capture,
                             vmbed_error **error);

/**
 * Ends a capture: what has passed until now is in the file when this returns. Blocks as long as writing does. `written` and
 * `missed`, each of which may be NULL, are set to how many frames were written, and how many came faster than that. The
 * handle is still yours to free.
 *
 * What the first failed write said, after which nothing was written; VMBED_ERR_INVALID_STATE the second time.
 */
int32_t vmbed_capture_finish(vmbed_capture *capture,
                             uint64_t *written,
                             uint64_t *missed,
                             vmbed_error **error);

/** Frees a capture, which ends it as vmbed_capture_finish() does. NULL is a no-op. */
void vmbed_capture_free(vmbed_capture *capture);

/* What its ports carry ------------------------------------------------------------------------------------- */

/** How many reasons there are for a frame to be dropped. */
#define VMBED_DROP_REASONS 26

/** The frame ends before its headers do. */
#define VMBED_DROP_RUNT 0

/** The frame is longer than an IP packet of 64 KiB with two tags. */
#define VMBED_DROP_TOO_LONG 1

/** What its vnet header asks for cannot be done on it. */
#define VMBED_DROP_BAD_OFFLOAD 2

/** Its source is no station: a multicast address, or zero. */
#define VMBED_DROP_BAD_SOURCE 3

/** The frame is for the other end of the cable only: spanning trees, pause frames, LLDP. */
#define VMBED_DROP_LINK_LOCAL 4

/** Its tag names VLAN 4095, or is no 802.1Q tag. */
#define VMBED_DROP_BAD_TAG 5

/** A second tag, where one would come to the front or hide what a guard has to see. */
#define VMBED_DROP_NESTED_TAG 6

/** Its VLAN is not carried by the port that it came from; on an access port, it has a tag at all. */
#define VMBED_DROP_FOREIGN_VLAN 7

/** Its source is not a MAC address of this port's guard. */
#define VMBED_DROP_SPOOFED_MAC 8

/** Its source is not an IPv4 address of this port's guard, or there is none to be seen. */
#define VMBED_DROP_SPOOFED_IPV4 9

/** Its source is not an IPv6 address of this port's guard, or there is none to be seen. */
#define VMBED_DROP_SPOOFED_IPV6 10

/** ARP or RARP in another's name, or malformed. */
#define VMBED_DROP_SPOOFED_ARP 11

/** Neighbour discovery in another's name, or malformed. */
#define VMBED_DROP_SPOOFED_NEIGHBOUR 12

/** The frame says that its sender is a router, and must not. */
#define VMBED_DROP_SPOOFED_ROUTER 13

/** Its source belongs to another port, by that port's guard. */
#define VMBED_DROP_FOREIGN_MAC 14

/** Beyond its `rate_in`. */
#define VMBED_DROP_RATE_IN 15

/** Beyond its `storm`. */
#define VMBED_DROP_STORM 16

/** Whom it is for is where it came from. */
#define VMBED_DROP_SAME_PORT 17

/** Both ports are isolated. */
#define VMBED_DROP_ISOLATED 18

/** There is no port that it could go to. */
#define VMBED_DROP_NOWHERE 19

/** The frame came from a port to which others are mirrored. */
#define VMBED_DROP_MONITOR 20

/** The frame came from a port that was removed. */
#define VMBED_DROP_REMOVED 21

/** To this port, beyond its `rate_out`. */
#define VMBED_DROP_RATE_OUT 22

/** To this port, whose station takes them too slowly. */
#define VMBED_DROP_QUEUE_FULL 23

/** To this port, where a second tag would have come to the front. */
#define VMBED_DROP_HIDDEN_TAG 24

/** To this port, whose interface of the host's did not take it, or is gone. */
#define VMBED_DROP_UPLINK 25

/**
 * What a port has carried since it was added. Bytes are from the Ethernet header on; one of several segments that were not
 * cut counts once.
 */
typedef struct {
    /** sizeof(struct vmbed_port_statistics) */
    size_t size;
    /** Frames that its station has sent, also those that were dropped. */
    uint64_t received_frames;
    /** Their bytes. */
    uint64_t received_bytes;
    /** Frames that were put into its queue for its station. */
    uint64_t sent_frames;
    /** Their bytes. */
    uint64_t sent_bytes;
    /** Frames that were copied to it because other ports are mirrored to it; not counted as sent. */
    uint64_t mirrored_frames;
    /** Their bytes. */
    uint64_t mirrored_bytes;
    /**
     * Addresses that were not remembered, since the port has `max_addresses` already or the table is full there: once for
     * each frame from one of them.
     */
    uint64_t unlearned;
    /** Addresses that were another port's before. */
    uint64_t moved;
    /** Addresses remembered now. */
    uint64_t addresses;
    /** Frames that were dropped, by VMBED_DROP_*. */
    uint64_t dropped[26];
} vmbed_port_statistics;

/** Fills `statistics`, whose size is set. Also of a port that was removed. */
int32_t vmbed_port_get_statistics(const vmbed_port *port,
                                  vmbed_port_statistics *statistics,
                                  vmbed_error **error);

/** A short, stable name of a reason, one of VMBED_DROP_*, for metrics: `spoofed-mac`. NULL for another number. Static. */
const char *vmbed_drop_name(uint32_t reason);

/* Bridges and TAP interfaces of the host ------------------------------------------------------------------- */

/** A bridge that is to be made. All zeroes but the size: without VLANs, and whatever else the kernel does by default. */
typedef struct {
    /** sizeof(struct vmbed_bridge_options) */
    size_t size;
    /** Its own address, `02:00:00:00:00:01`. NULL: that of one of its ports, and another when that one goes. */
    const char *mac;
    /** Other than 0: it tells VLANs apart (802.1Q); each port is in VLAN 1 until it is told another. */
    uint32_t vlan_filtering;
    /** Bytes of a packet without its Ethernet header. 0: 1500, or what its smallest port has. */
    uint32_t mtu;
} vmbed_bridge_options;

/** A TAP interface that is to be made. All zeroes but the size: on no bridge, with one queue, for who has CAP_NET_ADMIN. */
typedef struct {
    /** sizeof(struct vmbed_tap_options) */
    size_t size;
    /** The bridge that it is put on. NULL: none. */
    const char *bridge;
    /** The host's address on it, of no concern to the guest. NULL: made up by the kernel. */
    const char *mac;
    /** The VLANs that have tags on it, each 1 to 4094. NULL: an access port. */
    const uint32_t *trunk;
    /** How many VLANs `trunk` has. */
    uint32_t trunk_length;
    /**
     * Without `trunk`: the one VLAN that it is in, 1 to 4094; 0: what the bridge gives to every port, VLAN 1. With it: the VLAN of
     * frames without a tag; 0 drops them.
     */
    uint32_t vlan;
    /** Other than 0: it can have several queues, and is for cards that have (vmbed_net.queues). */
    uint32_t multi_queue;
    /**
     * Other than 0: it stays when the wiring is released. 0: it is deleted then, or by vmbed_wiring_free(). To the kernel all of them are
     * persistent (TUNSETPERSIST), since a card attaches to it later: it stays when the process is killed, as a bridge does.
     */
    uint32_t persistent;
    /** The user who may open it without any capability, by number. 0: nobody. */
    uint32_t owner;
    /** A group whose members may, by number. 0: none. */
    uint32_t group;
    /** Bytes of a packet without its Ethernet header. 0: its bridge's, or 1500. */
    uint32_t mtu;
    /** Zero. */
    uint32_t reserved;
} vmbed_tap_options;

/** Nothing done yet. It is yours to free. VMBED_ERR_UNSUPPORTED, or what else the kernel says, where it has no rtnetlink for us. */
int32_t vmbed_wiring_new(vmbed_wiring **wiring,
                         vmbed_error **error);

/** Undoes everything; it can be used again. VMBED_ERR_* of the first thing that could not be undone; the others were. */
int32_t vmbed_wiring_release(vmbed_wiring *wiring,
                             vmbed_error **error);

/** The same, where nobody wants to know; and it is gone. NULL is a no-op. */
void vmbed_wiring_free(vmbed_wiring *wiring);

/**
 * Makes a bridge, and sets it up; `options` may be NULL.
 *
 * VMBED_ERR_BUSY where there is an interface of that name; VMBED_ERR_UNSUPPORTED where the kernel has no bridges, or none that tell VLANs
 * apart.
 */
int32_t vmbed_wiring_add_bridge(vmbed_wiring *wiring,
                                const char *name,
                                const vmbed_bridge_options *options,
                                vmbed_error **error);

/**
 * Makes a TAP interface, which a card of a VM's can be on (vmbed_net.tap), puts it on a bridge if so told, and sets it up; `options` may
 * be NULL. As vmbed_wiring_add_bridge() and vmbed_wiring_set_vlans().
 */
int32_t vmbed_wiring_add_tap(vmbed_wiring *wiring,
                             const char *name,
                             const vmbed_tap_options *options,
                             vmbed_error **error);

/**
 * Makes an interface that carries VLAN `vlan`, 1 to 4094, of another one, and sets it up. As vmbed_wiring_add_bridge();
 * VMBED_ERR_NOT_FOUND for the other one.
 */
int32_t vmbed_wiring_add_vlan(vmbed_wiring *wiring,
                              const char *name,
                              const char *of,
                              uint32_t vlan,
                              vmbed_error **error);

/** Deletes an interface that this made. VMBED_ERR_INVALID_ARGUMENT where it is none of them. */
int32_t vmbed_wiring_remove(vmbed_wiring *wiring, const char *name, vmbed_error **error);

/**
 * Makes an interface a port of a bridge. VMBED_ERR_INVALID_STATE where it is one of another bridge: detach it first;
 * VMBED_ERR_NOT_FOUND; VMBED_ERR_INVALID_ARGUMENT where that is no bridge.
 */
int32_t vmbed_wiring_attach(vmbed_wiring *wiring,
                            const char *port,
                            const char *bridge,
                            vmbed_error **error);

/**
 * Takes a port from its bridge; nothing where it is on none. When that is undone, it has its settings there again (cost, priority,
 * flooding, isolation and the like), its VLANs, and the addresses that somebody has put behind it for good (`bridge fdb`); not
 * static groups (`bridge mdb`), settings of single VLANs and tunnels (`bridge vlan set`), and what the bridge had learned.
 */
int32_t vmbed_wiring_detach(vmbed_wiring *wiring,
                            const char *port,
                            vmbed_error **error);

/**
 * Says which VLANs a port of a bridge is in, or the bridge itself: as the host's own interface on it. With `trunk` NULL, and
 * `trunk_length` 0: in `vlan` alone, 1 to 4094, without a tag. Otherwise in those with tags, and in `vlan` without one; 0: in none.
 *
 * VMBED_ERR_INVALID_STATE where it is on no bridge, or on one that does not tell VLANs apart.
 */
int32_t vmbed_wiring_set_vlans(vmbed_wiring *wiring,
                               const char *port,
                               uint32_t vlan,
                               const uint32_t *trunk,
                               size_t trunk_length,
                               vmbed_error **error);

/**
 * Sets an interface up or down. One that is set down loses its routes and IPv6 addresses. When that is undone, it has again what
 * somebody gave it of them; what routers advertise they say again. What does not come back: next hop objects and the routes
 * through them, addresses with a lifetime, permanent neighbours, and the routes and IPv6 addresses of VLAN interfaces on it.
 */
int32_t vmbed_wiring_set_up(vmbed_wiring *wiring,
                            const char *name,
                            bool up,
                            vmbed_error **error);

/**
 * Sets the largest packet that an interface carries, in bytes without the Ethernet header. VMBED_ERR_INVALID_ARGUMENT where it
 * cannot. Below 1280 bytes there is no IPv6: its addresses and routes are lost, and come back as in vmbed_wiring_set_up(); its own
 * `net.ipv6.conf` do not.
 */
int32_t vmbed_wiring_set_mtu(vmbed_wiring *wiring,
                             const char *name,
                             uint32_t mtu,
                             vmbed_error **error);

/** Sets an interface's own address, `02:00:00:00:00:01`. Some cards want to be down for it. */
int32_t vmbed_wiring_set_mac(vmbed_wiring *wiring, const char *name, const char *mac, vmbed_error **error);

/* A VM's life ---------------------------------------------------------------------------------------------- */

/** Built, and nothing has run. */
#define VMBED_STATE_BUILT 1

/** The guest runs. */
#define VMBED_STATE_RUNNING 2

/** The guest, its clocks and its devices stand still. */
#define VMBED_STATE_PAUSED 3

/** The guest has ended; vmbed_vm_wait() says why. */
#define VMBED_STATE_STOPPED 4

/** The general registers of a vCPU. */
typedef struct {
    /** sizeof(struct vmbed_registers) */
    size_t size;
    uint64_t rax;
    uint64_t rbx;
    uint64_t rcx;
    uint64_t rdx;
    uint64_t rsi;
    uint64_t rdi;
    uint64_t rsp;
    uint64_t rbp;
    uint64_t r8;
    uint64_t r9;
    uint64_t r10;
    uint64_t r11;
    uint64_t r12;
    uint64_t r13;
    uint64_t r14;
    uint64_t r15;
    uint64_t rip;
    uint64_t rflags;
} vmbed_registers;

/** A number that no other VM of this process has had; events carry it. 0 for NULL. */
uint64_t vmbed_vm_id(const vmbed_vm *vm);

/** Where the VM is in its life, one of VMBED_STATE_*; 0 for NULL. Does not block. */
int32_t vmbed_vm_state(const vmbed_vm *vm);

/** Lets the vCPUs run. Does not block. VMBED_ERR_INVALID_STATE unless the VM has just been built. */
int32_t vmbed_vm_start(vmbed_vm *vm, vmbed_error **error);

/**
 * Stops the guest's time: every vCPU, every device, every clock. Returns when all stand still, usually within a
 * millisecond; a request that a device has begun is finished first, however long the host takes for it.
 *
 * VMBED_ERR_INVALID_STATE unless it runs. VMBED_ERR_TIMED_OUT after 10 s when a device or a disk of yours does not
 * answer: then the VM goes on running.
 */
int32_t vmbed_vm_pause(vmbed_vm *vm,
                       vmbed_error **error);

/**
 * Lets a paused guest go on. Its clocks go on from where they stood. Does not block. VMBED_ERR_INVALID_STATE unless it
 * is paused.
 */
int32_t vmbed_vm_resume(vmbed_vm *vm,
                        vmbed_error **error);

/**
 * Presses the power button. Does not block; a guest that listens to it ends with VMBED_CAUSE_GUEST_POWEROFF in its own
 * time, another does nothing. VMBED_ERR_INVALID_STATE unless it runs; VMBED_ERR_UNSUPPORTED for a bare guest.
 */
int32_t vmbed_vm_shutdown(vmbed_vm *vm,
                          vmbed_error **error);

/**
 * Ends the guest now, as pulling the plug would: what it had not flushed is lost. `cause`, where it is not NULL, is set
 * to VMBED_CAUSE_HOST_STOP or to what came before. VMBED_ERR_TIMED_OUT after 10 s when something of the host's hangs (a
 * disk, a device of yours); the end stays requested.
 */
int32_t vmbed_vm_stop(vmbed_vm *vm,
                      int32_t *cause,
                      vmbed_error **error);

/**
 * Asks for the end; for callbacks. Does not block: VMBED_EVENT_STOPPED tells when it is done. Does nothing when the VM
 * has ended.
 */
int32_t vmbed_vm_request_stop(vmbed_vm *vm,
                              vmbed_error **error);

/**
 * Waits at most `timeout` milliseconds until the guest has ended; for ever where that is negative. `cause`, where it is
 * not NULL, is set to one of VMBED_CAUSE_*. VMBED_ERR_TIMED_OUT where it has not ended by then.
 */
int32_t vmbed_vm_wait(const vmbed_vm *vm,
                      int64_t timeout,
                      int32_t *cause,
                      vmbed_error **error);

/** Sets `events` to the VM's stream. That handle is yours to free; it works after the VM was freed, too. */
int32_t vmbed_vm_events(const vmbed_vm *vm, vmbed_events **events, vmbed_error **error);

/**
 * Copies the last that the guest wrote to its console into `data`: at most `room` bytes, of the 64 KiB that are kept.
 * `length` is set to how many. Does not block.
 */
int32_t vmbed_vm_console_tail(const vmbed_vm *vm,
                              uint8_t *data,
                              size_t room,
                              size_t *length,
                              vmbed_error **error);

/**
 * Types `length` bytes of `data` on the guest's console. `taken`, where it is not NULL, is set to how many were taken:
 * what the guest has not read yet is bounded (4 KiB), the rest may be offered again. Does not block.
 */
int32_t vmbed_vm_console_input(vmbed_vm *vm,
                               const uint8_t *data,
                               size_t length,
                               size_t *taken,
                               vmbed_error **error);

/** The size of the guest's memory in bytes; 0 for NULL. */
uint64_t vmbed_vm_memory_size(const vmbed_vm *vm);

/**
 * When the guest first reached for a device outside of it, a port or an address without memory: nanoseconds of
 * CLOCK_MONOTONIC. 0 until then, and where there is no VM. In every state.
 */
uint64_t vmbed_vm_first_exit(const vmbed_vm *vm);

/**
 * Copies `length` bytes of guest memory from the guest-physical `address` into `data`. The guest may change them
 * meanwhile. Works in every state, and waits for nothing but the host's paging. VMBED_ERR_INVALID_ARGUMENT where the range
 * is not all guest memory.
 */
int32_t vmbed_vm_read_memory(const vmbed_vm *vm,
                             uint64_t address,
                             uint8_t *data,
                             size_t length,
                             vmbed_error **error);

/**
 * Copies `length` bytes of `data` into guest memory, as vmbed_vm_read_memory() does out of it. Where it fails, none is
 * written.
 */
int32_t vmbed_vm_write_memory(vmbed_vm *vm,
                              uint64_t address,
                              const uint8_t *data,
                              size_t length,
                              vmbed_error **error);

/**
 * Fills `registers`, whose size is set, with those of vCPU `vcpu`. Waits for a pause or resume in progress, for nothing
 * else. VMBED_ERR_INVALID_STATE while the VM runs; VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU.
 */
int32_t vmbed_vm_get_registers(const vmbed_vm *vm,
                               uint32_t vcpu,
                               vmbed_registers *registers,
                               vmbed_error **error);

/** Sets the general registers of vCPU `vcpu`, all of them. Waits and fails as vmbed_vm_get_registers() does. */
int32_t vmbed_vm_set_registers(vmbed_vm *vm,
                               uint32_t vcpu,
                               const vmbed_registers *registers,
                               vmbed_error **error);

/**
 * Ends everything: the guest, every thread, every file descriptor, its memory. When it returns, no callback of this VM
 * runs or will ever run, and their data were destroyed. Called by one of the VM's own callbacks, it returns at once, and
 * does the same right after the callback has returned. Waits as long as a request that hangs in the host or in a callback.
 * A second call for the same VM, from another thread while the first one waits, returns at once. NULL is a no-op.
 */
void vmbed_vm_free(vmbed_vm *vm);

/* Loops and threads of your own ---------------------------------------------------------------------------- */

/** The vCPU will not run any more: the VM has ended, or this vCPU of a bare guest has halted. */
#define VMBED_VCPU_ENDED 1

/**
 * vmbed_vcpu_interrupt() was called, or a signal was delivered to the thread. The guest goes on where it was when the
 * vCPU is run again.
 */
#define VMBED_VCPU_INTERRUPTED 2

/**
 * Sets `dispatcher` to a new one, without VMs. It is yours to free. VMBED_ERR_EXHAUSTED where the process has no file
 * descriptor left.
 */
int32_t vmbed_dispatcher_new(vmbed_dispatcher **dispatcher,
                             vmbed_error **error);

/**
 * The fd to poll for reading; it stays readable while there is work. For poll() and the like only: it belongs to the
 * dispatcher, and closes with the last of its VMs and handles. -1 for NULL.
 */
int32_t vmbed_dispatcher_fd(const vmbed_dispatcher *dispatcher);

/**
 * Serves what is ready, and returns; callbacks of the VMs on it run within. Does not wait for anything to become
 * ready; for another thread only that dispatches, or while it stops a device. After VMBED_EVENT_STOPPED, one more call
 * takes the guest's last words to its console. VMBED_ERR_INVALID_STATE where a callback calls.
 */
int32_t vmbed_dispatcher_dispatch(vmbed_dispatcher *dispatcher,
                                  vmbed_error **error);

/** Frees this handle; VMs on the dispatcher go on, and are not served any more. NULL is a no-op. */
void vmbed_dispatcher_free(vmbed_dispatcher *dispatcher);

/**
 * Serves the VM's console, network cards and random number generator on the dispatcher, instead of starting a thread for
 * them. Disks keep their threads, since their requests wait for the host.
 */
int32_t vmbed_builder_set_dispatcher(vmbed_builder *builder,
                                     const vmbed_dispatcher *dispatcher,
                                     vmbed_error **error);

/**
 * Leaves the vCPUs to threads of yours, which call vmbed_vcpu_run(), instead of starting a thread for each. One thread
 * of the library's, VMBED_THREAD_CONTROL, then waits for the VM's end.
 */
int32_t vmbed_builder_caller_vcpus(vmbed_builder *builder,
                                   vmbed_error **error);

/**
 * Runs vCPU `vcpu` on the calling thread. Blocks until it returns for a reason that `outcome` is set to, one of
 * VMBED_VCPU_*; before the start and through a pause it waits inside. Devices of yours are called on this thread.
 *
 * Each vCPU may be run by one thread at a time, by another one the next time (which costs KVM some milliseconds).
 * Signals that the thread does not block come through, and their handlers run. SIGURG is blocked meanwhile: vmbed sends
 * it to the thread.
 *
 * VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU. VMBED_ERR_INVALID_STATE where another thread runs it, where the
 * VM's vCPUs have threads of the library's, or where any VM's callback calls.
 */
int32_t vmbed_vcpu_run(vmbed_vm *vm,
                       uint32_t vcpu,
                       int32_t *outcome,
                       vmbed_error **error);

/**
 * Makes vmbed_vcpu_run() return on the thread that runs this vCPU; where none does, on the next one at once. Does not
 * block. Not for signal handlers: a signal alone has the same effect.
 *
 * VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU. VMBED_ERR_INVALID_STATE where the VM's vCPUs have threads of
 * the library's.
 */
int32_t vmbed_vcpu_interrupt(vmbed_vm *vm,
                             uint32_t vcpu,
                             vmbed_error **error);

/* What was promised, and what is there --------------------------------------------------------------------- */

/** One VM's memory keeps to the least, the most and the step that one VM may have. */
#define VMBED_CONSTRAINT_MEMORY_UNITS 0

/** One VM's shared vCPUs keep to the least, the most and the step that one VM may have. */
#define VMBED_CONSTRAINT_VCPU_UNITS 1

/** The VMs' memory sizes together stay within (total - reserved) x ratio. */
#define VMBED_CONSTRAINT_NOMINAL 2

/** Guarantees and overhead together stay within total - reserved. */
#define VMBED_CONSTRAINT_GUARANTEE 3

/** Everything that guests can touch, and overhead, stays within total - reserved + swap, unless the VM may be stopped. */
#define VMBED_CONSTRAINT_SOLVENCY 4

/** Free memory after the newcomer's guarantee covers what guests touch during the reaction time. */
#define VMBED_CONSTRAINT_HEADROOM 5

/** The VMs' shared vCPUs together stay within cores x ratio. */
#define VMBED_CONSTRAINT_VCPUS 6

/** Each dedicated vCPU has a core of its own. */
#define VMBED_CONSTRAINT_DEDICATED_VCPUS 7

/** How one constraint stands to a claim, in bytes or vCPUs. */
typedef struct {
    /** The most that may be promised. UINT64_MAX: not limited. */
    uint64_t limit;
    /** What is promised without this claim. */
    uint64_t used;
    /** What the claim asks for. */
    uint64_t wanted;
    /** What would be left; negative is how much is missing. */
    int64_t left;
    /** 1 where this alone forbids the claim, else 0. */
    uint64_t broken;
} vmbed_slack;

/** The ledger's answer to a claim. */
typedef struct {
    /** sizeof(struct vmbed_verdict) */
    size_t size;
    /** The constraint that forbids the claim, one of VMBED_CONSTRAINT_*; -1 where it fits. */
    int32_t binding;
    /** How many there are in `slack`. */
    uint32_t count;
    /** Every constraint, by VMBED_CONSTRAINT_*. */
    vmbed_slack slack[8];
} vmbed_verdict;

/** A VM's memory in bytes: what was promised, and what is there. */
typedef struct {
    /** sizeof(struct vmbed_memory) */
    size_t size;
    /** The most that the VM may ever have: its configured size. */
    uint64_t max;
    /** What its guest can touch without anybody's consent. */
    uint64_t entitlement;
    /** What it will always have. */
    uint64_t guarantee;
    /** What the VM costs beside its memory, as the ledger's model has it. */
    uint64_t overhead;
    /** Counts the changes of the promises, from 1 on. */
    uint64_t generation;
    /** What exists: what was ever touched, in memory or in swap. Exact to the page. */
    uint64_t backing;
    /** What of it is in memory. */
    uint64_t resident;
    /** What of it is in swap. */
    uint64_t swapped;
    /** What of it this process maps with huge pages. */
    uint64_t huge;
    /** What of it cannot be paged out. vmbed pins nothing so far. */
    uint64_t pinned;
    /** What KVM has mapped for the guest; 0 where its statistics say nothing. */
    uint64_t stage2;
    /** What the guest says that it has given up to its balloon: advisory, no promise depends on it. */
    uint64_t loaned;
} vmbed_memory;

/** What a vCPU got of the host. */
typedef struct {
    /** sizeof(struct vmbed_vcpu_statistics) */
    size_t size;
    /** The kernel's id of the thread that runs it; 0 while none does. */
    int32_t thread;
    /** The host's CPU that it is confined to; -1 where there is none, or more than one. */
    int32_t cpu;
    /** How long its threads ran, in the guest or for it, in nanoseconds. */
    uint64_t run_time;
    /** How long its threads were ready to run and had no CPU, in nanoseconds. What a guest knows as stolen time. */
    uint64_t run_delay;
} vmbed_vcpu_statistics;

/**
 * Fills `verdict`, whose size is set, with what the ledger would answer to a VM of this configuration. Nothing is
 * built or booked. Does not block for long.
 */
int32_t vmbed_host_verdict(const vmbed_host *host,
                           const vmbed_config *config,
                           vmbed_verdict *verdict,
                           vmbed_error **error);

/**
 * Fills `verdict`, whose size is set, with the one behind an error of status VMBED_ERR_REFUSED. False for every other
 * error, for NULL and for a wrong size.
 */
bool vmbed_error_verdict(const vmbed_error *error,
                         vmbed_verdict *verdict);

/**
 * Changes what there is to give while VMs run: all of `options` (NULL for the defaults) but the path of the KVM. Less
 * than is promised is accepted; from then on nothing is booked but what does not worsen that. vCPUs that exist stay on
 * the CPUs that they have. `generation` is the one
 * of the vmbed_usage that the change is based on, UINT64_MAX for any. Does not block for long.
 *
 * VMBED_ERR_INVALID_ARGUMENT with every bad field; VMBED_ERR_INVALID_STATE where the generation is another one by now.
 */
int32_t vmbed_host_set_shares(vmbed_host *host,
                              const vmbed_host_options *options,
                              uint64_t generation,
                              vmbed_error **error);

/**
 * Sets what the ledger promises the VM: `guarantee` bytes of its memory that it will always have, 0 by default, and in
 * `victim`, -1 by default, the class in which it may be stopped when the host runs out of memory, 0 to 255, the lowest
 * first. A VM with a class is admitted where memory and swap could not hold all that guests may touch.
 */
int32_t vmbed_config_set_promise(vmbed_config *config,
                                 uint64_t guarantee,
                                 int32_t victim,
                                 vmbed_error **error);

/** Says whether each vCPU has a core of the host's for itself, of those that vmbed_host_options keeps for such. */
int32_t vmbed_config_set_dedicated(vmbed_config *config,
                                   bool dedicated,
                                   vmbed_error **error);

/** Confines vCPU `vcpu` to the host's CPUs with these `length` numbers. Once one is confined, all must be. */
int32_t vmbed_config_set_affinity(vmbed_config *config,
                                  uint32_t vcpu,
                                  const uint32_t *cpus,
                                  size_t length,
                                  vmbed_error **error);

/**
 * Gives the VM's threads a cgroup (version 2) of their own, below `parent`, the directory of a cgroup that the process is in or
 * below and may write to, or below the process's own one where that is NULL. It is gone with the VM.
 *
 * `weight`, 1 to 10,000, is the VM's part of the time that its parent has, when more is wanted than there is; 100 is what
 * every cgroup begins with. In each `period` of microseconds, 1,000 to 1,000,000, its threads together run `quota`
 * microseconds at most; 0 for both: there is no limit. Threads of yours that call vmbed_vcpu_run() stay where they are.
 *
 * What the kernel refuses is an error of vmbed_builder_build() that names the file.
 */
int32_t vmbed_config_set_cgroup(vmbed_config *config,
                                const char *parent,
                                uint32_t weight,
                                uint64_t quota,
                                uint64_t period,
                                vmbed_error **error);

/**
 * Fills `memory`, whose size is set. In every state. Costs microseconds and a walk over page tables: milliseconds for
 * each GiB that is there in small pages.
 */
int32_t vmbed_vm_get_memory(const vmbed_vm *vm,
                            vmbed_memory *memory,
                            vmbed_error **error);

/**
 * Changes how many bytes of memory the VM will always have. Less than before always passes. `generation` is the one of
 * the vmbed_memory that the change is based on, UINT64_MAX for any. Does not block for long.
 *
 * VMBED_ERR_INVALID_ARGUMENT for more than the VM's memory; VMBED_ERR_REFUSED by the ledger; VMBED_ERR_INVALID_STATE where
 * the generation is another one by now. Then nothing has changed.
 */
int32_t vmbed_vm_set_guarantee(vmbed_vm *vm,
                               uint64_t guarantee,
                               uint64_t generation,
                               vmbed_error **error);

/**
 * Fills `statistics`, whose size is set, with what vCPU `vcpu` got. In every state; the times stand still once it runs
 * no more. Does not block for long. VMBED_ERR_INVALID_ARGUMENT where there is no such vCPU.
 */
int32_t vmbed_vm_get_vcpu_statistics(const vmbed_vm *vm,
                                     uint32_t vcpu,
                                     vmbed_vcpu_statistics *statistics,
                                     vmbed_error **error);

/* How guests give memory back ------------------------------------------------------------------------------ */

/** A virtio-balloon. All zeroes but the size are the defaults. */
typedef struct {
    /** sizeof(struct vmbed_balloon) */
    size_t size;
    /** Where on the PCI bus, `00:05.0`. NULL: the first free place. */
    const char *pci;
    /** Other than 0: the guest may not take memory out of the balloon before it kills a process for want of memory. */
    uint32_t keep_on_oom;
    /**
     * Other than 0: the guest does not give large pieces of free memory back as it goes along. One on the pool of huge pages
     * never does: the pool might have none when the guest uses them again.
     */
    uint32_t no_reporting;
    /**
     * Other than 0: vmbed_vm_discard_free_pages() works. A Linux guest that runs out of memory at that moment may use a
     * page while it is being given back, and lose what it has written there. 0 on the pool of huge pages.
     */
    uint32_t hinting;
    /** Zero. */
    uint32_t reserved;
} vmbed_balloon;

/**
 * What a balloon has moved since the VM was built, in bytes. "Claimed" is what the guest named, "measured" by how much
 * what backs its memory has shrunk for it, as the host counts it: less where the guest had never touched it.
 */
typedef struct {
    /** sizeof(struct vmbed_balloon_statistics) */
    size_t size;
    /** How much memory the guest was asked to give up. */
    uint64_t target;
    /** How much it says that it has given up. It may lie, and may touch that memory again. */
    uint64_t actual;
    /** What it put into the balloon, in all. */
    uint64_t inflated_claimed;
    /** The same, measured. */
    uint64_t inflated_measured;
    /** What it took out again, in all, by its own account. */
    uint64_t deflated;
    /** What its free page reporting gave back, in all. */
    uint64_t reported_claimed;
    /** The same, measured. */
    uint64_t reported_measured;
    /** What vmbed_vm_discard_free_pages() gave back, in all. */
    uint64_t hinted_claimed;
    /** The same, measured. */
    uint64_t hinted_measured;
    /** Pages and ranges that it named and that are not its memory, or not in whole pages. They were ignored. */
    uint64_t ignored;
} vmbed_balloon_statistics;

/**
 * A guest's own account of its memory (virtio 1.2, section 5.5.6.3), in bytes or in how often something happened.
 * UINT64_MAX where its driver does not say.
 */
typedef struct {
    /** sizeof(struct vmbed_guest_memory) */
    size_t size;
    /** When it came, in nanoseconds since 1970-01-01 UTC. */
    uint64_t time;
    /** What is swapped in, in all. */
    uint64_t swapped_in;
    /** What is swapped out, in all. */
    uint64_t swapped_out;
    /** Page faults that had to read a disk, in all. */
    uint64_t major_faults;
    /** Other page faults, in all. */
    uint64_t minor_faults;
    /** What is of no use for anything now. */
    uint64_t free;
    /** What it has altogether; Linux leaves out what its balloon holds, unless it may deflate it. */
    uint64_t total;
    /** What new programs could have without swapping. */
    uint64_t available;
    /** What can be had back quickly: file caches. */
    uint64_t caches;
    /** Huge pages that were allocated, in all. */
    uint64_t huge_allocations;
    /** Huge pages that could not be, in all. */
    uint64_t huge_failures;
    /** Processes that were killed for want of memory, in all. */
    uint64_t oom_kills;
    /** How often somebody had to wait for memory, in all. */
    uint64_t stalls;
} vmbed_guest_memory;

/**
 * Gives the VM a balloon, `balloon0`, through which its guest gives memory back. What `balloon` points to is copied. There
 * is none by default; the last call counts.
 */
int32_t vmbed_config_set_balloon(vmbed_config *config,
                                 const vmbed_balloon *balloon,
                                 vmbed_error **error);

/**
 * Asks the guest to give up `target` bytes of its memory in all, in whole pages of 4 KiB; less than before gives it some
 * back. Returns at once: the guest does it in its own time, as far as it can, and VMBED_EVENT_BALLOON tells when it has. A
 * guest without a driver does nothing. Neither entitlement nor guarantee changes.
 *
 * VMBED_ERR_INVALID_ARGUMENT for more than the VM's memory; VMBED_ERR_UNSUPPORTED where the VM has no balloon.
 */
int32_t vmbed_vm_set_balloon(vmbed_vm *vm,
                             uint64_t target,
                             vmbed_error **error);

/**
 * Fills `statistics`, whose size is set. In every state; reads counters only. VMBED_ERR_UNSUPPORTED where the VM has no
 * balloon.
 */
int32_t vmbed_vm_get_balloon_statistics(const vmbed_vm *vm,
                                        vmbed_balloon_statistics *statistics,
                                        vmbed_error **error);

/**
 * Asks the guest for an account of its memory, waits at most `timeout` milliseconds for it (negative: for ever), and fills
 * `memory`, whose size is set. With a timeout of 0 it does not wait, and answers the last one that came; the next one is
 * on its way then.
 *
 * VMBED_ERR_TIMED_OUT where the guest has not answered by then, or never yet. VMBED_ERR_UNSUPPORTED where the VM has no
 * balloon or the guest no driver for it. VMBED_ERR_INVALID_STATE when called from the VM's own callback, and where the VM has
 * ended, also while this waits.
 */
int32_t vmbed_vm_get_guest_memory(const vmbed_vm *vm,
                                  int64_t timeout,
                                  vmbed_guest_memory *memory,
                                  vmbed_error **error);

/**
 * Asks the guest for all pages that are free now and gives them back to the host; the guest has them again when it touches
 * them. Waits until that is done, at most `timeout` milliseconds (negative: for ever), and sets `discarded` to how many
 * bytes the host has got. See `hinting` of vmbed_balloon for what it may cost.
 *
 * VMBED_ERR_TIMED_OUT: what was given back by then stays so. VMBED_ERR_BUSY while another thread asks.
 * VMBED_ERR_UNSUPPORTED where the configuration does not allow it or the guest has no driver for it.
 * VMBED_ERR_INVALID_STATE when called from the VM's own callback.
 */
int32_t vmbed_vm_discard_free_pages(vmbed_vm *vm,
                                    int64_t timeout,
                                    uint64_t *discarded,
                                    vmbed_error **error);

/* When memory gets short ----------------------------------------------------------------------------------- */

/** A guest is asked for memory that it does not use, or may have some back. */
#define VMBED_STAGE_BALLOON 0

/** Some of a VM's memory goes to swap. */
#define VMBED_STAGE_PAGE_OUT 1

/** A VM stands still, since it has more than its guarantee. */
#define VMBED_STAGE_PAUSE 2

/** A VM ends: it was declared a victim. */
#define VMBED_STAGE_STOP 3

/** The thread has the rights of the process. */
#define VMBED_RECLAIM_SANDBOX_OFF 0

/** It is in a sandbox, as far as the kernel has what it takes: vmbed_host_get_reclaim_sandbox() says what is in force. */
#define VMBED_RECLAIM_SANDBOX_IF_PRESENT 1

/** It does not begin where the kernel lacks something of it. */
#define VMBED_RECLAIM_SANDBOX_REQUIRED 2

/**
 * What a host does when its memory gets short. "Free" is what the kernel calls available, or what is left below the own
 * cgroup's limit if that is less, in bytes. Each stage goes on until a quarter more is free than where it begins; one whose
 * threshold is 0 never begins.
 */
typedef struct {
    /** sizeof(struct vmbed_reclaim_options) */
    size_t size;
    /** Below it, guests with a balloon are asked for what they do not use; when there is room again, they have it back. */
    uint64_t balloon_below;
    /** Below it, what VMs have above their guarantees is paged out, where there is swap. */
    uint64_t page_out_below;
    /** Below it, VMs above their guarantees are paused, one after the other. */
    uint64_t pause_below;
    /** Below it, VMs with a victim class (vmbed_config_set_promise()) are stopped, one after the other. */
    uint64_t stop_below;
    /**
     * How much of what a guest does not use may be asked for: below 1. The higher, the more an idle guest gives for a busy
     * one. 0: 0.75.
     */
    double idle_tax;
    /** How many milliseconds a VM may be paused. Then it goes on, or is stopped if it may be. 0: 10,000. */
    uint32_t pause_deadline;
    /** How often the host's memory is looked at, in milliseconds, besides whenever the kernel reports pressure. 0: 1,000. */
    uint32_t interval;
    /**
     * Whether the thread is in a sandbox, one of VMBED_RECLAIM_SANDBOX_*: it may make the system calls that its work needs and no
     * others, and open no file. A call that is refused fails with EPERM and ends the thread: VMs that it has paused go on, and each VM
     * that there is has an event, VMBED_EVENT_RECLAIM_FAILED. VMs are paused, and your log is called, on threads that are not in it. As
     * long as it is there, do not change the process's user or groups with the C library's functions, which would end the process.
     */
    int32_t sandbox;
    /** Zero. */
    uint32_t reserved;
} vmbed_reclaim_options;

/** What an event of the kind VMBED_EVENT_MEMORY_PRESSURE says, in bytes. */
typedef struct {
    /** sizeof(struct vmbed_pressure) */
    size_t size;
    /**
     * What the step is about: what the balloon is asked for now, what is to be paged out, what there is of a VM that is
     * paused or stopped.
     */
    uint64_t wanted;
    /** What the guest says that it has put into the balloon so far; what was named to the kernel for paging out. */
    uint64_t claimed;
    /** What the host has got of that, as it counts it. */
    uint64_t measured;
    /** Of a pause: how many milliseconds it lasts at most. What comes then: a victim is stopped, another VM goes on. */
    uint64_t deadline;
    /** What was done, one of VMBED_STAGE_*. */
    int32_t stage;
    /** Zero. */
    uint32_t unused;
} vmbed_pressure;

/**
 * Says what to do with the VMs of a host when its memory gets short; NULL, as in the beginning: nothing. One thread,
 * `vmbed-reclaim`, does it, until the last end of this host is freed, which waits for it. Each step is an event of the VM
 * that it is about, VMBED_EVENT_MEMORY_PRESSURE. With NULL, VMs that it has paused go on, and balloons are asked for no more
 * than vmbed_vm_set_balloon() said. Blocks for as long as a step takes: a pause up to 10 s. Another `sandbox` than before begins with
 * another thread, and the one before ends as with NULL. In a callback it does not wait for the one before: what is said here of
 * an end comes soon after.
 *
 * VMBED_ERR_INVALID_ARGUMENT with every bad field; VMBED_ERR_EXHAUSTED where the process is out of threads or descriptors;
 * VMBED_ERR_UNSUPPORTED and VMBED_ERR_BUSY where this kernel has not, or gives not, what the sandbox takes. What was set before goes
 * on then.
 */
int32_t vmbed_host_set_reclaim(vmbed_host *host,
                               const vmbed_reclaim_options *options,
                               vmbed_error **error);

/**
 * Fills `pressure`, whose size is set, with what an event of the kind VMBED_EVENT_MEMORY_PRESSURE says. False for every other
 * event, for NULL and for a wrong size.
 */
bool vmbed_event_pressure(const vmbed_event *event,
                          vmbed_pressure *pressure);

/* A sandbox for a VM's threads ----------------------------------------------------------------------------- */

/** Threads that run vCPUs, and the one that ends a VM. They call your devices, and some functions of your networks. */
#define VMBED_SANDBOX_VCPUS 1

/** Threads that serve the console, cards and the random number generator. They call your console callback and your networks. */
#define VMBED_SANDBOX_DEVICES 2

/** Threads that serve disks. They call your disks. */
#define VMBED_SANDBOX_DISKS 4

/** The thread that serves the balloon. */
#define VMBED_SANDBOX_BALLOON 8

/** All of them. */
#define VMBED_SANDBOX_ALL 15

/** What is in force of a sandbox. */
typedef struct {
    /** sizeof(struct vmbed_sandbox) */
    size_t size;
    /** How many threads are in it; 0 where there is none. */
    uint32_t threads;
    /** Whether their calls are filtered: 0 or 1. */
    uint32_t seccomp;
    /** The version of Landlock's interface by which they open no files; 0 where the kernel has none. */
    uint32_t landlock;
    /** 0 */
    uint32_t reserved;
} vmbed_sandbox;

/**
 * Puts threads of the VM into a sandbox: each may make the system calls that its work needs and no others, and opens no files.
 * `threads` is the sum of VMBED_SANDBOX_* but not of none; 0: there is no sandbox, as in the beginning. A call that is refused
 * fails with EPERM, and its VM stops with VMBED_CAUSE_SANDBOX_VIOLATION; the process and its other VMs go on.
 *
 * Code of yours never runs in it: vmbed_builder_build() answers VMBED_ERR_INVALID_ARGUMENT where such a thread would call some,
 * and names it. It answers VMBED_ERR_UNSUPPORTED where the kernel lacks seccomp's notices or Landlock, unless `best_effort`:
 * then it goes on with what there is, and vmbed_vm_get_sandbox() says what that is.
 *
 * Once such a VM is built, do not change the process's user or groups with the C library's functions: they would have each
 * thread do the same, which is refused, and end the process.
 */
int32_t vmbed_config_set_sandbox(vmbed_config *config,
                                 uint32_t threads,
                                 bool best_effort,
                                 vmbed_error **error);

/** Fills `sandbox`, whose size is set. In every state. Never blocks. */
int32_t vmbed_vm_get_sandbox(const vmbed_vm *vm, vmbed_sandbox *sandbox, vmbed_error **error);

/**
 * Fills `sandbox`, whose size is set, with what is in force for `vmbed-reclaim`; zeroes where it is in no sandbox, or is not there.
 * Never blocks.
 */
int32_t vmbed_host_get_reclaim_sandbox(const vmbed_host *host,
                                       vmbed_sandbox *sandbox,
                                       vmbed_error **error);

/* What happened -------------------------------------------------------------------------------------------- */

/** The vCPUs run for the first time. */
#define VMBED_EVENT_STARTED 1

/** Every vCPU and every device stands still. */
#define VMBED_EVENT_PAUSED 2

/** They run again. */
#define VMBED_EVENT_RESUMED 3

/** The VM has ended; vmbed_event_cause() says why. The last event of a VM, and never lost. */
#define VMBED_EVENT_STOPPED 4

/** The guest's driver broke the rules of virtio; the device waits for the driver to reset it. */
#define VMBED_EVENT_DEVICE_NEEDS_RESET 5

/** The host failed a device: the guest got an error status (disk) or lost a frame (network). */
#define VMBED_EVENT_BACKEND_ERROR 6

/** vmbed_event_count() events were dropped because nobody read the stream. */
#define VMBED_EVENT_LOST 7

/**
 * The guest wrote to a doorbell, see vmbed_builder_add_pio_doorbell(). At most one event of each doorbell is unread:
 * while it is, further writes are counted in it, and it tells of the last.
 */
#define VMBED_EVENT_DOORBELL 8

/**
 * The guest has given up as much memory as vmbed_vm_set_balloon() asked for, or it takes memory back that it was not
 * told it might have; vmbed_event_value() says how much it has given up. At most one is unread: the latest.
 */
#define VMBED_EVENT_BALLOON 9

/**
 * The host has not enough memory, and something was done about it with this VM (vmbed_host_set_reclaim()):
 * vmbed_event_pressure() says what. At most one of each stage is unread: the latest.
 */
#define VMBED_EVENT_MEMORY_PRESSURE 10

/**
 * The thread that did something about it when the host's memory got short has ended: vmbed_event_text() says why. Nobody looks after
 * this VM's memory any more, until vmbed_host_set_reclaim() is called again.
 */
#define VMBED_EVENT_RECLAIM_FAILED 11

/** The VM has not ended. */
#define VMBED_CAUSE_NONE 0

/** The guest powered itself off (ACPI S5). */
#define VMBED_CAUSE_GUEST_POWEROFF 1

/** The guest asked for a reset. vmbed does not reboot it: build anew. */
#define VMBED_CAUSE_GUEST_RESET 2

/** A vCPU met an exception while it delivered a double fault. */
#define VMBED_CAUSE_TRIPLE_FAULT 3

/** The guest's kernel reported a panic through pvpanic. */
#define VMBED_CAUSE_GUEST_PANIC 4

/** Every vCPU of a bare guest has executed HLT: nothing can wake it. */
#define VMBED_CAUSE_GUEST_HALT 5

/** The embedder stopped or freed it. */
#define VMBED_CAUSE_HOST_STOP 6

/** A vCPU cannot go on: KVM refused, guest memory is gone, or vmbed has a defect. */
#define VMBED_CAUSE_VCPU_FAULT 7

/** A device cannot go on: an embedder's callback failed, or vmbed has a defect. */
#define VMBED_CAUSE_DEVICE_FAULT 8

/**
 * The host had not enough memory, and the VM had agreed to be stopped then (vmbed_config_set_promise()). Its memory was given
 * back at once: it reads zero.
 */
#define VMBED_CAUSE_MEMORY_PRESSURE 9

/**
 * A thread of the VM's, which vmbed_event_device() names, made a system call that its sandbox refuses
 * (vmbed_config_set_sandbox()): vmbed has a defect, or the guest has found one.
 */
#define VMBED_CAUSE_SANDBOX_VIOLATION 10

/** A stream of your own, for vmbed_builder_set_events() of several VMs. It is yours to free. */
int32_t vmbed_events_new(vmbed_events **events, vmbed_error **error);

/**
 * The stream's fd: it polls readable while an event waits; when several threads read, perhaps once too often, so ask
 * vmbed_events_next() with a timeout of 0. For poll() and the like only: it belongs to the stream, and closes with the
 * last of its VMs and handles. -1 for NULL.
 */
int32_t vmbed_events_fd(const vmbed_events *events);

/**
 * Takes the oldest unread event, waiting at most `timeout` milliseconds for one: 0 does not block, a negative timeout
 * waits for ever. `event` is set to it, and it is yours to free; or to NULL where none has come. Each event goes to one
 * reader.
 */
int32_t vmbed_events_next(const vmbed_events *events,
                          int64_t timeout,
                          vmbed_event **event,
                          vmbed_error **error);

/** Frees this end of a stream. NULL is a no-op. */
void vmbed_events_free(vmbed_events *events);

/** What happened, one of VMBED_EVENT_*; 0 for NULL. */
int32_t vmbed_event_kind(const vmbed_event *event);

/** Counts the events of one stream from 0, without gaps: what was lost is said by VMBED_EVENT_LOST. */
uint64_t vmbed_event_seq(const vmbed_event *event);

/** When it was reported, in nanoseconds since 1970 (CLOCK_REALTIME). */
uint64_t vmbed_event_time(const vmbed_event *event);

/** Which VM: what vmbed_vm_id() answers. */
uint64_t vmbed_event_vm_id(const vmbed_event *event);

/** How many equal events were folded into this one; of VMBED_EVENT_LOST, how many are missing. */
uint64_t vmbed_event_count(const vmbed_event *event);

/** Why the VM ended, one of VMBED_CAUSE_*; VMBED_CAUSE_NONE where it is not VMBED_EVENT_STOPPED. */
int32_t vmbed_event_cause(const vmbed_event *event);

/**
 * The device that it is about, `disk0` or the name of one of yours; NULL where it is about none. It belongs to the
 * event.
 */
const char *vmbed_event_device(const vmbed_event *event);

/** The host's errno of VMBED_EVENT_BACKEND_ERROR, else 0. */
int32_t vmbed_event_errno(const vmbed_event *event);

/**
 * Where on the medium VMBED_EVENT_BACKEND_ERROR came, in bytes; where in its range VMBED_EVENT_DOORBELL was rung, in
 * bytes; 0 where that means nothing.
 */
uint64_t vmbed_event_offset(const vmbed_event *event);

/**
 * What the guest wrote last to the doorbell of VMBED_EVENT_DOORBELL, little-endian; how many bytes of memory the guest of
 * VMBED_EVENT_BALLOON says that it has given up; else 0.
 */
uint64_t vmbed_event_value(const vmbed_event *event);

/**
 * What happened in words, without a line feed: the cause, what the guest's driver did, or why VMBED_EVENT_RECLAIM_FAILED came. Never
 * NULL; empty where the kind says it all. It belongs to the event.
 */
const char *vmbed_event_text(const vmbed_event *event);

/** Frees an event. NULL is a no-op. */
void vmbed_event_free(vmbed_event *event);

#ifdef __cplusplus
}
#endif

#endif

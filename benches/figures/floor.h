/*
 * A VM from KVM's ioctls, with nothing around them: what vmbed's figures are measured against.
 *
 * One VM is made as vmbed makes one: 2 MiB of sealed memfd mapped shared at a 2 MiB boundary inside a
 * reservation, kept from children and core dumps; CPUID as KVM_GET_SUPPORTED_CPUID gave it before (vmbed's
 * Host asks once, too); a vCPU with a signal mask and real-mode registers; a pthread that runs it with all
 * signals blocked. /dev/kvm is open beforehand on both sides.
 *
 * For programs that define _GNU_SOURCE first.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MEMORY ((size_t)2 << 20)
#define CPUID_ENTRIES 256

static int kvm;
static size_t run_size;
static struct kvm_cpuid2 *cpuid;

struct vm {
	int memfd, vm, vcpu;
	char *space, *memory;
	struct kvm_run *run;
	uint64_t first_exit;
};

static void check(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void make(struct vm *vm, const unsigned char *code, size_t length)
{
	vm->memfd = memfd_create("floor-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	check(vm->memfd >= 0, "memfd_create");
	check(ftruncate(vm->memfd, MEMORY) == 0, "ftruncate");
	check(fcntl(vm->memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0, "F_ADD_SEALS");
	vm->space = mmap(NULL, 2 * MEMORY, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	check(vm->space != MAP_FAILED, "mmap");
	char *memory = vm->memory = (char *)(((uintptr_t)vm->space + MEMORY - 1) & ~(uintptr_t)(MEMORY - 1));
	check(mmap(memory, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, vm->memfd, 0) == memory,
	      "mmap");
	check(madvise(memory, MEMORY, MADV_DONTFORK) == 0, "MADV_DONTFORK");
	check(madvise(memory, MEMORY, MADV_DONTDUMP) == 0, "MADV_DONTDUMP");

	vm->vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(vm->vm >= 0, "KVM_CREATE_VM");
	struct kvm_userspace_memory_region slot = { .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory };
	check(ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0, "KVM_SET_USER_MEMORY_REGION");

	vm->vcpu = ioctl(vm->vm, KVM_CREATE_VCPU, 0);
	check(vm->vcpu >= 0, "KVM_CREATE_VCPU");
	vm->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
	check(vm->run != MAP_FAILED, "mmap of kvm_run");
	struct { uint32_t len; uint64_t set; } __attribute__((packed)) mask = { 8, ~(1ull << (SIGUSR1 - 1)) };
	check(ioctl(vm->vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0, "KVM_SET_SIGNAL_MASK");
	check(ioctl(vm->vcpu, KVM_SET_CPUID2, cpuid) == 0, "KVM_SET_CPUID2");

	memcpy(memory + 0x1000, code, length);
	struct kvm_sregs sregs;
	check(ioctl(vm->vcpu, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
	struct kvm_segment *segments[] = { &sregs.cs, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss };
	for (size_t i = 0; i < 6; i++)
		segments[i]->base = segments[i]->selector = 0;
	check(ioctl(vm->vcpu, KVM_SET_SREGS, &sregs) == 0, "KVM_SET_SREGS");
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	check(ioctl(vm->vcpu, KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");
}

static void destroy(struct vm *vm)
{
	munmap(vm->run, run_size);
	close(vm->vcpu);
	close(vm->vm);
	munmap(vm->space, 2 * MEMORY);
	close(vm->memfd);
}

static void open_kvm(void)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	check(kvm >= 0, "/dev/kvm");
	run_size = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	cpuid = calloc(1, sizeof *cpuid + CPUID_ENTRIES * sizeof *cpuid->entries);
	cpuid->nent = CPUID_ENTRIES;
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0, "KVM_GET_SUPPORTED_CPUID");
}

/*
 * What vmbed's figures for bare guests are measured against: the same ioctls with nothing around them.
 *
 *   floor first-exit       for each line on stdin one VM, from nothing to its first exit; prints its nanoseconds
 *   floor exits N out|in   one VM, N exits for port I/O and nothing else in the loop; says nothing (callgrind counts)
 *   floor punch            for each line on stdin fills a memfd of 512 MiB, maps it, and gives it back in holes of 2 MiB;
 *                          prints the nanoseconds of the holes
 */
#define _GNU_SOURCE
#include "floor.h"

static void *serve_one(void *argument)
{
	struct vm *vm = argument;
	check(ioctl(vm->vcpu, KVM_RUN, 0) == 0 && vm->run->exit_reason == KVM_EXIT_IO, "KVM_RUN");
	vm->first_exit = now();
	return NULL;
}

static void first_exit(void)
{
	static const unsigned char code[] = { 0xe6, 0x10, 0xf4 }; /* out 0x10, al; hlt */
	char line[16];
	while (fgets(line, sizeof line, stdin)) {
		struct vm vm;
		sigset_t all, old;
		pthread_t thread;
		uint64_t begin = now();
		make(&vm, code, sizeof code);
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &old);
		check(pthread_create(&thread, NULL, serve_one, &vm) == 0, "pthread_create");
		pthread_sigmask(SIG_SETMASK, &old, NULL);
		check(pthread_join(thread, NULL) == 0, "pthread_join");
		destroy(&vm);
		printf("%llu\n", (unsigned long long)(vm.first_exit - begin));
		fflush(stdout);
	}
}

static void exits(unsigned long count, int in)
{
	/* out 0x10, al; jmp $-2, or in al, 0x10; jmp $-2 */
	const unsigned char code[] = { in ? 0xe4 : 0xe6, 0x10, 0xeb, 0xfc };
	struct vm vm;
	make(&vm, code, sizeof code);
	for (unsigned long i = 0; i < count; i++) {
		if (ioctl(vm.vcpu, KVM_RUN, 0) != 0 || vm.run->exit_reason != KVM_EXIT_IO)
			check(0, "KVM_RUN");
	}
	destroy(&vm);
}

static void punch(void)
{
	const size_t size = (size_t)512 << 20, hole = (size_t)2 << 20;
	char line[16];
	int file = memfd_create("floor-punch", MFD_CLOEXEC);
	check(file >= 0 && ftruncate(file, (off_t)size) == 0, "memfd_create");
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
	check(memory != MAP_FAILED, "mmap");
	while (fgets(line, sizeof line, stdin)) {
		memset(memory, 1, size);
		uint64_t begin = now();
		for (size_t at = 0; at < size; at += hole)
			check(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)hole) == 0, "fallocate");
		printf("%llu\n", (unsigned long long)(now() - begin));
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "punch") == 0) {
		punch();
		return 0;
	}
	open_kvm();
	if (argc == 2 && strcmp(argv[1], "first-exit") == 0)
		first_exit();
	else if (argc == 4 && strcmp(argv[1], "exits") == 0)
		exits(strtoul(argv[2], NULL, 10), strcmp(argv[3], "in") == 0);
	else {
		fprintf(stderr, "usage: floor first-exit | floor punch | floor exits N out|in\n");
		return 2;
	}
	return 0;
}

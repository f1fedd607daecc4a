/*
 * From a guest's port write to the program's poll loop that has read of it: `latency PAIRS` measures vmbed's doorbells
 * and, in turn, a KVM_RUN loop that writes an eventfd after the same exit, whose reader polls it. Prints for each pair
 * the nanoseconds of both and their ratio.
 *
 * The guest writes its port, and spins until its reader has answered in its memory; what is timed is the median of
 * such rounds. So the answer's way is in it, too, which is the same on both sides: one store.
 */
#define _GNU_SOURCE
#include "floor.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <vmbed.h>

enum { WARM = 50, ROUNDS = 400, ANSWER = 0x2000 };

/* inc al; out 0x10, al; cmp al, [0x2000]; jne $-4; jmp $-10 */
static const unsigned char code[] = { 0xfe, 0xc0, 0xe6, 0x10, 0x3a, 0x06, 0x00, 0x20, 0x75, 0xfa, 0xeb, 0xf4 };

static uint64_t rounds[ROUNDS];

static int by_value(const void *a, const void *b)
{
	uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
	return (left > right) - (left < right);
}

/* Waits for the guest as often as it takes; `take` reads what has made `fd` readable, `answer` lets the guest go on. */
static uint64_t median_round(int fd, void *side, void (*take)(void *, uint8_t), void (*answer)(void *, uint8_t))
{
	struct pollfd readable = { .fd = fd, .events = POLLIN };
	uint64_t last = 0;
	for (int i = 0; i < WARM + ROUNDS; i++) {
		check(poll(&readable, 1, 10000) == 1, "poll: the guest has not written its port within 10 s");
		take(side, (uint8_t)(i + 1));
		uint64_t time = now();
		if (i >= WARM)
			rounds[i - WARM] = time - last;
		last = time;
		/* The last one stays without: the guest spins. */
		if (i + 1 < WARM + ROUNDS)
			answer(side, (uint8_t)(i + 1));
	}
	qsort(rounds, ROUNDS, sizeof *rounds, by_value);
	return rounds[ROUNDS / 2];
}

struct floor {
	struct vm vm;
	int event;
	volatile int ends;
};

static void *serve(void *argument)
{
	struct floor *floor = argument;
	uint64_t one = 1;
	while (!floor->ends) {
		check(ioctl(floor->vm.vcpu, KVM_RUN, 0) == 0 && floor->vm.run->exit_reason == KVM_EXIT_IO, "KVM_RUN");
		check(write(floor->event, &one, sizeof one) == sizeof one, "write to the eventfd");
	}
	return NULL;
}

static void floor_take(void *side, uint8_t value)
{
	uint64_t count;
	(void)value;
	check(read(((struct floor *)side)->event, &count, sizeof count) == sizeof count && count == 1, "read of the eventfd");
}

static void floor_answer(void *side, uint8_t value)
{
	*(volatile uint8_t *)(((struct floor *)side)->vm.memory + ANSWER) = value;
}

static uint64_t measure_floor(void)
{
	struct floor floor = { .event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
	sigset_t all, old;
	pthread_t thread;
	check(floor.event >= 0, "eventfd");
	make(&floor.vm, code, sizeof code);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	check(pthread_create(&thread, NULL, serve, &floor) == 0, "pthread_create");
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	uint64_t median = median_round(floor.event, &floor, floor_take, floor_answer);
	/* One more exit, and its thread sees that it is over. */
	floor.ends = 1;
	floor_answer(&floor, (uint8_t)(WARM + ROUNDS));
	check(pthread_join(thread, NULL) == 0, "pthread_join");
	destroy(&floor.vm);
	close(floor.event);
	return median;
}

struct embedder {
	vmbed_vm *vm;
	vmbed_events *events;
};

static void good(int32_t status, vmbed_error *error)
{
	if (status != VMBED_OK) {
		fprintf(stderr, "latency: %s\n", vmbed_error_message(error));
		exit(1);
	}
}

static void embedder_take(void *side, uint8_t value)
{
	vmbed_error *error;
	vmbed_event *event;
	good(vmbed_events_next(((struct embedder *)side)->events, 0, &event, &error), error);
	check(vmbed_event_kind(event) == VMBED_EVENT_DOORBELL && vmbed_event_value(event) == value, "the event");
	vmbed_event_free(event);
}

static void embedder_answer(void *side, uint8_t value)
{
	vmbed_error *error;
	good(vmbed_vm_write_memory(((struct embedder *)side)->vm, ANSWER, &value, 1, &error), error);
}

static uint64_t measure_embedder(const vmbed_host *host)
{
	struct embedder embedder;
	vmbed_config *config;
	vmbed_builder *builder;
	vmbed_event *started;
	vmbed_error *error;
	good(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, code, sizeof code, &config, &error), error);
	good(vmbed_builder_new(host, config, &builder, &error), error);
	good(vmbed_builder_add_pio_doorbell(builder, "bell", 0x10, 1, &error), error);
	good(vmbed_builder_build(builder, &embedder.vm, &error), error);
	good(vmbed_vm_events(embedder.vm, &embedder.events, &error), error);
	good(vmbed_vm_start(embedder.vm, &error), error);
	good(vmbed_events_next(embedder.events, 10000, &started, &error), error);
	check(vmbed_event_kind(started) == VMBED_EVENT_STARTED, "the first event");
	vmbed_event_free(started);
	int fd = vmbed_events_fd(embedder.events);
	uint64_t median = median_round(fd, &embedder, embedder_take, embedder_answer);
	vmbed_vm_free(embedder.vm);
	vmbed_events_free(embedder.events);
	vmbed_builder_free(builder);
	vmbed_config_free(config);
	return median;
}

int main(int argc, char **argv)
{
	int pairs = argc == 2 ? atoi(argv[1]) : 0;
	vmbed_host *host;
	vmbed_error *error;
	if (pairs <= 0)
		return 2;
	open_kvm();
	good(vmbed_host_open(NULL, &host, &error), error);
	for (int i = 0; i < pairs; i++) {
		/* Who goes first, by turns. */
		uint64_t floor = i % 2 ? measure_floor() : 0, embedder = measure_embedder(host);
		floor = floor ? floor : measure_floor();
		printf("pair %d vmbed-ns %llu floor-ns %llu ratio %.3f\n", i, (unsigned long long)embedder,
		       (unsigned long long)floor, (double)embedder / (double)floor);
		fflush(stdout);
	}
	vmbed_host_free(host);
	return 0;
}

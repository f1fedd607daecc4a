/* Cases of the C API with many threads, many guests, and a second process. */
#include "rogue.h"
#include <errno.h>
#include <sys/wait.h>
#include <time.h>

static long number(const char *variable, long otherwise)
{
    const char *text = getenv(variable);
    return text ? atol(text) : otherwise;
}

/* xorshift64: the same numbers for the same seed. */
static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Says the seed, which whoever runs the cases shows when one fails: VMBED_SEED makes the same choices again. */
static uint64_t seed(void)
{
    uint64_t seed = (uint64_t)number("VMBED_SEED", (long)(time(NULL) ^ getpid() << 16));
    fprintf(stderr, "VMBED_SEED=%llu\n", (unsigned long long)seed);
    return seed * 2 + 1;
}

enum { PLACES = 4 };

/* Handles that all threads use, and free under each other. */
static struct {
    _Atomic(vmbed_host *) host[PLACES];
    _Atomic(vmbed_probe *) probe[PLACES];
    _Atomic(vmbed_config *) config[PLACES];
    _Atomic(vmbed_builder *) builder[PLACES];
    _Atomic(vmbed_vm *) vm[PLACES];
    _Atomic(vmbed_events *) events[PLACES];
    _Atomic(vmbed_event *) event[PLACES];
    _Atomic(vmbed_error *) error[PLACES];
} shared;

static atomic_int attached, ended, started, paused;

static void count_end(void *user)
{
    CHECK(user == &shared);
    ended++;
}

static int32_t any_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)vcpu, (void)offset, (void)data, (void)length;
    CHECK(user == &shared);
    return VMBED_OK;
}

static int32_t any_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)vcpu, (void)offset, (void)data, (void)length;
    CHECK(user == &shared);
    return VMBED_OK;
}

static const vmbed_device_ops any_ops = {sizeof any_ops, any_read, any_write, count_end};

/* Calls that may fail, but for a reason. */
#define ANY(call)                                                                              \
    do {                                                                                       \
        vmbed_error *error = NULL;                                                             \
        int32_t status_ = (call);                                                              \
        if (status_ > 0 || status_ <= VMBED_ERR_INTERNAL || !error != !status_) {              \
            fprintf(stderr, "%s:%d: %s: %d: %s\n", __FILE__, __LINE__, #call, status_, vmbed_error_message(error)); \
            abort();                                                                           \
        }                                                                                      \
        vmbed_error_free(error);                                                               \
    } while (0)

/*
 * A new handle in the place of another, which is freed; unless that was freed before, and the new one has its address.
 */
#define REPLACE(kind, place, call)                                                             \
    do {                                                                                       \
        vmbed_##kind *made = NULL;                                                             \
        ANY(call);                                                                             \
        vmbed_##kind *old_ = atomic_exchange(&shared.kind[place], made);                       \
        if (old_ != made)                                                                      \
            vmbed_##kind##_free(old_);                                                         \
    } while (0)

static void make_something(uint64_t *random, unsigned at)
{
    vmbed_host *host = shared.host[next(random) % PLACES];
    vmbed_config *config = shared.config[next(random) % PLACES];
    switch (next(random) % 8) {
    case 0: REPLACE(host, at, vmbed_host_open(NULL, &made, &error)); break;
    case 1: REPLACE(probe, at, vmbed_probe_new(NULL, &made, &error)); break;
    case 2: REPLACE(config, at, vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, writes, sizeof writes, &made, &error)); break;
    case 3: REPLACE(builder, at, vmbed_builder_new(host, config, &made, &error)); break;
    case 4: REPLACE(events, at, vmbed_events_new(&made, &error)); break;
    case 5: REPLACE(events, at, vmbed_vm_events(shared.vm[at], &made, &error)); break;
    case 6: REPLACE(event, at, vmbed_events_next(shared.events[at], (int64_t)(next(random) % 2), &made, &error)); break;
    default: {
        vmbed_error *made = NULL;
        CHECK(vmbed_host_usage(NULL, NULL, &made) == VMBED_ERR_INVALID_ARGUMENT && made);
        vmbed_error_free(atomic_exchange(&shared.error[at], made));
    }
    }
}

static void build_something(uint64_t *random, unsigned at)
{
    vmbed_builder *builder = shared.builder[at];
    switch (next(random) % 4) {
    case 0:
        attached++;
        ANY(vmbed_builder_add_pio(builder, "port", (uint16_t)(next(random) << 3), 8, &any_ops, &shared, &error));
        break;
    case 1: ANY(vmbed_builder_set_events(builder, shared.events[next(random) % PLACES], &error)); break;
    default: {
        vmbed_builder *new = NULL;
        /* One that others know, or one that nobody has built with. */
        if (next(random) % 2)
            ANY(vmbed_builder_new(shared.host[at], shared.config[at], &new, &error));
        REPLACE(vm, at, vmbed_builder_build(new ? new : builder, &made, &error));
        vmbed_builder_free(new);
    }
    }
}

static void drive_something(uint64_t *random, unsigned at)
{
    vmbed_vm *vm = shared.vm[at];
    vmbed_registers registers = {.size = sizeof registers};
    uint8_t bytes[16] = {0};
    size_t length;
    int32_t cause = -1;
    switch (next(random) % 14) {
    case 0: case 1: case 2: started += !vmbed_vm_start(vm, NULL); break;
    case 3: paused += !vmbed_vm_pause(vm, NULL); break;
    case 4: ANY(vmbed_vm_resume(vm, &error)); break;
    case 5: ANY(vmbed_vm_request_stop(vm, &error)); break;
    case 6:
        /* Nothing of this guest's ever hangs. */
        CHECK(vmbed_vm_stop(vm, &cause, NULL) != VMBED_ERR_TIMED_OUT);
        CHECK(cause == -1 || cause == VMBED_CAUSE_HOST_STOP);
        break;
    case 7: ANY(vmbed_vm_wait(vm, (int64_t)(next(random) % 3), &cause, &error)); break;
    case 8: ANY(vmbed_vm_get_registers(vm, 0, &registers, &error)); break;
    case 9: ANY(vmbed_vm_set_registers(vm, 1, &registers, &error)); break;
    case 10: ANY(vmbed_vm_read_memory(vm, next(random) % (3 << 20), bytes, sizeof bytes, &error)); break;
    case 11: ANY(vmbed_vm_write_memory(vm, 0x8000 + next(random) % (3 << 20), bytes, sizeof bytes, &error)); break;
    case 12: ANY(vmbed_vm_console_tail(vm, bytes, sizeof bytes, &length, &error)); break;
    default:
        CHECK(vmbed_vm_state(vm) >= 0 && vmbed_vm_state(vm) <= VMBED_STATE_STOPPED);
        ANY(vmbed_vm_shutdown(vm, &error));
    }
}

static void look_at_something(uint64_t *random, unsigned at)
{
    vmbed_usage usage = {.size = sizeof usage};
    switch (next(random) % 6) {
    case 0: ANY(vmbed_host_usage(shared.host[at], &usage, &error)); break;
    case 1: ANY(vmbed_config_validate(shared.config[at], &error)); break;
    case 2: ANY(vmbed_config_set_memory(shared.config[at], 64 << 10 << next(random) % 6, &error)); break;
    case 3: vmbed_probe_is_usable(shared.probe[at]); break;
    case 4: CHECK(vmbed_error_status(shared.error[at]) <= 0 && vmbed_events_fd(shared.events[at]) >= -1); break;
    default: CHECK(vmbed_event_kind(shared.event[at]) >= 0 && vmbed_event_cause(shared.event[at]) >= 0);
    }
}

/* Frees what others use; one time in four it stays where they find it. */
#define FREE(kind, at) vmbed_##kind##_free(stays ? shared.kind[at] : atomic_exchange(&shared.kind[at], NULL))

static void free_something(uint64_t *random, unsigned at)
{
    int stays = next(random) % 4 == 0;
    switch (next(random) % 8) {
    case 0: FREE(host, at); break;
    case 1: FREE(probe, at); break;
    case 2: FREE(config, at); break;
    case 3: FREE(builder, at); break;
    case 4: FREE(vm, at); break;
    case 5: FREE(events, at); break;
    case 6: FREE(event, at); break;
    default: FREE(error, at);
    }
}

static void *play(void *argument)
{
    uint64_t random = *(uint64_t *)argument;
    for (long i = number("VMBED_ROUNDS", 8000); i > 0; i--) {
        unsigned at = next(&random) % PLACES;
        switch (next(&random) % 16) {
        case 0: case 1: case 2: case 3: make_something(&random, at); break;
        case 4: case 5: case 6: build_something(&random, at); break;
        case 7: case 8: case 9: case 10: case 11: case 12: drive_something(&random, at); break;
        case 13: case 14: look_at_something(&random, at); break;
        default: free_something(&random, at);
        }
    }
    return NULL;
}

void handles_from_eight_threads(void)
{
    uint64_t random = seed(), seeds[8];
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) {
        seeds[i] = next(&random) | 1;
        CHECK(!pthread_create(&threads[i], NULL, play, &seeds[i]));
    }
    for (int i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < PLACES; i++) {
        vmbed_host_free(shared.host[i]), vmbed_probe_free(shared.probe[i]), vmbed_config_free(shared.config[i]);
        vmbed_builder_free(shared.builder[i]), vmbed_vm_free(shared.vm[i]), vmbed_events_free(shared.events[i]);
        vmbed_event_free(shared.event[i]), vmbed_error_free(shared.error[i]);
    }
    CHECK(attached > 0 && attached == ended);
    fprintf(stderr, "%d started, %d paused\n", started, paused);
    CHECK(number("VMBED_ROUNDS", 8000) < 8000 || (started > 200 && paused > 20));
}

/* Six handles of one running guest, freed in this order; what is left goes on working. */
static void free_in_order(const int *order)
{
    struct port port = {0};
    struct guest g = make(writes, sizeof writes, &port);
    vmbed_events *events;
    vmbed_event *event;
    int freed[6] = {0};
    OK(vmbed_vm_events(g.vm, &events, &error));
    OK(vmbed_vm_start(g.vm, &error));
    OK(vmbed_events_next(events, 60000, &event, &error));
    for (int i = 0; i < 6; i++) {
        switch (order[i]) {
        case 0: vmbed_host_free(g.host); break;
        case 1: vmbed_config_free(g.config); break;
        case 2: vmbed_builder_free(g.builder); break;
        case 3: vmbed_vm_free(g.vm); break;
        case 4: vmbed_events_free(events); break;
        default: vmbed_event_free(event);
        }
        freed[order[i]] = 1;
        CHECK(port.destroyed == freed[3] && vmbed_vm_state(g.vm) == (freed[3] ? 0 : VMBED_STATE_RUNNING));
        CHECK(vmbed_event_kind(event) == (freed[5] ? 0 : VMBED_EVENT_STARTED));
        CHECK(freed[4] || vmbed_events_fd(events) >= 0);
    }
}

/* Puts each of the handles that are left into place `at`, in turn. */
static void permute(int *order, int at, long *left)
{
    if (at == 6 && (*left)-- > 0)
        free_in_order(order);
    for (int i = at; i < 6 && *left > 0; i++) {
        int one = order[at];
        order[at] = order[i], order[i] = one;
        permute(order, at + 1, left);
        order[i] = order[at], order[at] = one;
    }
}

void freeing_in_every_order(void)
{
    int order[6] = {0, 1, 2, 3, 4, 5};
    long most = number("VMBED_ROUNDS", 720), left = most;
    permute(order, 0, &left);
    CHECK(left == 0 || most > 720);
}

static void *stops(void *vm)
{
    int32_t cause = -1, status = vmbed_vm_stop(vm, &cause, NULL);
    CHECK(status == VMBED_OK ? cause == VMBED_CAUSE_HOST_STOP : status == VMBED_ERR_INVALID_ARGUMENT);
    return NULL;
}

static void *waits(void *vm)
{
    int32_t cause = -1, status = vmbed_vm_wait(vm, -1, &cause, NULL);
    CHECK(status == VMBED_OK ? cause == VMBED_CAUSE_HOST_STOP : status == VMBED_ERR_INVALID_ARGUMENT);
    return NULL;
}

static void *pauses(void *vm)
{
    for (int i = 0; i < 20; i++) {
        int32_t status = vmbed_vm_pause(vm, NULL);
        CHECK(!status || status == VMBED_ERR_INVALID_STATE || status == VMBED_ERR_INVALID_ARGUMENT);
        status = vmbed_vm_resume(vm, NULL);
        CHECK(!status || status == VMBED_ERR_INVALID_STATE || status == VMBED_ERR_INVALID_ARGUMENT);
    }
    return NULL;
}

static void *frees(void *vm)
{
    vmbed_vm_free(vm);
    return NULL;
}

void stop_races_with_everything(void)
{
    void *(*const racers[8])(void *) = {stops, waits, pauses, frees, stops, waits, pauses, frees};
    uint64_t random = seed();
    for (long round = number("VMBED_ROUNDS", 400); round > 0; round--) {
        struct port port = {0};
        struct guest g = make(writes, sizeof writes, &port);
        pthread_t threads[8];
        if (next(&random) % 4)
            OK(vmbed_vm_start(g.vm, &error));
        /* Every second round without `free`, so that `stop` and `wait` bring the VM to its end. */
        int count = round % 2 ? 8 : 3, first = (int)(next(&random) % 8);
        for (int i = 0; i < count; i++) {
            void *(*racer)(void *) = count == 8 ? racers[(first + i) % 8] : racers[i];
            CHECK(!pthread_create(&threads[i], NULL, racer, g.vm));
            usleep((useconds_t)(next(&random) % 300));
        }
        for (int i = 0; i < count; i++)
            pthread_join(threads[i], NULL);
        drop(&g);
        CHECK(port.destroyed == 1);
    }
}

static atomic_int busy;

/* Holds the library's locks much of the time. */
static void *calls(void *host)
{
    while (busy) {
        vmbed_usage usage = {.size = sizeof usage};
        vmbed_error *error;
        OK(vmbed_host_usage(host, &usage, &error));
        CHECK(vmbed_vm_start(NULL, &error) == VMBED_ERR_INVALID_ARGUMENT);
        vmbed_error_free(error);
    }
    return NULL;
}

/* In the child: nothing of the parent's answers, nothing hangs, and a VM of its own runs. */
static void in_the_child(struct guest *g, vmbed_events *events)
{
    vmbed_registers registers = {.size = sizeof registers};
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_event *event;
    vmbed_vm *vm;
    uint8_t byte;
    int32_t cause;
    alarm(60);
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_start(g->vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_pause(g->vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_resume(g->vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_stop(g->vm, &cause, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_request_stop(g->vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_wait(g->vm, -1, &cause, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_read_memory(g->vm, 0x1000, &byte, 1, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_write_memory(g->vm, 0x1000, &byte, 1, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_vm_get_registers(g->vm, 0, &registers, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_events_next(events, -1, &event, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_host_usage(g->host, &usage, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_config_validate(g->config, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "fork", vmbed_builder_build(g->builder, &vm, &error));
    CHECK(vmbed_vm_state(g->vm) == 0 && vmbed_events_fd(events) == -1);
    drop(g);
    vmbed_events_free(events);
    struct port port = {0};
    struct guest own = make(talks, sizeof talks, &port);
    OK(vmbed_vm_start(own.vm, &error));
    OK(vmbed_vm_wait(own.vm, 30000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_HALT && port.reads == 1);
    drop(&own);
    CHECK(port.destroyed == 1);
}

static void forks(vmbed_host *host)
{
    struct port port = {0};
    struct guest g = make(writes, sizeof writes, &port);
    vmbed_events *events;
    vmbed_event *event;
    pthread_t thread;
    int32_t cause;
    OK(vmbed_vm_events(g.vm, &events, &error));
    OK(vmbed_vm_start(g.vm, &error));
    busy = 1;
    CHECK(!pthread_create(&thread, NULL, calls, g.host));
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            if (i % 2)
                in_the_child(&g, events);
            _exit(0);
        }
        int status;
        while (waitpid(child, &status, 0) != child)
            CHECK(errno == EINTR);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        int written = port.writes;
        for (int wait = 0; port.writes == written && wait < 60000; wait++)
            usleep(1000);
        CHECK(port.writes > written && port.destroyed == 0 && vmbed_vm_state(g.vm) == VMBED_STATE_RUNNING);
    }
    busy = 0;
    pthread_join(thread, NULL);
    OK(vmbed_vm_pause(g.vm, &error));
    OK(vmbed_vm_resume(g.vm, &error));
    OK(vmbed_vm_stop(g.vm, &cause, &error));
    CHECK(cause == VMBED_CAUSE_HOST_STOP);
    const int32_t kinds[] = {VMBED_EVENT_STARTED, VMBED_EVENT_PAUSED, VMBED_EVENT_RESUMED, VMBED_EVENT_STOPPED};
    for (int i = 0; i < 4; i++) {
        struct pollfd fd = {vmbed_events_fd(events), POLLIN, 0};
        CHECK(poll(&fd, 1, 0) == 1);
        OK(vmbed_events_next(events, 0, &event, &error));
        CHECK(vmbed_event_kind(event) == kinds[i]);
        vmbed_event_free(event);
    }
    drop(&g);
    vmbed_events_free(events);
    CHECK(port.destroyed == 1);
    (void)host;
}

void a_fork_while_a_vm_runs(void)
{
    beside_another_vm(forks);
}

enum { GUESTS = 256, FAULTS = 17, REFUSED = 42, FREED = 200 };

/* in al, 0x10; out 0x10, al; test al, al; jz $-6; lidt [0x1100], where there are zeroes; ud2 */
static const uint8_t obeys[] = {0xe4, 0x10, 0xe6, 0x10, 0x84, 0xc0, 0x74, 0xf8, 0x0f, 0x01, 0x1d, 0x00, 0x11, 0, 0, 0x0f, 0x0b};

static struct one {
    vmbed_vm *vm;
    uint64_t id;
    atomic_int writes, dies, refuses, destroyed;
    int started, stopped;
    int32_t cause;
} guests[GUESTS];

static int32_t obey_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)vcpu, (void)offset;
    memset(data, ((struct one *)user)->dies, length);
    return VMBED_OK;
}

static int32_t obey_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    struct one *one = user;
    (void)vcpu, (void)offset, (void)data, (void)length;
    one->writes++;
    usleep(10000); /* all run at once, and leave room for others */
    return one->refuses ? VMBED_ERR_UNSUPPORTED : VMBED_OK;
}

static void obey_end(void *user)
{
    ((struct one *)user)->destroyed++;
}

/* Reads what has come, each event for the guest that it names. */
static void take_events(const vmbed_events *events, int64_t timeout)
{
    for (vmbed_event *event;; vmbed_event_free(event)) {
        OK(vmbed_events_next(events, timeout, &event, &error));
        if (!event)
            return;
        timeout = 0;
        struct one *one = guests;
        while (one->id != vmbed_event_vm_id(event))
            CHECK(++one < guests + GUESTS);
        int32_t kind = vmbed_event_kind(event);
        CHECK(kind == VMBED_EVENT_STARTED || kind == VMBED_EVENT_STOPPED);
        CHECK(vmbed_event_count(event) == 1 && !one->stopped);
        one->started += kind == VMBED_EVENT_STARTED;
        one->stopped += kind == VMBED_EVENT_STOPPED;
        one->cause = vmbed_event_cause(event);
        const char *device = vmbed_event_device(event);
        CHECK(one->cause == VMBED_CAUSE_DEVICE_FAULT ? device && !strcmp(device, "commands") : !device);
    }
}

/* Waits until each guest but the three has written again. */
static void all_go_on(const vmbed_events *events, int three_are_gone)
{
    int before[GUESTS];
    for (int i = 0; i < GUESTS; i++)
        before[i] = guests[i].writes;
    for (int i = 0; i < GUESTS; i++) {
        if (three_are_gone && (i == FAULTS || i == REFUSED || i == FREED))
            continue;
        for (int wait = 0; guests[i].writes < before[i] + 3 && wait < 60000; wait++)
            usleep(1000);
        CHECK(guests[i].writes >= before[i] + 3 && vmbed_vm_state(guests[i].vm) == VMBED_STATE_RUNNING);
    }
    take_events(events, 0);
}

void many_at_once(void)
{
    const vmbed_device_ops ops = {sizeof ops, obey_read, obey_write, obey_end};
    vmbed_host *host;
    vmbed_config *config;
    vmbed_events *events;
    pthread_t thread;
    OK(vmbed_host_open(NULL, &host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_PROTECTED, 0x1000, obeys, sizeof obeys, &config, &error));
    OK(vmbed_config_set_memory(config, 64 << 10, &error));
    OK(vmbed_events_new(&events, &error));
    for (int i = 0; i < GUESTS; i++) {
        vmbed_builder *builder;
        OK(vmbed_builder_new(host, config, &builder, &error));
        OK(vmbed_builder_set_events(builder, events, &error));
        OK(vmbed_builder_add_pio(builder, "commands", 0x10, 1, &ops, &guests[i], &error));
        OK(vmbed_builder_build(builder, &guests[i].vm, &error));
        vmbed_builder_free(builder);
        guests[i].id = vmbed_vm_id(guests[i].vm);
    }
    for (int i = 0; i < GUESTS; i++) {
        OK(vmbed_vm_start(guests[i].vm, &error));
        take_events(events, 0);
    }
    all_go_on(events, 0);
    guests[FAULTS].dies = 1;
    guests[REFUSED].refuses = 1;
    CHECK(!pthread_create(&thread, NULL, frees, guests[FREED].vm));
    for (int i = 0; i < 60 && !(guests[FAULTS].stopped && guests[REFUSED].stopped && guests[FREED].stopped); i++)
        take_events(events, 1000);
    pthread_join(thread, NULL);
    CHECK(guests[FAULTS].cause == VMBED_CAUSE_TRIPLE_FAULT && guests[REFUSED].cause == VMBED_CAUSE_DEVICE_FAULT);
    CHECK(guests[FREED].cause == VMBED_CAUSE_HOST_STOP && guests[FREED].destroyed == 1);
    all_go_on(events, 1);
    for (int i = 0; i < GUESTS; i++)
        CHECK(guests[i].started == 1 && guests[i].stopped == (i == FAULTS || i == REFUSED || i == FREED));
    for (int i = 0; i < GUESTS; i++)
        vmbed_vm_free(guests[i].vm);
    take_events(events, 0);
    for (int i = 0; i < GUESTS; i++) {
        CHECK(guests[i].stopped == 1 && guests[i].destroyed == 1);
        CHECK(i == FAULTS || i == REFUSED || guests[i].cause == VMBED_CAUSE_HOST_STOP);
    }
    vmbed_events_free(events);
    vmbed_config_free(config);
    vmbed_host_free(host);
}

/* Cases of the C API in which callbacks do what they should not. */
#include "rogue.h"
#include <semaphore.h>
#include <time.h>

/* Every function that waits for the VM that calls back. */
static void refuses_to_wait(vmbed_vm *vm)
{
    vmbed_registers registers = {.size = sizeof registers};
    int32_t cause;
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_start(vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_pause(vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_resume(vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_stop(vm, &cause, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_wait(vm, -1, &cause, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_wait(vm, 0, &cause, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_get_registers(vm, 0, &registers, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_set_registers(vm, 0, &registers, &error));
}

/* A whole other VM, and what does not wait for this one. */
static void calls_everything_else(vmbed_vm *vm, vmbed_host *host)
{
    struct port port = {0};
    struct guest other = make(talks, sizeof talks, &port);
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_events *events;
    vmbed_event *event;
    uint8_t bytes[4];
    size_t length;
    int32_t cause;
    OK(vmbed_vm_start(other.vm, &error));
    OK(vmbed_vm_wait(other.vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_HALT && port.writes == 1);
    drop(&other);
    CHECK(port.destroyed == 1);
    OK(vmbed_host_usage(host, &usage, &error));
    CHECK(usage.vcpus == 1 && vmbed_vm_id(vm) > 0 && vmbed_vm_state(vm) == VMBED_STATE_RUNNING);
    OK(vmbed_vm_read_memory(vm, 0x1000, bytes, sizeof bytes, &error));
    OK(vmbed_vm_write_memory(vm, 0x2000, bytes, sizeof bytes, &error));
    OK(vmbed_vm_console_tail(vm, bytes, sizeof bytes, &length, &error));
    FAILS(VMBED_ERR_UNSUPPORTED, "", vmbed_vm_shutdown(vm, &error));
    OK(vmbed_vm_events(vm, &events, &error));
    OK(vmbed_events_next(events, 1000, &event, &error));
    CHECK(vmbed_event_kind(event) == VMBED_EVENT_STARTED);
    vmbed_event_free(event);
    OK(vmbed_events_next(events, 1, &event, &error));
    CHECK(!event);
    vmbed_events_free(events);
}

struct reentrant {
    struct guest g;
    atomic_int writes, destroyed;
};

static int32_t reenter_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    struct reentrant *r = user;
    (void)vcpu, (void)offset, (void)data, (void)length;
    if (r->writes++ == 0) {
        refuses_to_wait(r->g.vm);
        calls_everything_else(r->g.vm, r->g.host);
        OK(vmbed_vm_request_stop(r->g.vm, &error));
        refuses_to_wait(r->g.vm);
    }
    return VMBED_OK;
}

/* What a destroy function finds of the VM that ends. */
static void reenter_end(void *user)
{
    struct reentrant *r = user;
    vmbed_usage usage = {.size = sizeof usage};
    r->destroyed++;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "was freed", vmbed_vm_pause(r->g.vm, &error));
    OK(vmbed_host_usage(r->g.host, &usage, &error));
    vmbed_vm_free(r->g.vm);
}

static void reenters(void)
{
    const vmbed_device_ops ops = {sizeof ops, port_read, reenter_write, reenter_end};
    struct reentrant r = {0};
    int32_t cause;
    OK(vmbed_host_open(NULL, &r.g.host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, writes, sizeof writes, &r.g.config, &error));
    OK(vmbed_builder_new(r.g.host, r.g.config, &r.g.builder, &error));
    OK(vmbed_builder_add_pio(r.g.builder, "port", 0x10, 8, &ops, &r, &error));
    OK(vmbed_builder_build(r.g.builder, &r.g.vm, &error));
    OK(vmbed_vm_start(r.g.vm, &error));
    OK(vmbed_vm_wait(r.g.vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_HOST_STOP && r.writes == 1);
    vmbed_vm_free(r.g.vm);
    CHECK(r.destroyed == 1);
    drop(&r.g);
}

void a_callback_reenters(void)
{
    beside_another_vm_often(reenters);
}

/* A device whose callback does not return until its door opens. */
struct door {
    sem_t open;
    atomic_int entered, destroyed, freed;
    struct guest g;
};

static int32_t door_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    struct door *door = user;
    (void)vcpu, (void)offset, (void)data, (void)length;
    door->entered = 1;
    while (sem_wait(&door->open))
        continue;
    sem_post(&door->open);
    return VMBED_OK;
}

static void door_end(void *user)
{
    ((struct door *)user)->destroyed++;
}

static void make_door(struct door *door)
{
    const vmbed_device_ops ops = {sizeof ops, port_read, door_write, door_end};
    CHECK(!sem_init(&door->open, 0, 0));
    OK(vmbed_host_open(NULL, &door->g.host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, writes, sizeof writes, &door->g.config, &error));
    OK(vmbed_builder_new(door->g.host, door->g.config, &door->g.builder, &error));
    OK(vmbed_builder_add_pio(door->g.builder, "door", 0x10, 1, &ops, door, &error));
    OK(vmbed_builder_build(door->g.builder, &door->g.vm, &error));
    OK(vmbed_vm_start(door->g.vm, &error));
    for (int i = 0; i < 60000 && !door->entered; i++)
        usleep(1000);
    CHECK(door->entered);
}

static void *stop_in_vain(void *user)
{
    struct door *door = user;
    FAILS(VMBED_ERR_TIMED_OUT, "has not come to its end", vmbed_vm_stop(door->g.vm, NULL, &error));
    return NULL;
}

static void *pause_in_vain(void *user)
{
    struct door *door = user;
    FAILS(VMBED_ERR_TIMED_OUT, "callback", vmbed_vm_pause(door->g.vm, &error));
    CHECK(vmbed_vm_state(door->g.vm) == VMBED_STATE_RUNNING);
    return NULL;
}

static void *free_at_last(void *user)
{
    struct door *door = user;
    vmbed_vm_free(door->g.vm);
    door->freed = 1;
    return NULL;
}

static void blocks(vmbed_host *host)
{
    static struct door stopped, paused, freed;
    struct timespec begin, end;
    pthread_t threads[3];
    int32_t cause;
    make_door(&stopped), make_door(&paused), make_door(&freed);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    CHECK(!pthread_create(&threads[0], NULL, stop_in_vain, &stopped));
    CHECK(!pthread_create(&threads[1], NULL, pause_in_vain, &paused));
    CHECK(!pthread_create(&threads[2], NULL, free_at_last, &freed));
    FAILS(VMBED_ERR_TIMED_OUT, "100 ms", vmbed_vm_wait(stopped.g.vm, 100, &cause, &error));
    OK(vmbed_vm_request_stop(stopped.g.vm, &error));
    pthread_join(threads[0], NULL), pthread_join(threads[1], NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    CHECK(end.tv_sec - begin.tv_sec >= 9 && end.tv_sec - begin.tv_sec <= 30);
    /* Free promises that no callback runs when it returns: it waits, and the VM is gone for everybody else. */
    CHECK(!freed.freed && !freed.destroyed);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "was freed", vmbed_vm_pause(freed.g.vm, &error));
    sem_post(&stopped.open), sem_post(&paused.open), sem_post(&freed.open);
    OK(vmbed_vm_wait(stopped.g.vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_HOST_STOP);
    OK(vmbed_vm_pause(paused.g.vm, &error));
    OK(vmbed_vm_resume(paused.g.vm, &error));
    pthread_join(threads[2], NULL);
    CHECK(freed.freed && freed.destroyed == 1);
    drop(&stopped.g), drop(&paused.g), drop(&freed.g);
    CHECK(stopped.destroyed == 1 && paused.destroyed == 1 && freed.destroyed == 1);
    (void)host;
}

void a_callback_that_blocks(void)
{
    beside_another_vm(blocks);
}

/* The VM of a callback that is not a device's, and how often its data ended. */
struct caller {
    _Atomic(vmbed_vm *) vm;
    atomic_int calls, destroyed;
};

static void frees_its_vm(struct caller *caller)
{
    if (caller->calls++)
        return;
    for (int i = 0; i < 60000 && !caller->vm; i++)
        usleep(1000);
    refuses_to_wait(caller->vm);
    vmbed_vm_free(caller->vm);
}

static void hook(void *user, uint64_t vm, int32_t role, uint32_t index, int32_t tid)
{
    CHECK(vm > 0 && role >= 0 && index == 0 && tid > 0);
    frees_its_vm(user);
}

static void console(void *user, const uint8_t *data, size_t length)
{
    CHECK(length > 0 && data[0] == 'x');
    frees_its_vm(user);
}

static void caller_end(void *user)
{
    ((struct caller *)user)->destroyed++;
}

/* The VM ends, as its own callback wished, and its data end once. */
static void ends_by_itself(struct caller *caller, const vmbed_events *events)
{
    CHECK(next_cause(events) == VMBED_CAUSE_HOST_STOP);
    for (int i = 0; i < 60000 && !caller->destroyed; i++)
        usleep(1000);
    CHECK(caller->destroyed == 1 && caller->calls >= 1);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "was freed", vmbed_vm_start(caller->vm, &error));
}

static void put(uint8_t *image, size_t at, uint64_t value, size_t length)
{
    memcpy(image + at, &value, length);
}

/* A kernel of eight bytes with a PVH entry, which writes to its serial port for ever. */
static void write_kernel(const char *path)
{
    /* mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp $-1 */
    static const uint8_t code[] = {0x66, 0xba, 0xf8, 0x03, 0xb0, 'x', 0xee, 0xeb, 0xfd};
    uint8_t image[0x300] = "\177ELF\2\1\1";
    put(image, 18, 62, 2), put(image, 32, 64, 8), put(image, 54, 56, 2), put(image, 56, 2, 2);
    put(image, 64, 1, 4), put(image, 72, 0x200, 8), put(image, 88, 0x1000000, 8);
    put(image, 96, sizeof code, 8), put(image, 104, 0x1000, 8);
    put(image, 120, 4, 4), put(image, 128, 0x100, 8), put(image, 152, 20, 8), put(image, 160, 20, 8);
    put(image, 0x100, 4, 4), put(image, 0x104, 4, 4), put(image, 0x108, 18, 4);
    memcpy(image + 0x10c, "Xen", 4), put(image, 0x110, 0x1000000, 4);
    memcpy(image + 0x200, code, sizeof code);
    FILE *file = fopen(path, "w");
    CHECK(file && fwrite(image, sizeof image, 1, file) == 1 && !fclose(file));
}

static void a_console_callback_frees_its_vm(void)
{
    struct caller caller = {0};
    struct guest g = {0};
    vmbed_events *events;
    char path[64];
    snprintf(path, sizeof path, "/tmp/vmbed-kernel-%d", getpid());
    write_kernel(path);
    OK(vmbed_host_open(NULL, &g.host, &error));
    OK(vmbed_config_new_linux(path, &g.config, &error));
    OK(vmbed_config_set_memory(g.config, 64 << 20, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    OK(vmbed_builder_console_callback(g.builder, console, &caller, caller_end, &error));
    OK(vmbed_builder_build(g.builder, &g.vm, &error));
    unlink(path);
    caller.vm = g.vm;
    OK(vmbed_vm_events(g.vm, &events, &error));
    OK(vmbed_vm_start(g.vm, &error));
    ends_by_itself(&caller, events);
    vmbed_events_free(events);
    drop(&g);
}

static void a_thread_hook_frees_its_vm(void)
{
    struct caller caller = {0};
    struct guest g = make(spins, sizeof spins, NULL);
    vmbed_builder *builder;
    vmbed_events *events;
    vmbed_vm *vm;
    OK(vmbed_builder_new(g.host, g.config, &builder, &error));
    OK(vmbed_builder_on_thread_start(builder, hook, &caller, caller_end, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_events(vm, &events, &error));
    caller.vm = vm;
    vmbed_builder_free(builder);
    ends_by_itself(&caller, events);
    vmbed_events_free(events);
    drop(&g);
}

static void log_once(void *user, int32_t level, const char *target, const char *message)
{
    struct caller *caller = user;
    (void)level, (void)target, (void)message;
    /* Takes itself away, and lives until it returns. */
    if (caller->calls++ == 0) {
        OK(vmbed_log_set(VMBED_LOG_OFF, NULL, NULL, NULL, &error));
        CHECK(caller->destroyed == 0);
        FAILS(VMBED_ERR_INVALID_ARGUMENT, "NULL", vmbed_vm_start(NULL, &error));
    }
}

static void a_log_callback_takes_itself_away(void)
{
    struct caller caller = {0};
    OK(vmbed_log_set(VMBED_LOG_TRACE, log_once, &caller, caller_end, &error));
    struct guest g = make(spins, sizeof spins, NULL);
    OK(vmbed_vm_start(g.vm, &error));
    drop(&g);
    CHECK(caller.calls >= 1 && caller.destroyed == 1);
}

static void others_reenter_and_free(void)
{
    a_console_callback_frees_its_vm();
    a_thread_hook_frees_its_vm();
    a_log_callback_takes_itself_away();
}

void other_callbacks_reenter_and_free(void)
{
    beside_another_vm_often(others_reenter_and_free);
}

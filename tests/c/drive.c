/* Cases of the C API in which the caller's threads and loop drive a VM. */
#include "guest.h"

/* A guest that is built, but not by the library's threads alone. */
static struct guest prepare(const uint8_t *code, size_t length, struct port *port)
{
    struct guest g = {0};
    OK(vmbed_host_open(NULL, &g.host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, code, length, &g.config, &error));
    if (!port)
        OK(vmbed_config_set_platform(g.config, VMBED_PLATFORM_PC, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    if (port)
        OK(vmbed_builder_add_pio(g.builder, "port", 0x10, 8, &port_ops, port, &error));
    return g;
}

static void *interrupts(void *vm)
{
    OK(vmbed_vcpu_interrupt(vm, 0, &error));
    return NULL;
}

void vcpus_on_the_callers_threads(void)
{
    struct port port = {0};
    struct guest g = prepare(writes, sizeof writes, &port);
    pthread_t thread;
    int32_t outcome = 0, cause;
    OK(vmbed_builder_caller_vcpus(g.builder, &error));
    OK(vmbed_builder_build(g.builder, &g.vm, &error));
    OK(vmbed_vm_start(g.vm, &error));
    for (int round = 0; round < 10; round++) {
        CHECK(!pthread_create(&thread, NULL, interrupts, g.vm));
        OK(vmbed_vcpu_run(g.vm, 0, &outcome, &error));
        CHECK(outcome == VMBED_VCPU_INTERRUPTED);
        CHECK(!pthread_join(thread, NULL));
    }
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "there is no vCPU 1", vmbed_vcpu_run(g.vm, 1, &outcome, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "outcome is NULL", vmbed_vcpu_run(g.vm, 0, NULL, &error));
    port.stop = g.vm;
    OK(vmbed_vcpu_run(g.vm, 0, &outcome, &error));
    CHECK(outcome == VMBED_VCPU_ENDED && port.writes > 0);
    OK(vmbed_vm_wait(g.vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_HOST_STOP);
    drop(&g);
    CHECK(port.destroyed == 1);

    /* One that halts; and one that is the library's to run. */
    struct port second = {0}, third = {0};
    g = prepare(talks, sizeof talks, &second);
    OK(vmbed_builder_caller_vcpus(g.builder, &error));
    OK(vmbed_builder_build(g.builder, &g.vm, &error));
    OK(vmbed_vm_start(g.vm, &error));
    OK(vmbed_vcpu_run(g.vm, 0, &outcome, &error));
    OK(vmbed_vm_wait(g.vm, 60000, &cause, &error));
    CHECK(outcome == VMBED_VCPU_ENDED && cause == VMBED_CAUSE_GUEST_HALT && second.writes == 1);
    drop(&g);
    g = make(talks, sizeof talks, &third);
    FAILS(VMBED_ERR_INVALID_STATE, "caller_vcpus", vmbed_vcpu_run(g.vm, 0, &outcome, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "pause the VM", vmbed_vcpu_interrupt(g.vm, 0, &error));
    drop(&g);
}

struct console {
    vmbed_dispatcher *dispatcher;
    vmbed_vm *vm;
    pthread_t thread;
    char text[64];
    size_t length;
    int destroyed;
};

static void console_takes(void *user, const uint8_t *data, size_t length)
{
    struct console *console = user;
    int32_t cause;
    CHECK(pthread_equal(pthread_self(), console->thread));
    CHECK(console->length + length < sizeof console->text);
    memcpy(console->text + console->length, data, length);
    console->length += length;
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_dispatcher_dispatch(console->dispatcher, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_stop(console->vm, &cause, &error));
}

static void console_destroy(void *user)
{
    ((struct console *)user)->destroyed++;
}

void devices_on_the_callers_loop(void)
{
    /* mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al; mov al, 0xfe; out 0x64, al; jmp $ */
    static const uint8_t says[] = {0xba, 0xf8, 0x03, 0xb0, 'h', 0xee, 0xb0, 'i', 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe};
    struct guest g = prepare(says, sizeof says, NULL);
    struct console console = {.thread = pthread_self()};
    vmbed_events *events;
    int32_t cause = VMBED_CAUSE_NONE;
    OK(vmbed_dispatcher_new(&console.dispatcher, &error));
    OK(vmbed_builder_set_dispatcher(g.builder, console.dispatcher, &error));
    OK(vmbed_builder_console_callback(g.builder, console_takes, &console, console_destroy, &error));
    OK(vmbed_builder_build(g.builder, &g.vm, &error));
    console.vm = g.vm;
    OK(vmbed_vm_events(g.vm, &events, &error));
    OK(vmbed_vm_start(g.vm, &error));
    struct pollfd fds[] = {
        {.fd = vmbed_dispatcher_fd(console.dispatcher), .events = POLLIN},
        {.fd = vmbed_events_fd(events), .events = POLLIN},
    };
    while (cause == VMBED_CAUSE_NONE) {
        vmbed_event *event;
        CHECK(poll(fds, 2, 60000) > 0);
        OK(vmbed_dispatcher_dispatch(console.dispatcher, &error));
        OK(vmbed_events_next(events, 0, &event, &error));
        cause = vmbed_event_cause(event);
        vmbed_event_free(event);
    }
    /* The last words. */
    OK(vmbed_dispatcher_dispatch(console.dispatcher, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_RESET && !strcmp(console.text, "hi"));
    CHECK(poll(fds, 1, 0) == 0);
    vmbed_events_free(events);
    drop(&g);
    CHECK(console.destroyed == 1);
    vmbed_dispatcher_free(console.dispatcher);
    vmbed_dispatcher_free(NULL);
    CHECK(vmbed_dispatcher_fd(NULL) == -1);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "was freed", vmbed_dispatcher_dispatch(console.dispatcher, &error));
}

/*
 * A program as old as the header beside it. It is built against that header and must run with every later library
 * of the same SONAME, so it never changes; both are replaced when the SONAME is.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <vmbed.h>

/* in al, 0x10; out 0x11, al; hlt */
static const uint8_t code[] = {0xe4, 0x10, 0xe6, 0x11, 0xf4};
static int written, ended;

static int32_t device_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)user, (void)vcpu;
    data[0] = (uint8_t)(0x40 + offset + length);
    return VMBED_OK;
}

static int32_t device_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)vcpu;
    *(int *)user = offset == 1 && length == 1 ? data[0] : -1;
    return VMBED_OK;
}

static void device_end(void *user)
{
    (void)user;
    ended++;
}

static void check(int good, const char *what, const vmbed_error *error)
{
    if (!good) {
        fprintf(stderr, "%s: %s\n", what, vmbed_error_message(error));
        exit(1);
    }
}

#define OK(call) check((call) == VMBED_OK, #call, error)

int main(void)
{
    const vmbed_device_ops ops = {sizeof ops, device_read, device_write, device_end};
    vmbed_registers registers = {.size = sizeof registers};
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_error *error = NULL;
    vmbed_host *host;
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;
    vmbed_events *events;
    vmbed_event *event;
    int32_t cause;

    OK(vmbed_host_open(NULL, &host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, code, sizeof code, &config, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_add_pio(builder, "device", 0x10, 2, &ops, &written, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_get_registers(vm, 0, &registers, &error));
    OK(vmbed_host_usage(host, &usage, &error));
    check(registers.rip == 0x1000 && usage.vcpus == 1 && usage.memory == 2 << 20, "structures", NULL);
    OK(vmbed_vm_events(vm, &events, &error));
    OK(vmbed_vm_start(vm, &error));
    OK(vmbed_vm_wait(vm, 60000, &cause, &error));
    check(cause == VMBED_CAUSE_GUEST_HALT && written == 0x41, "the guest", NULL);
    struct pollfd fd = {vmbed_events_fd(events), POLLIN, 0};
    check(poll(&fd, 1, 0) == 1, "the events' fd", NULL);
    OK(vmbed_events_next(events, 0, &event, &error));
    check(vmbed_event_kind(event) == VMBED_EVENT_STARTED && vmbed_event_vm_id(event) == vmbed_vm_id(vm), "event", NULL);
    check(vmbed_vm_start(vm, &error) == VMBED_ERR_INVALID_STATE, "start", NULL);
    check(vmbed_error_status(error) == VMBED_ERR_INVALID_STATE, "error", NULL);
    vmbed_error_free(error);
    vmbed_event_free(event);
    vmbed_events_free(events);
    vmbed_vm_free(vm);
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    vmbed_host_free(host);
    check(ended == 1, "the device's end", NULL);
    puts("an old program runs");
    return 0;
}

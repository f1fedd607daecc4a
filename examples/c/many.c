/*
 * 256 guests at once in one process, on one poll loop. Each counts down in its registers and halts; one takes
 * a triple fault, one is refused by its device, and nobody else notices.
 *
 *     cc many.c -o many $(pkg-config --cflags --libs vmbed) && ./many
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <vmbed.h>

enum { GUESTS = 256, FAULTS = 17, REFUSED = 42 };

/* mov ecx, 2000; dec ecx; jnz $-2; hlt */
static const uint8_t counts[] = {0x66, 0xb9, 0xd0, 0x07, 0x00, 0x00, 0x66, 0x49, 0x75, 0xfc, 0xf4};
/* lidt [0x1100], where there are zeroes; ud2: an exception without a handler, in protected mode */
static const uint8_t faults[] = {0x0f, 0x01, 0x1d, 0x00, 0x11, 0x00, 0x00, 0x0f, 0x0b};
/* out 0x10, al; hlt */
static const uint8_t writes[] = {0xe6, 0x10, 0xf4};

static int32_t refuse_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset, (void)data, (void)length;
    return VMBED_ERR_UNSUPPORTED;
}

static int32_t refuse_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset, (void)data, (void)length;
    return VMBED_ERR_UNSUPPORTED;
}

static void check(int32_t status, vmbed_error **error)
{
    if (status != VMBED_OK) {
        fprintf(stderr, "many: %s\n", vmbed_error_message(*error));
        exit(1);
    }
}

static vmbed_vm *make(const vmbed_host *host, const vmbed_events *events, int number)
{
    const vmbed_device_ops device = {.size = sizeof device, .read = refuse_read, .write = refuse_write};
    const uint8_t *code = number == FAULTS ? faults : number == REFUSED ? writes : counts;
    size_t length = number == FAULTS ? sizeof faults : number == REFUSED ? sizeof writes : sizeof counts;
    vmbed_error *error;
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;

    int32_t mode = number == FAULTS ? VMBED_MODE_PROTECTED : VMBED_MODE_REAL;
    check(vmbed_config_new_bare(mode, 0x1000, code, length, &config, &error), &error);
    check(vmbed_builder_new(host, config, &builder, &error), &error);
    check(vmbed_builder_set_events(builder, events, &error), &error);
    check(vmbed_builder_add_pio(builder, "refusal", 0x10, 1, &device, NULL, &error), &error);
    check(vmbed_builder_build(builder, &vm, &error), &error);
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    return vm;
}

int main(void)
{
    vmbed_error *error;
    vmbed_host *host;
    vmbed_events *events;
    vmbed_vm *vms[GUESTS];
    int halted = 0, faulted = 0, refused = 0, others = 0;

    check(vmbed_host_open(NULL, &host, &error), &error);
    check(vmbed_events_new(&events, &error), &error);
    for (int i = 0; i < GUESTS; i++)
        vms[i] = make(host, events, i);
    for (int i = 0; i < GUESTS; i++)
        check(vmbed_vm_start(vms[i], &error), &error);

    struct pollfd readable = {.fd = vmbed_events_fd(events), .events = POLLIN};
    while (halted + faulted + refused + others < GUESTS) {
        vmbed_event *event;
        if (poll(&readable, 1, 60000) <= 0) {
            fprintf(stderr, "many: waited a minute for an event: %d, %d, %d, %d\n", halted, faulted, refused, others);
            return 1;
        }
        while (vmbed_events_next(events, 0, &event, NULL) == VMBED_OK && event != NULL) {
            int32_t cause = vmbed_event_cause(event);
            if (cause == VMBED_CAUSE_GUEST_HALT)
                halted++;
            else if (cause == VMBED_CAUSE_TRIPLE_FAULT)
                faulted++;
            else if (cause == VMBED_CAUSE_DEVICE_FAULT)
                refused++, printf("one ended so: %s\n", vmbed_event_text(event));
            else if (cause != VMBED_CAUSE_NONE)
                others++;
            vmbed_event_free(event);
        }
    }
    printf("%d halted, %d took a triple fault, %d was refused, %d ended otherwise\n", halted, faulted, refused, others);

    for (int i = 0; i < GUESTS; i++)
        vmbed_vm_free(vms[i]);
    vmbed_events_free(events);
    vmbed_host_free(host);
    return !(halted == GUESTS - 2 && faulted == 1 && refused == 1);
}

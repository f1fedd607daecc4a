/* The guest tests/guests/virtio.c, which a script drives; it is at $VMBED_GUEST. */
#ifndef DRIVEN_H
#define DRIVEN_H
#include "guest.h"
#include <time.h>

enum { END, READ, WRITE, FLUSH, BEGIN_READ, FINISH, SEND, RECEIVE, RESET, TELL, BEGIN_WRITE, INFLATE, DEFLATE, ACCOUNT, ASKED, TARGET, DISCARD, ZERO, HEADER };

struct step {
    uint32_t op, sector, sectors, fill;
};

struct result {
    uint32_t status, length;
    uint64_t sum;
};

struct said {
    atomic_int last;
};

__attribute__((unused)) static int32_t said_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset, (void)data, (void)length;
    return VMBED_OK;
}

__attribute__((unused)) static int32_t said_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    struct said *said = user;
    (void)vcpu, (void)offset, (void)length;
    said->last = data[0];
    return VMBED_OK;
}

static const vmbed_device_ops said_ops = {sizeof said_ops, said_read, said_write, NULL};

/* A PC with the guest, that many disks and cards to attach something to, and a port that it tells on. */
__attribute__((unused)) static struct guest prepare(int disks, int nets, struct said *said)
{
    static uint8_t code[1 << 16];
    const vmbed_disk disk = {.size = sizeof disk};
    const vmbed_net net = {.size = sizeof net};
    struct guest g = {0};
    CHECK(getenv("VMBED_GUEST"));
    FILE *file = fopen(getenv("VMBED_GUEST"), "rb");
    CHECK(file);
    size_t length = fread(code, 1, sizeof code, file);
    CHECK(length > 0 && length < sizeof code);
    fclose(file);
    OK(vmbed_host_open(NULL, &g.host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_LONG, 0x10000, code, length, &g.config, &error));
    OK(vmbed_config_set_stack(g.config, 0x7f00, &error));
    OK(vmbed_config_set_memory(g.config, 4 << 20, &error));
    OK(vmbed_config_set_platform(g.config, VMBED_PLATFORM_PC, &error));
    while (disks--)
        OK(vmbed_config_add_disk(g.config, &disk, &error));
    while (nets--)
        OK(vmbed_config_add_net(g.config, &net, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    if (said)
        OK(vmbed_builder_add_pio(g.builder, "said", 0x10, 1, &said_ops, said, &error));
    return g;
}

/* A configuration with the guest, and that disk. */
__attribute__((unused)) static vmbed_config *with_disk(const vmbed_disk *disk)
{
    struct guest g = prepare(0, 0, NULL);
    OK(vmbed_config_add_disk(g.config, disk, &error));
    vmbed_builder_free(g.builder), vmbed_host_free(g.host);
    return g.config;
}

__attribute__((unused)) static void start(struct guest *g, const struct step *steps, size_t size)
{
    OK(vmbed_builder_build(g->builder, &g->vm, &error));
    OK(vmbed_vm_write_memory(g->vm, 0x8000, (const uint8_t *)steps, size, &error));
    OK(vmbed_vm_start(g->vm, &error));
}

/* How the steps went, when all are done. */
__attribute__((unused)) static void finish(struct guest *g, struct result *results, size_t size)
{
    int32_t cause;
    OK(vmbed_vm_wait(g->vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_RESET);
    OK(vmbed_vm_read_memory(g->vm, 0x9000, (uint8_t *)results, size, &error));
}

__attribute__((unused)) static void wait_for(const atomic_int *number, int value)
{
    const struct timespec moment = {0, 1000000};
    for (int i = 0; *number != value; i++) {
        CHECK(i < 60000);
        nanosleep(&moment, NULL);
    }
}

#endif

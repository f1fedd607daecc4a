/*
 * Guests that break the rules, through C: tests/guests/hostile.c, at $VMBED_HOSTILE_GUEST, does every row of hostile-rows.h with the devices of one
 * VM, and a second VM must not notice. tests/hostile/driven.rs does the same in Rust. lies.c and host.c have the other rows.
 */
#include "rogue.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

void guests_that_break_the_rules(void);

enum { MEMORY = 4 << 20, SECTORS = 1024, END = 255 };

static int32_t ask_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    struct ask *ask = user;
    uint32_t row;
    (void)vcpu, (void)offset;
    pthread_mutex_lock(&ask->lock);
    while (!ask->given && !ask->ended)
        pthread_cond_wait(&ask->changed, &ask->lock);
    row = ask->given ? ask->row : END;
    ask->given = false;
    pthread_mutex_unlock(&ask->lock);
    memcpy(data, &row, length < sizeof row ? length : sizeof row);
    return VMBED_OK;
}

static int32_t ask_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    struct ask *ask = user;
    (void)vcpu, (void)offset;
    pthread_mutex_lock(&ask->lock);
    ask->answer = 0, ask->said = true;
    memcpy(&ask->answer, data, length < sizeof ask->answer ? length : sizeof ask->answer);
    pthread_cond_broadcast(&ask->changed);
    pthread_mutex_unlock(&ask->lock);
    return VMBED_OK;
}

static const vmbed_device_ops ask_ops = {sizeof ask_ops, ask_read, ask_write, NULL};

void rogue_begin(struct rogue *rogue, vmbed_host *host, const char *const *taps)
{
    static uint8_t code[1 << 16];
    const vmbed_disk disk = {.size = sizeof disk};
    vmbed_net nets[2] = {{.size = sizeof nets[0]}, {.size = sizeof nets[1]}};
    const vmbed_balloon balloon = {.size = sizeof balloon, .hinting = 1};
    vmbed_config *config;
    vmbed_builder *builder;
    int cable[2];
    CHECK(getenv("VMBED_HOSTILE_GUEST"));
    FILE *file = fopen(getenv("VMBED_HOSTILE_GUEST"), "rb");
    CHECK(file);
    size_t length = fread(code, 1, sizeof code, file);
    CHECK(length > 0 && length < sizeof code);
    fclose(file);
    OK(vmbed_config_new_bare(VMBED_MODE_LONG, 0x10000, code, length, &config, &error));
    OK(vmbed_config_set_stack(config, 0x7f00, &error));
    OK(vmbed_config_set_memory(config, MEMORY, &error));
    OK(vmbed_config_set_platform(config, VMBED_PLATFORM_PC, &error));
    OK(vmbed_config_set_rng(config, true, &error));
    OK(vmbed_config_set_console(config, VMBED_CONSOLE_VIRTIO, &error));
    OK(vmbed_config_set_balloon(config, &balloon, &error));
    OK(vmbed_config_add_disk(config, &disk, &error));
    for (int i = 0; i < 2; i++) {
        nets[i].tap = taps ? taps[i] : NULL;
        OK(vmbed_config_add_net(config, &nets[i], &error));
    }
    OK(vmbed_builder_new(host, config, &builder, &error));
    rogue->disk = memfd_create("hostile-disk", MFD_CLOEXEC);
    CHECK(rogue->disk >= 0 && ftruncate(rogue->disk, 512 * SECTORS) == 0);
    OK(vmbed_builder_disk_fd(builder, 0, rogue->disk, &error));
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, cable) == 0);
    for (int i = 0; i < 2; i++) {
        if (!taps)
            OK(vmbed_builder_net_fd(builder, i, cable[i], &error));
        close(cable[i]);
    }
    rogue->ask = (struct ask){.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    OK(vmbed_builder_add_pio(builder, "ask", 0x10, 8, &ask_ops, &rogue->ask, &error));
    OK(vmbed_builder_build(builder, &rogue->vm, &error));
    OK(vmbed_vm_events(rogue->vm, &rogue->events, &error));
    OK(vmbed_vm_start(rogue->vm, &error));
    vmbed_builder_free(builder);
    vmbed_config_free(config);
}

void rogue_end(struct rogue *rogue)
{
    int32_t cause;
    pthread_mutex_lock(&rogue->ask.lock);
    rogue->ask.ended = true;
    pthread_cond_broadcast(&rogue->ask.changed);
    pthread_mutex_unlock(&rogue->ask.lock);
    OK(vmbed_vm_wait(rogue->vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_RESET);
    vmbed_events_free(rogue->events);
    vmbed_vm_free(rogue->vm);
    close(rogue->disk);
}

uint32_t rogue_does(struct rogue *rogue, uint32_t row, const char *name)
{
    struct {
        uint32_t failed, at, broken, device;
        uint64_t found, wanted;
    } report;
    struct ask *ask = &rogue->ask;
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += 120;
    pthread_mutex_lock(&ask->lock);
    ask->row = row, ask->given = true;
    pthread_cond_broadcast(&ask->changed);
    while (!ask->said && pthread_cond_timedwait(&ask->changed, &ask->lock, &deadline) == 0)
        ;
    bool said = ask->said;
    ask->said = false;
    pthread_mutex_unlock(&ask->lock);
    OK(vmbed_vm_read_memory(rogue->vm, 0x9000, (uint8_t *)&report, sizeof report, &error));
    if (!said || report.failed || ask->answer) {
        fprintf(stderr, "row %u (%s): hostile.c:%u, %s, waits in line %u; %#lx where %#lx should be; device %#x\n", row, name, report.failed,
                said ? "has ended" : "goes on", report.at, (unsigned long)report.found, (unsigned long)report.wanted, report.device);
        abort();
    }
    return report.broken;
}

uint32_t rogue_told(struct rogue *rogue)
{
    uint32_t resets = 0;
    for (;;) {
        vmbed_event *event;
        OK(vmbed_events_next(rogue->events, 0, &event, &error));
        if (!event)
            return resets;
        int32_t kind = vmbed_event_kind(event);
        CHECK(kind == VMBED_EVENT_DEVICE_NEEDS_RESET || kind == VMBED_EVENT_BALLOON || kind == VMBED_EVENT_STARTED);
        resets += kind == VMBED_EVENT_DEVICE_NEEDS_RESET;
        vmbed_event_free(event);
    }
}

/* All that the guest can have left on its disk is the sector that it uses. */
static void disk_is_unharmed(const struct rogue *rogue)
{
    static uint8_t bytes[512 * SECTORS];
    CHECK(pread(rogue->disk, bytes, sizeof bytes, 0) == sizeof bytes);
    memset(bytes + 8 * 512, 0, 512);
    for (size_t i = 0; i < sizeof bytes; i++)
        CHECK(!bytes[i]);
}

/* How much is taken, with nobody reading. */
static size_t types_without_end(vmbed_vm *vm)
{
    static uint8_t typed[1 << 20];
    size_t all = 0, taken = 1;
    for (size_t i = 0; i < sizeof typed; i++)
        typed[i] = (uint8_t)i;
    for (; taken > 0; all += taken)
        OK(vmbed_vm_console_input(vm, typed + all, sizeof typed - all, &taken, &error));
    return all;
}

static void attack(struct rogue *rogue, uint32_t row, const char *name)
{
    vmbed_balloon_statistics before = {.size = sizeof before}, after = before;
    OK(vmbed_vm_get_balloon_statistics(rogue->vm, &before, &error));
    if (row == 22) {
        size_t typed = types_without_end(rogue->vm);
        CHECK(typed >= 4096 && typed <= 4096 + 64);
    }
    uint32_t broken = rogue_does(rogue, row, name), resets = rogue_told(rogue);
    CHECK((broken > 0) == (resets > 0) && resets <= broken);
    OK(vmbed_vm_get_balloon_statistics(rogue->vm, &after, &error));
    CHECK(row != 16 || after.ignored - before.ignored == 3 + 5);
    CHECK(vmbed_vm_state(rogue->vm) == VMBED_STATE_RUNNING);
    disk_is_unharmed(rogue);
}

void beside_another_vm(void (*happens)(vmbed_host *))
{
    static uint8_t before[MEMORY], after[MEMORY];
    static struct rogue bystander;
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_host *host;
    OK(vmbed_host_open(NULL, &host, &error));
    rogue_begin(&bystander, host, NULL);
    CHECK(rogue_does(&bystander, 0, "") == 0 && rogue_told(&bystander) == 0);
    OK(vmbed_vm_read_memory(bystander.vm, 0, before, sizeof before, &error));
    happens(host);
    OK(vmbed_host_usage(host, &usage, &error));
    CHECK(usage.vms == 1);
    OK(vmbed_vm_read_memory(bystander.vm, 0, after, sizeof after, &error));
    CHECK(!memcmp(before, after, sizeof before));
    CHECK(rogue_does(&bystander, 0, "") == 0 && rogue_told(&bystander) == 0);
    disk_is_unharmed(&bystander);
    rogue_end(&bystander);
    vmbed_host_free(host);
}

static void every_row(vmbed_host *host)
{
    static struct rogue rogue;
    rogue_begin(&rogue, host, NULL);
#define ROW(number, name) attack(&rogue, number, #name);
#include "../guests/hostile-rows.h"
#undef ROW
    rogue_end(&rogue);
}

void guests_that_break_the_rules(void)
{
    beside_another_vm(every_row);
}

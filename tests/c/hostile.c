/*
 * Guests that break the rules, through C: tests/guests/hostile.c, at $VMBED_HOSTILE_GUEST, does every row of hostile-rows.h with the devices of one
 * VM, and a second VM, which works all the time, must not notice. tests/hostile/driven.rs does the same in Rust. lies.c and host.c have the other rows.
 */
#include "rogue.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

void guests_that_break_the_rules(void);

enum { MEMORY = 4 << 20, SECTORS = ROGUE_SECTORS, DEVICES = 6, END = 255 };

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

void rogue_begin(struct rogue *rogue, vmbed_host *host, const struct attached *instead)
{
    static uint8_t code[1 << 16];
    const vmbed_disk disk = {.size = sizeof disk};
    vmbed_net nets[2] = {{.size = sizeof nets[0]}, {.size = sizeof nets[1]}};
    const vmbed_balloon balloon = {.size = sizeof balloon, .hinting = 1};
    const struct attached usual = {0}, *attached = instead ? instead : &usual;
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
        nets[i].tap = attached->taps ? attached->taps[i] : NULL;
        OK(vmbed_config_add_net(config, &nets[i], &error));
    }
    OK(vmbed_builder_new(host, config, &builder, &error));
    rogue->disk = memfd_create("hostile-disk", MFD_CLOEXEC);
    CHECK(rogue->disk >= 0 && ftruncate(rogue->disk, 512 * SECTORS) == 0);
    if (attached->disk)
        OK(vmbed_builder_disk_backend(builder, 0, attached->disk, 512 * SECTORS, false, attached->user, &error));
    else
        OK(vmbed_builder_disk_fd(builder, 0, rogue->disk, &error));
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, cable) == 0);
    for (int i = 0; i < 2 && !attached->taps; i++) {
        if (attached->cable)
            OK(vmbed_builder_net_backend(builder, i, attached->cable, cable[i], (void *)(intptr_t)cable[i], &error));
        else
            OK(vmbed_builder_net_fd(builder, i, cable[i], &error));
    }
    rogue->outside = cable[0], rogue->inside = cable[1];
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
    close(rogue->disk), close(rogue->outside), close(rogue->inside);
}

uint32_t rogue_does(struct rogue *rogue, uint32_t row, const char *name)
{
    struct {
        uint32_t failed, at, broken, device;
        uint64_t found, wanted, uses;
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

size_t types_without_end(vmbed_vm *vm)
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

/* Another VM, which uses its devices all the time. */
static struct bystander {
    struct rogue rogue;
    atomic_bool over;
    pthread_t thread;
} bystander;

static void *works(void *user)
{
    while (!bystander.over)
        CHECK(rogue_does(&bystander.rogue, USE_ALL, "another VM") == 0);
    return user;
}

/* How often it has used one of its devices. */
static uint64_t uses(void)
{
    uint64_t count;
    OK(vmbed_vm_read_memory(bystander.rogue.vm, 0x9020, (uint8_t *)&count, sizeof count, &error));
    return count;
}

/* Its memory but for what it writes to itself, by tests/guests/hostile.c: its data and stack, what goes through its devices, rings. */
static void read_the_rest(uint8_t *memory)
{
    static const uint32_t own[][2] = {{0, 0x20000}, {0x40000, 0x42000}, {0x100000, 0x130000}, {0x200000, 0x201000}, {0x300000, 0x360000}};
    OK(vmbed_vm_read_memory(bystander.rogue.vm, 0, memory, MEMORY, &error));
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        memset(memory + own[i][0], 0, own[i][1] - own[i][0]);
}

/* Whether it has used each of its devices while something happened so often: one of them had begun before. If it can go on only in between, it
 * uses one each time, which is not enough. */
static bool has_worked(uint64_t before, uint64_t times)
{
    bool has = uses() - before > DEVICES + times;
    CHECK(has || times < 128); /* another VM works meanwhile */
    return has;
}

void beside_another_vm(void (*happens)(vmbed_host *))
{
    static uint8_t before[MEMORY], after[MEMORY];
    struct rogue *rogue = &bystander.rogue;
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_host *host;
    uint64_t mark, times = 1;
    OK(vmbed_host_open(NULL, &host, &error));
    rogue_begin(rogue, host, NULL);
    CHECK(rogue_does(rogue, USE_ALL, "") == 0 && rogue_told(rogue) == 0);
    read_the_rest(before);
    bystander.over = false;
    CHECK(pthread_create(&bystander.thread, NULL, works, NULL) == 0);
    for (;; times *= 2) {
        mark = uses();
        for (uint64_t i = 0; i < times; i++)
            happens(host);
        if (has_worked(mark, times))
            break;
    }
    OK(vmbed_host_usage(host, &usage, &error));
    CHECK(usage.vms == 1);
    bystander.over = true;
    CHECK(pthread_join(bystander.thread, NULL) == 0);
    read_the_rest(after);
    CHECK(!memcmp(before, after, sizeof before));
    CHECK(rogue_does(rogue, USE_ALL, "") == 0 && rogue_told(rogue) == 0);
    disk_is_unharmed(rogue);
    rogue_end(rogue);
    vmbed_host_free(host);
}

static void (*what_is_short)(void);

static void happens_often(vmbed_host *host)
{
    (void)host;
    for (int i = 0; i < 5; i++)
        what_is_short();
}

void beside_another_vm_often(void (*happens)(void))
{
    what_is_short = happens;
    beside_another_vm(happens_often);
}

static void attack_beside(struct rogue *rogue, uint32_t row, const char *name)
{
    for (uint64_t times = 1;; times *= 2) {
        uint64_t mark = uses();
        for (uint64_t i = 0; i < times; i++)
            attack(rogue, row, name);
        if (has_worked(mark, times))
            return;
    }
}

static void every_row(vmbed_host *host)
{
    static struct rogue rogue;
    rogue_begin(&rogue, host, NULL);
#define ROW(number, name) attack_beside(&rogue, number, #name);
#include "../guests/hostile-rows.h"
#undef ROW
    rogue_end(&rogue);
}

/* Row 12: a disk that keeps its requests, or answers them. */
struct keeps {
    vmbed_block_request kept[SECTORS];
    atomic_int count;
    atomic_bool answers;
    uint8_t sector[512]; /* wherever it is */
};

static int32_t keep(struct keeps *keeps, const vmbed_block_request *request, int writes)
{
    uint8_t *at = keeps->sector;
    if (!keeps->answers) {
        CHECK(keeps->count < 16); /* no head that is in flight is taken again */
        keeps->kept[keeps->count] = *request;
        keeps->count++;
        return VMBED_BLOCK_PENDING;
    }
    CHECK(request->length <= sizeof keeps->sector);
    for (size_t i = 0; i < request->count; at += request->pieces[i++].length)
        writes ? memcpy(at, request->pieces[i].base, request->pieces[i].length) : memcpy(request->pieces[i].base, at, request->pieces[i].length);
    return 0;
}

static int32_t keep_read(void *user, const vmbed_block_request *request) { return keep(user, request, 0); }
static int32_t keep_write(void *user, const vmbed_block_request *request) { return keep(user, request, 1); }
static const vmbed_block_ops keep_ops = {.size = sizeof keep_ops, .read = keep_read, .write = keep_write, .flush = keep_read};

/* Whatever the guest offers, what waits for its host is no more than its queue holds. */
static void a_disk_that_keeps_everything(vmbed_host *host)
{
    static struct rogue rogue;
    static struct keeps keeps;
    const struct attached attached = {.disk = &keep_ops, .user = &keeps};
    keeps.answers = true;
    rogue_begin(&rogue, host, &attached);
    for (int round = 0; round < 3; round++) {
        keeps.answers = false;
        keeps.count = 0;
        CHECK(rogue_does(&rogue, SUBMIT_WITHOUT_END, "") == 1 && rogue_told(&rogue) == 1);
        CHECK(keeps.count == 16); /* those before the first that was offered twice */
        keeps.answers = true;
        for (int i = 0; i < 16; i++)
            OK(vmbed_block_complete(keeps.kept[i].disk, keeps.kept[i].tag, 0, &error));
        CHECK(rogue_does(&rogue, RESTART_ALL, "") == 0);
    }
    rogue_end(&rogue);
}

/* Row 20: what comes from outside of a card need not be a frame. */
static void what_is_no_frame(vmbed_host *host)
{
    enum { FEW = 4, LENGTHS = 12 + 14, LONGER = 12 + 65558 };
    static uint8_t frame[LONGER];
    static struct rogue rogue;
    vmbed_net_statistics before = {.size = sizeof before}, after = before;
    memset(frame, 0xff, sizeof frame);
    rogue_begin(&rogue, host, NULL);
    CHECK(rogue_does(&rogue, USE_ALL, "") == 0);
    for (int first = 0; first <= LENGTHS; first += FEW) {
        OK(vmbed_vm_get_net_statistics(rogue.vm, 1, &before, &error));
        /* No more at a time: a cable holds no more while its card has no buffers. */
        int count = 0;
        for (int i = first; i < first + FEW && i <= LENGTHS; i++, count++) {
            ssize_t length = i < LENGTHS ? i : LONGER;
            CHECK(send(rogue.outside, frame, length, 0) == length);
        }
        CHECK(rogue_does(&rogue, USE_ALL, "") == 0); /* the two frames that it waits for come after them */
        OK(vmbed_vm_get_net_statistics(rogue.vm, 1, &after, &error));
        CHECK(after.rx_frames == before.rx_frames + 2 && after.rx_dropped == before.rx_dropped + count);
    }
    CHECK(rogue_told(&rogue) == 0);
    rogue_end(&rogue);
}

/* An end of a cable whose other end does, and leaves, whatever is left to do. */
static int32_t cable_receive(void *user, const vmbed_piece *pieces, size_t count, size_t *length)
{
    uint8_t frame[2048];
    ssize_t got = recv((int)(intptr_t)user, frame, sizeof frame, MSG_DONTWAIT);
    if (got < 0)
        return errno;
    CHECK(count > 0);
    for (size_t at = 0, i = 0; at < (size_t)got; i++) {
        size_t part = (size_t)got - at < pieces[i].length ? (size_t)got - at : pieces[i].length;
        memcpy(pieces[i].base, frame + at, part);
        at += part;
    }
    *length = (size_t)got;
    return 0;
}

static int32_t cable_send(void *user, const vmbed_piece *pieces, size_t count)
{
    uint8_t frame[2048];
    size_t at = 0;
    for (size_t i = 0; i < count; at += pieces[i++].length) {
        CHECK(pieces[i].length <= sizeof frame - at);
        memcpy(frame + at, pieces[i].base, pieces[i].length);
    }
    return send((int)(intptr_t)user, frame, at, MSG_DONTWAIT) < 0 ? errno : 0;
}

static const vmbed_net_ops cable_ops = {.size = sizeof cable_ops,
                                        .receive = cable_receive,
                                        .send = cable_send,
                                        .offloads = VMBED_OFFLOAD_CSUM | VMBED_OFFLOAD_TSO4 | VMBED_OFFLOAD_TSO6};

/* Row 20: headers that leave something to do where their frame is not, from a guest, and from outside for one. */
static void offsets_behind_the_frame(vmbed_host *host)
{
    static const struct {
        uint8_t header[12];
        bool is_sound;
    } cases[] = {{{1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0}, false},    {{1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0}, false},
                 {{1, 0, 0, 0, 0, 0, 34, 0, 25, 0, 0, 0}, false},        {{1, 0, 0, 0, 0, 0, 34, 0, 24, 0, 0, 0}, true},
                 {{1, 1, 54, 0, 0xb4, 5, 59, 0, 0, 0, 0, 0}, false},     {{1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0}, false},
                 {{1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0}, true}};
    const struct attached attached = {.cable = &cable_ops};
    static struct rogue rogue;
    vmbed_net_statistics before = {.size = sizeof before}, after = before;
    rogue_begin(&rogue, host, &attached);
    CHECK(rogue_does(&rogue, LEAVE_TO_DO, "") == 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t frame[72] = {0};
        memcpy(frame, cases[i].header, 12);
        OK(vmbed_vm_get_net_statistics(rogue.vm, 1, &before, &error));
        CHECK(send(rogue.outside, frame, sizeof frame, 0) == sizeof frame);
        CHECK(rogue_does(&rogue, USE_ALL, "") == 0); /* the two frames that it waits for come after it */
        OK(vmbed_vm_get_net_statistics(rogue.vm, 1, &after, &error));
        CHECK(after.rx_frames == before.rx_frames + 2 + cases[i].is_sound && after.rx_dropped == before.rx_dropped + !cases[i].is_sound);
    }
    CHECK(rogue_told(&rogue) == 0);
    rogue_end(&rogue);
}

/* Row 22: where a guest waits until it may read its serial port, and says what it has read. */
static struct reader {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool ended;
    size_t wanted, count;
    uint8_t read[8192];
} reader = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void reads(size_t wanted, bool ended)
{
    pthread_mutex_lock(&reader.lock);
    reader.wanted = wanted, reader.count = 0, reader.ended = ended;
    pthread_cond_broadcast(&reader.changed);
    pthread_mutex_unlock(&reader.lock);
}

static size_t has_read(void)
{
    pthread_mutex_lock(&reader.lock);
    size_t count = reader.count;
    pthread_mutex_unlock(&reader.lock);
    return count;
}

static int32_t reader_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset;
    pthread_mutex_lock(&reader.lock);
    while (!reader.ended && reader.count >= reader.wanted)
        pthread_cond_wait(&reader.changed, &reader.lock);
    memset(data, !reader.ended, length);
    pthread_mutex_unlock(&reader.lock);
    return VMBED_OK;
}

static int32_t reader_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset;
    pthread_mutex_lock(&reader.lock);
    CHECK(length == 1 && reader.count < sizeof reader.read);
    reader.read[reader.count++] = *data;
    pthread_mutex_unlock(&reader.lock);
    return VMBED_OK;
}

static const vmbed_device_ops reader_ops = {sizeof reader_ops, reader_read, reader_write, NULL};

static void a_serial_port_that_nobody_reads(vmbed_host *host)
{
    /* again: in al, 0x10; test al, al; jz ends; more: mov dx, 0x3fd; in al, dx; test al, 1; jz again;
     * mov dx, 0x3f8; in al, dx; out 0x11, al; jmp more; ends: mov al, 0xfe; out 0x64, al; hlt */
    static const uint8_t polls[] = {0xe4, 0x10, 0x84, 0xc0, 0x74, 0x10, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf2,
                                    0xba, 0xf8, 0x03, 0xec, 0xe6, 0x11, 0xeb, 0xf0, 0xb0, 0xfe, 0xe6, 0x64, 0xf4};
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;
    int32_t cause;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, polls, sizeof polls, &config, &error));
    OK(vmbed_config_set_platform(config, VMBED_PLATFORM_PC, &error));
    OK(vmbed_config_set_console(config, VMBED_CONSOLE_SERIAL, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    reads(0, false);
    OK(vmbed_builder_add_pio(builder, "reader", 0x10, 2, &reader_ops, NULL, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_start(vm, &error));
    for (int round = 0; round < 3; round++) {
        size_t typed = types_without_end(vm);
        CHECK(typed >= 4096 && typed <= 4096 + 64);
        reads(typed, false);
        for (int wait = 0; has_read() < typed; wait++) {
            CHECK(wait < 60000);
            usleep(1000);
        }
        for (size_t i = 0; i < typed; i++)
            CHECK(reader.read[i] == (uint8_t)i); /* what was taken comes, in its order */
    }
    reads(0, true);
    OK(vmbed_vm_wait(vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_RESET);
    vmbed_vm_free(vm), vmbed_builder_free(builder), vmbed_config_free(config);
}

static void every_guest(vmbed_host *host)
{
    every_row(host);
    a_disk_that_keeps_everything(host);
    what_is_no_frame(host);
    offsets_behind_the_frame(host);
    a_serial_port_that_nobody_reads(host);
}

void guests_that_break_the_rules(void)
{
    beside_another_vm(every_guest);
}

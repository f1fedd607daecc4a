/* Cases of the C API with disks and cards of one's own; the guest is tests/guests/virtio.c, at $VMBED_GUEST. */
#include "driven.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define SECTORS 1024
/* 7 and 8 in two sectors. */
#define SUM (512 * (7 + 8))

/* A disk in memory. It fails at sector 100, and keeps what is about sector 200 or beyond. */
struct ram {
    uint8_t bytes[SECTORS * 512];
    vmbed_block_request kept[4];
    int writes[4];
    atomic_int count, flushes, discards, destroyed;
};

static void move(const vmbed_block_request *request, uint8_t *bytes, int writes)
{
    uint64_t length = 0;
    for (size_t i = 0; i < request->count; i++) {
        const vmbed_piece *piece = &request->pieces[i];
        uint8_t *at = bytes + request->offset + length;
        writes ? memcpy(at, piece->base, piece->length) : memcpy(piece->base, at, piece->length);
        length += piece->length;
    }
    CHECK(length == request->length && length % 512 == 0 && request->durable == 0);
}

static int32_t serve(struct ram *ram, const vmbed_block_request *request, int writes)
{
    if (request->offset / 512 == 100)
        return ENOSPC;
    if (request->offset / 512 < 200) {
        move(request, ram->bytes, writes);
        return 0;
    }
    CHECK(ram->count < 4);
    ram->writes[ram->count] = writes;
    ram->kept[ram->count] = *request;
    ram->count++;
    return VMBED_BLOCK_PENDING;
}

static int32_t ram_read(void *user, const vmbed_block_request *request)
{
    return serve(user, request, 0);
}

static int32_t ram_write(void *user, const vmbed_block_request *request)
{
    return serve(user, request, 1);
}

/* Ends within the call, as C's third way. */
static int32_t ram_flush(void *user, const vmbed_block_request *request)
{
    CHECK(request->count == 0 && !request->pieces && request->length == 0);
    ((struct ram *)user)->flushes++;
    OK(vmbed_block_complete(request->disk, request->tag, 0, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "pending", vmbed_block_complete(request->disk, request->tag, 0, &error));
    return VMBED_BLOCK_PENDING;
}

static int32_t ram_discard(void *user, const vmbed_block_request *request)
{
    CHECK(request->count == 0 && !request->pieces && request->length == 4 * 512 && !request->unmap);
    ((struct ram *)user)->discards++;
    return 0;
}

static int32_t ram_write_zeroes(void *user, const vmbed_block_request *request)
{
    CHECK(request->count == 0 && !request->durable && request->unmap);
    memset(((struct ram *)user)->bytes + request->offset, 0, request->length);
    return 0;
}

static void ram_destroy(void *user)
{
    ((struct ram *)user)->destroyed++;
}

static const vmbed_block_ops ram_ops = {sizeof ram_ops, ram_read, ram_write, ram_flush, ram_destroy, ram_discard, ram_write_zeroes};

static void *complete_backwards(void *user)
{
    struct ram *ram = user;
    while (ram->count > 0) {
        const vmbed_block_request *request = &ram->kept[--ram->count];
        move(request, ram->bytes, ram->writes[ram->count]);
        OK(vmbed_block_complete(request->disk, request->tag, 0, &error));
        FAILS(VMBED_ERR_INVALID_ARGUMENT, "pending", vmbed_block_complete(request->disk, request->tag, 0, &error));
    }
    return NULL;
}

void a_disk_of_ones_own(void)
{
    static const struct step steps[] = {
        {WRITE, 3, 2, 7}, {FLUSH, 0, 0, 0}, {READ, 3, 2, 0}, {READ, 100, 1, 0}, {BEGIN_READ, 200, 1, 0},
        {BEGIN_WRITE, 300, 2, 7}, {BEGIN_READ, 400, 1, 0}, {TELL, 0, 0, 1}, {FINISH, 0, 0, 0},
        {ZERO, 4, 1, 1}, {DISCARD, 8, 4, 0}, {DISCARD, 8, 4, 1}, {END, 0, 0, 0}};
    struct ram *ram = calloc(1, sizeof *ram);
    struct said said = {0};
    struct result results[12];
    vmbed_disk_statistics done = {.size = sizeof done};
    pthread_t other;
    vmbed_events *events;
    struct guest g = prepare(1, 0, &said);
    OK(vmbed_builder_disk_backend(g.builder, 0, &ram_ops, 512 * SECTORS, false, ram, &error));
    start(&g, steps, sizeof steps);
    wait_for(&said.last, 1);
    wait_for(&ram->count, 3);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "pending", vmbed_block_complete(ram->kept[0].disk, 12345, 0, &error));
    CHECK(pthread_create(&other, NULL, complete_backwards, ram) == 0 && pthread_join(other, NULL) == 0);
    finish(&g, results, sizeof results);
    CHECK(results[0].status == 0 && results[1].status == 0 && results[3].status == 1);
    CHECK(results[2].status == 0 && results[2].length == 1025 && results[2].sum == SUM);
    CHECK(results[8].status == 0 && results[8].length == 513 + 1 + 513);
    CHECK(ram->bytes[512 * 301] == 8 && ram->flushes == 1);
    CHECK(results[9].status == 0 && results[10].status == 0 && results[11].status == 2);
    CHECK(ram->bytes[512 * 3] == 7 && ram->bytes[512 * 4] == 0 && ram->discards == 1);
    OK(vmbed_vm_get_disk_statistics(g.vm, 0, &done, &error));
    CHECK(done.reads == 3 && done.read_bytes == 2048 && done.writes == 2 && done.written_bytes == 2048);
    CHECK(done.flushes == 1 && done.errors == 2 && done.discards == 2 && done.discarded_bytes == 5 * 512);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "disk1", vmbed_vm_get_disk_statistics(g.vm, 1, &done, &error));
    OK(vmbed_vm_events(g.vm, &events, &error));
    int failures = 0;
    for (;;) {
        vmbed_event *event;
        OK(vmbed_events_next(events, 0, &event, &error));
        if (!event)
            break;
        if (vmbed_event_kind(event) == VMBED_EVENT_BACKEND_ERROR) {
            CHECK(!strcmp(vmbed_event_device(event), "disk0"));
            failures++;
        }
        vmbed_event_free(event);
    }
    CHECK(failures == 1);
    vmbed_events_free(events);
    drop(&g);
    CHECK(ram->destroyed == 1);

    /* A table that lacks something, a capacity that is none, a disk that is not there: the data end once each. */
    g = prepare(1, 0, NULL);
    vmbed_block_ops bad = ram_ops;
    bad.read = NULL;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "read is NULL",
          vmbed_builder_disk_backend(g.builder, 0, &bad, 512, false, ram, &error));
    bad = ram_ops, bad.write = NULL;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "write is NULL",
          vmbed_builder_disk_backend(g.builder, 0, &bad, 512, false, ram, &error));
    CHECK(ram->destroyed == 3);
    OK(vmbed_builder_disk_backend(g.builder, 1, &bad, 512, true, ram, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "disks[1]", vmbed_builder_build(g.builder, &g.vm, &error));
    CHECK(ram->destroyed == 4);
    drop(&g);
    g = prepare(1, 0, NULL);
    OK(vmbed_builder_disk_backend(g.builder, 0, &ram_ops, 511, false, ram, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "multiple of 512", vmbed_builder_build(g.builder, &g.vm, &error));
    CHECK(ram->destroyed == 5);
    drop(&g);
    free(ram);
}

void a_disk_that_does_not_answer(void)
{
    static const struct step steps[] = {{BEGIN_READ, 200, 1, 0}, {TELL, 0, 0, 1}, {FINISH, 0, 0, 0},
                                        {BEGIN_READ, 201, 1, 0}, {TELL, 0, 0, 2}, {FINISH, 0, 0, 0},
                                        {END, 0, 0, 0}};
    struct ram *ram = calloc(1, sizeof *ram);
    struct said said = {0};
    int32_t cause;
    struct guest g = prepare(1, 0, &said);
    OK(vmbed_builder_disk_backend(g.builder, 0, &ram_ops, 512 * SECTORS, false, ram, &error));
    start(&g, steps, sizeof steps);
    wait_for(&said.last, 1);
    wait_for(&ram->count, 1);
    FAILS(VMBED_ERR_TIMED_OUT, "disk0", vmbed_vm_pause(g.vm, &error));
    complete_backwards(ram);
    wait_for(&said.last, 2);
    wait_for(&ram->count, 1);
    OK(vmbed_vm_stop(g.vm, &cause, &error));
    CHECK(cause == VMBED_CAUSE_HOST_STOP);
    drop(&g);
    CHECK(ram->destroyed == 1);
    /* Nobody waits for it; its memory is there all the same, until somebody says that it is done with it. */
    const vmbed_block_request *late = &ram->kept[0];
    move(late, ram->bytes, 0);
    FAILS(VMBED_ERR_INVALID_STATE, "nobody waits", vmbed_block_complete(late->disk, late->tag, 0, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "", vmbed_block_complete(late->disk, late->tag, 0, &error));
    free(ram);
}

/* A network that gives every frame back; one of 99 bytes fails. */
struct echo {
    uint8_t frames[4][2048];
    size_t lengths[4];
    int put, taken, bell;
    atomic_int destroyed, takes;
};

static size_t length_of(const vmbed_piece *pieces, size_t count)
{
    size_t length = 0;
    for (size_t i = 0; i < count; i++)
        length += pieces[i].length;
    return length;
}

static int32_t echo_receive(void *user, const vmbed_piece *pieces, size_t count, size_t *length)
{
    struct echo *echo = user;
    uint64_t rang;
    CHECK(length_of(pieces, count) > 65557);
    if (echo->taken == echo->put) {
        CHECK(read(echo->bell, &rang, sizeof rang) == sizeof rang || errno == EAGAIN);
        return EAGAIN;
    }
    const uint8_t *frame = echo->frames[echo->taken % 4];
    size_t left = *length = echo->lengths[echo->taken++ % 4];
    for (size_t i = 0; left > 0; i++) {
        size_t step = left < pieces[i].length ? left : pieces[i].length;
        memcpy(pieces[i].base, frame, step);
        frame += step, left -= step;
    }
    return 0;
}

static int32_t echo_send(void *user, const vmbed_piece *pieces, size_t count)
{
    struct echo *echo = user;
    const uint64_t one = 1;
    size_t length = length_of(pieces, count), at = 0;
    CHECK(length <= 2048 && echo->put - echo->taken < 4);
    if (length == 12 + 99)
        return ENETDOWN;
    for (size_t i = 0; i < count; at += pieces[i++].length)
        memcpy(echo->frames[echo->put % 4] + at, pieces[i].base, pieces[i].length);
    echo->lengths[echo->put++ % 4] = length;
    CHECK(write(echo->bell, &one, sizeof one) == sizeof one);
    return 0;
}

static void echo_destroy(void *user)
{
    ((struct echo *)user)->destroyed++;
}

static void echo_takes(void *user, uint32_t taken)
{
    ((struct echo *)user)->takes = (int)taken;
}

static const vmbed_net_ops echo_ops = {.size = sizeof echo_ops, .receive = echo_receive, .send = echo_send, .destroy = echo_destroy};

static int32_t says_nothing(void *user, const vmbed_piece *pieces, size_t count, size_t *length)
{
    (void)user, (void)pieces, (void)count, (void)length;
    return EAGAIN;
}

static int32_t takes_all(void *user, const vmbed_piece *pieces, size_t count)
{
    (void)user, (void)pieces, (void)count;
    return 0;
}

static const vmbed_net_ops silent_ops = {.size = sizeof silent_ops, .receive = says_nothing, .send = takes_all, .destroy = echo_destroy};

void a_card_moves_to_another_network(void)
{
    static const struct step steps[] = {
        {SEND, 0, 60, 5}, {TELL, 0, 0, 1}, {RECEIVE, 0, 0, 0}, {SEND, 0, 61, 5}, {TELL, 0, 0, 2}, {RECEIVE, 0, 0, 0}, {END, 0, 0, 0}};
    struct echo silence = {.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
    struct echo other = {.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
    const vmbed_net nowhere = {.size = sizeof nowhere, .tap = "vmbednone0"}, neither = {.size = sizeof neither};
    struct result results[6];
    struct said said = {0};
    vmbed_switch *lan;
    vmbed_port *port;
    uint8_t frame[72], room[100];
    int pair[2];
    memset(frame, 0, 12), memset(frame + 12, 3, 60);
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, pair) == 0);
    struct guest g = prepare(0, 1, &said);
    OK(vmbed_builder_net_backend(g.builder, 0, &silent_ops, silence.bell, &silence, &error));
    start(&g, steps, sizeof steps);
    wait_for(&said.last, 1);
    FAILS(VMBED_ERR_NOT_FOUND, "vmbednone0", vmbed_vm_change_net(g.vm, 0, &nowhere, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "one of tap and stream", vmbed_vm_change_net(g.vm, 0, &neither, &error));
    CHECK(silence.destroyed == 0);
    OK(vmbed_vm_change_net_fd(g.vm, 0, pair[1], &error));
    CHECK(silence.destroyed == 1);
    CHECK(send(pair[0], frame, sizeof frame, 0) == sizeof frame && recv(pair[0], room, sizeof room, 0) == 73);
    wait_for(&said.last, 2);
    OK(vmbed_vm_change_net_backend(g.vm, 0, &silent_ops, other.bell, &other, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "net1", vmbed_vm_change_net_fd(g.vm, 1, pair[1], &error));
    OK(vmbed_switch_new(NULL, &lan, &error));
    OK(vmbed_switch_add_port(lan, "p", NULL, &port, &error));
    OK(vmbed_vm_change_net_port(g.vm, 0, port, &error));
    CHECK(other.destroyed == 1);
    CHECK(send(pair[0], frame, sizeof frame, 0) == sizeof frame);
    OK(vmbed_vm_change_net_fd(g.vm, 0, pair[1], &error));
    finish(&g, results, sizeof results);
    CHECK(results[2].length == 72 && results[5].length == 72);
    drop(&g);
    vmbed_port_free(port);
    vmbed_switch_free(lan);
    close(pair[0]), close(pair[1]), close(silence.bell), close(other.bell);
}

/* Frames with something left to do, there and back: a checksum at 34 + 16, and segments of 1448 bytes behind 54 of headers. */
static void offloads_both_ways(void)
{
    static const struct step steps[] = {
        {HEADER, 0x00000001, 0x00220000, 16}, {SEND, 0, 200, 5},  {RECEIVE, 1, 0, 0},
        {HEADER, 0x00360101, 0x002205a8, 16}, {SEND, 0, 1990, 5}, {RECEIVE, 2, 0, 0},
        {HEADER, 0x00360401, 0x002205a8, 16}, {SEND, 0, 1990, 5}, {END, 0, 0, 0}};
    static const uint8_t came[2][12] = {{1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0}, {1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 1, 0}};
    struct echo echo = {.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), .takes = -1};
    vmbed_net_statistics carried = {.size = sizeof carried};
    vmbed_net_ops ops = echo_ops;
    struct result results[8];
    uint8_t header[12];
    ops.offloads = VMBED_OFFLOAD_CSUM | VMBED_OFFLOAD_TSO4 | VMBED_OFFLOAD_TSO6, ops.set_offloads = echo_takes;
    struct guest g = prepare(0, 1, NULL);
    OK(vmbed_builder_net_backend(g.builder, 0, &ops, echo.bell, &echo, &error));
    start(&g, steps, sizeof steps);
    finish(&g, results, sizeof results);
    CHECK(results[2].length == 212 && results[5].length == 2002 && echo.takes == (VMBED_OFFLOAD_CSUM | VMBED_OFFLOAD_TSO4));
    for (size_t i = 0; i < 2; i++) {
        /* As the guest sent it, and the network has it; in one buffer. */
        OK(vmbed_vm_read_memory(g.vm, 0x180800 + 2048 * i, header, sizeof header, &error));
        CHECK(memcmp(header, came[i], 12) == 0 && memcmp(echo.frames[i], came[i], 10) == 0 && echo.frames[i][10] == 0);
    }
    OK(vmbed_vm_get_net_statistics(g.vm, 0, &carried, &error));
    CHECK(carried.tx_frames == 2 && carried.tx_dropped == 1 && carried.rx_frames == 2);
    drop(&g);

    /* A program that is older than offloads: what lies behind its structure is nobody's. */
    echo.takes = -1;
    ops.size = offsetof(vmbed_net_ops, offloads);
    g = prepare(0, 1, NULL);
    OK(vmbed_builder_net_backend(g.builder, 0, &ops, echo.bell, &echo, &error));
    static const struct step asks[] = {{HEADER, 0x00000001, 0x00220000, 16}, {SEND, 0, 200, 5}, {END, 0, 0, 0}};
    start(&g, asks, sizeof asks);
    finish(&g, results, sizeof *results * 2);
    OK(vmbed_vm_get_net_statistics(g.vm, 0, &carried, &error));
    CHECK(echo.takes == -1 && carried.tx_frames == 0 && carried.tx_dropped == 1);
    drop(&g);

    ops.size = sizeof ops, ops.offloads = VMBED_OFFLOAD_USO << 1;
    g = prepare(0, 1, NULL);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "offloads is 0x20", vmbed_builder_net_backend(g.builder, 0, &ops, echo.bell, &echo, &error));
    ops.offloads = VMBED_OFFLOAD_USO, ops.reserved = 1;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "reserved", vmbed_builder_net_backend(g.builder, 0, &ops, echo.bell, &echo, &error));
    drop(&g);
    close(echo.bell);
}

void a_network_of_ones_own(void)
{
    offloads_both_ways();
    static const struct step steps[] = {
        {SEND, 0, 60, 5}, {RECEIVE, 0, 0, 0}, {SEND, 0, 99, 5}, {SEND, 0, 5, 5}, {END, 0, 0, 0}};
    struct echo echo = {.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
    struct result results[4];
    vmbed_net_statistics carried = {.size = sizeof carried};
    struct guest g = prepare(0, 1, NULL);
    OK(vmbed_builder_net_backend(g.builder, 0, &echo_ops, echo.bell, &echo, &error));
    start(&g, steps, sizeof steps);
    finish(&g, results, sizeof results);
    CHECK(results[1].length == 72 && results[1].sum == 300);
    OK(vmbed_vm_get_net_statistics(g.vm, 0, &carried, &error));
    CHECK(carried.tx_frames == 1 && carried.tx_bytes == 60 && carried.tx_dropped == 2);
    CHECK(carried.rx_frames == 1 && carried.rx_bytes == 60 && carried.rx_dropped == 0);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "net1", vmbed_vm_get_net_statistics(g.vm, 1, &carried, &error));
    drop(&g);
    CHECK(echo.destroyed == 1);

    static const struct step sends[] = {{SEND, 0, 60, 5}, {SEND, 0, 99, 5}, {END, 0, 0, 0}};
    const vmbed_rate rate = {.bytes_per_second = 1 << 20};
    vmbed_net card = {.size = sizeof card, .mtu = 9000, .speed = 1000, .link_down = 1, .receive_rate = rate, .send_rate = rate};
    g = prepare(0, 0, NULL);
    vmbed_builder_free(g.builder);
    OK(vmbed_config_add_net(g.config, &card, &error));
    card.mtu = 1500, card.queues = 1 << 16;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "queues is 65536", vmbed_config_add_net(g.config, &card, &error));
    card.queues = 1;
    card.mtu = 65536;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "mtu is 65536", vmbed_config_add_net(g.config, &card, &error));
    card.mtu = 1500, card.vhost = VMBED_VHOST_REQUIRED + 1;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "vhost is 3", vmbed_config_add_net(g.config, &card, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    echo = (struct echo){.bell = echo.bell};
    OK(vmbed_builder_net_backend(g.builder, 0, &echo_ops, echo.bell, &echo, &error));
    start(&g, sends, sizeof sends);
    finish(&g, results, sizeof *results * 2);
    OK(vmbed_vm_get_net_statistics(g.vm, 0, &carried, &error));
    CHECK(carried.tx_frames == 0 && carried.tx_dropped == 2);
    OK(vmbed_vm_set_link(g.vm, 0, true, &error));
    OK(vmbed_vm_announce_net(g.vm, 0, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "net1", vmbed_vm_announce_net(g.vm, 1, &error));
    OK(vmbed_vm_set_net_rates(g.vm, 0, NULL, &rate, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "net1", vmbed_vm_set_link(g.vm, 1, true, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "net1", vmbed_vm_set_net_rates(g.vm, 1, &rate, NULL, &error));
    drop(&g);

    g = prepare(0, 1, NULL);
    vmbed_net_ops bad = echo_ops;
    bad.send = NULL;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "send is NULL",
          vmbed_builder_net_backend(g.builder, 0, &bad, echo.bell, &echo, &error));
    bad = echo_ops, bad.receive = NULL;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "receive is NULL",
          vmbed_builder_net_backend(g.builder, 0, &bad, echo.bell, &echo, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "no open file descriptor",
          vmbed_builder_net_backend(g.builder, 0, &echo_ops, -1, &echo, &error));
    CHECK(echo.destroyed == 4);
    drop(&g);
    close(echo.bell);

    echo = (struct echo){.bell = eventfd(0, EFD_CLOEXEC)};
    card = (vmbed_net){.size = sizeof card, .vhost = VMBED_VHOST_REQUIRED};
    vmbed_vm *refused;
    g = prepare(0, 0, NULL);
    vmbed_builder_free(g.builder);
    OK(vmbed_config_add_net(g.config, &card, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    OK(vmbed_builder_net_backend(g.builder, 0, &echo_ops, echo.bell, &echo, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "no TAP interface", vmbed_builder_build(g.builder, &refused, &error));
    drop(&g);
    close(echo.bell);

    card = (vmbed_net){.size = sizeof card, .stream = "/nonexistent/socket"};
    vmbed_vm *vm;
    g = prepare(0, 0, NULL);
    vmbed_builder_free(g.builder);
    OK(vmbed_config_add_net(g.config, &card, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    FAILS(VMBED_ERR_NOT_FOUND, "net0: connecting to /nonexistent/socket", vmbed_builder_build(g.builder, &vm, &error));
    drop(&g);
}

void disks_and_cards_by_descriptor(void)
{
    static const struct step steps[] = {
        {WRITE, 3, 2, 7}, {READ, 3, 2, 0}, {SEND, 0, 60, 5}, {RECEIVE, 0, 0, 0}, {END, 0, 0, 0}};
    char name[] = "/tmp/vmbed-disk-XXXXXX";
    uint8_t bytes[1024], frame[100] = {0};
    int pair[2], file = mkstemp(name), null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    struct result results[4];
    CHECK(file >= 0 && null >= 0 && unlink(name) == 0 && ftruncate(file, 512 * SECTORS) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    struct guest g = prepare(1, 1, NULL);
    OK(vmbed_builder_disk_fd(g.builder, 0, file, &error));
    OK(vmbed_builder_net_fd(g.builder, 0, pair[0], &error));
    close(pair[0]);
    start(&g, steps, sizeof steps);
    struct pollfd poll_for = {.fd = pair[1], .events = POLLIN};
    CHECK(poll(&poll_for, 1, 60000) == 1 && recv(pair[1], frame, sizeof frame, 0) == 72);
    memset(frame, 0, 12), memset(frame + 12, 9, 40);
    CHECK(send(pair[1], frame, 52, 0) == 52);
    finish(&g, results, sizeof results);
    CHECK(results[0].status == 0 && results[1].sum == SUM && results[3].length == 52 && results[3].sum == 360);
    CHECK(pread(file, bytes, sizeof bytes, 1536) == 1024 && bytes[0] == 7 && bytes[1023] == 8);
    drop(&g);

    /* What is no disk, no network, or for a place that is not there. */
    const struct {
        int disks, nets, fd, net;
        const char *text;
    } bad[] = {{1, 0, -1, -1, "disks[0].path"}, {0, 1, -1, -1, "nets[0].tap"}, {0, 0, file, -1, "disks[0]"},
               {1, 0, pair[1], -1, "disk0: fd"}, {0, 1, -1, file, "net0"},     {1, 0, null, -1, "O_RDWR"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        g = prepare(bad[i].disks, bad[i].nets, NULL);
        if (bad[i].fd >= 0)
            OK(vmbed_builder_disk_fd(g.builder, 0, bad[i].fd, &error));
        if (bad[i].net >= 0)
            OK(vmbed_builder_net_fd(g.builder, 0, bad[i].net, &error));
        FAILS(VMBED_ERR_INVALID_ARGUMENT, bad[i].text, vmbed_builder_build(g.builder, &g.vm, &error));
        drop(&g);
    }
    g = prepare(1, 0, NULL);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "no open file descriptor", vmbed_builder_disk_fd(g.builder, 0, -1, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "no open file descriptor", vmbed_builder_net_fd(g.builder, 0, 9999, &error));
    drop(&g);
    close(file), close(null), close(pair[1]);
}

static atomic_int asks;

/* Waits for what a guest that stands does not say. */
static void *asks_for_ever(void *vm)
{
    static int32_t code;
    vmbed_guest_memory account = {.size = sizeof account};
    asks = 1;
    code = vmbed_vm_get_guest_memory(vm, -1, &account, NULL);
    return &code;
}

/* Memory that a guest gives back. */
void memory_given_back(void)
{
    const struct step steps[] = {{ACCOUNT, 0, 4, 2},     {TELL, 0, 0, 1},        {ASKED, 0, 0, 0},       {ACCOUNT, 0, 4, 3},
                                 {TARGET, 128, 0, 0},    {INFLATE, 768, 128, 9}, {DEFLATE, 768, 64, 0},  {END, 0, 0, 0}};
    const uint64_t size = 128 << 12;
    vmbed_balloon balloon = {.size = sizeof balloon};
    vmbed_balloon_statistics moved = {.size = sizeof moved};
    vmbed_guest_memory account = {.size = sizeof account}, again = {.size = sizeof again};
    vmbed_memory memory = {.size = sizeof memory};
    vmbed_usage usage = {.size = sizeof usage};
    struct said said = {0};
    struct result results[7];
    vmbed_events *events;
    vmbed_event *event;
    uint64_t discarded;
    int told = 0;

    struct guest g = prepare(0, 0, &said);
    OK(vmbed_builder_build(g.builder, &g.vm, &error));
    FAILS(VMBED_ERR_UNSUPPORTED, "no balloon", vmbed_vm_set_balloon(g.vm, 0, &error));
    FAILS(VMBED_ERR_UNSUPPORTED, "no balloon", vmbed_vm_get_balloon_statistics(g.vm, &moved, &error));
    vmbed_vm_free(g.vm), vmbed_builder_free(g.builder), g.vm = NULL;
    balloon.reserved = 1;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "reserved", vmbed_config_set_balloon(g.config, &balloon, &error));
    balloon.reserved = 0, balloon.pci = "00:07.0";
    OK(vmbed_config_set_balloon(g.config, &balloon, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    OK(vmbed_builder_add_pio(g.builder, "said", 0x10, 1, &said_ops, &said, &error));
    start(&g, steps, sizeof steps);
    wait_for(&said.last, 1);
    OK(vmbed_vm_get_guest_memory(g.vm, 60000, &account, &error));
    CHECK(account.free == 3 << 20 && account.total == 4 << 20 && account.caches == UINT64_MAX);
    OK(vmbed_vm_get_guest_memory(g.vm, 0, &again, &error));
    CHECK(again.time == account.time && again.time > 1000000000000000000u);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "balloon0", vmbed_vm_set_balloon(g.vm, 5 << 20, &error));
    FAILS(VMBED_ERR_UNSUPPORTED, "hints", vmbed_vm_discard_free_pages(g.vm, 60000, &discarded, &error));
    OK(vmbed_vm_set_balloon(g.vm, size, &error));
    finish(&g, results, sizeof results);
    OK(vmbed_vm_get_balloon_statistics(g.vm, &moved, &error));
    OK(vmbed_vm_get_memory(g.vm, &memory, &error));
    CHECK(moved.target == size && moved.actual == size && memory.loaned == size);
    OK(vmbed_host_usage(g.host, &usage, &error));
    CHECK(usage.loaned == size);
    CHECK(moved.inflated_claimed == size && moved.inflated_measured == size && moved.deflated == size / 2);
    CHECK(moved.reported_claimed == 0 && moved.hinted_claimed == 0 && moved.ignored == 0);
    OK(vmbed_vm_events(g.vm, &events, &error));
    for (;;) {
        OK(vmbed_events_next(events, 0, &event, &error));
        if (!event)
            break;
        told += vmbed_event_kind(event) == VMBED_EVENT_BALLOON && vmbed_event_value(event) == size;
        vmbed_event_free(event);
    }
    CHECK(told == 1);
    vmbed_events_free(events);
    vmbed_vm_free(g.vm), vmbed_builder_free(g.builder);

    /* Whoever waits for a guest's answer waits no longer than there is one. */
    struct said before = {0};
    pthread_t waits;
    void *code;
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    OK(vmbed_builder_add_pio(g.builder, "said", 0x10, 1, &said_ops, &before, &error));
    start(&g, steps, sizeof steps);
    wait_for(&before.last, 1);
    OK(vmbed_vm_pause(g.vm, &error));
    CHECK(!pthread_create(&waits, NULL, asks_for_ever, g.vm));
    wait_for(&asks, 1);
    usleep(100000);
    vmbed_vm_free(g.vm), g.vm = NULL;
    /* It may have come too late, on a machine that has much to do. */
    CHECK(!pthread_join(waits, &code) && (*(int32_t *)code == VMBED_ERR_INVALID_STATE || *(int32_t *)code == VMBED_ERR_INVALID_ARGUMENT));
    drop(&g);
}

/*
 * Row 28 of the table of inputs that have broken VMMs, through C: disks whose host fails. After each the disk works again, and a second VM of this
 * process has not noticed. tests/hostile/files.rs does the same in Rust.
 */
#include "driven.h"
#include "rogue.h"
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>

void disks_whose_host_fails(void);

enum { SIZE = 1 << 20 };

/* How many failures of its disk's the embedder is told of; of the first ones, the errno and the offset. */
static int disk_failures(vmbed_vm *vm, int32_t *errnos, uint64_t *offsets, int most)
{
    vmbed_events *events;
    vmbed_event *event;
    int count = 0;
    OK(vmbed_vm_events(vm, &events, &error));
    for (;; vmbed_event_free(event)) {
        OK(vmbed_events_next(events, 0, &event, &error));
        if (!event)
            break;
        if (vmbed_event_kind(event) != VMBED_EVENT_BACKEND_ERROR)
            continue;
        CHECK(!strcmp(vmbed_event_device(event), "disk0"));
        if (count < most)
            errnos[count] = vmbed_event_errno(event), offsets[count] = vmbed_event_offset(event);
        count++;
    }
    vmbed_events_free(events);
    return count;
}

/* What filled the file system is removed. */
static int32_t make_room(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset, (void)data, (void)length;
    return unlink("host-full/filler") ? VMBED_ERR_OS : VMBED_OK;
}

static const vmbed_device_ops room_ops = {sizeof room_ops, said_read, make_room, NULL};

/* Row 28: on a file system of 64 KiB, half of which something else fills. */
static void a_disk_that_is_full(vmbed_host *host)
{
    enum { FIRST = 12, ALL = FIRST + 8 };
    const vmbed_disk disk = {.size = sizeof disk, .path = "host-full/disk"};
    static uint8_t filler[32 << 10], bytes[SIZE];
    struct step steps[ALL + 1] = {[FIRST] = {FLUSH, 0, 0, 0}, [FIRST + 1] = {TELL, 0, 0, 1}};
    struct result results[ALL];
    int32_t number;
    uint64_t offset;
    for (uint32_t i = 0; i < FIRST; i++)
        steps[i] = (struct step){WRITE, 8 * i, 8, i};
    for (uint32_t i = 8; i < 14; i++)
        steps[FIRST + 2 + i - 8] = (struct step){WRITE, 8 * i, 8, i};
    memset(filler, 1, sizeof filler);
    int file = open("host-full/filler", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    CHECK(file >= 0 && write(file, filler, sizeof filler) == sizeof filler && close(file) == 0);
    file = open(disk.path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(file >= 0 && ftruncate(file, SIZE) == 0);
    struct guest g = {.config = with_disk(&disk)};
    OK(vmbed_builder_new(host, g.config, &g.builder, &error));
    OK(vmbed_builder_add_pio(g.builder, "told", 0x10, 1, &room_ops, NULL, &error));
    start(&g, steps, sizeof steps);
    finish(&g, results, sizeof results);
    for (int i = 0; i < ALL; i++)
        CHECK(results[i].status == (i >= 8 && i < FIRST)); /* eight of them fit */
    CHECK(disk_failures(g.vm, &number, &offset, 1) > 0 && number == ENOSPC && offset == 8 * 8 * 512);
    drop(&g);
    CHECK(pread(file, bytes, SIZE, 0) == SIZE && close(file) == 0);
    for (unsigned sector = 0; sector < 14 * 8; sector++)
        CHECK(bytes[512 * sector] == sector / 8 + sector % 8); /* what was acknowledged is there */
}

/* A disk in memory whose host fails with that errno for a while. */
struct failing {
    uint8_t bytes[SIZE];
    atomic_int number;
};

static int32_t failing_read(void *user, const vmbed_block_request *request)
{
    struct failing *failing = user;
    const uint8_t *from = failing->bytes + request->offset;
    if (failing->number == EIO)
        return EIO;
    for (size_t i = 0; i < request->count; from += request->pieces[i++].length)
        memcpy(request->pieces[i].base, from, request->pieces[i].length);
    return 0;
}

static int32_t failing_write(void *user, const vmbed_block_request *request)
{
    struct failing *failing = user;
    uint8_t *to = failing->bytes + request->offset;
    if (failing->number)
        return failing->number;
    for (size_t i = 0; i < request->count; to += request->pieces[i++].length)
        memcpy(to, request->pieces[i].base, request->pieces[i].length);
    return 0;
}

static int32_t failing_flush(void *user, const vmbed_block_request *request)
{
    (void)request;
    return ((struct failing *)user)->number;
}

static const vmbed_block_ops failing_ops = {.size = sizeof failing_ops, .read = failing_read, .write = failing_write, .flush = failing_flush};

static int32_t fail_with(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)vcpu, (void)offset, (void)length;
    ((struct failing *)user)->number = data[0];
    return VMBED_OK;
}

static const vmbed_device_ops fail_ops = {sizeof fail_ops, said_read, fail_with, NULL};

/* Row 28: EIO, and a file system that can only be read. */
static void a_disk_that_fails(vmbed_host *host)
{
    static const struct step steps[] = {
        {WRITE, 3, 2, 7}, {FLUSH, 0, 0, 0}, {TELL, 0, 0, EIO},  {READ, 3, 2, 0}, {WRITE, 3, 2, 1}, {FLUSH, 0, 0, 0}, {TELL, 0, 0, EROFS},
        {READ, 3, 2, 0},  {WRITE, 3, 2, 1}, {FLUSH, 0, 0, 0}, {TELL, 0, 0, 0}, {READ, 3, 2, 0},  {WRITE, 5, 2, 9}, {FLUSH, 0, 0, 0}, {END, 0, 0, 0}};
    static const uint32_t wanted[] = {0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0};
    const vmbed_disk disk = {.size = sizeof disk};
    struct failing *failing = calloc(1, sizeof *failing);
    struct result results[sizeof wanted / sizeof *wanted];
    int32_t numbers[2];
    uint64_t offsets[2];
    struct guest g = {.config = with_disk(&disk)};
    OK(vmbed_builder_new(host, g.config, &g.builder, &error));
    OK(vmbed_builder_disk_backend(g.builder, 0, &failing_ops, SIZE, false, failing, &error));
    OK(vmbed_builder_add_pio(g.builder, "told", 0x10, 1, &fail_ops, failing, &error));
    start(&g, steps, sizeof steps);
    finish(&g, results, sizeof results);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        CHECK(results[i].status == wanted[i]);
    CHECK(results[7].sum == 512 * (7 + 8) && results[11].sum == 512 * (7 + 8)); /* it is as it was */
    CHECK(disk_failures(g.vm, numbers, offsets, 2) >= 2 && numbers[0] == EIO && numbers[1] == EROFS);
    CHECK(offsets[0] == 3 * 512 && offsets[1] == 3 * 512);
    drop(&g);
    for (unsigned i = 0; i < 4; i++)
        CHECK(failing->bytes[512 * (3 + i)] == 7 + i);
    free(failing);
}

void disks_whose_host_fails(void)
{
    /* The file system is this process's own, and gone at its end. */
    CHECK(unshare(CLONE_NEWNS) == 0 && mount("none", "/", "none", MS_REC | MS_PRIVATE, NULL) == 0);
    CHECK(mkdir("host-full", 0700) == 0 && mount("none", "host-full", "tmpfs", 0, "size=64k") == 0);
    beside_another_vm(a_disk_that_is_full);
    CHECK(umount2("host-full", MNT_DETACH) == 0 && rmdir("host-full") == 0);
    beside_another_vm(a_disk_that_fails);
}

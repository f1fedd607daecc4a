/* Disks on files: how they are served, and what may be changed of them meanwhile. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/stat.h>

#include "driven.h"

void disks_and_what_is_changed_of_them(void);

enum { SIZE = 1 << 20 };

static char image[64];

/* Builds a VM with that disk. */
static int32_t build(vmbed_host *host, const vmbed_disk *disk, vmbed_vm **vm, vmbed_error **out)
{
    static const uint8_t halts[] = {0xf4};
    vmbed_config *config;
    vmbed_builder *builder;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, halts, sizeof halts, &config, &error));
    OK(vmbed_config_set_platform(config, VMBED_PLATFORM_PC, &error));
    OK(vmbed_config_add_disk(config, disk, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    int32_t status = vmbed_builder_build(builder, vm, out);
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    return status;
}

static bool hears(void *user, uint64_t behind, uint64_t all)
{
    CHECK(behind <= all && all == 2 * SIZE);
    if (user)
        *(uint64_t *)user = behind;
    return user;
}

/* The image, which says nothing yet, is made an encrypted one (QEMU's method 1) for a while. */
static void locked(vmbed_host *host, const char *path, vmbed_disk disk)
{
    const char *words[] = {"open sesame", "\xff"};
    uint8_t method = 1;
    vmbed_config *config;
    vmbed_vm *vm;
    int fd = open(path, O_WRONLY);
    CHECK(pwrite(fd, &method, 1, 35) == 1);
    disk.readonly = 1;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "there are no passphrases", build(host, &disk, &vm, &error));
    disk.passphrases = words, disk.passphrase_count = 2;
    OK(vmbed_config_new_linux("/kernel", &config, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "passphrases[] is not UTF-8", vmbed_config_add_disk(config, &disk, &error));
    vmbed_config_free(config);
    disk.passphrase_count = 1;
    OK(build(host, &disk, &vm, &error));
    vmbed_vm_free(vm);
    CHECK(pwrite(fd, (method = 0, &method), 1, 35) == 1);
    close(fd);
}

void disks_and_what_is_changed_of_them(void)
{
    static const struct step steps[] = {{WRITE, 3, 2, 7}, {FLUSH, 0, 0, 0}, {READ, 3, 2, 0}, {ZERO, 3, 1, 0},
                                        {DISCARD, 0, 1, 0}, {READ, 2047, 2, 0}, {END, 0, 0, 0}};
    static const int32_t ways[][3] = {{VMBED_CACHE_WRITEBACK, VMBED_ENGINE_AUTO, 0},
                                      {VMBED_CACHE_WRITETHROUGH, VMBED_ENGINE_SYNC, 3},
                                      {VMBED_CACHE_DIRECT, VMBED_ENGINE_IO_URING, 2},
                                      {VMBED_CACHE_UNSAFE, VMBED_ENGINE_SYNC, 1}};
    struct stat stat_;
    vmbed_vm *vm, *other;
    vmbed_host *host;
    vmbed_rate rate = {.bytes_per_second = 1 << 20, .ops_per_second = 100};
    vmbed_disk_statistics done = {.size = sizeof done};
    snprintf(image, sizeof image, "disk-c-%d", (int)getpid());
    int file = open(image, O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(file >= 0 && ftruncate(file, SIZE) == 0);

    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        struct said said = {0};
        struct result results[6];
        uint8_t bytes[2];
        struct guest g = prepare(0, 0, &said);
        vmbed_disk disk = {.size = sizeof disk, .path = image, .cache = ways[i][0], .engine = ways[i][1],
                           .queues = (uint32_t)ways[i][2]};
        vmbed_builder_free(g.builder);
        OK(vmbed_config_add_disk(g.config, &disk, &error));
        OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
        OK(vmbed_builder_add_pio(g.builder, "said", 0x10, 1, &said_ops, &said, &error));
        start(&g, steps, sizeof steps);
        finish(&g, results, sizeof results);
        for (size_t r = 0; r < 6; r++)
            CHECK(results[r].status == (r == 5));
        CHECK(results[2].sum == 512 * (7 + 8));
        CHECK(pread(file, bytes, 1, 512 * 3) == 1 && pread(file, bytes + 1, 1, 512 * 4) == 1 && !bytes[0] && bytes[1] == 8);
        OK(vmbed_vm_get_disk_statistics(g.vm, 0, &done, &error));
        CHECK(done.discards == 2 && done.errors == 1);
        drop(&g);
    }

    OK(vmbed_host_open(NULL, &host, &error));
    vmbed_disk disk = {.size = sizeof disk, .path = image, .queues = 17};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "queues", build(host, &disk, &vm, &error));
    disk.queues = 0;
    OK(build(host, &disk, &vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "in use", build(host, &disk, &other, &error));
    disk.no_lock = 1;
    OK(build(host, &disk, &other, &error));
    vmbed_vm_free(other);
    OK(vmbed_vm_resize_disk(vm, 0, 2 * SIZE, &error));
    CHECK(fstat(file, &stat_) == 0 && stat_.st_size == 2 * SIZE);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "512", vmbed_vm_resize_disk(vm, 0, 513, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "disk1", vmbed_vm_resize_disk(vm, 1, SIZE, &error));
    OK(vmbed_vm_set_disk_rate(vm, 0, &rate, &error));
    OK(vmbed_vm_set_disk_rate(vm, 0, NULL, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "disk1", vmbed_vm_set_disk_rate(vm, 1, NULL, &error));
    char saved[80];
    bool complete;
    uint64_t behind = 0;
    snprintf(saved, sizeof saved, "%s.saved", image);
    OK(vmbed_vm_save_disk(vm, 0, saved, VMBED_DISK_RAW, hears, &behind, &complete, &error));
    CHECK(complete && behind == 2 * SIZE && stat(saved, &stat_) == 0 && stat_.st_size == 2 * SIZE);
    FAILS(VMBED_ERR_OS, "saved", vmbed_vm_save_disk(vm, 0, saved, VMBED_DISK_RAW, NULL, NULL, NULL, &error));
    unlink(saved);
    OK(vmbed_vm_save_disk(vm, 0, saved, VMBED_DISK_QCOW2, hears, NULL, &complete, &error));
    CHECK(!complete && stat(saved, &stat_) != 0);
    vmbed_vm_free(vm);

    static const struct step again[] = {{READ, 4, 1, 0}, {WRITE, 4, 1, 9}, {FLUSH, 0, 0, 0}, {READ, 4, 1, 0}, {END, 0, 0, 0}};
    vmbed_backing_file below = {.path = image, .format = VMBED_DISK_RAW};
    char layer[80];
    uint8_t byte;
    struct said said = {0};
    struct result results[4];
    snprintf(layer, sizeof layer, "%s.qcow2", image);
    CHECK(vmbed_has_feature("qcow2"));
    OK(vmbed_disk_create(layer, VMBED_DISK_QCOW2, 0, &below, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "format is 7", vmbed_disk_create(layer, 7, 0, &below, &error));
    vmbed_disk top = {.size = sizeof top, .path = layer, .format = VMBED_DISK_QCOW2};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "backing", build(host, &top, &vm, &error));
    top.data_file = "/nonexistent/data";
    FAILS(VMBED_ERR_NOT_FOUND, "data_file: /nonexistent/data", build(host, &top, &vm, &error));
    top.backing = &below, top.backing_count = 1, top.data_file = NULL;
    locked(host, layer, top);
    struct guest g = prepare(0, 0, &said);
    vmbed_builder_free(g.builder);
    OK(vmbed_config_add_disk(g.config, &top, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    OK(vmbed_builder_add_pio(g.builder, "said", 0x10, 1, &said_ops, &said, &error));
    start(&g, again, sizeof again);
    finish(&g, results, sizeof results);
    CHECK(results[0].sum == 512 * 8 && results[1].status == 0 && results[2].status == 0 && results[3].sum == 512 * 9);
    drop(&g);
    CHECK(pread(file, &byte, 1, 512 * 4) == 1 && byte == 8);
    unlink(layer);
    vmbed_host_free(host);
    close(file);
    unlink(image);
}

/*
 * The rows about files, configurations and vCPUs of the table of inputs that have broken VMMs, through C. After each a good VM works, and a second one
 * of this process has not noticed. tests/hostile/files.rs and ends.rs do the same in Rust, and more of it. host.c has a host that fails.
 */
#include "driven.h"
#include "rogue.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

void files_that_lie_and_fail(void);
void vcpus_that_cannot_go_on(void);

enum { SIZE = 1 << 20 };

static void store(const char *path, const void *bytes, size_t length)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(file >= 0 && write(file, bytes, length) == (ssize_t)length && close(file) == 0);
}

static int32_t build(vmbed_host *host, vmbed_config *config, vmbed_error **out)
{
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_builder *builder;
    vmbed_vm *vm = NULL;
    OK(vmbed_builder_new(host, config, &builder, &error));
    int32_t status = vmbed_builder_build(builder, &vm, out);
    vmbed_builder_free(builder);
    CHECK(status == VMBED_OK || !vm);
    vmbed_vm_free(vm);
    OK(vmbed_host_usage(host, &usage, &error));
    CHECK(usage.vms == 1);
    return status;
}

struct told {
    int file;
    atomic_int times;
};

/* The file below the disk becomes shorter, and as long as it was. */
static int32_t resize(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    struct told *told = user;
    (void)vcpu, (void)offset, (void)length;
    told->times++;
    return ftruncate(told->file, data[0] == 1 ? 50 << 10 : SIZE) ? VMBED_ERR_OS : VMBED_OK;
}

static const vmbed_device_ops resize_ops = {sizeof resize_ops, said_read, resize, NULL};

/* Row 24: an image whose data are in another file (the specification's incompatible bit 2, and header extension "DATA"). */
static void data_elsewhere(vmbed_host *host)
{
    const uint8_t extension[] = {0x44, 0x41, 0x54, 0x41, 0, 0, 0, 10, 'l', 'i', 'e', 's', '-', 's', 'e', 'c', 'r', 'e', [31] = 0};
    const uint8_t elsewhere[] = {0, 0, 0, 0, 0, 0, 0, 4};
    uint8_t length[4], secret[65536];
    vmbed_disk outside = {.size = sizeof outside, .path = "lies-outside", .format = VMBED_DISK_QCOW2};
    OK(vmbed_disk_create("lies-outside", VMBED_DISK_QCOW2, SIZE, NULL, &error));
    int file = open("lies-outside", O_RDWR | O_CLOEXEC);
    CHECK(file >= 0 && pread(file, length, 4, 100) == 4);
    CHECK(pwrite(file, extension, sizeof extension, length[2] << 8 | length[3]) == sizeof extension);
    CHECK(pwrite(file, elsewhere, sizeof elsewhere, 72) == sizeof elsewhere && close(file) == 0);
    vmbed_config *config = with_disk(&outside);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "lies-secre", build(host, config, &error));
    vmbed_config_free(config);
    /* What it names is not opened in the place of what the embedder does. */
    outside.data_file = "lies-absent";
    config = with_disk(&outside);
    FAILS(VMBED_ERR_NOT_FOUND, "lies-absent", build(host, config, &error));
    vmbed_config_free(config);
    file = open("lies-secret", O_RDONLY | O_CLOEXEC);
    CHECK(read(file, secret, sizeof secret) == sizeof secret && close(file) == 0);
    for (size_t i = 0; i < sizeof secret; i++)
        CHECK(secret[i] == 7);
    unlink("lies-outside");
}

/* Row 24. */
static void images(vmbed_host *host)
{
    uint8_t header[512], raw[SIZE] = {0}, bytes[512];
    const vmbed_backing_file below = {.path = "lies-secret", .format = VMBED_DISK_RAW};
    vmbed_disk layer = {.size = sizeof layer, .path = "lies-layer", .format = VMBED_DISK_QCOW2};
    const vmbed_disk disk = {.size = sizeof disk, .path = "lies-disk"};
    memset(raw, 7, sizeof raw);
    store("lies-secret", raw, 65536);
    OK(vmbed_disk_create("lies-layer", VMBED_DISK_QCOW2, 0, &below, &error));
    vmbed_config *config = with_disk(&layer);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "lies-secret", build(host, config, &error));
    vmbed_config_free(config);
    layer.backing = &below, layer.backing_count = 1;
    config = with_disk(&layer);
    OK(build(host, config, &error));
    vmbed_config_free(config);
    data_elsewhere(host);
    /* That header in a raw disk is bytes. */
    int file = open("lies-layer", O_RDONLY | O_CLOEXEC);
    CHECK(read(file, header, sizeof header) == sizeof header && !memcmp(header, "QFI\xfb", 4) && close(file) == 0);
    memset(raw, 0, sizeof raw), memcpy(raw, header, sizeof header);
    store("lies-disk", raw, sizeof raw);
    const struct step steps[] = {{READ, 0, 1, 0}, {READ, SIZE / 512 - 1, 1, 0}, {WRITE, 1, 1, 9}, {END, 0, 0, 0}};
    struct result results[3];
    struct guest g = {.config = with_disk(&disk)};
    OK(vmbed_builder_new(host, g.config, &g.builder, &error));
    start(&g, steps, sizeof steps);
    finish(&g, results, sizeof results);
    drop(&g);
    uint64_t sum = 0;
    for (size_t i = 0; i < sizeof header; i++)
        sum += header[i];
    CHECK(!results[0].status && results[0].sum == sum && !results[1].status && !results[1].sum && !results[2].status);
    file = open("lies-disk", O_RDONLY | O_CLOEXEC);
    CHECK(pread(file, bytes, 512, 0) == 512 && !memcmp(bytes, header, 512) && pread(file, bytes, 512, 512) == 512 && bytes[0] == 9);
    close(file);
    unlink("lies-disk"), unlink("lies-layer"), unlink("lies-secret");
}

/* An ELF kernel with a segment of 64 bytes at that address. */
static void kernel(uint64_t address, uint64_t in_file)
{
    uint8_t image[0x240] = {0x7f, 'E', 'L', 'F', 2, 1, 1};
    const uint64_t segment[] = {0x200, 0, address, in_file, 0x1000};
    image[18] = 62, image[32] = 64, image[54] = 56, image[56] = 1, image[64] = 1;
    memcpy(image + 72, segment, sizeof segment);
    store("lies-kernel", image, sizeof image);
}

/* Row 25. */
static void kernels(vmbed_host *host)
{
    const struct {
        uint64_t address, in_file;
        const char *why;
    } lies[] = {{0xfffffffffffff800, 64, "program header 0: address and size wrap"},
                {0xc0000000, 64, "program header 0: occupies 0xc0000000-0xc0001000"},
                {1 << 24, 65, "program header 0: its bytes end at 577, the image at 576"},
                {1 << 24, UINT64_MAX, "program header 0: its bytes end"},
                {1 << 24, 64, "lies-kernel"} /* which has no entry */};
    vmbed_config *config;
    OK(vmbed_config_new_linux("lies-kernel", &config, &error));
    OK(vmbed_config_set_memory(config, 64 << 20, &error));
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        kernel(lies[i].address, lies[i].in_file);
        FAILS(VMBED_ERR_BAD_IMAGE, lies[i].why, build(host, config, &error));
    }
    store("lies-kernel", "\177ELF", 4);
    FAILS(VMBED_ERR_BAD_IMAGE, "lies-kernel", build(host, config, &error));
    vmbed_config_free(config);
    unlink("lies-kernel");
}

enum { BZ_PAYLOAD = 2048, BZ_SIZE = BZ_PAYLOAD + 128 };

/* A bzImage that resets the machine, with a change: not packed with LZ4, it unpacks itself where it wants to be. */
static void bzimage(size_t at, const void *change, size_t length)
{
    /* mov al, 0xfe; out 0x64, al; jmp $-4, at the entry of 64 bits, 0x200 */
    static const uint8_t resets[] = {0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfa};
    static const struct {
        size_t at;
        uint64_t value;
        size_t length;
    } fields[] = {{0x1f1, 1, 1}, {0x206, 0x20f, 2}, {0x211, 1, 1}, {0x22c, 0x7fffffff, 4}, {0x236, 1, 2}, {0x238, 2047, 4},
                  {0x248, BZ_PAYLOAD - 1024, 4}, {0x24c, BZ_SIZE - BZ_PAYLOAD, 4}, {0x258, 0x1000000, 8}, {0x260, 0x100000, 4}};
    uint8_t image[BZ_SIZE] = {0};
    memcpy(image + 0x1fe, "\x55\xaa\xeb\x66HdrS", 8);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        memcpy(image + fields[i].at, &fields[i].value, fields[i].length);
    memcpy(image + 1024 + 0x200, resets, sizeof resets);
    if (length)
        memcpy(image + at, change, length);
    store("lies-kernel", image, sizeof image);
}

/* Row 25: what is packed with LZ4 (its magic, and then blocks behind their lengths) included. */
static void bzimages(vmbed_host *host, vmbed_config *config)
{
    /* A block of all that an LZ4 payload can have, in a kernel of 512 bytes. */
    static const char block[128] = {0x02, 0x21, 0x4c, 0x18, -1, -1, -1, -1, [125] = 2};
    const struct {
        size_t at, length;
        const char *change, *why;
    } lies[] = {{0x1f1, 1, "\xff", "setup_sects"},
                {0x206, 2, "\x0b\x02", "protocol 2.11"},
                {0x211, 1, "\0", "loadflags"},
                {0x236, 1, "\0", "xloadflags"},
                {0x248, 4, "\xff\xff\xff\xff", "its payload ends at"},
                {0x24c, 4, "\xff\xff\xff\xff", "its payload ends at"},
                {0x258, 8, "\xff\xff\xff\xff\xff\xff\xff\xff", "not all guest memory"},
                {0x258, 8, "\0\0\0\0\0\0\0\0", "not all guest memory"},
                {0x260, 4, "\xff\xff\xff\xff", "not all guest memory"},
                {BZ_PAYLOAD, 4, "\x02\x21\x4c\x18", "empty payload"},
                {BZ_PAYLOAD, 128, block, "has 4294967295 of"}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        bzimage(lies[i].at, lies[i].change, lies[i].length);
        FAILS(VMBED_ERR_BAD_IMAGE, lies[i].why, build(host, config, &error));
        FAILS(VMBED_ERR_BAD_IMAGE, "lies-kernel", build(host, config, &error));
    }
    bzimage(0, NULL, 0);
    CHECK(truncate("lies-kernel", 0x240) == 0);
    FAILS(VMBED_ERR_BAD_IMAGE, "truncated", build(host, config, &error));
}

/* Row 25. */
static void initrds(vmbed_host *host, vmbed_config *config)
{
    static const struct {
        off_t size;
        const char *why;
    } lies[] = {{0, "is empty"}, {60 << 20, "is too large: it has 62914560 bytes"}, {3ll << 30, "3221225472 bytes, more than"}};
    OK(vmbed_config_set_initrd(config, "lies-initrd", &error));
    FAILS(VMBED_ERR_NOT_FOUND, "the initrd 'lies-initrd'", build(host, config, &error));
    store("lies-initrd", "", 0);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        CHECK(truncate("lies-initrd", lies[i].size) == 0);
        FAILS(VMBED_ERR_BAD_IMAGE, lies[i].why, build(host, config, &error));
        FAILS(VMBED_ERR_BAD_IMAGE, "the initrd 'lies-initrd'", build(host, config, &error));
    }
    OK(vmbed_config_set_initrd(config, ".", &error));
    FAILS(VMBED_ERR_BAD_IMAGE, "the initrd '.' is a directory", build(host, config, &error));
    CHECK(truncate("lies-initrd", 5000) == 0);
    OK(vmbed_config_set_initrd(config, "lies-initrd", &error));
    OK(build(host, config, &error));
    unlink("lies-initrd");
}

/* Row 25: what the tables for the guest's firmware (ACPI, SMBIOS) have no place for, and what lies where they say that something else does. */
static void machines(vmbed_host *host, vmbed_config *config)
{
    static const uint64_t places[] = {0xe8000000, 0xc0000000, 0xfec00000, 0xe0000};
    char name[66] = {0};
    struct port port = {0};
    OK(vmbed_config_set_cpus(config, 250, 1, 50, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "cpus.sockets", build(host, config, &error));
    OK(vmbed_config_set_cpus(config, 2, 3, 1, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "cpus.threads_per_core", build(host, config, &error));
    OK(vmbed_config_set_cpus(config, 1, 1, 1, &error));
    OK(vmbed_config_set_name(config, memset(name, 'x', 65), &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "name", build(host, config, &error));
    OK(vmbed_config_set_name(config, "", &error));
    bzimage(0x238, "\4\0\0\0", 4);
    OK(vmbed_config_set_cmdline(config, "quiet", &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "the command line has 5 bytes, 'lies-kernel' takes 4", build(host, config, &error));
    bzimage(0, NULL, 0);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        vmbed_builder *builder;
        vmbed_vm *vm;
        OK(vmbed_builder_new(host, config, &builder, &error));
        OK(vmbed_builder_add_mmio(builder, "mine", places[i], 4096, &port_ops, &port, &error));
        FAILS(VMBED_ERR_INVALID_ARGUMENT, "'mine'", vmbed_builder_build(builder, &vm, &error));
        vmbed_builder_free(builder);
    }
}

/* What is good runs, and ends with a reset. */
static void boots(vmbed_host *host, vmbed_config *config)
{
    vmbed_builder *builder;
    vmbed_vm *vm;
    int32_t cause;
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_start(vm, &error));
    OK(vmbed_vm_wait(vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_RESET);
    vmbed_vm_free(vm), vmbed_builder_free(builder);
}

static void what_boots(vmbed_host *host)
{
    vmbed_config *config;
    OK(vmbed_config_new_linux("lies-kernel", &config, &error));
    OK(vmbed_config_set_memory(config, 64 << 20, &error));
    bzimages(host, config);
    bzimage(0, NULL, 0);
    initrds(host, config);
    vmbed_config_free(config);
    OK(vmbed_config_new_linux("lies-kernel", &config, &error));
    OK(vmbed_config_set_memory(config, 64 << 20, &error));
    machines(host, config);
    boots(host, config);
    vmbed_config_free(config);
    unlink("lies-kernel");
}

/* Row 27. */
static void configurations(vmbed_host *host)
{
    const char *fields[] = {"memory", "cpus.count", "disks[0].queues", "disks[1].pci"};
    const vmbed_disk one = {.size = sizeof one, .path = "/d", .pci = "00:07.0", .queues = 1000};
    const vmbed_disk two = {.size = sizeof two, .path = "/d", .pci = "00:07.0"};
    vmbed_config *config = with_disk(&one);
    OK(vmbed_config_add_disk(config, &two, &error));
    for (int i = 0; i < 3; i++) {
        const uint64_t sizes[] = {UINT64_MAX - 4095, 0, (1ull << 63) + 1};
        const uint16_t counts[] = {0, 255, UINT16_MAX};
        OK(vmbed_config_set_memory(config, sizes[i], &error));
        OK(vmbed_config_set_cpus(config, counts[i], 1, 1, &error));
        for (size_t f = 0; f < sizeof fields / sizeof *fields; f++) {
            FAILS(VMBED_ERR_INVALID_ARGUMENT, fields[f], vmbed_config_validate(config, &error));
            FAILS(VMBED_ERR_INVALID_ARGUMENT, fields[f], build(host, config, &error));
        }
    }
    vmbed_config_free(config);
}

/* Row 28. */
static void a_file_that_shrinks(vmbed_host *host)
{
    const struct step steps[] = {{WRITE, 3, 2, 7}, {FLUSH, 0, 0, 0}, {TELL, 0, 0, 1}, {READ, 200, 1, 0}, {READ, 3, 2, 0}, {WRITE, 10, 1, 9},
                                 {FLUSH, 0, 0, 0}, {TELL, 0, 0, 2},  {READ, 200, 1, 0}, {WRITE, 200, 1, 5}, {END, 0, 0, 0}};
    const vmbed_disk disk = {.size = sizeof disk, .path = "lies-disk"};
    const uint32_t sectors[] = {3, 4, 10, 200};
    const uint8_t wanted[] = {7, 8, 9, 5};
    struct told told = {.file = open("lies-disk", O_RDWR | O_CREAT | O_CLOEXEC, 0600)};
    struct result results[10];
    vmbed_events *events;
    vmbed_event *event;
    int errors = 0;
    CHECK(told.file >= 0 && ftruncate(told.file, SIZE) == 0);
    struct guest g = {.config = with_disk(&disk)};
    OK(vmbed_builder_new(host, g.config, &g.builder, &error));
    OK(vmbed_builder_add_pio(g.builder, "told", 0x10, 1, &resize_ops, &told, &error));
    start(&g, steps, sizeof steps);
    finish(&g, results, sizeof results);
    CHECK(told.times == 2);
    for (size_t i = 0; i < sizeof results / sizeof *results; i++)
        CHECK(results[i].status == (i == 3));
    CHECK(results[4].sum == 512 * (7 + 8) && !results[8].sum);
    OK(vmbed_vm_events(g.vm, &events, &error));
    for (;; vmbed_event_free(event)) {
        OK(vmbed_events_next(events, 0, &event, &error));
        if (!event)
            break;
        if (vmbed_event_kind(event) == VMBED_EVENT_BACKEND_ERROR) {
            CHECK(!strcmp(vmbed_event_device(event), "disk0") && vmbed_event_errno(event) == EIO && vmbed_event_offset(event) == 200 * 512);
            errors++;
        }
    }
    CHECK(errors == 1);
    vmbed_events_free(events);
    drop(&g);
    for (size_t i = 0; i < sizeof sectors / sizeof *sectors; i++) {
        uint8_t byte;
        CHECK(pread(told.file, &byte, 1, 512 * sectors[i]) == 1 && byte == wanted[i]);
    }
    close(told.file);
    unlink("lies-disk");
}

static void lies(vmbed_host *host)
{
    images(host);
    kernels(host);
    what_boots(host);
    configurations(host);
    a_file_that_shrinks(host);
}

void files_that_lie_and_fail(void)
{
    beside_another_vm(lies);
}

/* Row 30: the cause of the end of a guest that is stopped, if it has not ended before. */
static int32_t cause_of(vmbed_host *host, int32_t mode, int32_t platform, const uint8_t *code, size_t length, bool ends)
{
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;
    int32_t cause;
    const uint8_t nothing[6] = {0};
    OK(vmbed_config_new_bare(mode, 0x1000, code, length, &config, &error));
    OK(vmbed_config_add_image(config, 0x1100, nothing, sizeof nothing, &error));
    OK(vmbed_config_set_platform(config, platform, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_start(vm, &error));
    if (ends)
        OK(vmbed_vm_wait(vm, 60000, &cause, &error));
    else
        FAILS(VMBED_ERR_TIMED_OUT, "", vmbed_vm_wait(vm, 20, &cause, &error));
    OK(vmbed_vm_stop(vm, &cause, &error));
    vmbed_vm_free(vm), vmbed_builder_free(builder), vmbed_config_free(config);
    return cause;
}

static void every_vcpu(vmbed_host *host)
{
    /* mov eax, 0xd0000000; jmp eax */
    const uint8_t hole[] = {0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0};
    /* lidt [0x1100]; ud2 */
    const uint8_t faults[] = {0x0f, 0x01, 0x1d, 0x00, 0x11, 0, 0, 0x0f, 0x0b};
    /* cli; hlt; jmp $-1 */
    const uint8_t halts[] = {0xfa, 0xf4, 0xeb, 0xfd};
    CHECK(cause_of(host, VMBED_MODE_PROTECTED, VMBED_PLATFORM_BARE, hole, sizeof hole, true) == VMBED_CAUSE_VCPU_FAULT);
    CHECK(cause_of(host, VMBED_MODE_LONG, VMBED_PLATFORM_PC, hole, sizeof hole, true) == VMBED_CAUSE_VCPU_FAULT);
    CHECK(cause_of(host, VMBED_MODE_PROTECTED, VMBED_PLATFORM_BARE, faults, sizeof faults, true) == VMBED_CAUSE_TRIPLE_FAULT);
    CHECK(cause_of(host, VMBED_MODE_REAL, VMBED_PLATFORM_BARE, spins, sizeof spins, false) == VMBED_CAUSE_HOST_STOP);
    CHECK(cause_of(host, VMBED_MODE_REAL, VMBED_PLATFORM_PC, halts, sizeof halts, false) == VMBED_CAUSE_HOST_STOP);
    CHECK(cause_of(host, VMBED_MODE_REAL, VMBED_PLATFORM_BARE, halts, sizeof halts, true) == VMBED_CAUSE_GUEST_HALT);
}

void vcpus_that_cannot_go_on(void)
{
    beside_another_vm(every_vcpu);
}

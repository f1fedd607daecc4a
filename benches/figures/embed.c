/*
 * What vmbed's figures of the C API are made of. With callgrind, as slopes over two numbers:
 *   embed exits N    one bare guest with N port writes to a device of ours
 *   embed usage N    N calls of vmbed_host_usage
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmbed.h>

/* out 0x10, al; jmp $-2 */
static const uint8_t writes[] = {0xe6, 0x10, 0xeb, 0xfc};

static int32_t countdown_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset, (void)data, (void)length;
    return VMBED_OK;
}

static int32_t countdown_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)vcpu, (void)offset, (void)data, (void)length;
    return (*(long *)user)-- ? VMBED_OK : VMBED_ERR_OS;
}

static void check(int32_t status, vmbed_error **error)
{
    if (status != VMBED_OK) {
        fprintf(stderr, "embed: %s\n", vmbed_error_message(*error));
        exit(1);
    }
}

int main(int argc, char **argv)
{
    long count = argc == 3 ? atol(argv[2]) : 0;
    vmbed_error *error;
    vmbed_host *host;
    if (count <= 0)
        return 2;
    check(vmbed_host_open(NULL, &host, &error), &error);
    if (!strcmp(argv[1], "usage")) {
        vmbed_usage usage = {.size = sizeof usage};
        while (count--)
            check(vmbed_host_usage(host, &usage, &error), &error);
    } else {
        const vmbed_device_ops device = {.size = sizeof device, .read = countdown_read, .write = countdown_write};
        vmbed_config *config;
        vmbed_builder *builder;
        vmbed_vm *vm;
        check(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, writes, sizeof writes, &config, &error), &error);
        check(vmbed_builder_new(host, config, &builder, &error), &error);
        check(vmbed_builder_add_pio(builder, "countdown", 0x10, 1, &device, &count, &error), &error);
        check(vmbed_builder_build(builder, &vm, &error), &error);
        check(vmbed_vm_start(vm, &error), &error);
        check(vmbed_vm_wait(vm, -1, NULL, &error), &error);
        vmbed_vm_free(vm);
        vmbed_builder_free(builder);
        vmbed_config_free(config);
    }
    vmbed_host_free(host);
    return 0;
}

/*
 * A guest of six instructions in 16-bit real mode that writes to a device of ours: vmbed in 60 lines.
 *
 *     cc bare.c -o bare $(pkg-config --cflags --libs vmbed) && ./bare
 */
#include <stdio.h>
#include <vmbed.h>

/* mov al, 'h'; out 0xe9, al; mov al, 'i'; out 0xe9, al; mov al, '\n'; out 0xe9, al; hlt */
static const uint8_t code[] = {0xb0, 'h', 0xe6, 0xe9, 0xb0, 'i', 0xe6, 0xe9, 0xb0, '\n', 0xe6, 0xe9, 0xf4};

static int32_t debug_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset, (void)data, (void)length;
    return VMBED_OK; /* all-ones, as the guest finds where nothing is */
}

static int32_t debug_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)vcpu, (void)offset;
    return fwrite(data, 1, length, user) == length ? VMBED_OK : VMBED_ERR_OS;
}

int main(void)
{
    vmbed_error *error = NULL;
    vmbed_host *host = NULL;
    vmbed_config *config = NULL;
    vmbed_builder *builder = NULL;
    vmbed_vm *vm = NULL;
    const vmbed_device_ops debug = {.size = sizeof debug, .read = debug_read, .write = debug_write};
    int32_t cause = VMBED_CAUSE_NONE;
    int status = 1;

    if (vmbed_host_open(NULL, &host, &error) ||
        vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, code, sizeof code, &config, &error) ||
        vmbed_builder_new(host, config, &builder, &error) ||
        vmbed_builder_add_pio(builder, "debug", 0xe9, 1, &debug, stdout, &error) ||
        vmbed_builder_build(builder, &vm, &error) ||
        vmbed_vm_start(vm, &error) ||
        vmbed_vm_wait(vm, 10000, &cause, &error))
        fprintf(stderr, "bare: %s\n", vmbed_error_message(error));
    else
        status = cause != VMBED_CAUSE_GUEST_HALT;

    vmbed_vm_free(vm);
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    vmbed_host_free(host);
    vmbed_error_free(error);
    return status;
}

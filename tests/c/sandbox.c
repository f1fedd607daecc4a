/* The sandbox of a VM's threads, as embedders ask for it; tests/sandbox has what it refuses. */
#include "guest.h"
#include <time.h>

void a_sandbox_for_its_threads(void);

static int32_t read_zero(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset;
    memset(data, 0, length);
    return VMBED_OK;
}

static int32_t write_nowhere(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    (void)user, (void)vcpu, (void)offset, (void)data, (void)length;
    return VMBED_OK;
}

static void wait_for_state(const vmbed_vm *vm, int32_t state)
{
    const struct timespec moment = {0, 1000000};
    for (int i = 0; vmbed_vm_state(vm) != state; i++) {
        CHECK(i < 60000);
        nanosleep(&moment, NULL);
    }
}

/* The thread that does something when memory gets short has one of its own; thresholds that no machine meets have it pause the VM. */
static void for_reclaim(vmbed_host *host, const vmbed_vm *vm)
{
    vmbed_reclaim_options options = {.size = sizeof options, .interval = 20, .sandbox = 3};
    vmbed_sandbox sandbox = {.size = sizeof sandbox};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "sandbox is 3", vmbed_host_set_reclaim(host, &options, &error));
    options.sandbox = 0, options.reserved = 1;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "reserved is 1", vmbed_host_set_reclaim(host, &options, &error));
    options.reserved = 0, options.pause_below = (uint64_t)1 << 60, options.sandbox = VMBED_RECLAIM_SANDBOX_REQUIRED;
    OK(vmbed_host_set_reclaim(host, &options, &error));
    wait_for_state(vm, VMBED_STATE_PAUSED);
    OK(vmbed_host_get_reclaim_sandbox(host, &sandbox, &error));
    CHECK(sandbox.threads == 1 && sandbox.seccomp == 1 && sandbox.landlock > 0);
    OK(vmbed_host_set_reclaim(host, NULL, &error));
    wait_for_state(vm, VMBED_STATE_RUNNING);
    OK(vmbed_host_get_reclaim_sandbox(host, &sandbox, &error));
    CHECK(!sandbox.threads && !sandbox.seccomp && !sandbox.landlock);
}

void a_sandbox_for_its_threads(void)
{
    const vmbed_device_ops ops = {.size = sizeof ops, .read = read_zero, .write = write_nowhere};
    vmbed_sandbox sandbox = {.size = sizeof sandbox};
    vmbed_host *host;
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;

    CHECK(vmbed_has_feature("sandbox"));
    OK(vmbed_host_open(NULL, &host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, spins, sizeof spins, &config, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_get_sandbox(vm, &sandbox, &error));
    CHECK(!sandbox.threads && !sandbox.seccomp && !sandbox.landlock);
    vmbed_vm_free(vm);
    vmbed_builder_free(builder);

    FAILS(VMBED_ERR_INVALID_ARGUMENT, "threads is 0x10", vmbed_config_set_sandbox(config, 16, false, &error));
    OK(vmbed_config_set_sandbox(config, VMBED_SANDBOX_ALL, false, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_get_sandbox(vm, &sandbox, &error));
    CHECK(sandbox.threads == 1 && sandbox.seccomp == 1 && sandbox.landlock > 0);
    OK(vmbed_vm_start(vm, &error));
    OK(vmbed_vm_pause(vm, &error));
    OK(vmbed_vm_resume(vm, &error));
    CHECK(vmbed_vm_state(vm) == VMBED_STATE_RUNNING);
    for_reclaim(host, vm);
    vmbed_vm_free(vm);
    vmbed_builder_free(builder);

    /* A device of ours would run there. */
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_add_pio(builder, "port", 0x10, 1, &ops, NULL, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "'port'", vmbed_builder_build(builder, &vm, &error));
    vmbed_builder_free(builder);
    OK(vmbed_config_set_sandbox(config, VMBED_SANDBOX_ALL & ~VMBED_SANDBOX_VCPUS, true, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_add_pio(builder, "port", 0x10, 1, &ops, NULL, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_get_sandbox(vm, &sandbox, &error));
    CHECK(!sandbox.threads && !sandbox.seccomp);
    vmbed_vm_free(vm);
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    vmbed_host_free(host);
}

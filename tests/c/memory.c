/* Memory of every kind, below the same guest. */
#include "rogue.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

void memory_of_every_kind(void);
void a_share_of_the_processors(void);
void memory_that_is_lost(void);

static const uint8_t halts[] = {0xf4};
static const uint64_t size = 4 << 20;

static int32_t build(vmbed_host *host, uint64_t memory, const vmbed_backing *backing, vmbed_vm **vm, vmbed_error **error)
{
    vmbed_config *config;
    vmbed_builder *builder;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, spins, sizeof spins, &config, &error));
    OK(vmbed_config_set_memory(config, memory, &error));
    OK(vmbed_config_set_backing(config, backing, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    int32_t status = vmbed_builder_build(builder, vm, error);
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    return status;
}

static vmbed_memory memory_of(vmbed_vm *vm)
{
    vmbed_memory memory = {.size = sizeof memory};
    OK(vmbed_vm_get_memory(vm, &memory, &error));
    return memory;
}

void memory_of_every_kind(void)
{
    const int32_t kinds[] = {VMBED_BACKING_MEMFD, VMBED_BACKING_ANONYMOUS};
    static const uint8_t pages[8192] = {1};
    vmbed_host *host;
    vmbed_vm *vm;
    OK(vmbed_host_open(NULL, &host, &error));
    for (size_t i = 0; i < 2; i++) {
        vmbed_backing backing = {.size = sizeof backing, .kind = kinds[i], .huge = VMBED_HUGE_NEVER};
        OK(build(host, size, &backing, &vm, &error));
        vmbed_memory before = memory_of(vm);
        OK(vmbed_vm_write_memory(vm, 0x200000, pages, sizeof pages, &error));
        vmbed_memory after = memory_of(vm);
        CHECK(after.backing == before.backing + sizeof pages && after.resident == after.backing && !after.huge && !after.pinned);
        OK(vmbed_vm_start(vm, &error));
        vmbed_vm_free(vm);

        backing = (vmbed_backing){.size = sizeof backing, .kind = kinds[i], .prefault = 1};
        OK(build(host, size, &backing, &vm, &error));
        CHECK(memory_of(vm).backing == size);
        vmbed_vm_free(vm);
    }

    vmbed_backing backing = {.size = sizeof backing, .kind = VMBED_BACKING_HUGE_2M, .huge = VMBED_HUGE_ALWAYS, .mergeable = 1};
    vmbed_error *error = NULL;
    CHECK(build(host, 5 << 20, &backing, &vm, &error) == VMBED_ERR_INVALID_ARGUMENT);
    CHECK(!strcmp(vmbed_error_field(error, 0), "memory") && !strcmp(vmbed_error_field(error, 1), "backing.huge"));
    CHECK(!strcmp(vmbed_error_field(error, 2), "backing.mergeable") && !vmbed_error_field(error, 3));
    vmbed_error_free(error);

    backing = (vmbed_backing){.size = sizeof backing, .kind = VMBED_BACKING_HUGE_2M};
    error = NULL;
    if (build(host, size, &backing, &vm, &error) == VMBED_OK) {
        vmbed_memory there = memory_of(vm);
        CHECK(there.pinned == size && there.huge == there.backing && there.backing % (2 << 20) == 0);
        vmbed_vm_free(vm);
    } else {
        CHECK(vmbed_error_status(error) == VMBED_ERR_EXHAUSTED && strstr(vmbed_error_message(error), "nr_hugepages"));
        vmbed_error_free(error);
    }

    const uint32_t node = 1000;
    backing = (vmbed_backing){.size = sizeof backing, .numa_nodes = &node, .numa_node_count = 1};
    error = NULL;
    CHECK(build(host, size, &backing, &vm, &error) != VMBED_OK && strstr(vmbed_error_message(error), "numa_nodes is [1000]"));
    vmbed_error_free(error);

    vmbed_config *config;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, halts, sizeof halts, &config, &error));
    backing = (vmbed_backing){.size = sizeof backing, .kind = 4};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "vmbed_backing.kind is 4", vmbed_config_set_backing(config, &backing, &error));
    backing = (vmbed_backing){.size = sizeof backing, .huge = -1};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "vmbed_backing.huge is -1", vmbed_config_set_backing(config, &backing, &error));
    backing = (vmbed_backing){.size = sizeof backing, .numa_node_count = 1};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "numa_nodes", vmbed_config_set_backing(config, &backing, &error));
    vmbed_config_free(config);
    vmbed_host_free(host);
}

void a_share_of_the_processors(void)
{
    vmbed_host *host;
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;
    OK(vmbed_host_open(NULL, &host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, halts, sizeof halts, &config, &error));
    OK(vmbed_config_set_cgroup(config, NULL, 0, 0, 1000, &error));
    vmbed_error *error = NULL;
    CHECK(vmbed_config_validate(config, &error) == VMBED_ERR_INVALID_ARGUMENT);
    CHECK(!strcmp(vmbed_error_field(error, 0), "cgroup.weight") && !strcmp(vmbed_error_field(error, 1), "cgroup.quota"));
    vmbed_error_free(error);
    OK(vmbed_config_set_cgroup(config, "/nowhere", 300, 20000, 100000, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    FAILS(VMBED_ERR_NOT_FOUND, "cgroup: /nowhere/vmbed-", vmbed_builder_build(builder, &vm, &error));
    vmbed_builder_free(builder);
    OK(vmbed_config_set_cgroup(config, NULL, 300, 0, 0, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    error = NULL;
    if (vmbed_builder_build(builder, &vm, &error) == VMBED_OK) {
        OK(vmbed_vm_start(vm, &error));
        vmbed_vm_free(vm);
    } else {
        CHECK(strstr(vmbed_error_message(error), "cgroup"));
        vmbed_error_free(error);
    }
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    vmbed_host_free(host);
}

enum { MAPPED = 32 };

/* Where guests' memory is mapped; how many places there are. */
static int mapped(uintptr_t places[MAPPED])
{
    char line[512];
    int count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps);
    while (fgets(line, sizeof line, maps))
        if (strstr(line, "vmbed-guest")) {
            CHECK(count < MAPPED && sscanf(line, "%lx-", &places[count]) == 1);
            count++;
        }
    fclose(maps);
    return count;
}

/* Builds a VM; where its memory is mapped. */
static char *build_mapped(vmbed_host *host, const vmbed_backing *backing, vmbed_vm **vm)
{
    uintptr_t before[MAPPED], after[MAPPED], found = 0;
    int were = mapped(before), is_new;
    OK(build(host, size, backing, vm, &error));
    for (int i = mapped(after); i--;) {
        is_new = 1;
        for (int b = 0; b < were; b++)
            is_new &= before[b] != after[i];
        CHECK(!is_new || !found);
        if (is_new)
            found = after[i];
    }
    CHECK(found);
    return (char *)found;
}

/* Takes a page away: no file stands behind it any more. */
static void take_away(void *page)
{
    int file = open(".", O_TMPFILE | O_RDWR, 0600);
    CHECK(file >= 0 && mmap(page, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == page);
    close(file);
}

static void leave(int number)
{
    _exit(number == SIGBUS ? 42 : 1);
}

static void a_page_is_lost(void)
{
    static const vmbed_backing backing = {.size = sizeof backing};
    uint8_t bytes[32];
    vmbed_host *host;
    vmbed_vm *vm;
    OK(vmbed_host_open(NULL, &host, &error));
    take_away(build_mapped(host, &backing, &vm) + 0x200000);
    OK(vmbed_vm_start(vm, &error));
    OK(vmbed_vm_write_memory(vm, 0x1ff000, bytes, sizeof bytes, &error));
    FAILS(VMBED_ERR_EXHAUSTED, "guest memory at 0x200000 is lost", vmbed_vm_read_memory(vm, 0x1ffff0, bytes, sizeof bytes, &error));
    int32_t cause;
    OK(vmbed_vm_wait(vm, -1, &cause, &error));
    CHECK(cause == VMBED_CAUSE_DEVICE_FAULT);
    vmbed_vm_free(vm);
    vmbed_host_free(host);
}

void memory_that_is_lost(void)
{
    struct sigaction own = {.sa_handler = leave}, before;
    CHECK(vmbed_has_feature("sigbus") && !sigaction(SIGBUS, &own, &before));
    OK(vmbed_handle_sigbus(&error));
    OK(vmbed_handle_sigbus(&error));
    beside_another_vm_often(a_page_is_lost);

    /* Any other fault is the program's own. */
    int status;
    void *page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    take_away(page);
    pid_t child = fork();
    if (!child)
        _exit(*(volatile char *)page);
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 42);
    munmap(page, 4096);
}

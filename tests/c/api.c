/*
 * Cases of the C API that need no stock kernel. `api` runs all, `api --list` names them, `api NAME` runs one.
 * tests/api-cases lists them for all languages.
 */
#include "rogue.h"
#include <time.h>

/* In races.c. */
void a_callback_reenters(void);
void a_callback_that_blocks(void);
void other_callbacks_reenter_and_free(void);
void handles_from_eight_threads(void);
void freeing_in_every_order(void);
void stop_races_with_everything(void);
void a_fork_while_a_vm_runs(void);
void many_at_once(void);
/* drive.c */
void a_disk_of_ones_own(void);
void a_disk_that_does_not_answer(void);
void a_network_of_ones_own(void);
void a_card_moves_to_another_network(void);
void memory_given_back(void);
void memory_of_every_kind(void);
void memory_that_is_lost(void);
void a_share_of_the_processors(void);
void a_sandbox_for_its_threads(void);
void disks_and_what_is_changed_of_them(void);
void cards_on_a_switch(void);
void the_hosts_side_of_a_network(void);
void what_is_done_when_memory_gets_short(void);
void a_switch_drops_and_says_why(void);
void disks_and_cards_by_descriptor(void);
void guests_that_break_the_rules(void);
void files_that_lie_and_fail(void);
void vcpus_that_cannot_go_on(void);
void disks_whose_host_fails(void);
void networks_that_go_away(void);
void too_few_descriptors_and_a_storm(void);
void the_hosts_side_of_a_network(void);
void vcpus_on_the_callers_threads(void);
void devices_on_the_callers_loop(void);

static void guest_and_device(void)
{
    struct port port = {0};
    struct guest g = make(talks, sizeof talks, &port);
    int32_t cause;
    CHECK(vmbed_vm_state(g.vm) == VMBED_STATE_BUILT && vmbed_vm_id(g.vm) > 0);
    CHECK(vmbed_vm_memory_size(g.vm) == 2 << 20);
    FAILS(VMBED_ERR_TIMED_OUT, "10 ms", vmbed_vm_wait(g.vm, 10, &cause, &error));
    OK(vmbed_vm_start(g.vm, &error));
    OK(vmbed_vm_wait(g.vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_HALT && vmbed_vm_state(g.vm) == VMBED_STATE_STOPPED);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t first = vmbed_vm_first_exit(g.vm);
    CHECK(first > 0 && first < (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec && !vmbed_vm_first_exit(NULL));
    CHECK(port.reads == 1 && port.writes == 1 && port.last == 0x5a && port.destroyed == 0);
    FAILS(VMBED_ERR_INVALID_STATE, "ended", vmbed_vm_start(g.vm, &error));
    drop(&g);
    CHECK(port.destroyed == 1);
}

static void events_in_order(void)
{
    struct guest g = make(spins, sizeof spins, NULL);
    vmbed_events *events;
    int32_t cause, kinds[] = {VMBED_EVENT_STARTED, VMBED_EVENT_PAUSED, VMBED_EVENT_RESUMED, VMBED_EVENT_STOPPED};
    uint64_t id = vmbed_vm_id(g.vm);
    OK(vmbed_vm_events(g.vm, &events, &error));
    struct pollfd fd = {vmbed_events_fd(events), POLLIN, 0};
    CHECK(fd.fd >= 0 && poll(&fd, 1, 0) == 0);
    OK(vmbed_vm_start(g.vm, &error));
    OK(vmbed_vm_pause(g.vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "running", vmbed_vm_pause(g.vm, &error));
    OK(vmbed_vm_resume(g.vm, &error));
    OK(vmbed_vm_stop(g.vm, &cause, &error));
    CHECK(cause == VMBED_CAUSE_HOST_STOP && poll(&fd, 1, 0) == 1);
    drop(&g); /* the stream outlives its VM */
    for (uint64_t i = 0; i < 4; i++) {
        vmbed_event *event;
        OK(vmbed_events_next(events, 0, &event, &error));
        CHECK(vmbed_event_kind(event) == kinds[i] && vmbed_event_seq(event) == i && vmbed_event_vm_id(event) == id);
        CHECK(vmbed_event_count(event) == 1 && vmbed_event_time(event) > 1600000000ull * 1000000000);
        CHECK(!vmbed_event_device(event) && !vmbed_event_errno(event) && !vmbed_event_offset(event));
        CHECK(i < 3 || !strcmp(vmbed_event_text(event), "stopped by the host"));
        vmbed_event_free(event);
    }
    vmbed_event *none = (vmbed_event *)-1;
    OK(vmbed_events_next(events, 0, &none, &error));
    CHECK(none == NULL && poll(&fd, 1, 0) == 0);
    vmbed_events_free(events);
}

static void registers_and_memory(void)
{
    struct guest g = make(spins, sizeof spins, NULL);
    vmbed_registers r = {.size = sizeof r};
    uint8_t bytes[sizeof spins], past[4];
    OK(vmbed_vm_get_registers(g.vm, 0, &r, &error));
    CHECK(r.rip == 0x1000 && r.size == sizeof r);
    r.rbx = 0x1234;
    OK(vmbed_vm_set_registers(g.vm, 0, &r, &error));
    memset(&r, 0, sizeof r), r.size = sizeof r;
    OK(vmbed_vm_get_registers(g.vm, 0, &r, &error));
    CHECK(r.rbx == 0x1234);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "no vCPU 1", vmbed_vm_get_registers(g.vm, 1, &r, &error));
    OK(vmbed_vm_read_memory(g.vm, 0x1000, bytes, sizeof bytes, &error));
    CHECK(!memcmp(bytes, spins, sizeof spins));
    OK(vmbed_vm_write_memory(g.vm, 0x2000, talks, sizeof talks, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "", vmbed_vm_read_memory(g.vm, (2 << 20) - 3, past, 4, &error));
    OK(vmbed_vm_read_memory(g.vm, 0, NULL, 0, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "data is NULL", vmbed_vm_read_memory(g.vm, 0, NULL, 1, &error));
    OK(vmbed_vm_start(g.vm, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "pause", vmbed_vm_get_registers(g.vm, 0, &r, &error));
    drop(&g);
}

static void structure_sizes(void)
{
    struct guest g = make(spins, sizeof spins, NULL);
    struct {
        vmbed_registers r;
        uint64_t later;
    } big = {.r = {.size = sizeof big}, .later = 7};
    OK(vmbed_vm_get_registers(g.vm, 0, &big.r, &error));
    CHECK(big.later == 0 && big.r.rip == 0x1000 && big.r.size == sizeof big);
    OK(vmbed_vm_set_registers(g.vm, 0, &big.r, &error));
    big.later = 1;
    FAILS(VMBED_ERR_UNSUPPORTED, "does not know", vmbed_vm_set_registers(g.vm, 0, &big.r, &error));
    for (size_t size = 0; size < sizeof big.r; size++) {
        big.r.size = size;
        FAILS(VMBED_ERR_INVALID_ARGUMENT, "its size is", vmbed_vm_set_registers(g.vm, 0, &big.r, &error));
    }
    vmbed_usage usage = {.size = sizeof usage};
    OK(vmbed_host_usage(g.host, &usage, &error));
    CHECK(usage.memory == 2 << 20 && usage.vcpus == 1 && usage.vcpu_capacity == UINT64_MAX && usage.memory_capacity);
    drop(&g);
}

static void every_bad_field_at_once(void)
{
    vmbed_config *config;
    vmbed_error *error = NULL;
    OK(vmbed_config_new_linux("/nonexistent", &config, &error));
    OK(vmbed_config_set_memory(config, 12345, &error));
    OK(vmbed_config_set_cpus(config, 0, 1, 1, &error));
    CHECK(vmbed_config_validate(config, &error) == VMBED_ERR_INVALID_ARGUMENT);
    int memory = 0, count = 0;
    for (size_t i = 0; vmbed_error_field(error, i); i++) {
        memory += !strcmp(vmbed_error_field(error, i), "memory");
        count += !strcmp(vmbed_error_field(error, i), "cpus.count");
        CHECK(vmbed_error_problem(error, i)[0] && vmbed_error_remedy(error, i));
    }
    CHECK(memory == 1 && count == 1 && !vmbed_error_source(error, 99) && !vmbed_error_problem(error, 99));
    vmbed_error_free(error);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "not one of", vmbed_config_set_console(config, 7, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "bare guests", vmbed_config_set_stack(config, 1, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "UTF-8", vmbed_config_set_name(config, "\xff", &error));
    vmbed_config_free(config);
    vmbed_host *host;
    vmbed_host_options nowhere = {.size = sizeof nowhere, .kvm = "/nonexistent/kvm"};
    FAILS(VMBED_ERR_NOT_FOUND, "/nonexistent/kvm", vmbed_host_open(&nowhere, &host, &error));
    vmbed_host_options never = {.size = sizeof never, .memory_ratio = -1};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "memory_ratio", vmbed_host_open(&never, &host, &error));
}

static void what_is_promised_and_what_is_there(void)
{
    struct guest g = make(spins, sizeof spins, NULL);
    vmbed_usage usage = {.size = sizeof usage};
    OK(vmbed_host_usage(g.host, &usage, &error));
    CHECK(usage.vms == 1 && usage.memory == 2 << 20 && usage.entitlement == 2 << 20 && usage.vcpus == 1);
    CHECK(usage.backing >= 4096 && usage.backing <= 2 << 20 && usage.process > 4096 && usage.overhead > 4096);
    CHECK(usage.unattributed == (int64_t)(usage.charged - usage.backing - usage.process));
    vmbed_memory memory = {.size = sizeof memory};
    OK(vmbed_vm_get_memory(g.vm, &memory, &error));
    CHECK(memory.max == 2 << 20 && memory.guarantee == 0 && memory.generation == 1 && memory.backing == usage.backing);
    CHECK(memory.resident + memory.swapped == memory.backing && memory.overhead == usage.overhead);
    uint8_t page[4096] = {1};
    OK(vmbed_vm_write_memory(g.vm, 0x100000, page, sizeof page, &error));
    OK(vmbed_vm_get_memory(g.vm, &memory, &error));
    CHECK(memory.backing == usage.backing + sizeof page);

    OK(vmbed_vm_set_guarantee(g.vm, 1 << 20, memory.generation, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "generation", vmbed_vm_set_guarantee(g.vm, 0, memory.generation, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "at most", vmbed_vm_set_guarantee(g.vm, 3 << 20, UINT64_MAX, &error));
    vmbed_host_options none = {.size = sizeof none, .memory = 4096, .memory_reserved = 1, .swap = 4096};
    FAILS(VMBED_ERR_INVALID_STATE, "generation", vmbed_host_set_shares(g.host, &none, 0, &error));
    OK(vmbed_host_set_shares(g.host, &none, UINT64_MAX, &error));
    OK(vmbed_vm_set_guarantee(g.vm, 4096, UINT64_MAX, &error));

    vmbed_verdict verdict = {.size = sizeof verdict};
    OK(vmbed_host_verdict(g.host, g.config, &verdict, &error));
    CHECK(verdict.binding == VMBED_CONSTRAINT_MEMORY_UNITS && verdict.count == 8);
    CHECK(verdict.slack[VMBED_CONSTRAINT_NOMINAL].wanted == 2 << 20 && verdict.slack[VMBED_CONSTRAINT_NOMINAL].left < 0);
    vmbed_builder *builder;
    vmbed_vm *vm;
    vmbed_error *error = NULL;
    OK(vmbed_builder_new(g.host, g.config, &builder, &error));
    CHECK(vmbed_builder_build(builder, &vm, &error) == VMBED_ERR_REFUSED);
    vmbed_verdict why = {.size = sizeof why};
    CHECK(vmbed_error_verdict(error, &why));
    /* All but what the machine had free at the moment. */
    why.slack[VMBED_CONSTRAINT_HEADROOM] = verdict.slack[VMBED_CONSTRAINT_HEADROOM];
    CHECK(!memcmp(&why, &verdict, sizeof why));
    CHECK(!strcmp(vmbed_error_field(error, VMBED_CONSTRAINT_SOLVENCY), "solvency") && !vmbed_error_verdict(NULL, &why));
    vmbed_error_free(error);
    vmbed_builder_free(builder);

    OK(vmbed_config_set_promise(g.config, 4096, 255, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "victim is 256", vmbed_config_set_promise(g.config, 0, 256, &error));
    uint32_t cpu = 0;
    OK(vmbed_config_set_affinity(g.config, 0, &cpu, 1, &error));
    OK(vmbed_config_set_dedicated(g.config, true, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "cpus.affinity", vmbed_config_validate(g.config, &error));

    OK(vmbed_vm_start(g.vm, &error));
    vmbed_vcpu_statistics vcpu = {.size = sizeof vcpu};
    for (int i = 0; vcpu.run_time < 1000000; i++) {
        CHECK(i < 60000 && "the vCPU has run a millisecond within a minute");
        usleep(1000);
        OK(vmbed_vm_get_vcpu_statistics(g.vm, 0, &vcpu, &error));
    }
    CHECK(vcpu.thread > 0 && vcpu.cpu == -1);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "no vCPU 1", vmbed_vm_get_vcpu_statistics(g.vm, 1, &vcpu, &error));
    drop(&g);
}

static void data_are_destroyed_once(void)
{
    struct port port = {0};
    struct guest g = make(talks, sizeof talks, NULL);
    /* The builder has built: the device's data end at once. */
    FAILS(VMBED_ERR_INVALID_STATE, "has built", vmbed_builder_add_pio(g.builder, "p", 1, 1, &port_ops, &port, &error));
    CHECK(port.destroyed == 1);
    vmbed_builder *builder;
    OK(vmbed_builder_new(g.host, g.config, &builder, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "name is NULL",
          vmbed_builder_add_pio(builder, NULL, 1, 1, &port_ops, &port, &error));
    CHECK(port.destroyed == 2);
    const vmbed_device_ops half = {sizeof half, port_read, NULL, port_destroy};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "write is NULL",
          vmbed_builder_add_pio(builder, "p", 1, 1, &half, &port, &error));
    CHECK(port.destroyed == 3);
    /* One whose place is taken makes the build fail, which ends both. */
    OK(vmbed_builder_add_pio(builder, "one", 0x20, 8, &port_ops, &port, &error));
    OK(vmbed_builder_add_pio(builder, "two", 0x27, 1, &port_ops, &port, &error));
    CHECK(port.destroyed == 3);
    vmbed_vm *vm;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "overlaps", vmbed_builder_build(builder, &vm, &error));
    CHECK(port.destroyed == 5);
    FAILS(VMBED_ERR_INVALID_STATE, "has built", vmbed_builder_build(builder, &vm, &error));
    vmbed_builder_free(builder);
    drop(&g);
}

static void fails(void)
{
    struct port port = {.answer = VMBED_ERR_BUSY};
    struct guest g = make(writes, sizeof writes, &port);
    vmbed_events *events;
    OK(vmbed_vm_events(g.vm, &events, &error));
    OK(vmbed_vm_start(g.vm, &error));
    for (vmbed_event *event;; vmbed_event_free(event)) {
        OK(vmbed_events_next(events, 60000, &event, &error));
        CHECK(event);
        if (vmbed_event_kind(event) != VMBED_EVENT_STOPPED)
            continue;
        CHECK(vmbed_event_cause(event) == VMBED_CAUSE_DEVICE_FAULT && !strcmp(vmbed_event_device(event), "port"));
        CHECK(strstr(vmbed_event_text(event), "-5"));
        vmbed_event_free(event);
        break;
    }
    vmbed_events_free(events);
    drop(&g);
    CHECK(port.destroyed == 1 && port.writes == 1);
}

static void a_device_that_fails_is_the_cause(void)
{
    beside_another_vm_often(fails);
}

static void stops_its_vm(void)
{
    struct port port = {0};
    struct guest g = make(writes, sizeof writes, &port);
    int32_t cause;
    port.stop = g.vm;
    OK(vmbed_vm_start(g.vm, &error));
    OK(vmbed_vm_wait(g.vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_HOST_STOP);
    drop(&g);
}

static void a_callback_stops_its_vm(void)
{
    beside_another_vm_often(stops_its_vm);
}

static void frees_its_vm(void)
{
    struct port port = {0};
    struct guest g = make(writes, sizeof writes, &port);
    vmbed_events *events;
    OK(vmbed_vm_events(g.vm, &events, &error));
    port.free = g.vm;
    OK(vmbed_vm_start(g.vm, &error));
    CHECK(next_cause(events) == VMBED_CAUSE_HOST_STOP);
    for (int i = 0; i < 60000 && !port.destroyed; i++)
        usleep(1000);
    CHECK(port.destroyed == 1 && port.writes == 1);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "was freed", vmbed_vm_start(g.vm, &error));
    vmbed_events_free(events);
    drop(&g); /* a second time: a no-op */
}

static void a_callback_frees_its_vm(void)
{
    beside_another_vm_often(frees_its_vm);
}

static void *waits(void *vm)
{
    int32_t cause = -1, status = vmbed_vm_wait(vm, -1, &cause, NULL);
    CHECK(status == VMBED_OK ? cause == VMBED_CAUSE_HOST_STOP : status == VMBED_ERR_INVALID_ARGUMENT);
    return NULL;
}

static void *pauses(void *vm)
{
    for (int i = 0; i < 20; i++)
        vmbed_vm_pause(vm, NULL), vmbed_vm_resume(vm, NULL);
    return NULL;
}

static void free_races_with_everything(void)
{
    for (int round = 0; round < 30; round++) {
        struct port port = {0};
        struct guest g = make(writes, sizeof writes, &port);
        pthread_t threads[4];
        OK(vmbed_vm_start(g.vm, &error));
        for (int i = 0; i < 4; i++)
            CHECK(!pthread_create(&threads[i], NULL, i % 2 ? waits : pauses, g.vm));
        usleep(round * 200);
        vmbed_vm_free(g.vm);
        CHECK(port.destroyed == 1);
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        drop(&g);
    }
}

static void doorbells_ring(void)
{
    /* mov ax, 0x1234; out 0x12, ax; out 0x20, al; out 0x21, al; in al, 0x10; jmp $-11 */
    static const uint8_t code[] = {0xb8, 0x34, 0x12, 0xe7, 0x12, 0xe6, 0x20, 0xe6, 0x21, 0xe4, 0x10, 0xeb, 0xf3};
    struct guest g = make(talks, sizeof talks, NULL);
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;
    vmbed_events *events;
    int one = 0, two = 0;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, code, sizeof code, &config, &error));
    OK(vmbed_builder_new(g.host, config, &builder, &error));
    OK(vmbed_builder_add_pio_doorbell(builder, "one", 0x10, 4, &error));
    OK(vmbed_builder_add_pio_doorbell(builder, "two", 0x20, 2, &error));
    OK(vmbed_builder_add_mmio_doorbell(builder, "three", 0xd0000000, 4, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "name is NULL", vmbed_builder_add_pio_doorbell(builder, NULL, 1, 1, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_events(vm, &events, &error));
    OK(vmbed_vm_start(vm, &error));
    /* Read slowly: what rings meanwhile is counted, and no event is lost. */
    for (uint64_t i = 0; one < 20 || two < 20; i++) {
        vmbed_event *event;
        OK(vmbed_events_next(events, 60000, &event, &error));
        CHECK(event && vmbed_event_seq(event) == i && vmbed_event_count(event) >= 1);
        if (vmbed_event_kind(event) == VMBED_EVENT_DOORBELL) {
            int first = !strcmp(vmbed_event_device(event), "one");
            CHECK(first || !strcmp(vmbed_event_device(event), "two"));
            CHECK(vmbed_event_value(event) == (first ? 0x1234 : 0x34));
            CHECK(first ? vmbed_event_offset(event) == 2 : vmbed_event_offset(event) <= 1);
            one += first, two += !first;
        } else {
            CHECK(vmbed_event_kind(event) == VMBED_EVENT_STARTED && vmbed_event_value(event) == 0);
        }
        vmbed_event_free(event);
        usleep(500);
    }
    vmbed_vm_free(vm), vmbed_events_free(events), vmbed_builder_free(builder), vmbed_config_free(config);
    drop(&g);
}

static int console_bytes;

static void console_ended(void *user)
{
    *(int *)user = 1;
}

static void console_takes(void *user, const uint8_t *data, size_t length)
{
    (void)user, (void)data;
    console_bytes += (int)length;
}

static void callbacks_that_are_missing(void)
{
    struct guest g = make(talks, sizeof talks, NULL);
    vmbed_builder *builder;
    int ended = 0;
    OK(vmbed_builder_new(g.host, g.config, &builder, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "function is NULL",
          vmbed_builder_console_callback(builder, NULL, &ended, console_ended, &error));
    CHECK(ended == 1);
    ended = 0;
    OK(vmbed_builder_console_callback(builder, console_takes, &ended, console_ended, &error));
    CHECK(ended == 0);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "no open file", vmbed_builder_console_output(builder, 9999, &error));
    vmbed_builder_free(builder);
    CHECK(ended == 1);
    drop(&g);
}

static atomic_int lines, logs_ended;

static void log_line(void *user, int32_t level, const char *target, const char *message)
{
    CHECK(user == &lines && level >= VMBED_LOG_ERROR && target[0] && message);
    lines++;
}

static void log_end(void *user)
{
    CHECK(user == &lines);
    logs_ended++;
}

static void log_lines_go_where_they_are_wanted(void)
{
    OK(vmbed_log_set(VMBED_LOG_TRACE, log_line, &lines, log_end, &error));
    struct guest g = make(spins, sizeof spins, NULL);
    OK(vmbed_vm_start(g.vm, &error));
    drop(&g);
    CHECK(lines > 0 && logs_ended == 0);
    OK(vmbed_log_set(VMBED_LOG_OFF, NULL, NULL, NULL, &error));
    CHECK(logs_ended == 1);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "not one of", vmbed_log_set(99, log_line, &lines, log_end, &error));
    CHECK(logs_ended == 2);
}

static void version_and_features(void)
{
    CHECK(vmbed_version() == (VMBED_VERSION_MAJOR << 16 | VMBED_VERSION_MINOR << 8 | VMBED_VERSION_PATCH));
    size_t count = 0;
    for (; vmbed_feature(count); count++)
        CHECK(vmbed_has_feature(vmbed_feature(count)));
    CHECK(count > 0 && vmbed_has_feature("bare") && !vmbed_has_feature("time-travel") && !vmbed_has_feature(NULL));
}

static void a_probe_says_what_is_missing(void)
{
    vmbed_probe *probe;
    OK(vmbed_probe_new(NULL, &probe, &error));
    CHECK(vmbed_probe_is_usable(probe) && vmbed_probe_what(probe, 0) && !vmbed_probe_problem(probe, 0));
    vmbed_probe_free(probe);
    OK(vmbed_probe_new("/nonexistent/kvm", &probe, &error));
    CHECK(!vmbed_probe_is_usable(probe) && vmbed_probe_problem(probe, 0) && vmbed_probe_remedy(probe, 0)[0]);
    vmbed_probe_free(probe);
}

static size_t entries(const char *path)
{
    DIR *directory = opendir(path);
    size_t count = 0;
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static size_t count_lines(const char *path)
{
    FILE *file = fopen(path, "r");
    size_t count = 0;
    for (int c; (c = getc(file)) != EOF;)
        count += c == '\n';
    fclose(file);
    return count;
}

static size_t resident(void)
{
    size_t size = 0, pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(fscanf(file, "%zu %zu", &size, &pages) == 2);
    fclose(file);
    return pages * 4096;
}

static void cycle(void)
{
    struct port port = {0};
    struct guest g = make(writes, sizeof writes, &port);
    int32_t cause;
    OK(vmbed_vm_start(g.vm, &error));
    OK(vmbed_vm_stop(g.vm, &cause, &error));
    drop(&g);
}

static void cycles_leave_nothing(void)
{
    const char *rounds = getenv("VMBED_CYCLES");
    for (int i = 0; i < 50; i++)
        cycle();
    size_t fds = entries("/proc/self/fd"), tasks = entries("/proc/self/task");
    size_t maps = count_lines("/proc/self/maps"), memory = resident();
    for (int i = 0; i < (rounds ? atoi(rounds) : 1000); i++)
        cycle();
    CHECK(entries("/proc/self/fd") == fds && entries("/proc/self/task") == tasks);
    CHECK(count_lines("/proc/self/maps") <= maps);
    CHECK(resident() <= memory + (256 << 10));
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
#define CASE(name) {#name, name}
    CASE(guest_and_device),
    CASE(events_in_order),
    CASE(registers_and_memory),
    CASE(structure_sizes),
    CASE(every_bad_field_at_once),
    CASE(what_is_promised_and_what_is_there),
    CASE(data_are_destroyed_once),
    CASE(a_device_that_fails_is_the_cause),
    CASE(a_callback_stops_its_vm),
    CASE(a_callback_frees_its_vm),
    CASE(free_races_with_everything),
    CASE(callbacks_that_are_missing),
    CASE(log_lines_go_where_they_are_wanted),
    CASE(version_and_features),
    CASE(a_probe_says_what_is_missing),
    CASE(cycles_leave_nothing),
    CASE(a_callback_reenters),
    CASE(a_callback_that_blocks),
    CASE(other_callbacks_reenter_and_free),
    CASE(handles_from_eight_threads),
    CASE(freeing_in_every_order),
    CASE(stop_races_with_everything),
    CASE(a_fork_while_a_vm_runs),
    CASE(many_at_once),
    CASE(vcpus_on_the_callers_threads),
    CASE(devices_on_the_callers_loop),
    CASE(doorbells_ring),
    CASE(a_disk_of_ones_own),
    CASE(a_disk_that_does_not_answer),
    CASE(a_network_of_ones_own),
    CASE(a_card_moves_to_another_network),
    CASE(memory_given_back),
    CASE(memory_of_every_kind),
    CASE(memory_that_is_lost),
    CASE(a_share_of_the_processors),
    CASE(a_sandbox_for_its_threads),
    CASE(disks_and_what_is_changed_of_them),
    CASE(cards_on_a_switch),
    CASE(what_is_done_when_memory_gets_short),
    CASE(a_switch_drops_and_says_why),
    CASE(disks_and_cards_by_descriptor),
    CASE(guests_that_break_the_rules),
    CASE(files_that_lie_and_fail),
    CASE(vcpus_that_cannot_go_on),
    CASE(disks_whose_host_fails),
    CASE(networks_that_go_away),
    CASE(too_few_descriptors_and_a_storm),
    CASE(the_hosts_side_of_a_network),
};

/* A VM that its own callback has freed ends behind our back, which takes the kernel a moment. A leak checker that stops all threads in
 * that moment waits for ever: the one that closes the VM waits, deep in the kernel, for one of the kernel's that is stopped already. */
static void let_the_last_vm_end(void)
{
    for (int i = 0; i < 1000; i++) {
        int threads = 0;
        DIR *tasks = opendir("/proc/self/task");
        for (struct dirent *entry; tasks && (entry = readdir(tasks));)
            threads += entry->d_name[0] != '.';
        if (tasks)
            closedir(tasks);
        if (threads <= 1)
            return;
        usleep(10000);
    }
}

int main(int argc, char **argv)
{
    alarm(300); /* nothing here takes longer: better dead than hanging */
    int found = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (argc > 1 && !strcmp(argv[1], "--list")) {
            puts(cases[i].name);
            found = 1;
        } else if (argc < 2 || !strcmp(argv[1], cases[i].name)) {
            cases[i].run();
            let_the_last_vm_end();
            printf("ok %s\n", cases[i].name);
            fflush(stdout);
            found = 1;
        }
    }
    return !found;
}

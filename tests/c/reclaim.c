/* The case of a host whose memory gets short: here it always is, by thresholds that no machine meets. */
#include "driven.h"

#define ALWAYS ((uint64_t)1 << 60)

static vmbed_vm *spinning(vmbed_host *host, int32_t victim)
{
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, spins, sizeof spins, &config, &error));
    OK(vmbed_config_set_promise(config, 0, victim, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_start(vm, &error));
    vmbed_builder_free(builder), vmbed_config_free(config);
    return vm;
}

static void wait_for_state(const vmbed_vm *vm, int32_t state)
{
    const struct timespec moment = {0, 1000000};
    for (int i = 0; vmbed_vm_state(vm) != state; i++) {
        CHECK(i < 60000);
        nanosleep(&moment, NULL);
    }
}

/* How many steps of that stage the VM's events tell of, and no other stage. */
static int told(const vmbed_vm *vm, int32_t stage)
{
    vmbed_events *events;
    vmbed_event *event;
    int count = 0;
    OK(vmbed_vm_events(vm, &events, &error));
    for (;;) {
        vmbed_pressure pressure = {.size = sizeof pressure};
        OK(vmbed_events_next(events, 0, &event, &error));
        if (!event)
            break;
        CHECK(vmbed_event_pressure(event, &pressure) == (vmbed_event_kind(event) == VMBED_EVENT_MEMORY_PRESSURE));
        if (vmbed_event_kind(event) == VMBED_EVENT_MEMORY_PRESSURE) {
            CHECK(pressure.stage == stage);
            CHECK((pressure.deadline > 0) == (stage == VMBED_STAGE_PAUSE));
            count++;
        }
        vmbed_event_free(event);
    }
    vmbed_events_free(events);
    return count;
}

void what_is_done_when_memory_gets_short(void)
{
    const vmbed_balloon balloon = {.size = sizeof balloon};
    /* One account only: another could be read before or after the balloon is full, and would count differently. */
    const struct step asks[] = {{ACCOUNT, 0, 4, 2}, {ASKED, 0, 0, 0}, {TARGET, 384, 0, 0}, {END, 0, 0, 0}};
    vmbed_balloon_statistics moved = {.size = sizeof moved};
    vmbed_reclaim_options options = {.size = sizeof options, .idle_tax = 1.0, .interval = 5};
    vmbed_memory memory = {.size = sizeof memory};
    struct result results[3];
    int32_t cause;

    struct guest g = prepare(0, 0, NULL);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "interval", vmbed_host_set_reclaim(g.host, &options, &error));
    options.idle_tax = 0, options.interval = 20;
    vmbed_builder_free(g.builder);
    OK(vmbed_config_set_balloon(g.config, &balloon, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    start(&g, asks, sizeof asks);
    options.balloon_below = ALWAYS;
    OK(vmbed_host_set_reclaim(g.host, &options, &error));
    finish(&g, results, sizeof results);
    OK(vmbed_vm_get_balloon_statistics(g.vm, &moved, &error));
    CHECK(moved.target == 384 << 12);
    OK(vmbed_host_set_reclaim(g.host, NULL, &error));
    OK(vmbed_vm_get_balloon_statistics(g.vm, &moved, &error));
    CHECK(moved.target == 0 && told(g.vm, VMBED_STAGE_BALLOON) == 1);

    vmbed_vm *vm = spinning(g.host, -1);
    options.balloon_below = 0, options.pause_below = ALWAYS, options.pause_deadline = 600000;
    OK(vmbed_host_set_reclaim(g.host, &options, &error));
    wait_for_state(vm, VMBED_STATE_PAUSED);
    OK(vmbed_host_set_reclaim(g.host, NULL, &error));
    wait_for_state(vm, VMBED_STATE_RUNNING);
    CHECK(told(vm, VMBED_STAGE_PAUSE) == 1);

    vmbed_vm *victim = spinning(g.host, 1);
    options.pause_below = 0, options.stop_below = ALWAYS;
    OK(vmbed_host_set_reclaim(g.host, &options, &error));
    OK(vmbed_vm_wait(victim, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_MEMORY_PRESSURE && told(victim, VMBED_STAGE_STOP) == 1);
    for (int i = 0; i == 0 || memory.backing > 0; i++) {
        const struct timespec moment = {0, 1000000};
        CHECK(i < 60000);
        nanosleep(&moment, NULL);
        OK(vmbed_vm_get_memory(victim, &memory, &error));
    }
    CHECK(vmbed_vm_state(vm) == VMBED_STATE_RUNNING);
    vmbed_vm_free(victim), vmbed_vm_free(vm);
    drop(&g);
}

/*
 * The rows about a host that fails of the table of inputs that have broken VMMs, through C: networks (29), memory (31), descriptors and signals (32); failing.c has
 * disks (28). After each the guest's devices work again, and a second VM of this process has not noticed. tests/hostile/host.rs does the same in Rust.
 */
#include "rogue.h"
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>

void networks_that_go_away(void);
void too_few_descriptors_and_a_storm(void);

enum { SIZE = 1 << 20 };

static const char *const taps[2] = {"vmbhost0", "vmbhost1"};

/* ip(8) does that. */
__attribute__((format(printf, 1, 2))) static void ip(const char *words, ...)
{
    char command[200] = "ip ";
    va_list arguments;
    va_start(arguments, words);
    vsnprintf(command + 3, sizeof command - 3, words, arguments);
    va_end(arguments);
    CHECK(system(command) == 0);
}

static void make_tap(const char *tap)
{
    ip("tuntap add %s mode tap", tap);
    ip("link set %s master vmbbr up", tap);
}

static void make_bridge(void)
{
    ip("link add vmbbr type bridge");
    ip("link set vmbbr up");
}

/* Whether its card is on it, and the bridge passes frames on. */
static bool is_up(const char *tap)
{
    char command[100], shown[4096];
    snprintf(command, sizeof command, "ip -d link show %s", tap);
    FILE *output = popen(command, "r");
    CHECK(output);
    shown[fread(shown, 1, sizeof shown - 1, output)] = 0;
    return pclose(output) == 0 && strstr(shown, "LOWER_UP") && strstr(shown, "state forwarding");
}

/* What the first card sends comes to the second. */
static void both_work(struct rogue *rogue)
{
    for (int i = 0; i < 2; i++)
        for (int tries = 0; !is_up(taps[i]); tries++) {
            CHECK(tries < 1200); /* a card is on its TAP interface again */
            usleep(50000);
        }
    CHECK(rogue_does(rogue, USE_ALL, "") == 0);
}

/* How many failures of that card's there were, and none of anything else's; waits for one if so wanted. */
static int card_failures(struct rogue *rogue, int card, bool wait)
{
    const char *device = card ? "net1" : "net0";
    int count = 0;
    for (;;) {
        vmbed_event *event;
        OK(vmbed_events_next(rogue->events, wait && !count ? 60000 : 0, &event, &error));
        CHECK(event || !wait || count); /* the embedder is told that the TAP interface is down, or gone */
        if (!event)
            return count;
        int32_t kind = vmbed_event_kind(event);
        CHECK(kind == VMBED_EVENT_BALLOON || kind == VMBED_EVENT_STARTED || kind == VMBED_EVENT_BACKEND_ERROR);
        if (kind == VMBED_EVENT_BACKEND_ERROR) {
            CHECK(!strcmp(vmbed_event_device(event), device));
            count++;
        }
        vmbed_event_free(event);
    }
}

/* Row 29. */
static void without_a_network(vmbed_host *host)
{
    static struct rogue rogue;
    rogue_begin(&rogue, host, &(struct attached){.taps = taps});
    both_work(&rogue);
    ip("link del vmbbr");
    rogue_does(&rogue, SEND_TEN, "");
    make_bridge();
    for (int i = 0; i < 2; i++)
        ip("link set %s master vmbbr", taps[i]);
    both_work(&rogue);
    CHECK(rogue_told(&rogue) == 0); /* a bridge is not the card's */
    for (int i = 0; i < 2; i++) {
        ip("link set %s down", taps[i]);
        rogue_does(&rogue, SEND_TEN, "");
        CHECK(i || card_failures(&rogue, i, true) > 0); /* the second sends nothing */
        ip("link set %s up", taps[i]);
        both_work(&rogue);
        CHECK(card_failures(&rogue, i, false) == 0);
        ip("link del %s", taps[i]);
        rogue_does(&rogue, SEND_TEN, "");
        CHECK(card_failures(&rogue, i, true) > 0);
        CHECK(vmbed_vm_state(rogue.vm) == VMBED_STATE_RUNNING);
        make_tap(taps[i]);
        both_work(&rogue);
        card_failures(&rogue, i, false);
    }
    rogue_end(&rogue);
}

void networks_that_go_away(void)
{
    /* With whose last thread all of it is gone. */
    int before = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    CHECK(before >= 0 && unshare(CLONE_NEWNET) == 0);
    make_bridge();
    for (int i = 0; i < 2; i++)
        make_tap(taps[i]);
    beside_another_vm(without_a_network);
    CHECK(setns(before, CLONE_NEWNET) == 0);
    close(before);
}

static vmbed_config *hungry(void)
{
    /* mov al, 0xfe; out 0x64, al; hlt: a reset */
    static const uint8_t resets[] = {0xb0, 0xfe, 0xe6, 0x64, 0xf4};
    static const char *const paths[] = {"host-one", "host-two"};
    vmbed_config *config;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, resets, sizeof resets, &config, &error));
    OK(vmbed_config_set_platform(config, VMBED_PLATFORM_PC, &error));
    for (int i = 0; i < 2; i++) {
        const vmbed_disk disk = {.size = sizeof disk, .path = paths[i]};
        int file = open(paths[i], O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        CHECK(file >= 0 && ftruncate(file, SIZE) == 0 && close(file) == 0);
        OK(vmbed_config_add_disk(config, &disk, &error));
    }
    return config;
}

/* Builds a VM and runs it to its end. */
static int32_t built(vmbed_host *host, const vmbed_config *config, const struct rlimit *meanwhile, vmbed_error **out)
{
    struct rlimit all;
    vmbed_builder *builder;
    vmbed_vm *vm = NULL;
    int32_t cause;
    OK(vmbed_builder_new(host, config, &builder, &error));
    CHECK(getrlimit(RLIMIT_NOFILE, &all) == 0 && setrlimit(RLIMIT_NOFILE, meanwhile ? meanwhile : &all) == 0);
    int32_t status = vmbed_builder_build(builder, &vm, out);
    CHECK(setrlimit(RLIMIT_NOFILE, &all) == 0);
    if (status == VMBED_OK) {
        OK(vmbed_vm_start(vm, &error));
        OK(vmbed_vm_wait(vm, 60000, &cause, &error));
        CHECK(cause == VMBED_CAUSE_GUEST_RESET);
    }
    vmbed_vm_free(vm), vmbed_builder_free(builder);
    return status;
}

static rlim_t descriptors(void)
{
    rlim_t count = 0;
    DIR *all = opendir("/proc/self/fd");
    CHECK(all);
    while (readdir(all))
        count++;
    closedir(all);
    return count;
}

/* Row 32: builds cut short by the limit of descriptors, wherever that is. */
static void too_few_descriptors(vmbed_host *host)
{
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_config *config = hungry();
    int failed = 0, done = 0;
    OK(built(host, config, NULL, &error));
    OK(vmbed_host_usage(host, &usage, &error)); /* what is counted of a VM is opened when somebody asks */
    struct rlimit fewer;
    CHECK(getrlimit(RLIMIT_NOFILE, &fewer) == 0);
    const rlim_t before = descriptors();
    for (rlim_t more = 0; more < 100; more++) {
        vmbed_error *error = NULL;
        fewer.rlim_cur = before + more;
        if (built(host, config, &fewer, &error) == VMBED_OK) {
            done++;
        } else {
            CHECK(error && strstr(vmbed_error_message(error), "os error 24"));
            failed++;
        }
        vmbed_error_free(error);
        OK(vmbed_host_usage(host, &usage, &error));
        CHECK(descriptors() == before && usage.vms == 1);
    }
    CHECK(failed > 10 && done > 10); /* the sweep has both its ends */
    vmbed_config_free(config);
}

/* Row 31: what the host has not is an error of the build, and all of it is taken back. */
static void is_refused(vmbed_host *host, uint64_t memory, int limit, rlim_t most, const char *why)
{
    static const uint8_t halts[] = {0xf4};
    struct rlimit all, fewer;
    vmbed_usage usage = {.size = sizeof usage};
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm = NULL;
    int32_t cause;
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, halts, sizeof halts, &config, &error));
    OK(vmbed_config_set_memory(config, memory, &error));
    CHECK(getrlimit(limit, &all) == 0);
    fewer = all, fewer.rlim_cur = most;
    for (int i = 0; i < 20; i++) {
        vmbed_error *error = NULL;
        OK(vmbed_builder_new(host, config, &builder, &error));
        CHECK(setrlimit(limit, &fewer) == 0);
        int32_t status = vmbed_builder_build(builder, &vm, &error);
        CHECK(setrlimit(limit, &all) == 0);
        CHECK(status == VMBED_ERR_EXHAUSTED && !vm && strstr(vmbed_error_message(error), why));
        vmbed_error_free(error), vmbed_builder_free(builder);
        OK(vmbed_host_usage(host, &usage, &error));
        CHECK(usage.vms == 1);
    }
    /* One that is small enough works. */
    OK(vmbed_config_set_memory(config, 1 << 20, &error));
    OK(vmbed_builder_new(host, config, &builder, &error));
    CHECK(setrlimit(limit, &fewer) == 0);
    OK(vmbed_builder_build(builder, &vm, &error));
    OK(vmbed_vm_start(vm, &error));
    OK(vmbed_vm_wait(vm, 60000, &cause, &error));
    CHECK(cause == VMBED_CAUSE_GUEST_HALT && setrlimit(limit, &all) == 0);
    vmbed_vm_free(vm), vmbed_builder_free(builder), vmbed_config_free(config);
}

static void too_little_memory(vmbed_host *host)
{
    unsigned long pages;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file && fscanf(file, "%lu", &pages) == 1 && fclose(file) == 0);
    is_refused(host, 1000 << 20, RLIMIT_AS, pages * 4096 + (500 << 20), "finding addresses for 1048576000 bytes of guest memory");
    is_refused(host, 4 << 20, RLIMIT_FSIZE, 2000000, "RLIMIT_FSIZE");
}

static atomic_int over, heard[3];
static const int signals[3] = {SIGUSR1, SIGUSR2, SIGURG};

static void hear(int number)
{
    for (int i = 0; i < 3; i++)
        if (signals[i] == number)
            heard[i]++;
}

static void *storms(void *user)
{
    while (!over) {
        for (int i = 0; i < 3; i++)
            CHECK(kill(getpid(), signals[i]) == 0);
        usleep(200);
    }
    return user;
}

/* Row 32: VMs are built, work, and end, while handlers interrupt calls. */
static void amid_signals(vmbed_host *host)
{
    static struct rogue rogue;
    static const uint32_t rows[] = {USE_ALL, 13, 17, USE_ALL};
    vmbed_config *config = hungry();
    for (int round = 0; round < 3; round++) {
        rogue_begin(&rogue, host, NULL);
        for (int i = 0; i < 4; i++)
            CHECK(rogue_does(&rogue, rows[i], "") == 0);
        CHECK(rogue_told(&rogue) == 0);
        rogue_end(&rogue);
    }
    for (int round = 0; round < 20; round++)
        OK(built(host, config, NULL, &error));
    vmbed_config_free(config);
}

void too_few_descriptors_and_a_storm(void)
{
    struct sigaction action = {.sa_handler = hear}, before[3];
    sigset_t all, mask;
    pthread_t storm;
    beside_another_vm(too_little_memory);
    beside_another_vm(too_few_descriptors);
    /* The thread that makes the storm is left out of it, so that it is the others who are interrupted. */
    sigfillset(&all);
    for (int i = 0; i < 3; i++)
        CHECK(sigaction(signals[i], &action, &before[i]) == 0);
    CHECK(pthread_sigmask(SIG_BLOCK, &all, &mask) == 0 && pthread_create(&storm, NULL, storms, NULL) == 0);
    CHECK(pthread_sigmask(SIG_SETMASK, &mask, NULL) == 0);
    beside_another_vm(amid_signals);
    over = 1;
    CHECK(pthread_join(storm, NULL) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(heard[i] > 0 && sigaction(signals[i], &before[i], NULL) == 0);
    unlink("host-one"), unlink("host-two");
}

/*
 * A plain virtual machine monitor, to copy from: boots a Linux kernel with disks and network cards, its console on
 * this terminal.
 *
 *     cc boot.c -o boot $(pkg-config --cflags --libs vmbed)
 *     ./boot --kernel F [--initrd F] [--cmdline S] [--disk F[,ro]]... [--tap NAME]... [--vcpus N] [--memory 512M]
 *
 * Ctrl-A x ends the guest. SIGTERM, SIGINT and SIGHUP press its power button, the second time they end it. Exit status:
 * 0 the guest powered off, 2 it asked for a reboot, 3 it crashed, 1 anything else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>
#include <vmbed.h>

static const char usage[] = "usage: boot --kernel FILE [--initrd FILE] [--cmdline TEXT] [--disk FILE[,ro]]... "
                            "[--tap NAME]... [--vcpus N] [--memory 512M]";

static struct termios terminal;
static int raw;

/* Gives the terminal back, whatever happens: at exit() too. */
static void restore(void)
{
    if (raw)
        tcsetattr(0, TCSANOW, &terminal);
    raw = 0;
}

static void take_terminal(void)
{
    struct termios ours;
    if (tcgetattr(0, &terminal) < 0)
        return;
    ours = terminal;
    cfmakeraw(&ours);
    raw = tcsetattr(0, TCSANOW, &ours) == 0;
}

static void fail(const char *what, vmbed_error *error)
{
    restore();
    fprintf(stderr, "boot: %s%s\n", what, error ? vmbed_error_message(error) : "");
    exit(1);
}

static void check(int32_t status, vmbed_error **error)
{
    if (status != VMBED_OK)
        fail("", *error);
}

/* "512M" in bytes; 0 where it is not a size. */
static uint64_t size(const char *text)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    int shift = !strcmp(end, "G") ? 30 : !strcmp(end, "M") ? 20 : !strcmp(end, "K") ? 10 : *end ? -1 : 0;
    return errno || shift < 0 || *text == '-' || value > UINT64_MAX >> shift ? 0 : value << shift;
}

static void add_disk(vmbed_config *config, char *text)
{
    vmbed_error *error;
    vmbed_disk disk = {.size = sizeof disk, .path = text};
    char *comma = strrchr(text, ',');
    if (comma && !strcmp(comma, ",ro")) {
        *comma = '\0';
        disk.readonly = 1;
    }
    check(vmbed_config_add_disk(config, &disk, &error), &error);
}

static vmbed_config *arguments(int argc, char **argv)
{
    static const struct option options[] = {
        {"kernel", 1, 0, 'k'}, {"initrd", 1, 0, 'i'}, {"cmdline", 1, 0, 'c'}, {"disk", 1, 0, 'd'},
        {"tap", 1, 0, 't'},    {"vcpus", 1, 0, 'v'},  {"memory", 1, 0, 'm'},  {"help", 0, 0, 'h'},
        {0, 0, 0, 0},
    };
    vmbed_error *error;
    vmbed_config *config = NULL;
    int option;

    /* The kernel first: it makes the configuration that the others change. */
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (option == 'h') {
            printf("%s\n\nCtrl-A x ends the guest. Exit status: 0 power-off, 2 reboot, 3 crash, 1 error.\n", usage);
            exit(0);
        } else if (option == 'k') {
            vmbed_config_free(config);
            check(vmbed_config_new_linux(optarg, &config, &error), &error);
        } else if (option == '?') {
            fail(usage, NULL);
        }
    if (!config || optind < argc)
        fail(usage, NULL);
    optind = 1;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (option == 'i') {
            check(vmbed_config_set_initrd(config, optarg, &error), &error);
        } else if (option == 'c') {
            check(vmbed_config_set_cmdline(config, optarg, &error), &error);
        } else if (option == 'd') {
            add_disk(config, optarg);
        } else if (option == 't') {
            const vmbed_net net = {.size = sizeof net, .tap = optarg};
            check(vmbed_config_add_net(config, &net, &error), &error);
        } else if (option == 'v') {
            uint64_t count = size(optarg);
            check(vmbed_config_set_cpus(config, count > 255 ? 255 : (uint16_t)count, 1, 1, &error), &error);
        } else if (option == 'm') {
            check(vmbed_config_set_memory(config, size(optarg), &error), &error);
        }
    return config;
}

/* Types what the user types, but for Ctrl-A x. Whether to go on reading. */
static int type(vmbed_vm *vm)
{
    static int after_ctrl_a;
    uint8_t bytes[256], out[2 * sizeof bytes];
    size_t length = 0;
    ssize_t count = read(0, bytes, sizeof bytes);
    for (ssize_t i = 0; i < count; i++) {
        if (after_ctrl_a && bytes[i] == 'x')
            vmbed_vm_request_stop(vm, NULL);
        else if (after_ctrl_a && bytes[i] != 1)
            out[length++] = 1;
        after_ctrl_a = !after_ctrl_a && bytes[i] == 1;
        if (!after_ctrl_a)
            out[length++] = bytes[i];
    }
    vmbed_vm_console_input(vm, out, length, NULL, NULL);
    return count > 0;
}

/* Watches the guest, the terminal and signals until the guest has ended. Why it did. */
static int32_t watch(vmbed_vm *vm, const vmbed_events *events, int signals)
{
    struct pollfd fds[] = {{vmbed_events_fd(events), POLLIN, 0}, {signals, POLLIN, 0}, {0, POLLIN, 0}};
    int pressed = 0;
    for (;;) {
        if (poll(fds, 3, -1) < 0 && errno != EINTR)
            fail("poll failed", NULL);
        vmbed_event *event;
        while (vmbed_events_next(events, 0, &event, NULL) == VMBED_OK && event) {
            int32_t cause = vmbed_event_cause(event);
            if (vmbed_event_kind(event) == VMBED_EVENT_BACKEND_ERROR)
                fprintf(stderr, "boot: %s: %s\r\n", vmbed_event_device(event), vmbed_event_text(event));
            vmbed_event_free(event);
            if (cause != VMBED_CAUSE_NONE)
                return cause;
        }
        struct signalfd_siginfo signal;
        if (fds[1].revents && read(signals, &signal, sizeof signal) > 0) {
            if (pressed++)
                vmbed_vm_request_stop(vm, NULL);
            else
                vmbed_vm_shutdown(vm, NULL);
        }
        if (fds[2].revents && !type(vm))
            fds[2].fd = -1;
    }
}

int main(int argc, char **argv)
{
    vmbed_error *error;
    vmbed_host *host;
    vmbed_builder *builder;
    vmbed_vm *vm;
    vmbed_events *events;
    vmbed_config *config = arguments(argc, argv);
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM), sigaddset(&set, SIGINT), sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    int signals = signalfd(-1, &set, SFD_CLOEXEC);

    check(vmbed_host_open(NULL, &host, &error), &error);
    check(vmbed_builder_new(host, config, &builder, &error), &error);
    check(vmbed_builder_console_output(builder, 1, &error), &error);
    check(vmbed_builder_build(builder, &vm, &error), &error);
    check(vmbed_vm_events(vm, &events, &error), &error);
    atexit(restore);
    take_terminal();
    check(vmbed_vm_start(vm, &error), &error);
    int32_t cause = watch(vm, events, signals);
    restore();

    vmbed_events_free(events);
    vmbed_vm_free(vm);
    vmbed_builder_free(builder);
    vmbed_config_free(config);
    vmbed_host_free(host);
    return cause == VMBED_CAUSE_GUEST_POWEROFF                                      ? 0
           : cause == VMBED_CAUSE_GUEST_RESET                                       ? 2
           : cause == VMBED_CAUSE_TRIPLE_FAULT || cause == VMBED_CAUSE_GUEST_PANIC ? 3
                                                                                    : 1;
}

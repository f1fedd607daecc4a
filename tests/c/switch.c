/* Cases of the C API with a switch between guests. */
#define _GNU_SOURCE
#include "driven.h"
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* The stations are 02:02:02:02:02:02 and 04:...; the broadcast address is 0xff. */
#define ALL 0xff

static struct guest on_port(const vmbed_port *port, struct said *said, const struct step *steps, size_t size)
{
    struct guest g = prepare(0, 1, said);
    OK(vmbed_builder_net_port(g.builder, 0, port, &error));
    start(&g, steps, size);
    return g;
}

static vmbed_port *add(vmbed_switch *on, const char *name, const vmbed_port_options *options)
{
    vmbed_port *port;
    OK(vmbed_switch_add_port(on, name, options, &port, &error));
    return port;
}

static vmbed_port_statistics carried(const vmbed_port *port)
{
    vmbed_port_statistics now = {.size = sizeof now};
    OK(vmbed_port_get_statistics(port, &now, &error));
    return now;
}

void cards_on_a_switch(void)
{
    const struct step listens[] = {{TELL, 0, 0, 1}, {RECEIVE, 0, 0, 0}, {SEND, 2, 70, 4}, {TELL, 0, 0, 2}, {END, 0, 0, 0}};
    const struct step asks[] = {{SEND, ALL, 60, 2}, {RECEIVE, 0, 0, 0}, {END, 0, 0, 0}};
    const vmbed_switch_options options = {.size = sizeof options, .addresses = 100};
    const vmbed_port_options ten = {.size = sizeof ten, .vlan = 10}, twenty = {.size = sizeof twenty, .vlan = 20};
    struct said said[3] = {0};
    struct result results[4];
    vmbed_switch *between;
    vmbed_capture *capture;
    vmbed_net_statistics heard = {.size = sizeof heard};
    uint64_t written, missed;
    uint8_t magic[4];
    int32_t cause;

    FILE *file = tmpfile();
    CHECK(file);
    OK(vmbed_switch_new(&options, &between, &error));
    vmbed_port *first = add(between, "first", &ten), *second = add(between, "second", &ten);
    vmbed_port *other = add(between, "other", &twenty);
    CHECK(!strcmp(vmbed_port_name(first), "first"));
    const vmbed_port *const two[] = {first, second};
    OK(vmbed_switch_capture(between, two, 2, fileno(file), &capture, &error));
    struct guest answers = on_port(second, &said[0], listens, sizeof listens);
    struct guest outside = on_port(other, &said[1], listens, sizeof listens);
    wait_for(&said[0].last, 1), wait_for(&said[1].last, 1);
    struct guest speaks = on_port(first, &said[2], asks, sizeof asks);
    finish(&speaks, results, sizeof(struct result) * 2);
    CHECK(results[1].length == 12 + 70 && results[1].sum == 6 * 2 + 64 * 4);
    finish(&answers, results, sizeof results);
    CHECK(results[1].length == 12 + 60 && results[1].sum == 6 * 0xff + 54 * 2);
    OK(vmbed_vm_stop(outside.vm, &cause, &error));
    OK(vmbed_vm_get_net_statistics(outside.vm, 0, &heard, &error));
    CHECK(heard.rx_frames == 0);
    CHECK(carried(first).received_frames == 1 && carried(first).sent_bytes == 70 && carried(first).addresses == 1);
    CHECK(carried(second).sent_bytes == 60 && carried(other).sent_frames == 0);
    OK(vmbed_capture_finish(capture, &written, &missed, &error));
    CHECK(written == 4 && missed == 0);
    FAILS(VMBED_ERR_INVALID_STATE, "has ended", vmbed_capture_finish(capture, NULL, NULL, &error));
    CHECK(pread(fileno(file), magic, 4, 0) == 4 && !memcmp(magic, "\x0a\x0d\x0d\x0a", 4));
    vmbed_capture_free(capture);

    /* Whoever read it has gone: an error, and no SIGPIPE. */
    int ends[2];
    CHECK(signal(SIGPIPE, SIG_DFL) != SIG_ERR && !pipe(ends));
    OK(vmbed_switch_capture(between, two, 2, ends[1], &capture, &error));
    close(ends[0]);
    FAILS(VMBED_ERR_OS, "writing a capture", vmbed_capture_finish(capture, NULL, NULL, &error));
    vmbed_capture_free(capture);
    /* Its beginning waits in a buffer until then. */
    OK(vmbed_switch_capture(between, two, 2, ends[1], &capture, &error));
    vmbed_capture_free(capture), close(ends[1]);
    drop(&speaks), drop(&answers), drop(&outside);
    vmbed_port_free(first), vmbed_port_free(second), vmbed_port_free(other), vmbed_switch_free(between);
    fclose(file);
}

/* From one socket to another, of the two kinds. */
static void sockets(vmbed_switch *between)
{
    const vmbed_port_options options = {.size = sizeof options, .vlan = 30};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint8_t sent[12 + 64] = {0}, heard[4 + 64] = {0};
    vmbed_port *messages, *stream;
    int pair[2], null = open("/dev/null", O_RDONLY | O_CLOEXEC), listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    FAILS(VMBED_ERR_INVALID_ARGUMENT, "up", vmbed_switch_add_fd(between, "up", null, NULL, &messages, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "fd", vmbed_switch_add_fd(between, "up", -1, NULL, &messages, &error));
    close(null);
    snprintf(address.sun_path, sizeof address.sun_path, "/tmp/vmbed-c-%d", getpid());
    unlink(address.sun_path);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 1) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    OK(vmbed_switch_add_fd(between, "messages", pair[0], &options, &messages, &error));
    OK(vmbed_switch_add_stream(between, "stream", address.sun_path, &options, &stream, &error));
    close(pair[0]);
    int peer = accept(listener, NULL, NULL);
    memset(sent + 12, 0xff, 6);
    sent[12 + 6] = 2, sent[12 + 63] = 7;
    CHECK(write(pair[1], sent, sizeof sent) == sizeof sent);
    CHECK(recv(peer, heard, sizeof heard, MSG_WAITALL) == sizeof heard);
    CHECK(heard[3] == 64 && memcmp(heard + 4, sent + 12, 64) == 0);
    vmbed_port_free(messages), vmbed_port_free(stream);
    close(peer), close(pair[1]), close(listener), unlink(address.sun_path);
}

void a_switch_drops_and_says_why(void)
{
    const struct step hear[] = {{TELL, 0, 0, 1}, {RECEIVE, 0, 0, 0}, {END, 0, 0, 0}};
    const struct step see[] = {{TELL, 0, 0, 1}, {RECEIVE, 0, 0, 0}, {RECEIVE, 0, 0, 0}, {END, 0, 0, 0}};
    const struct step lie[] = {{SEND, ALL, 60, 2}, {SEND, ALL, 64, 4}, {END, 0, 0, 0}};
    const vmbed_port_options guard = {.size = sizeof guard, .guard_macs = "04:04:04:04:04:04", .guard_addresses = ""};
    const uint32_t vlans[] = {10, 4095}, fine[] = {10, 20};
    vmbed_port_options trunk = {.size = sizeof trunk, .trunk = vlans, .trunk_length = 2, .isolated = 1};
    struct said said[3] = {0};
    struct result results[3];
    vmbed_switch *between;
    vmbed_port *none;

    OK(vmbed_switch_new(NULL, &between, &error));
    vmbed_port *guarded = add(between, "guarded", &guard), *open = add(between, "open", NULL);
    vmbed_port *monitor = add(between, "monitor", NULL);
    OK(vmbed_port_mirror_to(guarded, monitor, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "itself", vmbed_port_mirror_to(guarded, guarded, &error));
    struct guest hears = on_port(open, &said[0], hear, sizeof hear), sees = on_port(monitor, &said[1], see, sizeof see);
    wait_for(&said[0].last, 1), wait_for(&said[1].last, 1);
    struct guest lies = on_port(guarded, &said[2], lie, sizeof lie);
    finish(&lies, results, sizeof(struct result) * 2);
    finish(&hears, results, sizeof(struct result) * 2);
    CHECK(results[1].length == 12 + 64);
    finish(&sees, results, sizeof results);
    CHECK(results[2].length == 12 + 64);
    const vmbed_port_statistics now = carried(guarded);
    for (uint32_t i = 0; i < VMBED_DROP_REASONS; i++)
        CHECK(now.dropped[i] == (i == VMBED_DROP_SPOOFED_MAC));
    CHECK(!strcmp(vmbed_drop_name(VMBED_DROP_SPOOFED_MAC), "spoofed-mac") && !vmbed_drop_name(VMBED_DROP_REASONS));
    CHECK(carried(monitor).mirrored_frames == 2);
    OK(vmbed_port_mirror_to(guarded, NULL, &error));

    struct guest next = prepare(0, 1, NULL);
    OK(vmbed_builder_net_port(next.builder, 0, open, &error));
    FAILS(VMBED_ERR_BUSY, "net0", vmbed_builder_build(next.builder, &next.vm, &error));
    drop(&next), drop(&hears), drop(&sees), drop(&lies);
    next = prepare(0, 1, NULL);
    OK(vmbed_builder_net_port(next.builder, 0, open, &error));
    OK(vmbed_builder_build(next.builder, &next.vm, &error));
    drop(&next);
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "vlan.vlans", vmbed_port_set_options(open, &trunk, &error));
    trunk.trunk = fine, trunk.vlan = 70000;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "70000", vmbed_port_set_options(open, &trunk, &error));
    trunk.vlan = 1, trunk.storm.ops_per_second = UINT64_MAX, trunk.rate_in.bytes_per_second = 1000;
    OK(vmbed_port_set_options(open, &trunk, &error));
    trunk.guard_macs = "04:04";
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "04:04", vmbed_port_set_options(open, &trunk, &error));
    OK(vmbed_port_remove(open, &error));
    OK(vmbed_port_remove(open, &error));
    FAILS(VMBED_ERR_NOT_FOUND, "open", vmbed_port_set_options(open, NULL, &error));
    next = prepare(0, 1, NULL);
    OK(vmbed_builder_net_port(next.builder, 0, open, &error));
    FAILS(VMBED_ERR_NOT_FOUND, "open", vmbed_builder_build(next.builder, &next.vm, &error));
    drop(&next);
    FAILS(VMBED_ERR_NOT_FOUND, "vmbed-no-tap", vmbed_switch_add_tap(between, "up", "vmbed-no-tap", NULL, &none, &error));
    FAILS(VMBED_ERR_NOT_FOUND, "nobody listens", vmbed_switch_add_stream(between, "up", "/nonexistent/passt", NULL, &none, &error));
    sockets(between);
    vmbed_port_free(guarded), vmbed_port_free(open), vmbed_port_free(monitor), vmbed_switch_free(between);
}

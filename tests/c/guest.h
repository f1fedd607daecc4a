/* What the cases of the C API share: checks, and a bare guest with a device. */
#ifndef GUEST_H
#define GUEST_H

#define _GNU_SOURCE
#include <dirent.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <vmbed.h>

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);            \
            abort();                                                                           \
        }                                                                                      \
    } while (0)

/* The call works. */
#define OK(call)                                                                               \
    do {                                                                                       \
        vmbed_error *error = (vmbed_error *)-1;                                                \
        int32_t status_ = (call);                                                              \
        if (status_ != VMBED_OK) {                                                             \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, vmbed_error_message(error)); \
            abort();                                                                           \
        }                                                                                      \
        CHECK(error == NULL);                                                                  \
    } while (0)

/* The call fails with this status, and its error says `text`. */
#define FAILS(status, text, call)                                                              \
    do {                                                                                       \
        vmbed_error *error = NULL;                                                             \
        CHECK((call) == (status));                                                             \
        CHECK(error && vmbed_error_status(error) == (status));                                 \
        if (!strstr(vmbed_error_message(error), text)) {                                       \
            fprintf(stderr, "%s:%d: '%s' is not in: %s\n", __FILE__, __LINE__, text, vmbed_error_message(error)); \
            abort();                                                                           \
        }                                                                                      \
        vmbed_error_free(error);                                                               \
    } while (0)

/* A VM from nothing, with one device at port 0x10. */
struct guest {
    vmbed_host *host;
    vmbed_config *config;
    vmbed_builder *builder;
    vmbed_vm *vm;
};

struct port {
    atomic_int reads, writes, destroyed;
    uint8_t last;
    int32_t answer;
    vmbed_vm *stop, *free;
};

static inline int32_t port_read(void *user, uint32_t vcpu, uint64_t offset, uint8_t *data, size_t length)
{
    struct port *port = user;
    CHECK(vcpu == 0 && offset < 8 && length >= 1 && length <= 4 && data[0] == 0xff);
    memset(data, 0x5a, length);
    port->reads++;
    return port->answer;
}

static inline int32_t port_write(void *user, uint32_t vcpu, uint64_t offset, const uint8_t *data, size_t length)
{
    struct port *port = user;
    CHECK(vcpu == 0 && offset < 8 && length >= 1 && length <= 4);
    port->last = data[0];
    port->writes++;
    if (port->stop)
        vmbed_vm_request_stop(port->stop, NULL);
    if (port->free) {
        int32_t cause;
        FAILS(VMBED_ERR_INVALID_STATE, "callback", vmbed_vm_wait(port->free, -1, &cause, &error));
        vmbed_vm_free(port->free);
    }
    return port->answer;
}

static inline void port_destroy(void *user)
{
    ((struct port *)user)->destroyed++;
}

static const vmbed_device_ops port_ops = {sizeof port_ops, port_read, port_write, port_destroy};

static inline struct guest make(const uint8_t *code, size_t length, struct port *port)
{
    struct guest g = {0};
    OK(vmbed_host_open(NULL, &g.host, &error));
    OK(vmbed_config_new_bare(VMBED_MODE_REAL, 0x1000, code, length, &g.config, &error));
    OK(vmbed_builder_new(g.host, g.config, &g.builder, &error));
    if (port)
        OK(vmbed_builder_add_pio(g.builder, "port", 0x10, 8, &port_ops, port, &error));
    OK(vmbed_builder_build(g.builder, &g.vm, &error));
    return g;
}

static inline void drop(struct guest *g)
{
    vmbed_host_free(g->host);
    vmbed_builder_free(g->builder);
    vmbed_vm_free(g->vm);
    vmbed_config_free(g->config);
}

/* in al, 0x10; out 0x11, al; hlt */
static const uint8_t talks[] = {0xe4, 0x10, 0xe6, 0x11, 0xf4};
/* cli; jmp $ */
static const uint8_t spins[] = {0xfa, 0xeb, 0xfe};
/* out 0x10, al; jmp $-2 */
static const uint8_t writes[] = {0xe6, 0x10, 0xeb, 0xfc};

static inline int32_t next_cause(const vmbed_events *events)
{
    for (;;) {
        vmbed_event *event;
        OK(vmbed_events_next(events, 60000, &event, &error));
        CHECK(event);
        int32_t cause = vmbed_event_cause(event);
        vmbed_event_free(event);
        if (cause != VMBED_CAUSE_NONE)
            return cause;
    }
}

#endif

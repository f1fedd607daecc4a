/*
 * A bare guest that breaks the rules of every device that it has, by the registers and rings that a guest reaches. It asks the test at
 * ASK which row of hostile-rows.h it is to do (0: use every device as one should; SEND: frames that may get lost; SUBMIT: flushes that nobody
 * answers; RESTART: every device anew; LEAVE: frames with something left to do, for cards whose network can; END: reset the machine) and says there when it has been done. The last thing of each row is that every device serves again. What it finds wrong it leaves in `report`, at RESULTS.
 *
 * It has a disk of 1024 sectors, two cards that are the two ends of one cable, a source of random numbers, a console port, and a balloon with
 * everything. virtio.c beside it is the guest that keeps to the rules.
 */
#include "bare.h"

#define RESULTS 0x9000UL
#define MEMORY 0x400000UL
#define HEADER 0x40000UL
#define STATUS 0x40100UL
#define TABLE 0x41000UL   /* for indirect tables */
#define DATA 0x100000UL   /* 64 KiB that devices read and write */
#define ROOM 0x120000UL   /* 64 KiB for frames that come in */
#define PAGES 0x200000UL  /* memory that the balloon may have */
#define RINGS 0x300000UL  /* 4 KiB for each queue */
#define SECTORS 1024UL
#define SIZE 32 /* entries of each queue */
#define ASK 0x10
#define LEAVE 251
#define RESTART 252
#define SUBMIT 253
#define SEND 254
#define END 255

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 0x40, SERVES = 15 };
/* Offsets in the common configuration. */
enum { DEVICE_FEATURE = 4, DRIVER_SELECT = 8, DRIVER_FEATURE = 12, QUEUES = 18, DEVICE_STATUS = 20, SELECT = 22, QUEUE_SIZE = 24, VECTOR = 26, ENABLE = 28, NOTIFY_OFF = 30, DESC = 32, AVAIL = 40, USED = 48 };

struct queue {
    struct descriptor *table;
    volatile u16 *available; /* flags, idx, ring */
    volatile u16 *used;      /* flags, idx, then pairs of u32 */
    u16 number, descriptor, put, seen, offset;
};

struct device {
    u32 id, nth, features, place;
    u64 bar, msix_table, pending;
    volatile u8 *common, *notify, *own;
    u32 multiplier;
    u16 queues, victim; /* `victim`: the queue whose chains are taken without anything from the other side */
    u16 harmless;       /* the flags of a buffer that it likes there */
    u64 rings;
    struct queue queue[5];
};

static struct device disk = {.id = 0x1042, .rings = RINGS};
static struct device sender = {.id = 0x1041, .features = 1 << 15, .victim = 1, .rings = RINGS + 0x10000};
static struct device receiver = {.id = 0x1041, .nth = 1, .features = 1 << 15, .victim = 1, .rings = RINGS + 0x20000};
static struct device rng = {.id = 0x1044, .harmless = WRITE, .rings = RINGS + 0x30000};
static struct device console = {.id = 0x1043, .victim = 1, .rings = RINGS + 0x40000};
static struct device balloon = {.id = 0x1045, .features = 0x3f, .rings = RINGS + 0x50000};
static struct device *const all[] = {&disk, &sender, &rng, &console, &balloon, &receiver};
/* The devices whose victims need no other side. */
#define EACH(device) for (struct device *device, *const *each = all; each < all + 5 && (device = *each, report->device = device->id, 1); each++)

static volatile struct {
    u32 failed; /* the line of a check that failed */
    u32 at;     /* the line that it waits at */
    u32 broken; /* how often a device had to ask for a reset in this row */
    u32 device; /* the id of the one that is tried */
    u64 found, wanted;
    u64 uses;   /* how often it has used a device as one should */
} *const report = (void *)RESULTS;

static u8 round = 1, has_room;

static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline u16 in16(u16 port)
{
    u16 value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void failed(u32 line, u64 found, u64 wanted)
{
    report->failed = line, report->found = found, report->wanted = wanted;
    out32(ASK, line);
    for (;;)
        in32(ASK);
}

#define SAME(found, wanted)                                 \
    do {                                                    \
        u64 found_ = (u64)(found), wanted_ = (u64)(wanted); \
        if (found_ != wanted_)                              \
            failed(__LINE__, found_, wanted_);              \
    } while (0)
#define CHECK(condition) SAME(!!(condition), 1)
/* The test has the deadline. */
#define WAIT(condition)                                  \
    do {                                                 \
        report->at = __LINE__;                           \
        while (!(condition))                             \
            __asm__ volatile("pause" : : : "memory");    \
        report->at = 0;                                  \
    } while (0)

static u64 get(u64 at, u32 width)
{
    switch (width) {
    case 1: return *(volatile u8 *)at;
    case 2: return *(volatile u16 *)at;
    case 4: return *(volatile u32 *)at;
    default: return *(volatile u64 *)at;
    }
}

static void set(u64 at, u32 width, u64 value)
{
    switch (width) {
    case 1: *(volatile u8 *)at = (u8)value; break;
    case 2: *(volatile u16 *)at = (u16)value; break;
    case 4: *(volatile u32 *)at = (u32)value; break;
    default: *(volatile u64 *)at = value;
    }
}

static u64 reg(struct device *device, u32 offset, u32 width) { return get((u64)device->common + offset, width); }
static void set_reg(struct device *device, u32 offset, u32 width, u64 value) { set((u64)device->common + offset, width, value); }
static u8 status(struct device *device) { return (u8)reg(device, DEVICE_STATUS, 1); }
static void fill(u64 at, u32 length, u8 byte)
{
    for (u32 i = 0; i < length; i++)
        ((volatile u8 *)at)[i] = byte;
}

static u32 config(u32 place, u32 offset)
{
    out32(0xcf8, 0x80000000u | place << 11 | (offset & ~3u));
    return in32(0xcfc);
}

static void find(struct device *device)
{
    u32 place = 0, left = device->nth + 1;
    while (left) {
        CHECK(++place < 32);
        left -= config(place, 0) == (device->id << 16 | 0x1af4);
    }
    device->place = place;
    out32(0xcf8, 0x80000000u | place << 11 | 4);
    out32(0xcfc, 6); /* memory, bus master */
    device->bar = (config(place, 0x10) & ~15u) | (u64)config(place, 0x14) << 32;
    for (u32 next = config(place, 0x34) & 0xff; next; next = config(place, next) >> 8 & 0xff) {
        u32 first = config(place, next);
        u64 at = device->bar + config(place, next + 8);
        if ((first & 0xff) == 0x11) {
            device->msix_table = device->bar + (config(place, next + 4) & ~7u);
            device->pending = device->bar + (config(place, next + 8) & ~7u);
        } else if ((first & 0xff) == 9) {
            switch (first >> 24) {
            case 1: device->common = (volatile u8 *)at; break;
            case 2: device->notify = (volatile u8 *)at, device->multiplier = config(place, next + 16); break;
            case 4: device->own = (volatile u8 *)at; break;
            }
        }
    }
}

/* Empty rings; the device has not been told of them. */
static void clear(struct device *device, u16 number)
{
    struct queue *queue = &device->queue[number];
    u64 at = device->rings + 0x1000 * number;
    for (u64 i = 0; i < 0xa00; i += 8)
        *(volatile u64 *)(at + i) = 0;
    *queue = (struct queue){.table = (void *)at, .available = (void *)(at + 0x400), .used = (void *)(at + 0x800), .number = number, .offset = queue->offset};
}

static void set_addresses(struct device *device, u64 desc, u64 avail, u64 used)
{
    const u64 addresses[] = {desc, avail, used};
    for (u32 i = 0; i < 6; i++)
        set_reg(device, DESC + 4 * i, 4, addresses[i / 2] >> (32 * (i % 2)));
}

static void negotiate(struct device *device, u32 features)
{
    set_reg(device, DEVICE_STATUS, 1, 0);
    WAIT(status(device) == 0);
    set_reg(device, DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER);
    set_reg(device, 0, 4, 0);
    features &= (u32)reg(device, DEVICE_FEATURE, 4);
    set_reg(device, DRIVER_SELECT, 4, 0), set_reg(device, DRIVER_FEATURE, 4, features);
    set_reg(device, DRIVER_SELECT, 4, 1), set_reg(device, DRIVER_FEATURE, 4, 1); /* VERSION_1 */
    set_reg(device, DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    SAME(status(device), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

/* A reset and the whole way to DRIVER_OK, with empty rings. */
static void restart(struct device *device)
{
    negotiate(device, device->features | 1 << 28); /* INDIRECT_DESC */
    device->queues = (u16)reg(device, QUEUES, 2);
    for (u16 i = 0; i < device->queues && i < 5; i++) {
        /* A card's third queue is for its commands, which nobody has agreed on. */
        if (device->id == 0x1041 && i == 2)
            break;
        clear(device, i);
        set_reg(device, SELECT, 2, i);
        set_reg(device, QUEUE_SIZE, 2, SIZE);
        set_addresses(device, (u64)device->queue[i].table, (u64)device->queue[i].available, (u64)device->queue[i].used);
        device->queue[i].offset = (u16)reg(device, NOTIFY_OFF, 2);
        set_reg(device, ENABLE, 2, 1);
    }
    set_reg(device, DEVICE_STATUS, 1, SERVES);
    SAME(status(device), SERVES);
    if (device->nth)
        has_room = 0; /* the receiver's buffer has gone with its ring */
}

static void ring(struct device *device, struct queue *queue)
{
    fence();
    *(volatile u16 *)(device->notify + queue->offset * device->multiplier) = queue->number;
}

static void put(void *table, u16 at, u64 address, u32 length, u16 flags, u16 next)
{
    ((struct descriptor *)table)[at] = (struct descriptor){address, length, flags, next};
}

/* Another buffer of the chain that is being written. */
static void add(struct queue *queue, u64 address, u32 length, u16 flags)
{
    u16 at = queue->descriptor++ % SIZE;
    put(queue->table, at, address, length, flags | NEXT, queue->descriptor % SIZE);
}

static void make_available(struct queue *queue, u16 head)
{
    queue->available[2 + queue->put % SIZE] = head;
    fence();
    queue->available[1] = ++queue->put;
}

/* Offers the chain of the last `count` buffers; its head. */
static u16 offer(struct queue *queue, u16 count)
{
    u16 head = (u16)(queue->descriptor - count) % SIZE;
    queue->table[(queue->descriptor - 1) % SIZE].flags &= (u16)~NEXT;
    make_available(queue, head);
    return head;
}

static u16 send(struct queue *queue, u64 address, u32 length, u16 flags)
{
    add(queue, address, length, flags);
    return offer(queue, 1);
}

static int is_used(struct queue *queue) { return queue->used[1] != queue->seen; }

/* Takes the next that the device has done. */
static u32 take(struct queue *queue, u32 *length)
{
    WAIT(is_used(queue));
    fence();
    volatile u32 *pair = (volatile u32 *)(queue->used + 2) + 2 * (queue->seen++ % SIZE);
    *length = pair[1];
    return pair[0];
}

static void completes(struct queue *queue, u16 head, u32 wanted)
{
    u32 length;
    SAME(take(queue, &length), head);
    SAME(length, wanted);
}

/* One buffer for the device's victim, which it does `wanted` bytes with. */
static void tries(struct device *device, u64 address, u32 length, u16 flags, u32 wanted)
{
    struct queue *queue = &device->queue[device->victim];
    u16 head = send(queue, address, length, flags);
    ring(device, queue);
    completes(queue, head, wanted);
}

static void header(u32 kind, u64 sector)
{
    set(HEADER, 4, kind), set(HEADER + 4, 4, 0), set(HEADER + 8, 8, sector);
    set(STATUS, 1, 0xff);
}

/* A request of a disk over these pieces of data; its status. */
static u8 request(u32 kind, u64 sector, const struct descriptor *data, u16 count)
{
    struct queue *queue = &disk.queue[0];
    u32 length;
    header(kind, sector);
    add(queue, HEADER, 16, 0);
    for (u16 i = 0; i < count; i++)
        add(queue, data[i].address, data[i].length, data[i].flags);
    add(queue, STATUS, 1, WRITE);
    u16 head = offer(queue, count + 2);
    ring(&disk, queue);
    SAME(take(queue, &length), head);
    return (u8)get(STATUS, 1);
}

static u8 reads(u64 sector, u64 at, u32 length) { return request(0, sector, &(struct descriptor){at, length, WRITE, 0}, 1); }
static u8 writes(u64 sector, u64 at, u32 length) { return request(1, sector, &(struct descriptor){at, length, 0, 0}, 1); }

static void good_disk(void)
{
    fill(DATA, 512, round);
    SAME(writes(8, DATA, 512), 0);
    fill(DATA, 512, 0);
    SAME(reads(8, DATA, 512), 0);
    for (u32 i = 0; i < 512; i += 37)
        SAME(get(DATA + i, 1), round);
}

/* A frame to everybody, of a type for experiments. */
static void sends_a_frame(void)
{
    fill(DATA, 12, 0), fill(DATA + 12, 60, round), fill(DATA + 12, 6, 0xff);
    set(DATA + 18, 8, 0xb588070000000002);
    tries(&sender, DATA, 72, 0, 0);
}

/* A buffer for a frame that comes in. */
static void makes_room(void)
{
    if (!has_room)
        send(&receiver.queue[0], ROOM, 2048, WRITE), ring(&receiver, &receiver.queue[0]);
    has_room = 1;
}

/* A frame for the other card: it may have to come after what is on the cable already. */
static void good_cards(void)
{
    struct queue *queue = &receiver.queue[0];
    u32 length;
    sends_a_frame();
    for (;; has_room = 0) {
        makes_room();
        take(queue, &length);
        if (length == 72 && get(ROOM + 26, 1) == round && get(ROOM + 71, 1) == round)
            break;
    }
    has_room = 0;
}

static void good_balloon(void)
{
    fill(PAGES, 64, round);
    set(DATA, 4, PAGES >> 12);
    tries(&balloon, DATA, 4, 0, 0);
    WAIT(get(PAGES, 8) == 0);
}

/* Every device does what it is for. */
static void good(struct device *device)
{
    round = round == 250 ? 1 : (u8)(round + 1);
    SAME(status(device), SERVES);
    if (device == &disk)
        good_disk();
    else if (device == &sender || device == &receiver)
        good_cards();
    else if (device == &balloon)
        good_balloon();
    else if (device == &rng)
        tries(&rng, DATA, 64, WRITE, 64);
    else
        tries(&console, DATA, 7, 0, 0);
    SAME(status(device), SERVES);
    report->uses++;
}

/* The device asks for a reset, serves nothing meanwhile, and serves after it. */
static void broken(struct device *device)
{
    struct queue *queue = &device->queue[device->victim];
    report->broken++;
    /* Where it serves what was offered, it does not break any more. */
    WAIT(status(device) & NEEDS_RESET || is_used(queue));
    SAME(status(device), NEEDS_RESET | SERVES);
    clear(device, device->victim);
    send(queue, DATA, 16, device->harmless);
    ring(device, queue);
    set_reg(device, DEVICE_STATUS, 1, SERVES);
    SAME(status(device), NEEDS_RESET | SERVES);
    set_reg(device, DEVICE_STATUS, 1, 0);
    WAIT(status(device) == 0);
    SAME(queue->used[1], 0);
    restart(device);
    good(device);
}

static void queue_registers(struct device *device, u64 *registers)
{
    const u8 places[][2] = {{QUEUE_SIZE, 2}, {VECTOR, 2}, {ENABLE, 2}, {NOTIFY_OFF, 2}, {DESC, 8}, {AVAIL, 8}, {USED, 8}};
    for (u32 i = 0; i < 7; i++)
        registers[i] = reg(device, places[i][0], places[i][1]);
}

/* Writes to every register of the queue that is selected. */
static void scribble(struct device *device)
{
    const u64 values[] = {~0UL, 0, 1};
    for (u32 v = 0; v < 3; v++)
        for (u32 at = QUEUE_SIZE; at < 56; at++)
            for (u32 width = 1; width <= 8; width *= 2)
                set_reg(device, at, width, values[v]);
}

static void queue_registers_after_driver_ok(void)
{
    u64 before[7], after[7];
    EACH(device) {
        for (u16 i = 0; i < device->queues; i++) {
            set_reg(device, SELECT, 2, i);
            queue_registers(device, before);
            scribble(device);
            queue_registers(device, after);
            for (u32 r = 0; r < 7; r++)
                SAME(after[r], before[r]);
        }
        good(device);
        /* From its enabling on, too. */
        negotiate(device, 0);
        set_reg(device, SELECT, 2, 0);
        set_addresses(device, device->rings, device->rings + 0x400, device->rings + 0x800);
        set_reg(device, ENABLE, 2, 1);
        queue_registers(device, before);
        set_reg(device, QUEUE_SIZE, 2, 2), set_addresses(device, 16, 32, 48);
        queue_registers(device, after);
        for (u32 r = 0; r < 7; r++)
            SAME(after[r], before[r]);
        restart(device);
    }
}

static void queue_select_out_of_range(void)
{
    u64 registers[7], before[5][7];
    EACH(device) {
        const u16 beyond[] = {device->queues, (u16)(device->queues + 1), 0xff, 0x100, 0x7fff, 0xffff};
        for (u32 started = 2; started--;) {
            if (!started)
                set_reg(device, DEVICE_STATUS, 1, 0);
            for (u16 i = 0; i < device->queues; i++)
                set_reg(device, SELECT, 2, i), queue_registers(device, before[i]);
            for (u32 b = 0; b < 6; b++) {
                set_reg(device, SELECT, 2, beyond[b]);
                SAME(reg(device, SELECT, 2), beyond[b]);
                scribble(device);
                queue_registers(device, registers);
                for (u32 r = 0; r < 7; r++)
                    SAME(registers[r], 0);
            }
            for (u16 i = 0; i < device->queues; i++) {
                set_reg(device, SELECT, 2, i), queue_registers(device, registers);
                for (u32 r = 0; r < 7; r++)
                    SAME(registers[r], before[i][r]);
            }
        }
        restart(device);
    }
}

static void mad_accesses_to_msix(void)
{
    EACH(device) {
        u64 end = 16UL * (device->queues + 1u), before[24];
        for (u64 i = 0; i < end / 4; i++)
            before[i] = get(device->msix_table + 4 * i, 4);
        for (u32 page = 0; page < 2; page++) {
            u64 base = page ? device->pending : device->msix_table, size = page ? 8 : end;
            for (u64 offset = 0; offset < 0xff0; offset += offset < size + 20 ? 1 : 101)
                for (u32 width = 1; width <= 8; width *= 2) {
                    if (width >= 4 && offset % width == 0 && offset + width <= size)
                        continue;
                    set(base + offset, width, 0x5555555555555555);
                    SAME(get(base + offset, width), ~0UL >> (64 - 8 * width));
                }
        }
        for (u64 i = 0; i < end / 4; i++)
            SAME(get(device->msix_table + 4 * i, 4), before[i]);
    }
}

static void queue_sizes_that_cannot_be(void)
{
    EACH(device) {
        set_reg(device, DEVICE_STATUS, 1, 0);
        set_reg(device, SELECT, 2, 0);
        u64 most = reg(device, QUEUE_SIZE, 2);
        const u64 sizes[] = {0, 3, most - 1, most + 1, 2 * most, 0x8000, 0xffff};
        for (u32 s = 0; s < 7; s++) {
            negotiate(device, device->features);
            for (u16 i = 0; i < device->queues; i++) {
                set_reg(device, SELECT, 2, i);
                set_reg(device, QUEUE_SIZE, 2, sizes[s]);
                set_addresses(device, device->rings, device->rings + 0x400, device->rings + 0x800);
                set_reg(device, ENABLE, 2, 1);
                SAME(reg(device, QUEUE_SIZE, 2), 0);
                SAME(reg(device, ENABLE, 2), 0);
            }
            report->broken++;
            set_reg(device, DEVICE_STATUS, 1, SERVES);
            SAME(status(device) & NEEDS_RESET, NEEDS_RESET);
        }
        set_reg(device, DEVICE_STATUS, 1, 0);
        set_reg(device, SELECT, 2, 0);
        set_reg(device, QUEUE_SIZE, 4, 0x10000); /* which does not fit */
        SAME(reg(device, QUEUE_SIZE, 2), most);
        restart(device);
    }
}

static void doorbells_without_a_queue(void)
{
    EACH(device) {
        for (u32 index = device->queues; index < 0x1000 / device->multiplier; index += index < 40 ? 1 : 61)
            for (u32 width = 1; width <= 8; width *= 2)
                set((u64)device->notify + index * device->multiplier, width, index);
        /* The address says which queue; the value may be any. */
        for (u32 value = 7; value < 0x10000; value = value * 8 + 7)
            *(volatile u16 *)device->notify = (u16)value;
        good(device);
        set_reg(device, DEVICE_STATUS, 1, 0);
        *(volatile u16 *)device->notify = 0;
        restart(device);
    }
}

static void available_index_too_far_ahead(void)
{
    const u16 ahead[] = {SIZE + 1, 0x8000, 0xffff};
    EACH(device) {
        struct queue *queue = &device->queue[device->victim];
        for (u32 i = 0; i < 3; i++) {
            queue->available[1] = (u16)(queue->used[1] + ahead[i]);
            ring(device, queue);
            broken(device);
        }
        /* As far as the queue is long is a driver's right; the entries are not good, though. */
        for (u32 i = 0; i < SIZE; i++)
            queue->available[2 + i] = 0xffff;
        queue->available[1] = (u16)(queue->used[1] + SIZE);
        ring(device, queue);
        broken(device);
    }
}

/* Writes malformed chain `n`, whose head is 0; false when there are no more. */
static int malformed(struct queue *queue, u32 n)
{
    struct descriptor *table = queue->table;
    void *inner = (void *)TABLE, *innermost = (void *)(TABLE + 0x800);
    const u32 odd[] = {0, 1, 15, 17, 40, ~0u};
    switch (n) {
    case 0: put(table, 0, DATA, 16, NEXT, 0); break;
    case 1: put(table, 0, DATA, 16, NEXT, 1), put(table, 1, DATA, 16, NEXT, 0); break;
    case 2: put(table, 0, DATA, 16, NEXT, SIZE); break;
    case 3: put(table, 0, DATA, 16, NEXT, 0xffff); break;
    case 4: put(table, 0, TABLE, 32, INDIRECT, 0), put(inner, 0, DATA, 16, NEXT, 1), put(inner, 1, DATA, 16, NEXT, 0); break;
    case 5: put(table, 0, TABLE, 32, INDIRECT, 0), put(inner, 0, DATA, 16, NEXT, 2); break;
    case 6: put(table, 0, TABLE, 16, INDIRECT, 0), put(inner, 0, TABLE, 16, INDIRECT, 0); break;
    case 7: /* nested, and otherwise good */
        put(table, 0, TABLE, 16, INDIRECT, 0), put(inner, 0, TABLE + 0x800, 16, INDIRECT, 0);
        put(innermost, 0, DATA, 16, 0, 0);
        break;
    case 8:
        put(table, 0, TABLE, 16, INDIRECT | NEXT, 1), put(inner, 0, DATA, 16, 0, 0);
        put(table, 1, DATA, 16, 0, 0);
        break;
    case 9: put(table, 0, MEMORY - 8, 16, INDIRECT, 0); break;
    case 10: put(table, 0, ~0UL - 15, 32, INDIRECT, 0); break;
    case 11: put(table, 0, 0xc0000000, 4096, INDIRECT, 0); break;
    default:
        if (n - 12 >= sizeof odd / sizeof *odd)
            return 0;
        put(table, 0, TABLE, odd[n - 12], INDIRECT, 0);
    }
    return 1;
}

static void malformed_chains(void)
{
    EACH(device) {
        struct queue *queue = &device->queue[device->victim];
        for (u32 n = 0; malformed(queue, n); n++) {
            make_available(queue, 0);
            ring(device, queue);
            broken(device);
        }
    }
}

static void more_than_four_gib(void)
{
    const struct descriptor huge[] = {{DATA, ~0u, WRITE, 0}, {DATA, ~0u, WRITE, 0}, {DATA, 512, WRITE, 0}};
    /* In 32 bits it would be one sector. */
    const struct descriptor wraps[] = {{DATA, 1u << 31, WRITE, 0}, {DATA, 1u << 31, WRITE, 0}, {DATA, 512, WRITE, 0}};
    struct descriptor pieces[SIZE - 2];
    for (u32 i = 0; i < SIZE - 2; i++)
        pieces[i] = (struct descriptor){0, MEMORY, WRITE, 0};
    SAME(request(0, 0, huge, 3), 1);
    SAME(request(0, 0, wraps, 3), 1);
    SAME(request(0, 0, pieces, SIZE - 2), 1);
    good(&disk);
}

static void addresses_that_wrap(void)
{
    const struct descriptor wraps[] = {{~0UL, 2, 0, 0}, {~0UL - 15, 17, 0, 0}, {~0UL - 3, ~0u, 0, 0}, {1UL << 63, 16, 0, 0}};
    EACH(device) {
        struct queue *queue = &device->queue[device->victim];
        for (u32 i = 0; i < 8; i++) {
            u16 head = send(queue, wraps[i / 2].address, wraps[i / 2].length, i % 2 ? WRITE : 0);
            ring(device, queue);
            WAIT(is_used(queue) || status(device) & NEEDS_RESET);
            if (is_used(queue))
                completes(queue, head, 0);
            else
                broken(device);
        }
    }
    const u64 outside[] = {MEMORY - 256, MEMORY, 0xc0000000, 0xfee00000, 1UL << 40};
    for (u32 i = 0; i < 5; i++) {
        SAME(reads(0, outside[i], 512), 1);
        SAME(writes(0, outside[i], 512), 1);
    }
}

static void a_head_that_is_in_flight(void)
{
    const u16 heads[][3] = {{0, 0, 1}, {0, 1, 0}, {0, 1, 1}};
    for (u32 i = 0; i < 3; i++) {
        struct queue *queue = &receiver.queue[0];
        u16 before = queue->used[1];
        put(queue->table, 0, ROOM, 0x200, WRITE, 0), put(queue->table, 1, ROOM + 0x200, 0x200, WRITE, 0);
        for (u32 h = 0; h < 3; h++)
            make_available(queue, heads[i][h]);
        ring(&receiver, queue);
        /* It needs three buffers, and holds those before the last meanwhile. */
        fill(DATA, 12, 0);
        tries(&sender, DATA, 12 + 1400, 0, 0);
        report->broken++;
        WAIT(status(&receiver) & NEEDS_RESET);
        SAME(queue->used[1], before); /* no half frame */
        restart(&receiver);
        good(&receiver);
    }
}

static void who_never_waits(void)
{
    EACH(device) {
        struct queue *queue = &device->queue[device->victim];
        fill(DATA, 16, 0);
        if (device == &balloon)
            set(DATA, 4, PAGES >> 12), set(DATA + 4, 8, 0x200020100000201);
        for (u32 i = 0; i < 20; i++) {
            u32 length;
            for (u32 n = 0; n < SIZE; n++) {
                send(queue, DATA, 4, device->harmless);
                ring(device, queue);
            }
            /* Nobody looks at what comes back until all of it has. */
            WAIT((u16)(queue->used[1] - queue->seen) == SIZE);
            while (is_used(queue))
                take(queue, &length);
        }
        SAME(status(device), SERVES);
        good(device);
    }
}

static void chains_that_are_only_a_head(void)
{
    const struct {
        u64 at;
        u32 length, flags, written;
    } chains[] = {{HEADER, 16, 0, 0}, {HEADER, 0, 0, 0}, {STATUS, 1, WRITE, 1}, {STATUS, 0, WRITE, 0}};
    for (u32 i = 0; i < 100; i++) {
        set(STATUS, 1, 0xff);
        tries(&disk, chains[i % 4].at, chains[i % 4].length, (u16)chains[i % 4].flags, chains[i % 4].written);
        SAME(get(STATUS, 1), i % 4 == 2 ? 1 : 0xff);
    }
    EACH(device)
        for (u32 i = 0; i < 2 * SIZE + 2 && device != &disk; i++)
            tries(device, DATA, 0, i % 2 ? WRITE : 0, 0);
}

static void past_the_end_of_the_disk(void)
{
    const u64 sectors[] = {~0UL, ~0UL / 512, 1UL << 55, (1UL << 55) - 1, SECTORS, SECTORS + 1};
    for (u32 i = 0; i < 6; i++) {
        SAME(reads(sectors[i], DATA, 512), 1);
        SAME(writes(sectors[i], DATA, 512), 1);
    }
    const struct descriptor halves[] = {{DATA, 512, 0, 0}, {DATA + 512, 512, 0, 0}};
    const struct descriptor writable[] = {{DATA, 512, WRITE, 0}, {DATA + 512, 512, WRITE, 0}};
    fill(DATA, 1024, 0x77);
    /* Either half would fit. */
    SAME(request(1, SECTORS - 1, halves, 2), 1);
    SAME(request(0, SECTORS - 1, writable, 2), 1);
    SAME(get(DATA, 1), 0x77);
    SAME(get(DATA + 512, 1), 0x77);
    SAME(reads(SECTORS - 1, DATA, 512), 0);
    SAME(get(DATA, 8), 0);
    SAME(writes(0, DATA, 511), 1);
}

static void buffers_of_the_wrong_direction(void)
{
    const struct descriptor readable = {DATA, 512, 0, 0}, writable = {DATA, 512, WRITE, 0}, both[] = {writable, readable};
    fill(DATA, 512, 0x66);
    SAME(request(0, 0, &readable, 1), 1);
    SAME(request(1, 0, &writable, 1), 1);
    SAME(request(1, 0, both, 2), 1);
    for (u32 i = 0; i < 3; i++) {
        struct queue *queue = &disk.queue[0];
        header(i > 0, 0);
        add(queue, HEADER, 16, i < 2 ? WRITE : 0);
        add(queue, DATA, 512, i ? 0 : WRITE);
        add(queue, STATUS, 1, i < 2 ? WRITE : 0);
        u16 head = offer(queue, 3);
        ring(&disk, queue);
        completes(queue, head, i < 2);
    }
    SAME(reads(0, DATA, 512), 0);
    SAME(get(DATA, 8), 0);
    EACH(device)
        if (device != &disk && device != &balloon)
            tries(device, DATA, 512, device->harmless ^ WRITE, 0);
}

/* The test looks whether eight were ignored. */
static void what_a_balloon_cannot_have(void)
{
    const u32 pages[] = {~0u, 0xc0000, MEMORY >> 12, PAGES >> 12, PAGES >> 12};
    const struct descriptor ranges[] = {{PAGES + 1, 4096, 0, 0},         {PAGES, 100, 0, 0},       {MEMORY - 4096, 8192, 0, 0},
                                        {0xfee00000, 4096, 0, 0},        {1UL << 40, 4096, 0, 0}};
    for (u32 i = 0; i < 5; i++)
        set(DATA + 4 * i, 4, pages[i]);
    tries(&balloon, DATA, sizeof pages, 0, 0);
    fill(PAGES, 4096, 7);
    struct queue *queue = &balloon.queue[4];
    for (u32 i = 0; i < 5; i++)
        add(queue, ranges[i].address, ranges[i].length, WRITE);
    u16 head = offer(queue, 5);
    ring(&balloon, queue);
    completes(queue, head, 0);
    for (u32 i = 0; i < 4096; i += 111)
        SAME(get(PAGES + i, 1), 7);
}

static void headers_in_pieces(void)
{
    struct queue *queue = &disk.queue[0];
    for (u32 whole = 2; whole--;) {
        u16 pieces = whole ? 16 : 15;
        fill(DATA, 512, 0x42);
        header(1, 3);
        for (u16 i = 0; i < pieces; i++)
            add(queue, HEADER + i, 1, 0);
        add(queue, whole ? DATA : STATUS, whole ? 512 : 1, whole ? 0 : WRITE);
        if (whole)
            add(queue, STATUS, 1, WRITE);
        u16 head = offer(queue, pieces + (whole ? 2 : 1));
        ring(&disk, queue);
        completes(queue, head, 1);
        SAME(get(STATUS, 1), whole ? 0 : 1);
    }
    SAME(reads(3, DATA, 512), 0);
    SAME(get(DATA, 8), 0x4242424242424242);
    fill(DATA, 512, 0);
    SAME(writes(3, DATA, 512), 0);

    queue = &sender.queue[1];
    fill(DATA, 12, 0), fill(DATA + 12, 60, 0x33);
    for (u16 i = 0; i < 12; i++)
        add(queue, DATA + i, 1, 0);
    add(queue, DATA + 12, 60, 0);
    u16 head = offer(queue, 13), room = send(&receiver.queue[0], ROOM, 2048, WRITE);
    ring(&sender, queue);
    completes(queue, head, 0);
    ring(&receiver, &receiver.queue[0]);
    completes(&receiver.queue[0], room, 72);
    SAME(get(ROOM + 12, 8), 0x3333333333333333);
    for (u32 length = 0; length < 12; length++)
        tries(&sender, DATA, length, 0, 0);
    /* Nothing of that has been sent: the next frame is the first. */
    room = send(&receiver.queue[0], ROOM, 2048, WRITE);
    ring(&receiver, &receiver.queue[0]);
    tries(&sender, DATA, 12 + 61, 0, 0);
    completes(&receiver.queue[0], room, 73);
}

static void receive_buffers_outside_memory(void)
{
    const u64 outside[] = {receiver.bar, 0xc0000000, MEMORY - 100, ~0UL - 4096, 0xfee00000};
    for (u32 i = 0; i < 5; i++) {
        struct queue *queue = &receiver.queue[0];
        u16 bad = send(queue, outside[i], 2048, WRITE), next = send(queue, ROOM, 2048, WRITE);
        ring(&receiver, queue);
        fill(DATA, 12, 0);
        tries(&sender, DATA, 72, 0, 0);
        WAIT(is_used(queue) || status(&receiver) & NEEDS_RESET);
        if (is_used(queue)) {
            /* The frame goes into the next. */
            completes(queue, bad, 0);
            completes(queue, next, 72);
        } else {
            report->broken++;
            restart(&receiver);
        }
        good(&receiver);
    }
}

static void a_flood_without_buffers(void)
{
    struct queue *queue = &receiver.queue[0], *source = &sender.queue[1];
    u32 length;
    for (u32 i = 0; i < 5; i++) {
        fill(DATA, 12, 0), fill(DATA + 12, 1000, 0xfe);
        /* Nobody takes them: the cable is full at some time, and the others wait for it. */
        for (u32 n = 0; n < SIZE; n++)
            send(source, DATA, 1012, 0), ring(&sender, source);
        WAIT(is_used(source));
        SAME(queue->used[1], queue->seen);
        /* When there are buffers, all of them come. */
        for (u32 n = 0; n < SIZE; n++) {
            u16 head = send(queue, ROOM, 2048, WRITE);
            ring(&receiver, queue);
            completes(queue, head, 1012);
            SAME(get(ROOM + 500, 1), 0xfe);
        }
        for (u32 n = 0; n < SIZE; n++)
            take(source, &length);
        good(&receiver);
    }
}

static void frames_of_impossible_lengths(void)
{
    const u8 headers[][12] = {{1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0},
                              {0, 1, 54, 0, 0xb4, 5, 0, 0, 0, 0, 0, 0},
                              {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}};
    struct queue *queue = &sender.queue[1];
    u16 head, room = send(&receiver.queue[0], ROOM, 2048, WRITE);
    ring(&receiver, &receiver.queue[0]);
    fill(DATA, 12, 0);
    for (u32 length = 0; length < 14; length++)
        tries(&sender, DATA, 12 + length, 0, 0);
    for (u32 over = 1; over < 70000; over += 60000) {
        u32 left = 12 + 65557 + over;
        u16 count = 0;
        for (; left > 0; count++) {
            u32 step = left < 0x4000 ? left : 0x4000;
            add(queue, DATA, step, 0);
            left -= step;
        }
        head = offer(queue, count);
        ring(&sender, queue);
        completes(queue, head, 0);
    }
    /* What nobody agreed to leave to do, or cannot be where it says. */
    for (u32 i = 0; i < 3; i++) {
        for (u32 b = 0; b < 12; b++)
            set(DATA + b, 1, headers[i][b]);
        tries(&sender, DATA, 72, 0, 0);
    }
    /* All of it was dropped: the first that comes is the first that is good. */
    fill(DATA, 12, 0);
    tries(&sender, DATA, 12 + 77, 0, 0);
    completes(&receiver.queue[0], room, 89);
}

/* Cards whose drivers may leave checksums and segments to do, from here on. What makes no sense on its frame of 60 bytes is dropped, and what makes
 * some comes as it was sent. */
static void nonsense_left_to_do(void)
{
    enum { LEFT = 1 | 1 << 1 | 1 << 7 | 1 << 11 }; /* CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4 */
    /* flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers (5.1.6) */
    static const u8 headers[][12] = {
        {1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0},         /* sums from behind the end on, */
        {1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0},         /* to behind the end, */
        {1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0},   /* both, */
        {1, 0, 0, 0, 0, 0, 34, 0, 25, 0, 0, 0},             /* by one byte, */
        {1, 1, 54, 0, 0xb4, 5, 59, 0, 0, 0, 0, 0},          /* also of segments */
        {1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0},            /* segments of nothing, */
        {0, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0},         /* without a checksum, */
        {1, 2, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0},         /* of a kind that there is not, */
        {1, 4, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0},         /* or that was not agreed on */
        {1, 0x80, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0},      /* congestion without segments */
        {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
        {1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 1, 0}};        /* sound */
    enum { COUNT = sizeof headers / sizeof *headers };
    sender.features |= LEFT, receiver.features |= LEFT;
    restart(&sender), restart(&receiver);
    SAME(reg(&sender, DEVICE_FEATURE, 4) & LEFT, LEFT);
    u16 room = send(&receiver.queue[0], ROOM, 2048, WRITE);
    ring(&receiver, &receiver.queue[0]);
    for (u32 i = 0; i < COUNT; i++) {
        for (u32 b = 0; b < 12; b++)
            set(DATA + b, 1, headers[i][b]);
        fill(DATA + 12, 60, (u8)i);
        tries(&sender, DATA, 72, 0, 0);
    }
    completes(&receiver.queue[0], room, 72);
    for (u32 b = 0; b < 12; b++)
        SAME(get(ROOM + b, 1), headers[COUNT - 1][b]);
    SAME(get(ROOM + 71, 1), COUNT - 1);
}

/* The test has typed until no more of it was taken. */
static void input_that_nobody_reads(void)
{
    struct queue *queue = &console.queue[0];
    u32 length;
    /* 0, 1, 2, …: what was taken is there, in its order, and what had to wait comes after it. */
    u8 wanted = 0;
    for (u32 taken = 0; taken < 4096; taken += length) {
        u16 head = send(queue, DATA, 4096, WRITE);
        ring(&console, queue);
        SAME(take(queue, &length), head);
        CHECK(length > 0 && length <= 4096);
        for (u32 i = 0; i < length; i++)
            if (get(DATA + i, 1) != wanted++)
                failed(__LINE__, get(DATA + i, 1), (u8)(wanted - 1));
    }
}

/* Flushes, as many as there is room for, and then the same again, for a disk that does not answer. */
static void submits_without_waiting(void)
{
    struct queue *queue = &disk.queue[0];
    u16 heads[SIZE / 2];
    header(4, 0);
    for (u32 i = 0; i < SIZE / 2; i++) {
        add(queue, HEADER, 16, 0), add(queue, STATUS, 1, WRITE);
        heads[i] = offer(queue, 2);
        ring(&disk, queue);
    }
    for (u32 i = 0; i < SIZE / 2; i++) {
        make_available(queue, heads[i % (SIZE / 2)]);
        ring(&disk, queue);
    }
    report->broken++;
    WAIT(status(&disk) & NEEDS_RESET);
}

static int is_dangerous(u32 port)
{
    /* The test's own, the reset by the keyboard controller, the panic, power, and where PCI is configured. */
    return port - ASK < 8 || port == 0x64 || port == 0x505 || port - 0x600 < 5 || port - 0xcf8 < 8;
}

static void every_port_and_many_addresses(void)
{
    const u64 edges[] = {0xc0000000, 0xe0000000, 0xe8000000, 0xe8100000, 0xfec00000, 0xfec01000, MEMORY, 0xfffbc000 - 64, 0xfffff000};
    for (u32 port = 0; port < 0xfff0; port += port < 0x700 ? 1 : 61) {
        if (port - ASK < 8 || port + 3 - ASK < 8)
            continue;
        in8((u16)port), in16((u16)port), in32((u16)port);
        for (u32 near = 0; near < 4; near++)
            if (is_dangerous(port + near))
                goto next;
        out8((u16)port, 0x55), out16((u16)port, 0xffff), out32((u16)port, 0);
    next:;
    }
    SAME(in8(0x80), 0xff);
    SAME(in16(0x3000), 0xffff);
    SAME(in32(0x3000), ~0u);
    for (u32 i = 0; i < sizeof edges / sizeof *edges; i++)
        for (u32 near = 0; near < 40; near += 3)
            for (u32 width = 1; width <= 8; width *= 2) {
                u64 at = edges[i] + near;
                (void)get(at, width);
                set(at, width, ~0UL);
            }
    SAME(get(0xd8000000, 8), ~0UL);
    /* Interrupts may be on now in the serial port; nobody listens. The host bridge has been written to. */
    SAME(config(disk.place, 0), 0x10421af4);
}

static const struct {
    u32 number;
    void (*run)(void);
} rows[] = {
#define ROW(number, name) {number, name},
#include "hostile-rows.h"
#undef ROW
};

static void run(u32 row)
{
    report->broken = 0;
    if (row == SUBMIT) {
        submits_without_waiting();
        return;
    }
    for (u32 i = 0; i < 6 && row == RESTART; i++)
        restart(all[i]);
    if (row == LEAVE)
        nonsense_left_to_do();
    if (row == SEND) {
        makes_room();
        for (u32 i = 0; i < 10; i++)
            sends_a_frame();
        return;
    }
    for (u32 i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].number == row)
            rows[i].run();
    for (u32 i = 0; i < 6; i++)
        good(all[i]);
}

/* The linker puts this section first: it is where the guest begins. */
__attribute__((section(".text.startup"))) void guest(void)
{
    for (u32 i = 0; i < 6; i++)
        find(all[i]), restart(all[i]);
    for (u32 row; (row = in32(ASK)) != END;) {
        run(row);
        out32(ASK, 0);
    }
    for (;;)
        out8(0x64, 0xfe);
}

/*
 * A bare guest that does with a disk, a card, a balloon, a console and a source of random bytes what a script in its memory says, without
 * hearing interrupts: for tests of what stands behind them. The test puts the script at SCRIPT before it starts the VM and finds a result for each step
 * at RESULTS; the last step resets the machine. mod.rs builds it and has the same script in Rust.
 */
#include "bare.h"

#define SCRIPT 0x8000UL
#define RESULTS 0x9000UL
#define HEADERS 0x40000UL /* 32 bytes for each request: the header, and its status at 16 */
#define DATA 0x100000UL   /* 64 KiB for each request */
#define RINGS 0x200000UL  /* 64 KiB for each queue */
#define SIZE 16           /* entries of each queue, four for a request */
#define SAY 0x10          /* a port of the test's */

enum { END, READ, WRITE, FLUSH, BEGIN_READ, FINISH, SEND, RECEIVE, RESET, TELL, BEGIN_WRITE, INFLATE, DEFLATE, ACCOUNT, ASKED, TARGET, DISCARD, ZERO, HEADER, RANDOM, PRINT, PAIRS, INTERRUPTS, ROOM };

struct step {
    u32 op, sector, sectors, fill;
};

struct result {
    u32 status, length;
    u64 sum;
};

struct queue {
    struct descriptor *table;
    volatile u16 *available; /* flags, idx, ring */
    volatile u16 *used;      /* flags, idx, then pairs of u32 */
    volatile u16 *doorbell;
    u16 number, put, seen;
};

struct device {
    u32 place;
    volatile u8 *common, *own;
    struct queue queues[5];
};

static struct device disk, card, balloon, source, console;
/* What the card's driver knows of offloads, and the header in front of the frames that it sends. */
static u32 offloads, header[3];
static u16 pairs = 1, pending;

static void die(u8 why)
{
    out8(SAY, why);
    for (;;)
        __asm__ volatile("cli; pause");
}

static u32 config(u32 place, u32 offset)
{
    out32(0xcf8, 0x80000000u | place << 11 | (offset & ~3u));
    return in32(0xcfc);
}

#define COMMON(type, offset) (*(volatile type *)(device->common + (offset)))

static void setup_queue(struct device *device, u16 number, volatile u8 *notify, u32 multiplier, u64 at)
{
    struct queue *queue = &device->queues[number];
    for (u64 i = 0; i < 0x3000; i += 8)
        *(volatile u64 *)(at + i) = 0;
    queue->table = (struct descriptor *)at;
    queue->available = (volatile u16 *)(at + 0x1000);
    queue->used = (volatile u16 *)(at + 0x2000);
    queue->number = number, queue->put = 0, queue->seen = 0;
    COMMON(u16, 22) = number;
    COMMON(u16, 24) = SIZE;
    COMMON(u32, 32) = (u32)at, COMMON(u32, 36) = 0;
    COMMON(u32, 40) = (u32)(at + 0x1000), COMMON(u32, 44) = 0;
    COMMON(u32, 48) = (u32)(at + 0x2000), COMMON(u32, 52) = 0;
    queue->doorbell = (volatile u16 *)(notify + COMMON(u16, 30) * multiplier);
    COMMON(u16, 28) = 1;
}

static void setup(struct device *device, u32 id, u16 queues, u32 features, u64 at)
{
    u32 place = 1, multiplier = 0;
    volatile u8 *notify = 0;
    while (config(place, 0) != (id << 16 | 0x1af4))
        if (++place == 32)
            die('?');
    device->place = place;
    out32(0xcf8, 0x80000000u | place << 11 | 4);
    out32(0xcfc, 6); /* memory, bus master */
    for (u32 next = config(place, 0x34) & 0xff; next; next = config(place, next) >> 8 & 0xff) {
        u32 first = config(place, next);
        if ((first & 0xff) != 9)
            continue;
        u32 kind = first >> 24, bar = config(place, next + 4) & 0xff;
        if (bar > 5)
            continue;
        u64 base = config(place, 0x10 + 4 * bar) & ~15u;
        if ((config(place, 0x10 + 4 * bar) & 6) == 4)
            base |= (u64)config(place, 0x14 + 4 * bar) << 32;
        base += config(place, next + 8);
        if (kind == 1)
            device->common = (volatile u8 *)base;
        if (kind == 4)
            device->own = (volatile u8 *)base;
        if (kind == 2)
            notify = (volatile u8 *)base, multiplier = config(place, next + 16);
    }
    COMMON(u8, 20) = 0;
    while (COMMON(u8, 20))
        ;
    COMMON(u8, 20) = 3;
    COMMON(u32, 0) = 0;
    features &= COMMON(u32, 4);
    COMMON(u32, 8) = 0, COMMON(u32, 12) = features;
    COMMON(u32, 8) = 1, COMMON(u32, 12) = 1; /* VERSION_1 */
    COMMON(u8, 20) = 11;
    if (!(COMMON(u8, 20) & 8))
        die('f');
    for (u16 i = 0; i < queues; i++)
        setup_queue(device, i, notify, multiplier, at + 0x10000 * i);
    COMMON(u8, 20) = 15;
}

static struct device *the_disk(void)
{
    if (!disk.common)
        setup(&disk, 0x1042, 1, 1 << 9 | 1 << 13 | 1 << 14, RINGS); /* FLUSH, DISCARD, WRITE_ZEROES */
    return &disk;
}

static struct device *the_card(void)
{
    if (!card.common)
        /* With CTRL_VQ and MQ where it has several pairs. */
        setup(&card, 0x1041, pairs > 1 ? 2 * pairs + 1 : 2, offloads | (pairs > 1 ? 1 << 17 | 1 << 22 : 0), RINGS + 0x80000);
    return &card;
}

static struct device *the_balloon(void)
{
    if (!balloon.common)
        setup(&balloon, 0x1045, 3, 3, RINGS + 0x30000); /* MUST_TELL_HOST, STATS_VQ */
    return &balloon;
}

static struct device *the_source(void)
{
    if (!source.common)
        setup(&source, 0x1044, 1, 0, RINGS + 0x60000);
    return &source;
}

static struct device *the_console(void)
{
    if (!console.common)
        setup(&console, 0x1043, 2, 0, RINGS + 0x70000);
    return &console;
}

static void offer(struct queue *queue, u16 head)
{
    queue->available[2 + queue->put % SIZE] = head;
    fence();
    queue->available[1] = ++queue->put;
    fence();
    *queue->doorbell = queue->number;
}

/* Waits for the next that the device has done: its head, and the bytes that it wrote. */
static u32 done(struct queue *queue, u32 *length)
{
    while (queue->used[1] == queue->seen)
        __asm__ volatile("pause" : : : "memory");
    fence();
    volatile u32 *pair = (volatile u32 *)(queue->used + 2) + 2 * (queue->seen++ % SIZE);
    *length = pair[1];
    return pair[0];
}

static void put(struct queue *queue, u16 at, u64 address, u32 length, u16 flags)
{
    queue->table[at].address = address;
    queue->table[at].length = length;
    queue->table[at].flags = flags | (flags & 1);
    queue->table[at].next = (u16)(at + 1);
}

/* Begins a request; its number. A discard, or a zeroing with the flags `fill`, has its range as data. */
static u16 begin(u32 kind, const struct step *step)
{
    int ranged = kind == 11 || kind == 13;
    struct queue *queue = &the_disk()->queues[0];
    u16 number = pending++, at = (u16)(4 * number);
    u64 header = HEADERS + 32 * number, data = DATA + 0x10000UL * number;
    u32 length = ranged ? 16 : 512 * step->sectors, device_writes = kind == 0 ? 2 : 0;
    if (number >= SIZE / 4)
        die('n');
    *(volatile u32 *)header = kind;
    *(volatile u32 *)(header + 4) = 0;
    *(volatile u64 *)(header + 8) = ranged ? 0 : step->sector;
    *(volatile u8 *)(header + 16) = 0xff;
    for (u32 i = 0; i < length; i++)
        ((volatile u8 *)data)[i] = kind == 1 ? (u8)(step->fill + i / 512) : 0xee;
    put(queue, at, header, 16, 1);
    if (ranged) {
        *(volatile u64 *)data = step->sector;
        *(volatile u32 *)(data + 8) = step->sectors, *(volatile u32 *)(data + 12) = step->fill;
        put(queue, (u16)(at + 1), data, 10, 1), put(queue, (u16)(at + 2), data + 10, 6, 1);
    } else if (length) {
        put(queue, (u16)(at + 1), data, 200, (u16)(1 | device_writes));
        put(queue, (u16)(at + 2), data + 200, length - 200, (u16)(1 | device_writes));
    } else {
        queue->table[at].next = (u16)(at + 3);
    }
    put(queue, (u16)(at + 3), header + 16, 1, 2);
    offer(queue, at);
    return number;
}

static void finish(struct result *results)
{
    while (pending) {
        u32 length, ended = 0, statuses = 0;
        /* All of them, in any order; the result is of all: the worst status, the bytes, and a sum. */
        for (u16 i = 0; i < pending; i++) {
            u32 number = done(&disk.queues[0], &length) / 4;
            u8 status = *(volatile u8 *)(HEADERS + 32 * number + 16);
            statuses = status > statuses ? status : statuses;
            ended += length;
            if (length > 1)
                for (u32 b = 0; b + 1 < length; b++)
                    results->sum += ((volatile u8 *)(DATA + 0x10000UL * number))[b];
        }
        results->status = statuses, results->length = ended;
        pending = 0;
    }
}

/*
 * A frame for the device, or room for one, number `sector`, behind a header of 12 bytes. A frame is all of one byte, but its
 * destination where `sector` names another one.
 */
static void transfer(const struct step *step, struct result *result)
{
    int receives = step->op == RECEIVE;
    struct queue *queue = &the_card()->queues[receives ? 0 : 1];
    volatile u8 *frame = (volatile u8 *)(DATA + (receives ? 0x80000UL + 2048 * step->sector : 0x90000UL));
    for (u32 i = 0; i < 2048 && !(receives && step->sectors); i++)
        frame[i] = i < 12 ? (receives ? 0 : ((u8 *)header)[i]) : (u8)(i < 18 && step->sector ? step->sector : step->fill);
    /* A frame that there is room for already has `sectors`. */
    if (!receives || !step->sectors) {
        put(queue, 0, (u64)frame, receives ? 2048 : 12 + step->sectors, receives ? 2 : 0);
        offer(queue, 0);
    }
    done(queue, &result->length);
    for (u32 i = 12; i < result->length; i++)
        result->sum += frame[i];
}

/* Room for a frame that nobody waits for. */
static void make_room(void)
{
    struct queue *queue = &the_card()->queues[0];
    put(queue, 0, DATA + 0x80000UL, 2048, 2);
    offer(queue, 0);
}

/* Frames are sent behind these 12 bytes from here on. The first has the driver begin again, as one that knows CSUM and TSO4, both ways. */
static void set_header(const struct step *step)
{
    if (!offloads)
        card.common = 0, offloads = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 11;
    header[0] = step->sector, header[1] = step->sectors, header[2] = step->fill;
}

/* Has the driver begin again and use both of the card's pairs; the status that the device answers with. */
static void use_pairs(struct result *result)
{
    volatile u8 *command = (volatile u8 *)(DATA + 0xd0000UL);
    card.common = 0, pairs = 2;
    struct queue *queue = &the_card()->queues[2 * pairs];
    command[0] = 4, command[1] = 0; /* VIRTIO_NET_CTRL_MQ, VQ_PAIRS_SET */
    command[2] = (u8)pairs, command[3] = 0, command[4] = 0xff;
    put(queue, 0, (u64)command, 4, 1), put(queue, 1, (u64)command + 4, 1, 2);
    offer(queue, 0);
    done(queue, &result->length);
    result->status = command[4];
}

/* Lets the disk's first vector and COM1's interrupts through; they are not taken. With `fill`, has the vector wait again, and looks whether it does. */
static void let_interrupts(const struct step *step)
{
    u32 place = the_disk()->place, next = config(place, 0x34) & 0xff;
    while ((config(place, next) & 0xff) != 0x11)
        if (!(next = config(place, next) >> 8 & 0xff))
            die('x');
    u32 table = config(place, next + 4);
    volatile u32 *entry = (volatile u32 *)((config(place, 0x10 + 4 * (table & 7)) & ~15UL) + (table & ~7u));
    if (step->fill) {
        u32 waiting = config(place, next + 8);
        entry[3] = 1;
        (void)*(volatile u32 *)((config(place, 0x10 + 4 * (waiting & 7)) & ~15UL) + (waiting & ~7u));
        return;
    }
    out32(0xcf8, 0x80000000u | place << 11 | next);
    out32(0xcfc, config(place, next) | 1u << 31);
    entry[0] = 0xfee00000, entry[1] = 0, entry[2] = 0x41, entry[3] = 0;
    volatile u32 *ioapic = (volatile u32 *)0xfec00000UL;
    ioapic[0] = 0x11 + 2 * 4, ioapic[4] = 0;
    ioapic[0] = 0x10 + 2 * 4, ioapic[4] = 0x31;
    out8(0x3f9, 3); /* what is received, and room to send */
    out8(0x3f8, 'x');
}

/* Gives `sectors` pages from page `sector` on to the balloon, filled before, or takes them back. */
static void move_pages(const struct step *step, struct result *result)
{
    struct queue *queue = &the_balloon()->queues[step->op == INFLATE ? 0 : 1];
    volatile u32 *numbers = (volatile u32 *)(DATA + 0xa0000UL);
    for (u32 i = 0; i < step->sectors; i++) {
        numbers[i] = step->sector + i;
        for (u32 b = 0; b < 4096 && step->op == INFLATE; b++)
            ((volatile u8 *)((u64)numbers[i] << 12))[b] = (u8)step->fill;
    }
    put(queue, 0, (u64)numbers, 4 * step->sectors, 0);
    offer(queue, 0);
    done(queue, &result->length);
}

/* Takes `sectors` random bytes, or prints as many of `fill`. */
static void stream(const struct step *step, struct result *result)
{
    int prints = step->op == PRINT;
    struct queue *queue = prints ? &the_console()->queues[1] : &the_source()->queues[0];
    volatile u8 *bytes = (volatile u8 *)(DATA + 0xc0000UL);
    for (u32 i = 0; i < step->sectors; i++)
        bytes[i] = (u8)step->fill;
    put(queue, 0, (u64)bytes, step->sectors, prints ? 0 : 2);
    offer(queue, 0);
    done(queue, &result->length);
}

/* An account of memory: `fill` MiB free of `sectors`. The device keeps it until somebody asks for another one. */
static void account(const struct step *step)
{
    volatile u16 *words = (volatile u16 *)(DATA + 0xb0000UL);
    u64 values[] = {(u64)step->fill << 20, (u64)step->sectors << 20};
    for (u32 i = 0; i < 2; i++)
        for (u32 w = 0; w < 5; w++)
            words[5 * i + w] = w ? (u16)(values[i] >> (16 * (w - 1))) : (u16)(4 + i);
    put(&the_balloon()->queues[2], 0, (u64)words, 20, 0);
    offer(&balloon.queues[2], 0);
}

/* The linker puts this section first: it is where the guest begins. */
__attribute__((section(".text.startup"))) void guest(void)
{
    const struct step *step = (const struct step *)SCRIPT;
    struct result *result = (struct result *)RESULTS;
    for (; step->op != END; step++, result++) {
        switch (step->op) {
        case READ: begin(0, step), finish(result); break;
        case WRITE: begin(1, step), finish(result); break;
        case FLUSH: begin(4, step), finish(result); break;
        case DISCARD: begin(11, step), finish(result); break;
        case ZERO: begin(13, step), finish(result); break;
        case BEGIN_READ: begin(0, step); break;
        case BEGIN_WRITE: begin(1, step); break;
        case FINISH: finish(result); break;
        case SEND:
        case RECEIVE: transfer(step, result); break;
        case HEADER: set_header(step); break;
        case PAIRS: use_pairs(result); break;
        case INTERRUPTS: let_interrupts(step); break;
        case ROOM: make_room(); break;
        case RESET: disk.common = 0, pending = 0, the_disk(); break;
        case INFLATE:
        case DEFLATE: move_pages(step, result); break;
        case ACCOUNT: account(step); break;
        case ASKED: done(&the_balloon()->queues[2], &result->length); break;
        case TARGET:
            while (*(volatile u32 *)the_balloon()->own != step->sector)
                __asm__ volatile("pause");
            *(volatile u32 *)(balloon.own + 4) = step->sector;
            break;
        case RANDOM:
        case PRINT: stream(step, result); break;
        case TELL: out8(SAY, (u8)step->fill); break;
        default: die('!');
        }
    }
    out8(0x64, 0xfe);
    die('.');
}

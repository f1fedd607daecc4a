/* A VM with every device and the guest tests/guests/hostile.c, which breaks the rules; hostile.c has the functions. */
#ifndef ROGUE_H
#define ROGUE_H
#include "guest.h"

/* Where the guest asks for rows, and says that it has done them. */
struct ask {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t row, answer;
    bool given, said, ended;
};

struct rogue {
    vmbed_vm *vm;
    vmbed_events *events;
    struct ask ask;
    int disk;
};

/* No rows: every device is used as it should be; ten frames, of which all may get lost. */
enum { USE_ALL = 0, SEND_TEN = 254 };

/* Its two cards are on these TAP interfaces; NULL: they are the ends of one cable. */
void rogue_begin(struct rogue *rogue, vmbed_host *host, const char *const *taps);
/* The guest does that row. How often a device had to ask for a reset. */
uint32_t rogue_does(struct rogue *rogue, uint32_t row, const char *name);
/* How often devices have asked for a reset, as the embedder is told. It is told of nothing else. */
uint32_t rogue_told(struct rogue *rogue);
void rogue_end(struct rogue *rogue);

/* Something happens, and another VM of this process must not notice. */
void beside_another_vm(void (*happens)(vmbed_host *));

#endif

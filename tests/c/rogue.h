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
    int outside; /* what is sent there comes out of the second card's end of the cable */
    int inside;  /* that end */
};

/* What there is instead of a cable from one card to the other, and of a file: two TAP interfaces, a network of one's own at each end of it, a disk of one's own. */
struct attached {
    const char *const *taps;
    const vmbed_net_ops *cable; /* `user` is the end's descriptor */
    const vmbed_block_ops *disk;
    void *user;
};

/* No rows: every device is used as it should be; from its reset on; flushes that nobody answers, again and again; ten frames, of which all may
 * get lost; frames with something left to do. */
enum { USE_ALL = 0, LEAVE_TO_DO = 251, RESTART_ALL = 252, SUBMIT_WITHOUT_END = 253, SEND_TEN = 254, ROGUE_SECTORS = 1024 };

void rogue_begin(struct rogue *rogue, vmbed_host *host, const struct attached *instead);
/* The guest does that row. How often a device had to ask for a reset. */
uint32_t rogue_does(struct rogue *rogue, uint32_t row, const char *name);
/* How often devices have asked for a reset, as the embedder is told. It is told of nothing else. */
uint32_t rogue_told(struct rogue *rogue);
void rogue_end(struct rogue *rogue);

/* How much is taken, with nobody reading. */
size_t types_without_end(vmbed_vm *vm);

/* Something happens, and another VM of this process must not notice, and uses all its devices meanwhile. It happens again where it was over too
 * soon for that. `often`: the same for what is always over soon. */
void beside_another_vm_often(void (*happens)(void));
void beside_another_vm(void (*happens)(vmbed_host *));

#endif

/* Preloaded into the command by tests/cli/gate.py: stops the process at a point that the test names and holds its clock.
 *
 * A test and the process share one page, `struct gate`. The process looks at it at every point: each backward pass, and
 * each switch of gradients on or off, of which a forward pass in evaluation has several. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum point { BACKWARD, SWITCH };

/* The layout is repeated in gate.py. */
struct gate {
    volatile int32_t point;     /* where to stop */
    volatile int32_t lines;     /* points count once `file` has so many lines; 0: once it exists; -1: from the start */
    volatile int32_t left;      /* so many points are passed before the process stops; -1: it never stops */
    volatile int32_t held;      /* times stopped */
    volatile int32_t released;  /* times released; the process stands while this is less than `held` */
    volatile int32_t frozen;    /* the monotonic clock stands still, but for `ahead` */
    volatile int64_t ahead;     /* nanoseconds that the monotonic clock is ahead */
    volatile int64_t a_pass;    /* nanoseconds that each backward pass adds to `ahead` */
    char file[1024];
};

static struct gate* gate;
static struct timespec stood;

static void* next(const char* name) {
    void* found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static int real_clock(clockid_t clock, struct timespec* now) {
    static int (*real)(clockid_t, struct timespec*);
    if (!real) real = next("clock_gettime");
    return real(clock, now);
}

__attribute__((constructor)) static void begin(void) {
    const char* page = getenv("MICROBATCH_GATE");
    int file = page ? open(page, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void* found = mmap(NULL, sizeof(struct gate), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (found == MAP_FAILED) abort();
    real_clock(CLOCK_MONOTONIC, &stood);
    gate = found;
}

/* Lines of gate->file so far, -1 while it is missing; reads only what is new. */
static int lines_now(void) {
    static int lines;
    static off_t at;
    static char text[65536];
    int file = open(gate->file, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    if (lseek(file, 0, SEEK_END) < at) at = lines = 0;
    for (ssize_t got; gate->lines > 0 && (got = pread(file, text, sizeof text, at)) > 0; at += got)
        for (ssize_t i = 0; i < got; ++i) lines += text[i] == '\n';
    close(file);
    return lines;
}

static void reach(enum point point) {
    if (!gate) return;
    if (point == BACKWARD) gate->ahead += gate->a_pass;
    if (point != (enum point)gate->point || gate->left < 0) return;
    if (gate->lines >= 0 && lines_now() < gate->lines) return;
    if (gate->left > 0) {
        --gate->left;
        return;
    }
    const struct timespec moment = {0, 200000};
    gate->held = gate->held + 1;
    while (gate->released < gate->held) nanosleep(&moment, NULL);
}

int clock_gettime(clockid_t clock, struct timespec* now) {
    int code = real_clock(clock, now);
    if (code != 0 || !gate || clock != CLOCK_MONOTONIC) return code;
    if (gate->frozen)
        *now = stood;
    else
        stood = *now;
    now->tv_sec += gate->ahead / 1000000000;
    now->tv_nsec += gate->ahead % 1000000000;
    if (now->tv_nsec >= 1000000000) ++now->tv_sec, now->tv_nsec -= 1000000000;
    return 0;
}

/* void at::Tensor::_backward(TensorList, const std::optional<Tensor>&, std::optional<bool>, bool) const */
struct tensors { const void* data; size_t size; };
struct maybe { bool value, there; };
#define _BACKWARD "_ZNK2at6Tensor9_backwardEN3c108ArrayRefIS0_EERKSt8optionalIS0_ES4_IbEb"
void backward(const void*, struct tensors, const void*, struct maybe, bool) __asm__(_BACKWARD);
void backward(const void* self, struct tensors inputs, const void* gradient, struct maybe keep, bool create) {
    static void (*real)(const void*, struct tensors, const void*, struct maybe, bool);
    if (!real) real = next(_BACKWARD);
    reach(BACKWARD);
    real(self, inputs, gradient, keep, create);
}

/* static void c10::GradMode::set_enabled(bool) */
#define SET_ENABLED "_ZN3c108GradMode11set_enabledEb"
void set_enabled(bool) __asm__(SET_ENABLED);
void set_enabled(bool enabled) {
    static void (*real)(bool);
    if (!real) real = next(SET_ENABLED);
    reach(SWITCH);
    real(enabled);
}

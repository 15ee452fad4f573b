/* A library to preload: the wall clock of a process, shifted by an offset that another process may change at any time.

   The offset (nanoseconds, int64_t) is the content of the file that CLOCK_OFFSET_FILE names. The clocks that do not
   step (CLOCK_MONOTONIC, ...) are left alone, and so are the times that the kernel itself stamps on files. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static const int64_t SECOND = 1000000000;
static const int64_t none;
static const volatile int64_t *offset = &none;
static int (*read_clock)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    read_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CLOCK_OFFSET_FILE");
    int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    void *shared = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED)
        abort(); /* a test must not run with the real clock unawares */
    offset = shared;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    if (read_clock == NULL)
        begin(); /* another library's constructor came first */
    int result = read_clock(id, now);
    if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        int64_t shifted = now->tv_sec * SECOND + now->tv_nsec + *offset;
        now->tv_sec = shifted / SECOND;
        now->tv_nsec = shifted % SECOND;
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec precise;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return result;
}

time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME_COARSE, &precise);
    if (now != NULL)
        *now = precise.tv_sec;
    return precise.tv_sec;
}

// What libfaketime leaves out, for tests; preload it before that one. The kernel's word on its clock: adjtimex(2) returns the
// number in the file $ADJTIMEX, of which 0 is synchronised and 5 (TIME_ERROR) is not. And sleeps by the monotonic clock, which
// libfaketime 0.9.10 refuses (EINVAL) even where it leaves that clock alone: Python's time.sleep since 3.11.
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/timex.h>
#include <time.h>
#include <unistd.h>

int adjtimex(struct timex *buffer) {
    int state = -1;
    const char *name = getenv("ADJTIMEX");
    FILE *file = name ? fopen(name, "r") : NULL;
    (void)buffer;
    if (file) {
        if (fscanf(file, "%d", &state) != 1)
            state = -1;
        fclose(file);
    }
    return state;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *asked, struct timespec *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, asked, left) == -1 ? errno : 0;
}

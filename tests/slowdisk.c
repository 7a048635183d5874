/* A disk that is slow for some files: fsync of a file whose name holds SLOW_DISK_NAME takes 6 s while SLOW_DISK_FLAG exists. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int fsync(int descriptor)
{
    static int (*real)(int);
    char link[64], name[4096];
    const char *flag = getenv("SLOW_DISK_FLAG"), *part = getenv("SLOW_DISK_NAME");
    ssize_t size;

    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    size = readlink(link, name, sizeof name - 1);
    if (flag && part && size > 0 && access(flag, F_OK) == 0) {
        name[size] = 0;
        if (strstr(name, part))
            sleep(6);
    }
    return real(descriptor);
}

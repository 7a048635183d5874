// A GPIO chip for tests: preloaded, it makes /dev/gpiochip99 out of the file $GPIOCHIP, one byte of voltage for each of 64 lines.
// Speaks the kernel's character device, version 2 (linux/gpio.h), so that the real libgpiod above it does not know the difference.
// Like a chip, it keeps its voltages when the process that drove them is killed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/gpio.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define NAME "/dev/gpiochip99"
#define LINES 64

static int chip = -1, request = -1;
static unsigned offsets[LINES], count, low[LINES];

static int opened(void) {
    chip = (int)(long)((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open"))(getenv("GPIOCHIP"), O_RDWR);
    return chip;
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    int mode = va_arg(more, int);
    va_end(more);
    if (!strcmp(path, NAME)) return opened();
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}

static int told(const char *path, struct stat *found) {
    if (strcmp(path, NAME)) return 0;
    memset(found, 0, sizeof *found);
    found->st_mode = S_IFCHR | 0600;
    found->st_rdev = makedev(254, 99);
    return 1;
}

#define STAT(name)                                                                                   \
    int name(int version, const char *path, struct stat *found) {                                    \
        if (told(path, found)) return 0;                                                             \
        return ((int (*)(int, const char *, struct stat *))dlsym(RTLD_NEXT, #name))(version, path, found); \
    }
STAT(__xstat)
STAT(__lxstat)

int stat(const char *path, struct stat *found) {
    if (told(path, found)) return 0;
    return ((int (*)(const char *, struct stat *))dlsym(RTLD_NEXT, "stat"))(path, found);
}

int lstat(const char *path, struct stat *found) {
    if (told(path, found)) return 0;
    return ((int (*)(const char *, struct stat *))dlsym(RTLD_NEXT, "lstat"))(path, found);
}

static char *resolved(const char *path, char *into) {
    if (strcmp(path, "/sys/dev/char/254:99/subsystem")) return NULL;
    if (!into) into = malloc(64);
    return strcpy(into, "/sys/bus/gpio");
}

char *realpath(const char *path, char *into) {
    char *found = resolved(path, into);
    return found ? found : ((char *(*)(const char *, char *))dlsym(RTLD_NEXT, "realpath"))(path, into);
}

char *__realpath_chk(const char *path, char *into, size_t size) {
    char *found = resolved(path, into);
    return found ? found : ((char *(*)(const char *, char *, size_t))dlsym(RTLD_NEXT, "__realpath_chk"))(path, into, size);
}

static void drive(unsigned index, unsigned active) {
    char voltage = active != low[index];
    if (pwrite(chip, &voltage, 1, offsets[index]) != 1) abort();
}

static int requested(struct gpio_v2_line_request *asked) {
    unsigned long long values = 0, lows = 0;
    if (request >= 0) return errno = EBUSY, -1;
    if (!(asked->config.flags & GPIO_V2_LINE_FLAG_OUTPUT)) return errno = EINVAL, -1;
    if (asked->config.flags & GPIO_V2_LINE_FLAG_ACTIVE_LOW) lows = ~0ULL;
    for (unsigned i = 0; i < asked->config.num_attrs; i++) {
        struct gpio_v2_line_config_attribute *given = &asked->config.attrs[i];
        if (given->attr.id == GPIO_V2_LINE_ATTR_ID_OUTPUT_VALUES) values |= given->attr.values & given->mask;
        if (given->attr.id == GPIO_V2_LINE_ATTR_ID_FLAGS && given->attr.flags & GPIO_V2_LINE_FLAG_ACTIVE_LOW) lows |= given->mask;
        if (given->attr.id == GPIO_V2_LINE_ATTR_ID_FLAGS && !(given->attr.flags & GPIO_V2_LINE_FLAG_ACTIVE_LOW)) lows &= ~given->mask;
    }
    count = asked->num_lines;
    for (unsigned i = 0; i < count; i++) {
        if (asked->offsets[i] >= LINES) return errno = EINVAL, -1;
        offsets[i] = asked->offsets[i];
        low[i] = lows >> i & 1;
        drive(i, values >> i & 1);
    }
    chip = dup(chip);  // the library closes the one it has
    asked->fd = request = dup(chip);
    return 0;
}

int ioctl(int descriptor, unsigned long code, ...) {
    va_list more;
    va_start(more, code);
    void *given = va_arg(more, void *);
    va_end(more);
    if (chip < 0 || (descriptor != chip && descriptor != request))
        return ((int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl"))(descriptor, code, given);
    code &= 0xffffffff;  // the library passes some of them as a negative int
    if (code == GPIO_GET_CHIPINFO_IOCTL) {
        struct gpiochip_info *info = given;
        memset(info, 0, sizeof *info);
        strcpy(info->name, "gpiochip99");
        info->lines = LINES;
        return 0;
    }
    if (code == GPIO_V2_GET_LINEINFO_IOCTL) {
        struct gpio_v2_line_info *info = given;
        unsigned line = info->offset;
        memset(info, 0, sizeof *info);
        return info->offset = line, line < LINES ? 0 : (errno = EINVAL, -1);
    }
    if (code == GPIO_V2_GET_LINE_IOCTL) return requested(given);
    if (code == GPIO_V2_LINE_SET_VALUES_IOCTL) {
        struct gpio_v2_line_values *values = given;
        for (unsigned i = 0; i < count; i++)
            if (values->mask >> i & 1) drive(i, values->bits >> i & 1);
        return 0;
    }
    return errno = EINVAL, -1;
}

int close(int descriptor) {
    if (descriptor == request) request = -1;
    return ((int (*)(int))dlsym(RTLD_NEXT, "close"))(descriptor);
}

// A V4L2 camera for tests: preloaded, it makes /dev/video99, so that the real OpenCV above it does not know the difference.
// Frames are YUYV; all pixels of one are (its number % 200) + 20 bright. As in a kernel, queued buffers are filled while nobody
// dequeues, so that after a pause the oldest frames come first. The file $V4L2_MODE says what it does now: hang, unplug, dark,
// freeze; anything else is well.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define NAME "/dev/video99"
#define MOST 8
#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))

typedef int (*open_call)(const char *, int, ...);
typedef int (*ioctl_call)(int, unsigned long, ...);
typedef void *(*mmap_call)(void *, size_t, int, int, int, off_t);

static int camera = -1, width = 128, height = 128, fps = 30;
static char *memory;
static int empty[MOST], empties, full[MOST], fulls;
static double stamp[MOST], began;
static unsigned number[MOST], made;

static size_t size(void) { return (size_t)width * height * 2; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int is(const char *mode) {
    char told[32] = "";
    FILE *file = fopen(getenv("V4L2_MODE"), "r");
    if (file) {
        if (!fgets(told, sizeof told, file)) told[0] = 0;
        fclose(file);
    }
    return !strcmp(told, mode);
}

static void fill(void) {  // what the camera has done since it was looked at last
    if (is("hang")) return;
    for (; began + made / (double)fps <= now(); made++) {
        if (!empties) continue;  // lost: no buffer
        int buffer = empty[0];
        memmove(empty, empty + 1, sizeof *empty * --empties);
        int level = is("dark") ? 0 : is("freeze") ? 99 : (int)(made % 200) + 20;
        for (size_t i = 0; i < size(); i += 2) {
            memory[buffer * size() + i] = (char)level;
            memory[buffer * size() + i + 1] = (char)128;
        }
        stamp[buffer] = began + made / (double)fps;
        number[buffer] = made;
        full[fulls++] = buffer;
    }
}

static int opened(int flags) {
    if (is("unplug")) return errno = ENOENT, -1;
    return camera = timerfd_create(CLOCK_MONOTONIC, flags & O_NONBLOCK ? TFD_NONBLOCK : 0);
}

#define OPEN(name)                                             \
    int name(const char *path, int flags, ...) {               \
        va_list more;                                          \
        va_start(more, flags);                                 \
        int mode = va_arg(more, int);                          \
        va_end(more);                                          \
        if (!strcmp(path, NAME)) return opened(flags);         \
        return REAL(open_call, #name)(path, flags, mode);      \
    }
OPEN(open)
OPEN(open64)

int stat(const char *path, struct stat *found) {
    if (strcmp(path, NAME)) return REAL(int (*)(const char *, struct stat *), "stat")(path, found);
    memset(found, 0, sizeof *found);
    found->st_mode = S_IFCHR | 0600;
    found->st_rdev = makedev(81, 99);
    return 0;
}

int close(int descriptor) {
    if (descriptor >= 0 && descriptor == camera) {
        camera = -1;
        if (memory) REAL(int (*)(void *, size_t), "munmap")(memory, size() * MOST);
        memory = NULL;
        empties = fulls = 0;
    }
    return REAL(int (*)(int), "close")(descriptor);
}

#define MMAP(name)                                                                          \
    void *name(void *at, size_t length, int protection, int flags, int descriptor, off_t offset) { \
        if (descriptor >= 0 && descriptor == camera) return memory ? memory + offset : MAP_FAILED; \
        return REAL(mmap_call, #name)(at, length, protection, flags, descriptor, offset);   \
    }
MMAP(mmap)
MMAP(mmap64)

int munmap(void *at, size_t length) {
    if (memory && (char *)at >= memory && (char *)at < memory + size() * MOST) return 0;
    return REAL(int (*)(void *, size_t), "munmap")(at, length);
}

int select(int most, fd_set *read, fd_set *write, fd_set *except, struct timeval *patience) {
    if (camera >= 0 && read && FD_ISSET(camera, read)) {
        if (is("unplug")) return 1;
        if (is("hang")) {
            FD_ZERO(read);
            return REAL(int (*)(int, fd_set *, fd_set *, fd_set *, struct timeval *), "select")(0, NULL, NULL, NULL, patience);
        }
        fill();
        if (fulls) return 1;
    }
    return REAL(int (*)(int, fd_set *, fd_set *, fd_set *, struct timeval *), "select")(most, read, write, except, patience);
}

static int dequeued(struct v4l2_buffer *buffer) {
    unsigned long long ticks;
    if (read(camera, &ticks, sizeof ticks) < 0 && errno != EAGAIN) return -1;
    fill();
    if (!fulls) return errno = EAGAIN, -1;
    int index = full[0];
    memmove(full, full + 1, sizeof *full * --fulls);
    buffer->index = index;
    buffer->bytesused = buffer->length = size();
    buffer->sequence = number[index];
    buffer->m.offset = index * size();
    buffer->flags = V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC | V4L2_BUF_FLAG_DONE;
    buffer->timestamp.tv_sec = (long)stamp[index];
    buffer->timestamp.tv_usec = (long)((stamp[index] - (long)stamp[index]) * 1e6);
    return 0;
}

static int formatted(struct v4l2_format *format, int set) {
    if (set && format->fmt.pix.width) {
        width = format->fmt.pix.width > 1280 ? 1280 : (int)format->fmt.pix.width;
        height = format->fmt.pix.height > 720 ? 720 : (int)format->fmt.pix.height;
    }
    format->fmt.pix.width = width;
    format->fmt.pix.height = height;
    format->fmt.pix.pixelformat = V4L2_PIX_FMT_YUYV;
    format->fmt.pix.bytesperline = width * 2;
    format->fmt.pix.sizeimage = size();
    format->fmt.pix.field = V4L2_FIELD_NONE;
    return 0;
}

static int rated(struct v4l2_streamparm *rate, int set) {
    struct v4l2_fract *period = &rate->parm.capture.timeperframe;
    if (set && period->numerator && period->denominator) fps = period->denominator / period->numerator;
    rate->parm.capture.capability = V4L2_CAP_TIMEPERFRAME;
    period->numerator = 1;
    period->denominator = fps;
    return 0;
}

int ioctl(int descriptor, unsigned long code, ...) {
    va_list more;
    va_start(more, code);
    void *given = va_arg(more, void *);
    va_end(more);
    if (descriptor < 0 || descriptor != camera) return REAL(ioctl_call, "ioctl")(descriptor, code, given);
    if (is("unplug")) return errno = ENODEV, -1;
    struct v4l2_capability *able = given;
    struct v4l2_input *input = given;
    struct v4l2_requestbuffers *wanted = given;
    struct v4l2_buffer *buffer = given;
    struct itimerspec tick = {{0, 1000000000 / fps}, {0, 1000000000 / fps}};
    switch (code & 0xffffffff) {
    case VIDIOC_QUERYCAP:
        memset(able, 0, sizeof *able);
        strcpy((char *)able->card, "for tests");
        able->device_caps = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        able->capabilities = able->device_caps | V4L2_CAP_DEVICE_CAPS;
        return 0;
    case VIDIOC_ENUMINPUT:
        if (input->index) return errno = EINVAL, -1;
        memset(input, 0, sizeof *input);
        input->type = V4L2_INPUT_TYPE_CAMERA;
        return 0;
    case VIDIOC_G_INPUT: *(int *)given = 0; return 0;
    case VIDIOC_S_INPUT: return 0;
    case VIDIOC_G_FMT: return formatted(given, 0);
    case VIDIOC_S_FMT: case VIDIOC_TRY_FMT: return formatted(given, (code & 0xffffffff) == VIDIOC_S_FMT);
    case VIDIOC_G_PARM: return rated(given, 0);
    case VIDIOC_S_PARM: return rated(given, 1);
    case VIDIOC_REQBUFS:
        if (wanted->memory != V4L2_MEMORY_MMAP) return errno = EINVAL, -1;
        if (wanted->count > MOST) wanted->count = MOST;
        empties = fulls = 0;
        if (wanted->count && !memory)
            memory = REAL(mmap_call, "mmap")(NULL, size() * MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return 0;
    case VIDIOC_QUERYBUF:
        buffer->length = size();
        buffer->m.offset = buffer->index * size();
        return 0;
    case VIDIOC_QBUF:
        fill();
        if (empties < MOST) empty[empties++] = (int)buffer->index;
        return 0;
    case VIDIOC_DQBUF:
        if (is("hang")) return errno = EAGAIN, -1;
        return dequeued(given);
    case VIDIOC_STREAMON:
        began = now();
        made = 0;
        return timerfd_settime(camera, 0, &tick, NULL);
    case VIDIOC_STREAMOFF: empties = fulls = 0; return 0;
    }
    return errno = EINVAL, -1;
}

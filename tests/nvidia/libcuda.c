/* A stand-in for the CUDA driver where there is no GPU. Device memory is host memory and a stream is done at once, so it shows
   that calls come in a legal order and how many there are; about a GPU it says nothing.
   FAKE_CUDA_LOST=FILE: once the file exists every call fails as after an illegal address, for good.
   FAKE_CUDA_INTEGRATED=1: a GPU that shares its memory with the CPU. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int Result;
typedef uint64_t Address;
enum { DONE = 0, NO_MEMORY = 2, NOT_INITIALISED = 3, NO_DEVICE = 101, NO_CONTEXT = 201, ILLEGAL_ADDRESS = 700 };
enum { UPLOADS, DOWNLOADS, DEVICE_BUFFERS, PINNED_BUFFERS, WAITS, PUSHES, DEPTH, KINDS };

static int initialised, lost;
static long counts[KINDS];
static char primary;
static __thread void *contexts[16];
static __thread int depth;

long fake_cuda_count(int kind) { return kind == DEPTH ? depth : counts[kind]; }

static Result ready(void) {
  const char *file = getenv("FAKE_CUDA_LOST");
  if (file && access(file, F_OK) == 0) lost = 1;
  return lost ? ILLEGAL_ADDRESS : !initialised ? NOT_INITIALISED : !depth ? NO_CONTEXT : DONE;
}
#define READY do { Result found = ready(); if (found) return found; } while (0)

Result cuInit(unsigned flags) { initialised = 1; return DONE; }
Result cuDriverGetVersion(int *version) { *version = 13000; return DONE; }
Result cuGetErrorString(Result r, const char **text) {
  *text = r == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : r == NO_CONTEXT ? "invalid device context" : "failed";
  return DONE;
}
Result cuDeviceGetCount(int *n) { *n = 1; return DONE; }
Result cuDeviceGet(int *device, int number) { *device = number; return number ? NO_DEVICE : DONE; }
Result cuDeviceGetName(char *name, int size, int device) { strncpy(name, "no GPU", size); return DONE; }
Result cuDeviceComputeCapability(int *major, int *minor, int device) { *major = 8; *minor = 7; return DONE; }
Result cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)8 << 30; return DONE; }
Result cuDeviceGetPCIBusId(char *id, int size, int device) { strncpy(id, "0000:00:00.0", size); return DONE; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 18 ? getenv("FAKE_CUDA_INTEGRATED") != NULL : 1; /* 18: CU_DEVICE_ATTRIBUTE_INTEGRATED */
  return DONE;
}

Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = &primary; return initialised ? DONE : NOT_INITIALISED; }
Result cuDevicePrimaryCtxRelease_v2(int device) { return DONE; }
Result cuCtxPushCurrent_v2(void *context) {
  if (lost) return ILLEGAL_ADDRESS;
  contexts[depth++] = context;
  counts[PUSHES]++;
  return DONE;
}
Result cuCtxPopCurrent_v2(void **context) {
  if (lost) return ILLEGAL_ADDRESS; /* the worst that a driver could do: PyCUDA then keeps the context on its own stack */
  if (!depth) return NO_CONTEXT;
  void *popped = contexts[--depth];
  if (context) *context = popped;
  return DONE;
}
Result cuCtxAttach(void **context, unsigned flags) { if (!depth) return NO_CONTEXT; *context = contexts[depth - 1]; return DONE; }
Result cuCtxDetach(void *context) { return DONE; }
Result cuCtxDestroy_v2(void *context) { return DONE; }
Result cuCtxGetDevice(int *device) { READY; *device = 0; return DONE; }
Result cuCtxSynchronize(void) { READY; return DONE; }

Result cuMemAlloc_v2(Address *at, size_t bytes) {
  READY;
  *at = (Address)(uintptr_t)calloc(1, bytes ? bytes : 1);
  counts[DEVICE_BUFFERS]++;
  return *at ? DONE : NO_MEMORY;
}
Result cuMemFree_v2(Address at) { READY; free((void *)(uintptr_t)at); counts[DEVICE_BUFFERS]--; return DONE; }
Result cuMemHostAlloc(void **at, size_t bytes, unsigned flags) {
  READY;
  counts[PINNED_BUFFERS]++;
  return posix_memalign(at, 4096, bytes ? bytes : 1) ? NO_MEMORY : DONE;
}
Result cuMemFreeHost(void *at) { READY; free(at); counts[PINNED_BUFFERS]--; return DONE; }
Result cuMemHostGetDevicePointer_v2(Address *device, void *host, unsigned flags) { READY; *device = (Address)(uintptr_t)host; return DONE; }
Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *stream) {
  READY; memcpy((void *)(uintptr_t)to, from, bytes); counts[UPLOADS]++; return DONE;
}
Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *stream) {
  READY; memcpy(to, (void *)(uintptr_t)from, bytes); counts[DOWNLOADS]++; return DONE;
}
Result cuStreamCreate(void **stream, unsigned flags) { READY; *stream = malloc(1); return DONE; }
Result cuStreamDestroy_v2(void *stream) { READY; free(stream); return DONE; }
Result cuStreamSynchronize(void *stream) { READY; counts[WAITS]++; return DONE; }
Result cuEventCreate(void **event, unsigned flags) { READY; *event = malloc(1); return DONE; }
Result cuEventDestroy_v2(void *event) { READY; free(event); return DONE; }
Result cuEventRecord(void *event, void *stream) { READY; return DONE; }
Result cuEventSynchronize(void *event) { READY; return DONE; }
Result cuEventElapsedTime_v2(float *ms, void *from, void *to) { READY; *ms = 0; return DONE; }
Result cuEventElapsedTime(float *ms, void *from, void *to) { READY; *ms = 0; return DONE; }

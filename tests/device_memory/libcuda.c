/* A stand-in for libcuda.so.1: two devices in host memory, and as much of the driver's interface as is used, with its
 * types and its order of arguments, so that the package cuda-bindings and what calls it can run without a GPU.
 * Memory is a memfd with one page more than its size, in which the number of its device is written. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { DEVICES = 2, GRANULARITY = 1 << 16, PAGE = 4096, MAPS = 64, DESCRIPTOR = 1, PINNED = 1, READ_WRITE = 3 };

struct Location { int type, id; };
struct Properties { int type, handle_types; struct Location location; void *windows; unsigned char flags[8]; };
struct Access { struct Location location; int flags; };
static struct { uintptr_t address; size_t nbytes; int has_access; } maps[MAPS];
static __thread uintptr_t contexts[8];
static __thread int depth;
static int initialized;

Result cuInit(unsigned flags) { initialized = 1; return flags ? INVALID_VALUE : SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = DEVICES; return initialized ? SUCCESS : 3; }
Result cuDeviceGet(int *device, int number) {
    *device = number;
    return number >= 0 && number < DEVICES ? SUCCESS : 101;
}
Result cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0xA0 + device, 16); return SUCCESS; }
Result cuDeviceCanAccessPeer(int *can, int device, int peer) { *can = device == 0 && peer == 1; return SUCCESS; }
Result cuDevicePrimaryCtxRetain(uintptr_t *context, int device) { *context = 1000 + device; return SUCCESS; }
Result cuCtxPushCurrent_v2(uintptr_t context) {
    if (depth == 8) return INVALID_VALUE;
    contexts[depth++] = context;
    return SUCCESS;
}
Result cuCtxPopCurrent_v2(uintptr_t *context) {
    if (!depth) return INVALID_CONTEXT;
    *context = contexts[--depth];
    return SUCCESS;
}

static int is_right(const struct Properties *p) {
    return p->type == PINNED && p->handle_types == DESCRIPTOR && p->location.type == 1 && p->location.id < DEVICES;
}
Result cuMemGetAllocationGranularity(size_t *bytes, const struct Properties *p, int option) {
    *bytes = option == 1 ? GRANULARITY : 1;
    return is_right(p) ? SUCCESS : INVALID_VALUE;
}
Result cuMemCreate(uint64_t *handle, size_t nbytes, const struct Properties *p, uint64_t flags) {
    if (!is_right(p) || flags || !nbytes || nbytes % GRANULARITY) return INVALID_VALUE;
    int fd = memfd_create("libcuda", MFD_CLOEXEC);
    if (ftruncate(fd, nbytes + PAGE) || pwrite(fd, &p->location.id, 4, nbytes) != 4) return 2;
    *handle = fd;
    return SUCCESS;
}
Result cuMemExportToShareableHandle(int *fd, uint64_t handle, int type, uint64_t flags) {
    if (type != DESCRIPTOR || flags) return INVALID_VALUE;
    *fd = dup(handle);
    return *fd < 0 ? INVALID_VALUE : SUCCESS;
}
Result cuMemImportFromShareableHandle(uint64_t *handle, void *fd, int type) {
    char path[32], name[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(intptr_t)fd);
    if (type != DESCRIPTOR || readlink(path, name, sizeof name - 1) < 0 || !strstr(name, "memfd:libcuda"))
        return INVALID_VALUE;
    *handle = dup((int)(intptr_t)fd);
    return SUCCESS;
}
static size_t size_of(uint64_t handle) {
    struct stat s;
    return fstat(handle, &s) ? 0 : s.st_size - PAGE;
}
Result cuMemGetAllocationPropertiesFromHandle(struct Properties *p, uint64_t handle) {
    size_t nbytes = size_of(handle);
    if (!nbytes) return INVALID_VALUE;
    memset(p, 0, sizeof *p);
    p->type = PINNED, p->handle_types = DESCRIPTOR, p->location.type = 1;
    return pread(handle, &p->location.id, 4, nbytes) == 4 ? SUCCESS : INVALID_VALUE;
}
Result cuMemRelease(uint64_t handle) { return close(handle) ? INVALID_VALUE : SUCCESS; }

Result cuMemAddressReserve(uintptr_t *address, size_t nbytes, size_t alignment, uintptr_t wish, uint64_t flags) {
    if (alignment || wish || flags) return INVALID_VALUE;
    *address = (uintptr_t)mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return SUCCESS;
}
Result cuMemAddressFree(uintptr_t address, size_t nbytes) { return munmap((void *)address, nbytes) ? 1 : SUCCESS; }
static int place_of(uintptr_t address) {
    int place = 0;
    while (place < MAPS && maps[place].address != address) place++;
    return place;
}
Result cuMemMap(uintptr_t address, size_t nbytes, size_t offset, uint64_t handle, uint64_t flags) {
    int place = place_of(0);
    if (offset || flags || nbytes > size_of(handle) || place == MAPS) return INVALID_VALUE;
    if (mmap((void *)address, nbytes, PROT_NONE, MAP_SHARED | MAP_FIXED, handle, 0) == MAP_FAILED) return INVALID_VALUE;
    maps[place].address = address, maps[place].nbytes = nbytes;
    return SUCCESS;
}
Result cuMemSetAccess(uintptr_t address, size_t nbytes, const struct Access *access, size_t count) {
    if (place_of(address) == MAPS || count != 1 || access->flags != READ_WRITE || access->location.type != 1)
        return INVALID_VALUE;
    return mprotect((void *)address, nbytes, PROT_READ | PROT_WRITE) ? INVALID_VALUE : SUCCESS;
}
Result cuMemUnmap(uintptr_t address, size_t nbytes) {
    int place = place_of(address);
    if (place == MAPS || maps[place].nbytes != nbytes) return INVALID_VALUE;
    maps[place].address = 0;
    return SUCCESS;
}
Result cuMemGetAddressRange_v2(uintptr_t *base, size_t *nbytes, uintptr_t address) {
    int place = place_of(address);
    if (place == MAPS) return NOT_FOUND;
    *base = address, *nbytes = maps[place].nbytes;
    return SUCCESS;
}
Result cuMemcpyAsync(uintptr_t target, uintptr_t source, size_t nbytes, uintptr_t stream) {
    if (!depth || contexts[depth - 1] < 1000) return INVALID_CONTEXT;
    memmove((void *)target, (void *)source, nbytes);
    return stream ? INVALID_VALUE : SUCCESS;
}

/* The package asks for every function of the driver by this one. */
Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    static const char *const suffixes[] = {"", "_v2"};
    (void)version, (void)flags;
    *function = NULL;
    for (int i = 0; i < 2 && !*function; i++) {
        char symbol[128];
        snprintf(symbol, sizeof symbol, "%s%s", name, suffixes[i]);
        *function = dlsym(RTLD_DEFAULT, symbol);
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

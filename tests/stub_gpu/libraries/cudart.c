/* libcudart without a GPU: devices, memory and copies are real, and kernels are launched into
 * nothing. Device memory is memory of this process that is mapped but not reserved. What is not
 * here answers "success" (build.py). Layouts follow CUDA 13's driver_types.h. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include "device.h"

#define API __attribute__((visibility("default")))
enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, DRIVER_TOO_OLD = 35, NO_DEVICE = 100,
    INVALID_DEVICE = 101, NO_KERNEL = 209, NOT_FOUND = 500, UNKNOWN = 999
};
enum { RUNTIME = 13000, REAL_COPY = 1 << 16, PAGE = 4096, SEGMENT = 2 << 20 };

static __thread int last_error, current;
static int fail(int error) { last_error = error; return error; }

/* ---- devices ---- */

static Device shown[MOST];
static int shown_count = -1;
static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;

static int driver_version(void) {
    const char *text = getenv("STUB_GPU_DRIVER");
    return text ? atoi(text) : RUNTIME;
}

/* The visible devices, looked up once, as CUDA does. */
static int devices(void) {
    pthread_mutex_lock(&once);
    if (shown_count < 0) shown_count = visible(shown);
    pthread_mutex_unlock(&once);
    return shown_count;
}

API int cudaDriverGetVersion(int *version) { *version = driver_version(); return SUCCESS; }
API int cudaRuntimeGetVersion(int *version) { *version = RUNTIME; return SUCCESS; }

API int cudaGetDeviceCount(int *count) {
    *count = 0;
    if (driver_version() / 1000 < RUNTIME / 1000) return fail(DRIVER_TOO_OLD);
    *count = devices();
    return *count ? SUCCESS : fail(NO_DEVICE);
}

/* The device to work on, entered; NULL (and the error) where it cannot be worked on. */
static Device *here(void) {
    if (current >= devices()) { fail(INVALID_DEVICE); return NULL; }
    if (lost(shown[current])) { fail(UNKNOWN); return NULL; }
    if (!enter(shown[current])) { fail(OUT_OF_MEMORY); return NULL; }
    return &shown[current];
}

API int cudaGetDevice(int *device) { *device = current; return SUCCESS; }

API int cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return fail(INVALID_DEVICE);
    current = device;
    return here() ? SUCCESS : last_error;
}

/* struct cudaDeviceProp, 1008 bytes: the fields that are filled in, at their places. */
typedef struct {
    char name[256]; unsigned char uuid[16]; char luid[8]; unsigned luid_mask;
    size_t total, shared_per_block; int registers_per_block, warp; size_t pitch;
    int threads_per_block, block[3], grid[3]; size_t constants; int major, minor;
    size_t alignment, pitch_alignment; int processors, integrated;
    char textures[176]; int bus, slot, domain, tcc, copy_engines, unified, bus_width, l2, l2_kept;
    int threads_per_processor, priorities, l1_global, l1_local; size_t shared_per_processor;
    int registers_per_processor, managed; char flags[28]; int cooperative; size_t shared_optin;
    int pages[2], blocks_per_processor, window; size_t shared_reserved; char rest[304];
} Properties;
_Static_assert(sizeof(Properties) == 1008, "cudaDeviceProp of CUDA 13");
_Static_assert(__builtin_offsetof(Properties, processors) == 384, "multiProcessorCount");
_Static_assert(__builtin_offsetof(Properties, bus) == 568, "pciBusID");
_Static_assert(__builtin_offsetof(Properties, shared_optin) == 672, "sharedMemPerBlockOptin");

/* Shared memory of a block that asks for more than 48 KiB, by capability (CUDA programming guide). */
static size_t shared_optin(int capability) {
    if (capability < 75) return 96 << 10;
    if (capability < 80) return 64 << 10;
    if (capability == 80 || capability == 87) return 163 << 10;
    if (capability == 86 || capability == 89 || capability >= 120) return 99 << 10;
    return 227 << 10;
}

API int cudaGetDeviceProperties(Properties *p, int device) {
    if (device < 0 || device >= devices()) return fail(INVALID_DEVICE);
    Device of = shown[device], chip = {of.gpu, -1};
    const char *name = device_setting(of, "NAME");
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", name ? name : "Stub GPU");
    uuid_bytes(of, p->uuid);
    capability_of(of, &p->major, &p->minor);
    p->total = (size_t)(device_total(of) - device_number(of, "RESERVED", 0));
    p->processors = (int)device_number(chip, "PROCESSORS", 132);
    p->bus = 1 + of.gpu;
    p->warp = 32, p->threads_per_block = 1024, p->threads_per_processor = p->major == 7 ? 1024 : 2048;
    p->block[0] = p->block[1] = 1024, p->block[2] = 64;
    p->grid[0] = 2147483647, p->grid[1] = p->grid[2] = 65535;
    p->shared_per_block = 48 << 10, p->shared_optin = shared_optin(p->major * 10 + p->minor);
    p->shared_per_processor = p->shared_optin + 1024, p->shared_reserved = 1024;
    p->registers_per_block = p->registers_per_processor = 65536, p->blocks_per_processor = 32;
    p->constants = 65536, p->pitch = 2147483647, p->alignment = 512, p->l2 = 50 << 20;
    p->unified = p->managed = p->cooperative = 1, p->copy_engines = 3, p->bus_width = 5120;
    return SUCCESS;
}

API int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    Properties p;
    int error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
        case 1: *value = p.threads_per_block; break;
        case 8: *value = (int)p.shared_per_block; break;
        case 10: *value = p.warp; break;
        case 12: *value = p.registers_per_block; break;
        case 16: *value = p.processors; break;
        case 39: *value = p.threads_per_processor; break;
        case 75: *value = p.major; break;
        case 76: *value = p.minor; break;
        case 81: *value = (int)p.shared_per_processor; break;
        case 97: *value = (int)p.shared_optin; break;
        case 106: *value = p.blocks_per_processor; break;
        default: *value = 1;
    }
    return SUCCESS;
}

API int cudaDeviceGetPCIBusId(char *text, int size, int device) {
    if (device < 0 || device >= devices()) return fail(INVALID_DEVICE);
    snprintf(text, (size_t)size, "0000:%02X:00.0", 1 + shown[device].gpu);
    return SUCCESS;
}
API int cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0, *high = -5; return SUCCESS; }
API int cudaDeviceCanAccessPeer(int *can, int device, int peer) { (void)device, (void)peer; *can = 0; return SUCCESS; }
API int cudaDeviceSynchronize(void) { return here() ? SUCCESS : last_error; }
API int cudaStreamSynchronize(void *stream) { (void)stream; return here() ? SUCCESS : last_error; }

/* ---- memory ---- */

typedef struct { char *start; size_t size; int device; } Block;
static Block *blocks;
static size_t block_count, block_room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Index of the first block that starts above an address; the lock is held. */
static size_t above(const char *address) {
    size_t low = 0, high = block_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].start <= address) low = middle + 1; else high = middle;
    }
    return low;
}

/* Device whose memory an address is in; -1 for the host's. */
static int owner(const void *address) {
    pthread_mutex_lock(&lock);
    size_t next = above(address);
    int device = -1;
    if (next && (const char *)address < blocks[next - 1].start + blocks[next - 1].size)
        device = blocks[next - 1].device;
    pthread_mutex_unlock(&lock);
    return device;
}

static size_t rounded(size_t size, size_t to) { return (size + to - 1) / to * to; }

API int cudaMalloc(void **out, size_t size) {
    Device *device = here();
    *out = NULL;
    if (!device) return last_error;
    if (!size) return SUCCESS;
    if (!take(*device, (long long)rounded(size, SEGMENT))) return fail(OUT_OF_MEMORY);
    char *start = mmap(NULL, rounded(size, PAGE), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) { take(*device, -(long long)rounded(size, SEGMENT)); return fail(OUT_OF_MEMORY); }
    pthread_mutex_lock(&lock);
    if (block_count == block_room)
        blocks = realloc(blocks, (block_room = block_room * 2 + 64) * sizeof *blocks);
    size_t at = above(start);
    memmove(blocks + at + 1, blocks + at, (block_count++ - at) * sizeof *blocks);
    blocks[at] = (Block){start, size, current};
    pthread_mutex_unlock(&lock);
    *out = start;
    return SUCCESS;
}

API int cudaFree(void *address) {
    if (!address) return SUCCESS;
    pthread_mutex_lock(&lock);
    size_t at = above(address);
    int known = at && blocks[at - 1].start == (char *)address;
    Block block = known ? blocks[at - 1] : (Block){0};
    if (known) memmove(blocks + at - 1, blocks + at, (block_count-- - at) * sizeof *blocks);
    pthread_mutex_unlock(&lock);
    if (!known) return fail(INVALID_VALUE);
    munmap(block.start, rounded(block.size, PAGE));
    take(shown[block.device], -(long long)rounded(block.size, SEGMENT));
    return SUCCESS;
}

API int cudaMemGetInfo(size_t *left, size_t *total) {
    Device *device = here();
    if (!device) return last_error;
    *left = (size_t)device_free(*device);
    *total = (size_t)(device_total(*device) - device_number(*device, "RESERVED", 0));
    return SUCCESS;
}

API int cudaHostAlloc(void **out, size_t size, unsigned flags) {
    (void)flags;
    *out = aligned_alloc(PAGE, rounded(size, PAGE));
    return *out ? SUCCESS : fail(OUT_OF_MEMORY);
}
API int cudaFreeHost(void *address) { free(address); return SUCCESS; }

/* Large copies within a device are left out: they would fill memory that nobody reads. What is
 * read is copied by computing.py. */
static int copy(void *to, const void *from, size_t size) {
    if (!here()) return last_error;
    if (size <= REAL_COPY || owner(to) < 0 || owner(from) < 0) memcpy(to, from, size);
    return SUCCESS;
}
API int cudaMemcpy(void *to, const void *from, size_t size, int kind) { (void)kind; return copy(to, from, size); }
API int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    (void)kind, (void)stream;
    return copy(to, from, size);
}
API int cudaMemcpyPeerAsync(void *to, int device, const void *from, int peer, size_t size, void *stream) {
    (void)device, (void)peer, (void)stream;
    return copy(to, from, size);
}
API int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t rows, int kind, void *stream) {
    (void)kind, (void)stream;
    for (size_t row = 0; row < rows; row++)
        if (copy(to + row * to_pitch, from + row * from_pitch, width)) return last_error;
    return SUCCESS;
}

/* Pages that are to be zero are given back, so that they take no memory. */
API int cudaMemset(void *address, int value, size_t size) {
    char *start = address, *first = (char *)rounded((size_t)start, PAGE);
    char *last = (char *)((size_t)(start + size) / PAGE * PAGE);
    if (!here()) return last_error;
    if (value || last <= first) {
        if (!value || size <= REAL_COPY) memset(start, value, size);
        return SUCCESS;
    }
    memset(start, 0, (size_t)(first - start));
    madvise(first, (size_t)(last - first), MADV_DONTNEED);
    memset(last, 0, (size_t)(start + size - last));
    return SUCCESS;
}
API int cudaMemsetAsync(void *address, int value, size_t size, void *stream) { (void)stream; return cudaMemset(address, value, size); }

typedef struct { int type, device; void *here, *host; long rest[8]; } Pointer;
API int cudaPointerGetAttributes(Pointer *out, const void *address) {
    int device = owner(address);
    memset(out, 0, sizeof *out);
    out->type = device < 0 ? 0 : 2; /* unregistered, device */
    out->device = device < 0 ? 0 : device;
    out->here = (void *)address;
    return SUCCESS;
}

/* ---- streams, events, kernels: a handle each, and nothing behind it ---- */

static long handles = 0x1000;
static int new_handle(void **out) { *out = (void *)__sync_add_and_fetch(&handles, 16); return here() ? SUCCESS : last_error; }
API int cudaStreamCreate(void **stream) { return new_handle(stream); }
API int cudaStreamCreateWithFlags(void **stream, unsigned flags) { (void)flags; return new_handle(stream); }
API int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { (void)flags, (void)priority; return new_handle(stream); }
API int cudaStreamGetPriority(void *stream, int *priority) { (void)stream; *priority = 0; return SUCCESS; }
API int cudaStreamIsCapturing(void *stream, int *capturing) { (void)stream; *capturing = 0; return SUCCESS; }
API int cudaStreamGetCaptureInfo(void *stream, int *capturing, unsigned long long *id, void *graph, void *dependencies, void *edges, size_t *count) {
    (void)stream, (void)graph, (void)dependencies, (void)edges, (void)count;
    *capturing = 0;
    if (id) *id = 0;
    return SUCCESS;
}
API int cudaThreadExchangeStreamCaptureMode(int *mode) { *mode = 0; return SUCCESS; }
API int cudaEventCreate(void **event) { return new_handle(event); }
API int cudaEventCreateWithFlags(void **event, unsigned flags) { (void)flags; return new_handle(event); }
API int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { (void)start, (void)end; *milliseconds = 0.001f; return SUCCESS; }

typedef struct { unsigned x, y, z; } Dim;
static __thread struct { Dim grid, block; size_t shared; void *stream; } calls[32];
static __thread int call_count;
API unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void *stream) {
    calls[call_count].grid = grid, calls[call_count].block = block;
    calls[call_count].shared = shared, calls[call_count++].stream = stream;
    return SUCCESS;
}
API int __cudaPopCallConfiguration(Dim *grid, Dim *block, size_t *shared, void **stream) {
    call_count--;
    *grid = calls[call_count].grid, *block = calls[call_count].block;
    *shared = calls[call_count].shared, *stream = calls[call_count].stream;
    return SUCCESS;
}
static int launch(void) {
    Device *device = here();
    if (!device) return last_error;
    return device_number(*device, "NO_KERNELS", 0) ? fail(NO_KERNEL) : SUCCESS;
}
API int cudaLaunchKernel(const void *function, Dim grid, Dim block, void **arguments, size_t shared, void *stream) {
    (void)function, (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
    return launch();
}
API int __cudaLaunchKernel(void *kernel, Dim grid, Dim block, void **arguments, size_t shared, void *stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
API int cudaLaunchKernelExC(const void *config, const void *function, void **arguments) { (void)config, (void)function, (void)arguments; return launch(); }
API int cudaLaunchCooperativeKernel(const void *function, Dim grid, Dim block, void **arguments, size_t shared, void *stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}
typedef struct { size_t sizes[3]; int threads, registers, ptx, binary, cache, dynamic, rest[24]; } Function;
_Static_assert(sizeof(Function) == 144, "cudaFuncAttributes of CUDA 13");
API int cudaFuncGetAttributes(Function *out, const void *function) {
    int major, minor;
    Device *device = here();
    (void)function;
    if (!device) return last_error;
    if (device_number(*device, "NO_KERNELS", 0)) return fail(NO_KERNEL);
    capability_of(*device, &major, &minor);
    memset(out, 0, sizeof *out);
    out->threads = 1024, out->registers = 32, out->dynamic = 48 << 10;
    out->ptx = out->binary = major * 10 + minor;
    return SUCCESS;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function, int block, size_t shared) { (void)function, (void)block, (void)shared; *count = 2; return SUCCESS; }
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int block, size_t shared, unsigned flags) { (void)function, (void)block, (void)shared, (void)flags; *count = 2; return SUCCESS; }

/* ---- errors, and what registers itself when a library is loaded ---- */

static const struct { int code; const char *name, *text; } errors[] = {
    {SUCCESS, "cudaSuccess", "no error"},
    {INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument"},
    {OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {DRIVER_TOO_OLD, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
    {NO_DEVICE, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {NO_KERNEL, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {UNKNOWN, "cudaErrorUnknown", "unknown error"},
};
#define ERRORS (sizeof errors / sizeof *errors)
API const char *cudaGetErrorString(int code) {
    for (size_t i = 0; i < ERRORS; i++) if (errors[i].code == code) return errors[i].text;
    return "unrecognized error code";
}
API const char *cudaGetErrorName(int code) {
    for (size_t i = 0; i < ERRORS; i++) if (errors[i].code == code) return errors[i].name;
    return "unrecognized error code";
}
API int cudaGetLastError(void) { int error = last_error; last_error = SUCCESS; return error; }
API int cudaPeekAtLastError(void) { return last_error; }

static void *binaries[16];
API void **__cudaRegisterFatBinary(void *binary) { (void)binary; return binaries; }
API char __cudaInitModule(void **binary) { (void)binary; return 1; }
API int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return SUCCESS; }
API int cudaGetSymbolAddress(void **out, const void *symbol) { *out = (void *)symbol; return SUCCESS; }

static long answer_success(void) { return 0; }
API int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *out = driver ? dlsym(driver, name) : NULL;
    if (!*out) *out = (void *)answer_success;
    if (status) *status = 0;
    return SUCCESS;
}

/* libnccl for processes of one machine: the sums are real, through a file that all map, because
 * who adds up how many samples a step has decides what the step does. Each process takes what a
 * communicator takes on hardware (NVML_STUB_<d>_NCCL bytes; github.com/NVIDIA/nccl/issues/964). */
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <sys/stat.h>
#include "device.h"

#define API __attribute__((visibility("default")))
enum { SUCCESS = 0, UNHANDLED = 1, SYSTEM = 2, INVALID = 4, REMOTE = 6, RANKS = 8, CHUNK = 1 << 18 };
enum { SUM = 0, PRODUCT, MAXIMUM, MINIMUM, AVERAGE };
enum { INT8 = 0, UINT8, INT32, UINT32, INT64, UINT64, HALF, FLOAT, DOUBLE, BFLOAT16 };

typedef struct {
    int arrived, generation, pids[RANKS];
    char chunks[RANKS][CHUNK];
} Room;
typedef struct { int rank, size, aborted; Device device; long long bytes; Room *room; char path[4096]; } Communicator;
typedef struct { char bytes[128]; } Id;

extern int cudaGetDevice(int *device);

API int ncclGetVersion(int *version) { *version = 22907; return SUCCESS; }
API const char *ncclGetErrorString(int code) { return code == REMOTE ? "a process of the group is gone" : code ? "an error of the stub" : "no error"; }
API const char *ncclGetLastError(void *communicator) { (void)communicator; return ""; }
API int ncclGetUniqueId(Id *id) {
    int random = open("/dev/urandom", O_RDONLY);
    memset(id, 0, sizeof *id);
    for (int i = 0; i < 16; i++) {
        unsigned char byte = 0;
        if (read(random, &byte, 1) != 1) byte = (unsigned char)(getpid() + i);
        sprintf(id->bytes + 2 * i, "%02x", byte);
    }
    close(random);
    return SUCCESS;
}

/* Wait until all have come; an error where one of them is gone. */
static int meet(Communicator *c) {
    Room *room = c->room;
    int generation = __atomic_load_n(&room->generation, __ATOMIC_SEQ_CST);
    if (__sync_add_and_fetch(&room->arrived, 1) == c->size) {
        room->arrived = 0;
        __sync_add_and_fetch(&room->generation, 1);
        return SUCCESS;
    }
    for (long spins = 0; __atomic_load_n(&room->generation, __ATOMIC_SEQ_CST) == generation; spins++) {
        if (c->aborted) return SYSTEM;
        if (spins < 1000) { sched_yield(); continue; }
        usleep(200);
        if (spins % 500 == 0)
            for (int r = 0; r < c->size; r++)
                if (room->pids[r] && !alive(room->pids[r])) return REMOTE;
    }
    return SUCCESS;
}

static int join(Communicator **out, int size, Id id, int rank) {
    const char *folder = getenv("STUB_GPU_STATE");
    int shown, index = 0;
    Device devices[MOST];
    if (size > RANKS) return INVALID;
    Communicator *c = calloc(1, sizeof *c);
    c->rank = rank, c->size = size;
    cudaGetDevice(&index);
    shown = visible(devices);
    c->device = devices[index < shown ? index : 0];
    c->bytes = size > 1 ? device_number(c->device, "NCCL", (long long)(size > 2 ? 688 : 544) * MIB) : 0;
    if (!take(c->device, c->bytes)) { free(c); return UNHANDLED; }
    snprintf(c->path, sizeof c->path, "%s/nccl-%.32s", folder ? folder : "/dev/shm", id.bytes);
    int file = open(c->path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(Room))) { free(c); return SYSTEM; }
    c->room = mmap(NULL, sizeof(Room), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    c->room->pids[rank] = getpid();
    *out = c;
    int error = meet(c);
    if (rank == 0) unlink(c->path);
    return error;
}
API int ncclCommInitRank(Communicator **out, int size, Id id, int rank) { return join(out, size, id, rank); }
API int ncclCommInitRankConfig(Communicator **out, int size, Id id, int rank, void *config) { (void)config; return join(out, size, id, rank); }
API int ncclCommInitRankScalable(Communicator **out, int size, int rank, int count, Id *ids, void *config) { (void)count, (void)config; return join(out, size, ids[0], rank); }
API int ncclCommDestroy(Communicator *c) { take(c->device, -c->bytes); munmap(c->room, sizeof(Room)); free(c); return SUCCESS; }
API int ncclCommFinalize(Communicator *c) { (void)c; return SUCCESS; }
API int ncclCommAbort(Communicator *c) { c->aborted = 1; return SUCCESS; }
API int ncclCommCount(Communicator *c, int *out) { *out = c->size; return SUCCESS; }
API int ncclCommUserRank(Communicator *c, int *out) { *out = c->rank; return SUCCESS; }
API int ncclCommGetAsyncError(Communicator *c, int *out) { *out = c->aborted ? SYSTEM : SUCCESS; return SUCCESS; }

static size_t width(int type) {
    static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return widths[type];
}
static float from_bfloat16(uint16_t bits) { uint32_t wide = (uint32_t)bits << 16; float value; memcpy(&value, &wide, 4); return value; }
static uint16_t to_bfloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

#define REDUCE(type, load, store) do { \
    for (size_t i = 0; i < count; i++) { \
        type first = load(((stored *)c->room->chunks[0])[i]), value = first; \
        for (int r = 1; r < c->size; r++) { \
            type other = load(((stored *)c->room->chunks[r])[i]); \
            if (operation == SUM || operation >= AVERAGE) value += other; \
            else if (operation == PRODUCT) value *= other; \
            else if (operation == MAXIMUM) value = other > value ? other : value; \
            else value = other < value ? other : value; \
        } \
        if (operation == AVERAGE) value = (type)(value / (type)c->size); \
        ((stored *)out)[i] = store(value); \
    } } while (0)
#define SAME(x) (x)

static void reduce(Communicator *c, void *out, size_t count, int type, int operation) {
    switch (type) {
        case INT8: { typedef int8_t stored; REDUCE(int64_t, SAME, SAME); break; }
        case UINT8: { typedef uint8_t stored; REDUCE(uint64_t, SAME, SAME); break; }
        case INT32: { typedef int32_t stored; REDUCE(int64_t, SAME, SAME); break; }
        case UINT32: { typedef uint32_t stored; REDUCE(uint64_t, SAME, SAME); break; }
        case INT64: { typedef int64_t stored; REDUCE(int64_t, SAME, SAME); break; }
        case UINT64: { typedef uint64_t stored; REDUCE(uint64_t, SAME, SAME); break; }
        case HALF: { typedef _Float16 stored; REDUCE(float, SAME, SAME); break; }
        case FLOAT: { typedef float stored; REDUCE(float, SAME, SAME); break; }
        case DOUBLE: { typedef double stored; REDUCE(double, SAME, SAME); break; }
        case BFLOAT16: { typedef uint16_t stored; REDUCE(float, from_bfloat16, to_bfloat16); break; }
    }
}

API int ncclAllReduce(const void *in, void *out, size_t count, int type, int operation, Communicator *c, void *stream) {
    size_t each = CHUNK / width(type);
    (void)stream;
    for (size_t done = 0; done < count; done += each) {
        size_t now = count - done < each ? count - done : each;
        memcpy(c->room->chunks[c->rank], (const char *)in + done * width(type), now * width(type));
        int error = meet(c);
        if (error) return error;
        reduce(c, (char *)out + done * width(type), now, type, operation);
        if ((error = meet(c))) return error;
    }
    return SUCCESS;
}
API int ncclBroadcast(const void *in, void *out, size_t count, int type, int root, Communicator *c, void *stream) {
    size_t all = count * width(type);
    (void)stream;
    for (size_t done = 0; done < all; done += CHUNK) {
        size_t now = all - done < CHUNK ? all - done : CHUNK;
        if (c->rank == root) memcpy(c->room->chunks[root], (const char *)in + done, now);
        int error = meet(c);
        if (error) return error;
        memcpy((char *)out + done, c->room->chunks[root], now);
        if ((error = meet(c))) return error;
    }
    return SUCCESS;
}
API int ncclBcast(void *data, size_t count, int type, int root, Communicator *c, void *stream) { return ncclBroadcast(data, data, count, type, root, c, stream); }
API int ncclAllGather(const void *in, void *out, size_t count, int type, Communicator *c, void *stream) {
    size_t all = count * width(type);
    (void)stream;
    for (size_t done = 0; done < all; done += CHUNK) {
        size_t now = all - done < CHUNK ? all - done : CHUNK;
        memcpy(c->room->chunks[c->rank], (const char *)in + done, now);
        int error = meet(c);
        if (error) return error;
        for (int r = 0; r < c->size; r++)
            memcpy((char *)out + (size_t)r * all + done, c->room->chunks[r], now);
        if ((error = meet(c))) return error;
    }
    return SUCCESS;
}

/* A driver library without a GPU: the NVML calls that rankfit.client.nvml makes, answered from
 * environment variables, so that the genuine nvidia-ml-py runs against it.
 *
 * The devices are those of tests/stub_gpu/libraries/device.h, where their variables are told;
 * what processes take of them through the stub's CUDA is not free here. Here alone:
 *
 *   NVML_STUB_<d>_PIDS=11,12               further compute processes
 *   NVML_STUB_<g>_MIG=1, _SLICES=2         MIG mode (unset: not supported) and slots for slices;
 *                                          a slot without UUID is empty
 *   NVML_STUB_FAIL=function=code,…         error code of a function; function@d=code for a device
 *   NVML_STUB_LOG=file                     a line for each nvmlInit and nvmlShutdown
 *
 * Compiled with -DOLD_DRIVER it lacks the symbols that drivers before 510 lack. Structs and error
 * codes follow nvml.h. */
#include "device.h"

typedef int nvmlReturn_t;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory_v2;
typedef struct {
    unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance;
} Process;

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15, ARGUMENT_VERSION_MISMATCH = 25
};

static Device gpus[MOST], slices[MOST][MOST];
static int initialised = 0;

static const char *setting(const Device *device, const char *key) {
    return device_setting(*device, key);
}

static unsigned long long number(const Device *device, const char *key) {
    return (unsigned long long)device_number(*device, key, 0);
}

/* The code that NVML_STUB_FAIL asks for, or SUCCESS. */
static nvmlReturn_t failure(const char *function, const Device *device) {
    const char *text = getenv("NVML_STUB_FAIL");
    char buffer[1024], *entry, *rest;
    if (!text) return SUCCESS;
    snprintf(buffer, sizeof buffer, "%s", text);
    for (entry = strtok_r(buffer, ",", &rest); entry; entry = strtok_r(NULL, ",", &rest)) {
        char *code = strchr(entry, '='), *which = strchr(entry, '@');
        if (!code) continue;
        *code = 0;
        if (which) *which = 0;
        if (strcmp(entry, function)) continue;
        if (which && (!device || device->slice >= 0 || atoi(which + 1) != device->gpu)) continue;
        return atoi(code + 1);
    }
    return SUCCESS;
}

static void note(const char *what) {
    const char *path = getenv("NVML_STUB_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) { fprintf(file, "%s\n", what); fclose(file); }
}

#define ENTER(device) do { \
    nvmlReturn_t wanted = failure(__func__, device); \
    const Device *asked = device; \
    if (!initialised) return UNINITIALIZED; \
    if (wanted) return wanted; \
    if (asked && lost(*asked)) return GPU_IS_LOST; } while (0)

static nvmlReturn_t text_answer(const Device *device, const char *key, char *out, unsigned size) {
    const char *text = setting(device, key);
    if (!text) return NOT_SUPPORTED;
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t code) { (void)code; return "a message of the stub"; }

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    nvmlReturn_t wanted = failure(__func__, NULL);
    (void)flags;
    if (wanted) return wanted;
    for (int gpu = 0; gpu < MOST; gpu++) {
        gpus[gpu] = (Device){gpu, -1};
        for (int slice = 0; slice < MOST; slice++) slices[gpu][slice] = (Device){gpu, slice};
    }
    initialised = 1;
    note("init");
    return SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    ENTER(NULL);
    initialised = 0;
    note("shutdown");
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    const char *text = getenv("NVML_STUB_GPUS");
    ENTER(NULL);
    *count = text ? (unsigned)atoi(text) : 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    const char *text = getenv("NVML_STUB_GPUS");
    if (!text || index >= (unsigned)atoi(text)) return INVALID_ARGUMENT;
    ENTER(&gpus[index]);
    *device = &gpus[index];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    ENTER(NULL);
    for (int gpu = 0; gpu < MOST; gpu++)
        for (int slice = -1; slice < MOST; slice++) {
            Device *one = slice < 0 ? &gpus[gpu] : &slices[gpu][slice];
            const char *text = setting(one, "UUID");
            if (text && !strcmp(text, uuid)) { *device = one; return SUCCESS; }
        }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetName(Device *device, char *name, unsigned size) {
    ENTER(device);
    return text_answer(device, "NAME", name, size);
}

nvmlReturn_t nvmlDeviceGetUUID(Device *device, char *uuid, unsigned size) {
    ENTER(device);
    return text_answer(device, "UUID", uuid, size);
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    const char *text = setting(device, "CC");
    ENTER(device);
    return text && sscanf(text, "%d.%d", major, minor) == 2 ? SUCCESS : NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    ENTER(device);
    memory->total = number(device, "TOTAL");
    memory->free = (unsigned long long)device_free(*device);
    memory->used = memory->total - memory->free; /* v1 counts what is reserved as used */
    return SUCCESS;
}

#ifndef OLD_DRIVER
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(Device *device, Memory_v2 *memory) {
    ENTER(device);
    if (memory->version != (sizeof(Memory_v2) | 2u << 24)) return ARGUMENT_VERSION_MISMATCH;
    memory->total = number(device, "TOTAL");
    memory->free = (unsigned long long)device_free(*device);
    memory->reserved = number(device, "RESERVED");
    memory->used = memory->total - memory->free - memory->reserved;
    return SUCCESS;
}
#endif

static nvmlReturn_t processes(Device *device, unsigned *count, Process *out) {
    const char *text = setting(device, "PIDS");
    char buffer[512], *entry, *rest;
    unsigned found = 0, room = *count;
    snprintf(buffer, sizeof buffer, "%s", text ? text : "");
    for (entry = strtok_r(buffer, ",", &rest); entry; entry = strtok_r(NULL, ",", &rest), found++)
        if (out && found < room) out[found] = (Process){(unsigned)atoi(entry), 1 << 20, 0, 0};
    for (int i = 0; i < PROCESSES; i++) {
        const Taker *row = &takers()[i];
        long long bytes = row->bytes[device_place(*device)];
        if (bytes <= 0 || !alive(row->pid)) continue;
        if (out && found < room)
            out[found] = (Process){(unsigned)row->pid, (unsigned long long)bytes, 0, 0};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned *count, Process *out) {
    ENTER(device);
    return processes(device, count, out);
}

#ifndef OLD_DRIVER
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *out) {
    ENTER(device);
    return processes(device, count, out);
}
#endif

nvmlReturn_t nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    ENTER(device);
    if (!setting(device, "MIG")) return NOT_SUPPORTED;
    *current = *pending = (unsigned)number(device, "MIG");
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    ENTER(device);
    *count = (unsigned)number(device, "SLICES");
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(Device *gpu, unsigned index, Device **device) {
    ENTER(gpu);
    if (index >= MOST) return INVALID_ARGUMENT;
    if (!setting(&slices[gpu->gpu][index], "UUID")) return NOT_FOUND;
    *device = &slices[gpu->gpu][index];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *slice, Device **device) {
    ENTER(slice);
    if (slice->slice < 0) return INVALID_ARGUMENT;
    *device = &gpus[slice->gpu];
    return SUCCESS;
}

/* What torch asks for: its message about memory, and its search for links between GPUs. */
typedef struct { unsigned pid; unsigned long long used; } Process_v1;
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(Device *device, unsigned *count, Process_v1 *out) {
    Process found[64];
    unsigned room = *count < 64 ? *count : 64;
    ENTER(device);
    *count = room;
    nvmlReturn_t code = processes(device, count, found);
    for (unsigned i = 0; out && i < *count && i < room; i++)
        out[i] = (Process_v1){found[i].pid, found[i].used};
    return code;
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus, Device **device) {
    unsigned domain, number;
    ENTER(NULL);
    if (sscanf(bus, "%x:%x:", &domain, &number) != 2 || number - 1 >= (unsigned)gpu_count())
        return NOT_FOUND;
    *device = &gpus[number - 1];
    return SUCCESS;
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    const char *text = getenv("STUB_GPU_DRIVER");
    ENTER(NULL);
    *version = text ? atoi(text) : 13000;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(Device *device, unsigned link, int *type) {
    (void)device, (void)link, (void)type;
    return NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(Device *device, unsigned link, void *info) {
    (void)device, (void)link, (void)info;
    return NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(Device *device, void *info) {
    (void)device, (void)info; /* as it comes, of zeros: the state is 0, no fabric */
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetFieldValues(Device *device, int count, void *values) {
    (void)device, (void)count, (void)values;
    return NOT_SUPPORTED;
}

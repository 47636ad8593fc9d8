/* A driver library without a GPU: the NVML calls that rankfit.client.nvml makes, answered from
 * environment variables, so that the genuine nvidia-ml-py runs against it.
 *
 *   NVML_STUB_GPUS=2                       number of GPUs
 *   NVML_STUB_<d>_NAME, _UUID, _CC=7.5     d = 0, 1, … for GPUs; 0_MIG1 for slice 1 of GPU 0
 *   NVML_STUB_<d>_TOTAL, _FREE, _RESERVED  bytes
 *   NVML_STUB_<d>_PIDS=11,12               compute processes
 *   NVML_STUB_<g>_MIG=1, _SLICES=2         MIG mode (unset: not supported) and slots for slices;
 *                                          a slot without UUID is empty
 *   NVML_STUB_FAIL=function=code,…         error code of a function; function@d=code for a device
 *   NVML_STUB_LOG=file                     a line for each nvmlInit and nvmlShutdown
 *
 * Compiled with -DOLD_DRIVER it lacks the symbols that drivers before 510 lack. Structs and error
 * codes follow nvml.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef struct { int gpu, slice; } Device; /* slice -1: the whole GPU */
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory_v2;
typedef struct {
    unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance;
} Process;

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, ARGUMENT_VERSION_MISMATCH = 25
};
enum { MOST = 8 };

static Device gpus[MOST], slices[MOST][MOST];
static int initialised = 0;

static const char *setting(const Device *device, const char *key) {
    char name[128];
    if (device->slice < 0) snprintf(name, sizeof name, "NVML_STUB_%d_%s", device->gpu, key);
    else snprintf(name, sizeof name, "NVML_STUB_%d_MIG%d_%s", device->gpu, device->slice, key);
    return getenv(name);
}

static unsigned long long number(const Device *device, const char *key) {
    const char *text = setting(device, key);
    return text ? strtoull(text, NULL, 10) : 0;
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
    if (!initialised) return UNINITIALIZED; \
    if (wanted) return wanted; } while (0)

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
    memory->free = number(device, "FREE");
    memory->used = memory->total - memory->free; /* v1 counts what is reserved as used */
    return SUCCESS;
}

#ifndef OLD_DRIVER
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(Device *device, Memory_v2 *memory) {
    ENTER(device);
    if (memory->version != (sizeof(Memory_v2) | 2u << 24)) return ARGUMENT_VERSION_MISMATCH;
    memory->total = number(device, "TOTAL");
    memory->free = number(device, "FREE");
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

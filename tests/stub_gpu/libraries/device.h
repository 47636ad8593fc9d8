/* The devices of the stub: what the environment says of each, and what processes take of it.
 *
 *   NVML_STUB_GPUS=2                       number of GPUs
 *   NVML_STUB_<d>_NAME, _UUID, _CC=7.5     d = 0, 1, … for GPUs; 0_MIG1 for slice 1 of GPU 0
 *   NVML_STUB_<d>_TOTAL, _FREE, _RESERVED  bytes; FREE is what is free while no process is here
 *   NVML_STUB_<d>_CONTEXT                  bytes that a process takes by its CUDA context
 *   NVML_STUB_<g>_MIG=1                    the GPU is in MIG mode
 *   STUB_GPU_STATE=folder                  shared by all processes: who takes what. A file lost-0 in
 *                                          it makes GPU 0 fall off the bus. Unset: each process alone
 *
 * NVML (tests/client/nvml_stub), the CUDA runtime, the driver and NCCL read the same figures. */
#ifndef STUB_GPU_DEVICE_H
#define STUB_GPU_DEVICE_H
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 8, PROCESSES = 128, PLACES = MOST * (MOST + 1) };
enum { MIB = 1 << 20, CONTEXT_MIB = 470 };

typedef struct { int gpu, slice; } Device; /* slice -1: the whole GPU */
typedef struct { int pid; long long bytes[PLACES]; } Taker;

static inline const char *device_setting(Device device, const char *key) {
    char name[128];
    if (device.slice < 0) snprintf(name, sizeof name, "NVML_STUB_%d_%s", device.gpu, key);
    else snprintf(name, sizeof name, "NVML_STUB_%d_MIG%d_%s", device.gpu, device.slice, key);
    return getenv(name);
}

static inline long long device_number(Device device, const char *key, long long otherwise) {
    const char *text = device_setting(device, key);
    return text ? strtoll(text, NULL, 10) : otherwise;
}

static inline int gpu_count(void) {
    const char *text = getenv("NVML_STUB_GPUS");
    int count = text ? atoi(text) : 0;
    return count < MOST ? count : MOST;
}

static inline int device_place(Device device) {
    return device.gpu * (MOST + 1) + device.slice + 1;
}

/* The table of takers: a file that all processes map, or memory of this process alone. */
static inline Taker *takers(void) {
    static Taker *table;
    if (table) return table;
    const char *folder = getenv("STUB_GPU_STATE");
    int shared = -1;
    if (folder) {
        char path[4096];
        snprintf(path, sizeof path, "%s/takers", folder);
        shared = open(path, O_RDWR | O_CREAT, 0600);
        if (shared >= 0 && ftruncate(shared, PROCESSES * sizeof(Taker))) { close(shared); shared = -1; }
    }
    void *mapped = mmap(NULL, PROCESSES * sizeof(Taker), PROT_READ | PROT_WRITE,
                        shared >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, shared, 0);
    if (shared >= 0) close(shared);
    if (mapped == MAP_FAILED) abort();
    return table = mapped;
}

static inline int alive(int pid) {
    if (pid == 0 || (kill(pid, 0) && errno == ESRCH)) return 0;
    char path[64], state = 'R';
    snprintf(path, sizeof path, "/proc/%d/stat", pid); /* a zombie holds nothing */
    FILE *file = fopen(path, "r");
    if (file) { if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 'R'; fclose(file); }
    return state != 'Z';
}

/* This process's row; rows of processes that are gone are taken over. */
static inline Taker *own_row(void) {
    static Taker *row;
    int pid = getpid();
    if (row && row->pid == pid) return row;
    Taker *table = takers();
    for (int i = 0; i < PROCESSES; i++) if (table[i].pid == pid) return row = &table[i];
    for (int i = 0; i < PROCESSES; i++) {
        int before = table[i].pid;
        if (alive(before)) continue;
        if (!__sync_bool_compare_and_swap(&table[i].pid, before, pid)) continue;
        memset(table[i].bytes, 0, sizeof table[i].bytes);
        return row = &table[i];
    }
    abort();
}

/* Bytes that living processes have taken of a device; of a GPU, those of its slices with it. */
static inline long long taken(Device device) {
    long long sum = 0;
    Taker *table = takers();
    for (int i = 0; i < PROCESSES; i++) {
        if (!alive(table[i].pid)) continue;
        if (device.slice >= 0) sum += table[i].bytes[device_place(device)];
        else for (int s = -1; s < MOST; s++)
            sum += table[i].bytes[device_place((Device){device.gpu, s})];
    }
    return sum;
}

static inline long long device_total(Device device) { return device_number(device, "TOTAL", 0); }

static inline long long device_free(Device device) {
    long long usable = device_total(device) - device_number(device, "RESERVED", 0);
    long long left = device_number(device, "FREE", usable) - taken(device);
    return left > 0 ? left : 0;
}

/* Take bytes (or give back, below 0); 0 where there are not so many. */
static inline int take(Device device, long long bytes) {
    long long *own = &own_row()->bytes[device_place(device)];
    __sync_add_and_fetch(own, bytes);
    long long usable = device_total(device) - device_number(device, "RESERVED", 0);
    if (bytes <= 0 || taken(device) <= device_number(device, "FREE", usable)) return 1;
    __sync_add_and_fetch(own, -bytes);
    return 0;
}

static inline int has_context(Device device) {
    return own_row()->bytes[device_place(device)] > 0;
}

/* A process that uses a device for the first time takes its context; 0 where that does not fit. */
static inline int enter(Device device) {
    if (has_context(device)) return 1;
    long long bytes = device_number(device, "CONTEXT", (long long)CONTEXT_MIB * MIB);
    return take(device, bytes > 0 ? bytes : 1);
}

static inline int lost(Device device) {
    char path[4096];
    const char *folder = getenv("STUB_GPU_STATE");
    if (!folder) return 0;
    snprintf(path, sizeof path, "%s/lost-%d", folder, device.gpu);
    return !access(path, F_OK);
}

static inline void capability_of(Device device, int *major, int *minor) {
    const char *text = device_setting(device, "CC");
    if (!text && device.slice >= 0) text = device_setting((Device){device.gpu, -1}, "CC");
    *major = 9, *minor = 0;
    if (text) sscanf(text, "%d.%d", major, minor);
}

/* Before another: CUDA's default order is fastest first. */
static inline int faster(Device a, Device b) {
    int am, an, bm, bn;
    capability_of(a, &am, &an), capability_of(b, &bm, &bn);
    if (am * 10 + an != bm * 10 + bn) return am * 10 + an > bm * 10 + bn;
    return device_total(a) > device_total(b);
}

/* GPUs as CUDA numbers them, before CUDA_VISIBLE_DEVICES. */
static inline int ordered(Device *out) {
    int count = gpu_count();
    const char *order = getenv("CUDA_DEVICE_ORDER");
    for (int g = 0; g < count; g++) out[g] = (Device){g, -1};
    if (order && !strcmp(order, "PCI_BUS_ID")) return count;
    for (int i = 1; i < count; i++) /* insertion sort: equal ones keep their order */
        for (int j = i; j > 0 && faster(out[j], out[j - 1]); j--) {
            Device other = out[j]; out[j] = out[j - 1]; out[j - 1] = other;
        }
    return count;
}

/* In MIG mode CUDA shows the first slice that there is, and it alone. */
static inline int first_slice(Device gpu, Device *out) {
    for (int s = 0; s < MOST; s++) {
        Device slice = {gpu.gpu, s};
        if (device_setting(slice, "UUID")) { *out = slice; return 1; }
    }
    return 0;
}

/* The devices that CUDA shows, by CUDA_VISIBLE_DEVICES; returns how many. */
static inline int visible(Device *out) {
    Device all[MOST], chosen[MOST];
    int count = ordered(all), found = 0;
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) { memcpy(chosen, all, sizeof all); found = count; }
    char buffer[1024], *rest, *entry;
    snprintf(buffer, sizeof buffer, "%s", text ? text : "");
    for (entry = strtok_r(buffer, ",", &rest); entry; entry = strtok_r(NULL, ",", &rest)) {
        while (*entry == ' ') entry++;
        if (!strncmp(entry, "MIG-", 4)) {
            for (int g = 0; g < count; g++)
                for (int s = 0; s < MOST; s++) {
                    const char *uuid = device_setting((Device){g, s}, "UUID");
                    if (uuid && !strcmp(uuid, entry)) { out[0] = (Device){g, s}; return 1; }
                }
            return 0;
        }
        int match = -1;
        if (!strncmp(entry, "GPU-", 4)) {
            for (int g = 0; g < count; g++) {
                const char *uuid = device_setting(all[g], "UUID");
                if (uuid && !strncmp(uuid, entry, strlen(entry))) match = match < 0 ? g : count;
            }
        } else if (*entry >= '0' && *entry <= '9') match = atoi(entry);
        if (match < 0 || match >= count || found == MOST) break;
        for (int i = 0; i < found; i++) if (chosen[i].gpu == all[match].gpu) return 0;
        chosen[found++] = all[match];
    }
    for (int i = 0; i < found; i++)
        if (device_number(chosen[i], "MIG", 0) && first_slice(chosen[i], &out[0])) return 1;
    int shown = 0;
    for (int i = 0; i < found; i++)
        if (!device_number(chosen[i], "MIG", 0)) out[shown++] = chosen[i];
    return shown;
}

/* Sixteen bytes of GPU-xxxxxxxx-xxxx-…; a device without one has its number in the last. */
static inline void uuid_bytes(Device device, unsigned char *out) {
    const char *text = device_setting(device, "UUID");
    int digits = 0;
    memset(out, 0, 16);
    if (!text) { out[15] = (unsigned char)device_place(device); return; }
    for (text += strlen(text) > 4 ? 4 : 0; *text && digits < 32; text++) {
        unsigned value;
        if (sscanf((char[]){*text, 0}, "%x", &value) != 1) continue;
        out[digits / 2] |= (unsigned char)(digits % 2 ? value : value << 4);
        digits++;
    }
}
#endif

/* libcuda, the driver: contexts, and the virtual memory that expandable segments are made of. */
#define _GNU_SOURCE
#include "device.h"

#define API __attribute__((visibility("default")))
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, GRANULARITY = 2 << 20 };

static Device shown[MOST];
static Device device_of(int index) {
    int count = visible(shown);
    return shown[index >= 0 && index < count ? index : 0];
}

API int cuInit(unsigned flags) { (void)flags; return SUCCESS; }
API int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
API int cuDeviceGet(int *device, int index) { *device = index; return SUCCESS; }
API int cuCtxGetCurrent(void **context) { *context = (void *)0x1000; return SUCCESS; }
API int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
API int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)0x1000; return SUCCESS; }
API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0, *active = has_context(device_of(device));
    return SUCCESS;
}
API int cuGetErrorString(int code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code ? "unknown error" : "no error";
    return SUCCESS;
}
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int major, minor;
    capability_of(device_of(device), &major, &minor);
    /* Virtual memory is supported (102); multicast (132) and fabric handles (128) are not. */
    *value = attribute == 75 ? major : attribute == 76 ? minor : attribute != 132 && attribute != 128;
    return SUCCESS;
}

/* An allocation is a handle of so many bytes on a device; addresses are reserved apart from it. */
typedef struct { size_t size; int device, mapped; } Handle;
typedef struct { int type, handle_types; struct { int type, id; } location; void *security; unsigned char flags[8]; } Properties;

API int cuMemGetAllocationGranularity(size_t *out, const Properties *p, int option) {
    (void)p, (void)option;
    *out = GRANULARITY;
    return SUCCESS;
}
API int cuMemAddressReserve(void **out, size_t size, size_t alignment, void *wanted, unsigned long long flags) {
    (void)alignment, (void)flags;
    *out = mmap(wanted, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *out == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}
API int cuMemAddressFree(void *address, size_t size) { munmap(address, size); return SUCCESS; }
API int cuMemCreate(Handle **out, size_t size, const Properties *p, unsigned long long flags) {
    (void)flags;
    Device device = device_of(p->location.id);
    if (size % GRANULARITY) return INVALID_VALUE;
    if (!enter(device) || !take(device, (long long)size)) return OUT_OF_MEMORY;
    *out = malloc(sizeof **out);
    **out = (Handle){size, p->location.id, 0};
    return SUCCESS;
}
API int cuMemRelease(Handle *handle) {
    take(device_of(handle->device), -(long long)handle->size);
    free(handle);
    return SUCCESS;
}
API int cuMemMap(void *address, size_t size, size_t offset, Handle *handle, unsigned long long flags) {
    (void)offset, (void)handle, (void)flags;
    return mprotect(address, size, PROT_READ | PROT_WRITE) ? INVALID_VALUE : SUCCESS;
}
API int cuMemUnmap(void *address, size_t size) {
    void *again = mmap(address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return again == MAP_FAILED ? INVALID_VALUE : SUCCESS;
}
API int cuMemSetAccess(void *address, size_t size, const void *access, size_t count) {
    (void)address, (void)size, (void)access, (void)count;
    return SUCCESS;
}

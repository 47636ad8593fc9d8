/* libcudnn: whatever graph is described, one engine does it, with the workspace of
 * STUB_GPU_CUDNN_WORKSPACE bytes (0). Numbers of attributes follow cudnn_graph.h of cuDNN 9. */
#include <stdint.h>
#include <stdlib.h>
#define API __attribute__((visibility("default")))
enum { ENGINE_RESULTS = 202, CONFIG_WORKSPACE = 303, CONFIG_SHARED = 304, PLAN_WORKSPACE = 402, ENGINES = 802 };

static long handles = 0x7500;
static int new_handle(void **out) { *out = (void *)__sync_add_and_fetch(&handles, 64); return 0; }
static int64_t workspace(void) {
    const char *text = getenv("STUB_GPU_CUDNN_WORKSPACE");
    return text ? strtoll(text, NULL, 10) : 0;
}

API int cudnnCreate(void **out) { return new_handle(out); }
API unsigned long cudnnGetVersion(void) { return 92000; }
API unsigned long cudnnGetCudartVersion(void) { return 13000; }
API const char *cudnnGetErrorString(int code) { return code ? "an error of the stub" : "success"; }

API int cudnnBackendCreateDescriptor(int type, void **out) { (void)type; return new_handle(out); }
API int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t room, int64_t *count, void *out) {
    int64_t found = 0;
    (void)descriptor, (void)type;
    if (name == ENGINE_RESULTS) found = 1; /* the caller made the descriptor */
    if (name == ENGINES) { found = 1; if (out && room) *(int64_t *)out = 1; }
    if (name == PLAN_WORKSPACE || name == CONFIG_WORKSPACE) {
        found = 1;
        if (out && room) *(int64_t *)out = workspace();
    }
    if (name == CONFIG_SHARED) { found = 1; if (out && room) *(int32_t *)out = 0; }
    if (count) *count = found;
    return 0;
}

/* The older interface. */
#define CREATE(what) API int cudnnCreate##what##Descriptor(void **out) { return new_handle(out); }
CREATE(Activation) CREATE(CTCLoss) CREATE(Convolution) CREATE(Dropout) CREATE(Filter) CREATE(Pooling)
CREATE(RNN) CREATE(RNNData) CREATE(SpatialTransformer) CREATE(Tensor)
#define WORKSPACE(pass) \
    API int cudnnGetConvolution##pass##WorkspaceSize(void *h, void *a, void *b, void *c, void *d, int algorithm, size_t *out) { \
        (void)h, (void)a, (void)b, (void)c, (void)d, (void)algorithm; *out = (size_t)workspace(); return 0; }
WORKSPACE(Forward) WORKSPACE(BackwardData) WORKSPACE(BackwardFilter)
/* Algorithm, status, time, memory, determinism, mathematics, reserved words. */
typedef struct { int algorithm, status; float time; size_t memory; int fixed, math, reserved[3]; } Found;
#define ALGORITHM(pass) \
    API int cudnnGetConvolution##pass##Algorithm_v7(void *h, void *a, void *b, void *c, void *d, int wanted, int *count, Found *out) { \
        (void)h, (void)a, (void)b, (void)c, (void)d, (void)wanted; \
        *out = (Found){.algorithm = 1, .memory = (size_t)workspace(), .fixed = 1}; *count = 1; return 0; }
ALGORITHM(Forward) ALGORITHM(BackwardData) ALGORITHM(BackwardFilter)
static int none(size_t *out) { *out = 0; return 0; }
API int cudnnDropoutGetStatesSize(void *h, size_t *out) { (void)h; return none(out); }
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *h, int m, int o, void *x, void *z, void *y, void *p, void *a, size_t *out) {
    (void)h, (void)m, (void)o, (void)x, (void)z, (void)y, (void)p, (void)a;
    return none(out);
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *h, int m, int o, void *a, void *x, size_t *out) {
    (void)h, (void)m, (void)o, (void)a, (void)x;
    return none(out);
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *h, int m, int o, void *x, void *y, void *dy, void *dz, void *dx, void *p, void *a, size_t *out) {
    (void)h, (void)m, (void)o, (void)x, (void)y, (void)dy, (void)dz, (void)dx, (void)p, (void)a;
    return none(out);
}

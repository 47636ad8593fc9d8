/* libcublasLt: descriptors, and one algorithm that needs no workspace of its own. */
#include <string.h>
#define API __attribute__((visibility("default")))
static long handles = 0x800000;
static int new_handle(void **out) { *out = (void *)__sync_add_and_fetch(&handles, 64); return 0; }
API unsigned long cublasLtGetVersion(void) { return 130003; }
API int cublasLtCreate(void **out) { return new_handle(out); }
API int cublasLtMatmulDescCreate(void **out, int compute, int scale) { (void)compute, (void)scale; return new_handle(out); }
API int cublasLtMatrixLayoutCreate(void **out, int type, unsigned long rows, unsigned long columns, long leading) {
    (void)type, (void)rows, (void)columns, (void)leading;
    return new_handle(out);
}
API int cublasLtMatmulPreferenceCreate(void **out) { return new_handle(out); }
/* The result: an algorithm of 64 bytes, its workspace, its state, its waves, reserved words. */
typedef struct { char algorithm[64]; unsigned long workspace; int state; float waves; int reserved[4]; } Result;
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference, int wanted, Result *out, int *found) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)wanted;
    memset(out, 0, sizeof *out);
    *found = 1;
    return 0;
}

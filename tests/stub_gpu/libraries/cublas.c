/* libcublas: a handle of its own for every cublasCreate, since torch keeps a workspace for each. */
#define API __attribute__((visibility("default")))
static long handles = 0x700000;
API int cublasCreate_v2(void **out) { *out = (void *)__sync_add_and_fetch(&handles, 64); return 0; }
API int cublasGetMathMode(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }
API int cublasGetPointerMode_v2(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }
API int cublasGetVersion_v2(void *handle, int *version) { (void)handle; *version = 130003; return 0; }

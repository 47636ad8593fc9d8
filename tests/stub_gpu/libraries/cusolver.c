/* libcusolver: the sizes of work spaces, which torch allocates. They are those of LAPACK's plain
 * algorithms, not cuSOLVER's, which are not published. */
#include <stddef.h>
#include <stdint.h>
#define API __attribute__((visibility("default")))
enum { PANEL = 32 };
static int words(int *out, long long a, long long b) { *out = (int)((a > b ? a : b) * PANEL + 1); return 0; }
static int bytes(size_t *device, size_t *host, long long n) { *device = (size_t)n * PANEL * 8; *host = 0; return 0; }
#pragma GCC diagnostic ignored "-Wunused-parameter"

static long handles = 0x900000;
static int new_handle(void **out) { *out = (void *)__sync_add_and_fetch(&handles, 64); return 0; }
API int cusolverDnCreate(void **out) { return new_handle(out); }
API int cusolverDnCreateParams(void **out) { return new_handle(out); }
API int cusolverDnCreateGesvdjInfo(void **out) { return new_handle(out); }

/* The interface of one function for each number type T. */
#define TYPED(T, orgqr, ormqr, syevd, syevj) \
    API int cusolverDn##T##geqrf_bufferSize(void *h, int m, int n, void *a, int lda, int *out) { return words(out, m, n); } \
    API int cusolverDn##T##getrf_bufferSize(void *h, int m, int n, void *a, int lda, int *out) { return words(out, m, n); } \
    API int cusolverDn##T##potrf_bufferSize(void *h, int uplo, int n, void *a, int lda, int *out) { return words(out, n, n); } \
    API int cusolverDn##T##sytrf_bufferSize(void *h, int n, void *a, int lda, int *out) { return words(out, n, n); } \
    API int cusolverDn##T##gesvd_bufferSize(void *h, int m, int n, int *out) { return words(out, m, n); } \
    API int cusolverDn##T##orgqr##_bufferSize(void *h, int m, int n, int k, void *a, int lda, void *tau, int *out) { return words(out, m, n); } \
    API int cusolverDn##T##ormqr##_bufferSize(void *h, int side, int trans, int m, int n, int k, void *a, int lda, void *tau, void *c, int ldc, int *out) { return words(out, m, n); } \
    API int cusolverDn##T##syevd##_bufferSize(void *h, int jobz, int uplo, int n, void *a, int lda, void *w, int *out) { return words(out, n, n); } \
    API int cusolverDn##T##syevj##_bufferSize(void *h, int jobz, int uplo, int n, void *a, int lda, void *w, int *out, void *p, int batch) { return words(out, (long long)n * batch, n); } \
    API int cusolverDn##T##gesvdj_bufferSize(void *h, int jobz, int econ, int m, int n, void *a, int lda, void *s, void *u, int ldu, void *v, int ldv, int *out, void *p) { return words(out, m, n); } \
    API int cusolverDn##T##gesvdjBatched_bufferSize(void *h, int jobz, int m, int n, void *a, int lda, void *s, void *u, int ldu, void *v, int ldv, int *out, void *p, int batch) { return words(out, (long long)m * batch, n); } \
    API int cusolverDn##T##gesvdaStridedBatched_bufferSize(void *h, int jobz, int rank, int m, int n, void *a, int lda, long long sa, void *s, long long ss, void *u, int ldu, long long su, void *v, int ldv, long long sv, int *out, int batch) { return words(out, (long long)m * batch, n); }
TYPED(S, orgqr, ormqr, syevd, syevjBatched) TYPED(D, orgqr, ormqr, syevd, syevjBatched)
TYPED(C, ungqr, unmqr, heevd, heevjBatched) TYPED(Z, ungqr, unmqr, heevd, heevjBatched)

/* The interface that takes the number type as an argument. */
API int cusolverDnXgeqrf_bufferSize(void *h, void *p, int64_t m, int64_t n, int ta, void *a, int64_t lda, int tt, void *tau, int tc, size_t *device, size_t *host) { return bytes(device, host, m > n ? m : n); }
API int cusolverDnXpotrf_bufferSize(void *h, void *p, int uplo, int64_t n, int ta, void *a, int64_t lda, int tc, size_t *device, size_t *host) { return bytes(device, host, n); }
API int cusolverDnXsyevd_bufferSize(void *h, void *p, int jobz, int uplo, int64_t n, int ta, void *a, int64_t lda, int tw, void *w, int tc, size_t *device, size_t *host) { return bytes(device, host, n); }
API int cusolverDnXsyevBatched_bufferSize(void *h, void *p, int jobz, int uplo, int64_t n, int ta, void *a, int64_t lda, int tw, void *w, int tc, size_t *device, size_t *host, int64_t batch) { return bytes(device, host, n * batch); }
API int cusolverDnXgeev_bufferSize(void *h, void *p, int jl, int jr, int64_t n, int ta, void *a, int64_t lda, int tw, void *w, int tvl, void *vl, int64_t ldvl, int tvr, void *vr, int64_t ldvr, int tc, size_t *device, size_t *host) { return bytes(device, host, n); }
API int cusolverDnXsytrs_bufferSize(void *h, int uplo, int64_t n, int64_t nrhs, int ta, void *a, int64_t lda, void *ipiv, int tb, void *b, int64_t ldb, size_t *device, size_t *host) { return bytes(device, host, n); }

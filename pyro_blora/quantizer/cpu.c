/* The quantizer's loops on a CPU; cpu.py compiles and calls them, fake_quantize.py has the equations.

   GRIDS, their number, is a constant of a compilation, and EACH(DO) is DO(0) DO(1) ... for each of them.

   x and gradients are float (0) or bfloat16 (1), the arithmetic is float, operation by operation that of
   quantizer._EAGER (no product is fused with a sum). Sums are taken in blocks of one size, and those of the blocks in
   double and in order: the same bits with any number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RANGE, WEIGHT, EXACT = WEIGHT + GRIDS, SCALE, INVERSE = SCALE + GRIDS, WEIGHTED_SCALE = INVERSE + GRIDS };
enum { BELOW_32 = WEIGHTED_SCALE + GRIDS, EDGE }; /* in c[4 GRIDS + 4] */
enum { BLOCK = 4096, PARALLEL = 32768, SUMS = 3 + GRIDS };

typedef float f32;
typedef uint16_t b16;

static inline float from_f32(f32 x) { return x; }
static inline f32 to_f32(float x) { return x; }

static inline float from_b16(b16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline b16 to_b16(float x) { /* to the nearest, even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (b16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline float clipped(float x, float edge) { /* nan stays nan */
    x = x < -edge ? -edge : x;
    return x > edge ? edge : x;
}

/* sum_b w_b Q_b(x).  x, out (n) */
#define FORWARD(X, O)                                                                                                  \
    static void forward_##X##_##O(const X *restrict x, const float *c, O *restrict out, int64_t n, int threads) {      \
        _Pragma("omp parallel for num_threads(threads) if (n > PARALLEL)") for (int64_t block = 0; block < n;          \
                                                                                block += BLOCK) {                      \
            int64_t end = block + BLOCK < n ? block + BLOCK : n;                                                       \
            for (int64_t j = block; j < end; j++) {                                                                    \
                float exact = from_##X(x[j]), inside = clipped(exact, c[EDGE]), value = c[EXACT] * exact;              \
                for (int i = 0; i < GRIDS; i++)                                                                        \
                    value = value + rintf(inside * c[INVERSE + i]) * c[WEIGHTED_SCALE + i];                            \
                out[j] = to_##O(value);                                                                                \
            }                                                                                                          \
        }                                                                                                              \
    }

FORWARD(f32, f32)
FORWARD(f32, b16)
FORWARD(b16, b16)

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#define NAME(i) , e##i
#define ZERO(i) , e##i = 0
#define ADD(i) e##i += g * (rintf(inside * c[INVERSE + i]) * c[SCALE + i] - inside);

/* dL/dx (n), where of_x is not NULL, and the sums (SUMS) of each block: whole, beyond, of the range, of each error */
#define BACKWARD(G, X)                                                                                                 \
    static void backward_##G##_##X(const G *restrict grad, const X *restrict x, const float *c, X *restrict of_x,      \
                                   float *restrict sums, int64_t n, int threads) {                                     \
        _Pragma("omp parallel for num_threads(threads) if (n > PARALLEL)") for (int64_t block = 0; block < n;          \
                                                                                block += BLOCK) {                      \
            int64_t end = block + BLOCK < n ? block + BLOCK : n;                                                       \
            float whole = 0, beyond = 0, range = 0 EACH(ZERO);                                                         \
            PRAGMA(omp simd reduction(+ : whole, beyond, range EACH(NAME))) for (int64_t j = block; j < end; j++) {    \
                float g = from_##G(grad[j]), exact = from_##X(x[j]), inside = clipped(exact, c[EDGE]);                 \
                float sign = exact > 0 ? 1.0f : exact < 0 ? -1.0f : 0.0f;                                              \
                int is_inside = fabsf(exact) < c[RANGE];                                                               \
                whole += g * inside;                                                                                   \
                beyond += g * (exact - inside);                                                                        \
                range += is_inside ? 0.0f : g * sign;                                                                  \
                EACH(ADD)                                                                                              \
            }                                                                                                          \
            float slope = c[EXACT], below_32 = c[BELOW_32], value_range = c[RANGE];                                    \
            for (int64_t j = block; of_x && j < end; j++) /* what was just read is in the cache */                     \
                of_x[j] = to_##X(from_##G(grad[j]) *                                                                   \
                                 (slope + (fabsf(from_##X(x[j])) < value_range ? below_32 : 0.0f)));                   \
            float found[SUMS] = {whole, beyond, range EACH(NAME)};                                                     \
            memcpy(sums + block / BLOCK * SUMS, found, sizeof found);                                                  \
        }                                                                                                              \
    }

BACKWARD(f32, f32)
BACKWARD(f32, b16)
BACKWARD(b16, f32)
BACKWARD(b16, b16)

/* of_x, of_out: what they are of; bfloat16 gives bfloat16 */
void quantizer_forward(int of_x, int of_out, const void *x, const float *c, void *out, int64_t n, int threads) {
    if (of_x)
        forward_b16_b16(x, c, out, n, threads);
    else if (of_out)
        forward_f32_b16(x, c, out, n, threads);
    else
        forward_f32_f32(x, c, out, n, threads);
}

/* out (GRIDS + 2): dL/d[range, w_2, ..., w_32].  Returns 0, or 1 where there is no memory for the blocks' sums. */
int quantizer_backward(int of_grad, int of_x, const void *grad, const void *x, const float *c, void *to_x, float *out,
                       int64_t n, int threads) {
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    float *sums = malloc((size_t)(blocks + 1) * SUMS * sizeof *sums);
    double total[SUMS] = {0};
    if (!sums)
        return 1;
    if (of_grad && of_x)
        backward_b16_b16(grad, x, c, to_x, sums, n, threads);
    else if (of_grad)
        backward_b16_f32(grad, x, c, to_x, sums, n, threads);
    else if (of_x)
        backward_f32_b16(grad, x, c, to_x, sums, n, threads);
    else
        backward_f32_f32(grad, x, c, to_x, sums, n, threads);
    for (int64_t block = 0; block < blocks; block++)
        for (int k = 0; k < SUMS; k++)
            total[k] += sums[block * SUMS + k];
    free(sums);
    double range = c[BELOW_32] * total[2];
    for (int i = 0; i < GRIDS; i++) {
        range += c[WEIGHT + i] * total[3 + i] / c[RANGE];
        out[1 + i] = (float)(total[0] + total[3 + i]);
    }
    out[0] = (float)range;
    out[1 + GRIDS] = (float)(total[0] + total[1]);
    return 0;
}

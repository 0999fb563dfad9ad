/* The quantizer's loops on a CPU; cpu.py compiles and calls them, fake_quantize.py has the equations.

   GRIDS, their number, is a constant of a compilation, and EACH(DO) is DO(0) DO(1) ... for each of them.

   x and gradients are float (0) or bfloat16 (1), the arithmetic is float, operation by operation that of
   quantizer._EAGER (no product is fused with a sum). Sums are taken in pieces of one size, and those of the pieces in
   double and in order: the same bits with any number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RANGE, WEIGHT, EXACT = WEIGHT + GRIDS, SCALE, INVERSE = SCALE + GRIDS, WEIGHTED_SCALE = INVERSE + GRIDS };
enum { BELOW_32 = WEIGHTED_SCALE + GRIDS, EDGE, CONSTANTS }; /* in c[4 GRIDS + 4] */
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

/* x, out and gradients are (rows, n), c is (channels, CONSTANTS): row r has the constants r % channels, and is taken in
   pieces of at most BLOCK elements. A tensor with one range is one row. */
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#define EACH_PIECE(piece)                                                                                              \
    int64_t of_row = (n + BLOCK - 1) / BLOCK, pieces = rows * of_row;                                                  \
    PRAGMA(omp parallel for num_threads(threads) if (rows * n > PARALLEL))                                             \
    for (int64_t piece = 0; piece < pieces; piece++)

typedef struct {
    const float *c;
    int64_t start, end;
} Piece;

static inline Piece piece_at(int64_t piece, int64_t of_row, const float *c, int64_t n, int64_t channels) {
    int64_t row = piece / of_row, start = row * n + piece % of_row * BLOCK, end = (row + 1) * n;
    Piece found = {c + row % channels * CONSTANTS, start, start + BLOCK < end ? start + BLOCK : end};
    return found;
}

/* sum_b w_b Q_b(x) */
#define FORWARD(X, O)                                                                                                  \
    static void forward_##X##_##O(const X *restrict x, const float *all, O *restrict out, int64_t rows, int64_t n,     \
                                  int64_t channels, int threads) {                                                     \
        EACH_PIECE(piece) {                                                                                            \
            Piece at = piece_at(piece, of_row, all, n, channels);                                                      \
            const float *c = at.c;                                                                                     \
            for (int64_t j = at.start; j < at.end; j++) {                                                              \
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

#define NAME(i) , e##i
#define ZERO(i) , e##i = 0
#define ADD(i) e##i += g * (rintf(inside * c[INVERSE + i]) * c[SCALE + i] - inside);

/* dL/dx, where of_x is not NULL, and the sums (SUMS) of each piece: whole, beyond, of the range, of each error */
#define BACKWARD(G, X)                                                                                                 \
    static void backward_##G##_##X(const G *restrict grad, const X *restrict x, const float *all, X *restrict of_x,    \
                                   float *restrict sums, int64_t rows, int64_t n, int64_t channels, int threads) {     \
        EACH_PIECE(piece) {                                                                                            \
            Piece at = piece_at(piece, of_row, all, n, channels);                                                      \
            const float *c = at.c;                                                                                     \
            float whole = 0, beyond = 0, range = 0 EACH(ZERO);                                                         \
            PRAGMA(omp simd reduction(+ : whole, beyond, range EACH(NAME)))                                            \
            for (int64_t j = at.start; j < at.end; j++) {                                                              \
                float g = from_##G(grad[j]), exact = from_##X(x[j]), inside = clipped(exact, c[EDGE]);                 \
                float sign = exact > 0 ? 1.0f : exact < 0 ? -1.0f : 0.0f;                                              \
                int is_inside = fabsf(exact) < c[RANGE];                                                               \
                whole += g * inside;                                                                                   \
                beyond += g * (exact - inside);                                                                        \
                range += is_inside ? 0.0f : g * sign;                                                                  \
                EACH(ADD)                                                                                              \
            }                                                                                                          \
            float slope = c[EXACT], below_32 = c[BELOW_32], value_range = c[RANGE];                                    \
            for (int64_t j = at.start; of_x && j < at.end; j++) /* what was just read is in the cache */               \
                of_x[j] = to_##X(from_##G(grad[j]) *                                                                   \
                                 (slope + (fabsf(from_##X(x[j])) < value_range ? below_32 : 0.0f)));                   \
            float found[SUMS] = {whole, beyond, range EACH(NAME)};                                                     \
            memcpy(sums + piece * SUMS, found, sizeof found);                                                          \
        }                                                                                                              \
    }

BACKWARD(f32, f32)
BACKWARD(f32, b16)
BACKWARD(b16, f32)
BACKWARD(b16, b16)

/* of_x, of_out: what they are of; bfloat16 gives bfloat16 */
void quantizer_forward(int of_x, int of_out, const void *x, const float *c, void *out, int64_t rows, int64_t n,
                       int64_t channels, int threads) {
    if (of_x)
        forward_b16_b16(x, c, out, rows, n, channels, threads);
    else if (of_out)
        forward_f32_b16(x, c, out, rows, n, channels, threads);
    else
        forward_f32_f32(x, c, out, rows, n, channels, threads);
}

/* out (channels + GRIDS + 1): dL/d[ranges, w_2, ..., w_32].  Returns 0, or 1 where there is no memory for the sums. */
int quantizer_backward(int of_grad, int of_x, const void *grad, const void *x, const float *c, void *to_x, float *out,
                       int64_t rows, int64_t n, int64_t channels, int threads) {
    int64_t of_row = (n + BLOCK - 1) / BLOCK;
    float *sums = malloc((size_t)(rows * of_row + 1) * SUMS * sizeof *sums);
    double of_weights[GRIDS + 1] = {0};
    if (!sums)
        return 1;
    if (of_grad && of_x)
        backward_b16_b16(grad, x, c, to_x, sums, rows, n, channels, threads);
    else if (of_grad)
        backward_b16_f32(grad, x, c, to_x, sums, rows, n, channels, threads);
    else if (of_x)
        backward_f32_b16(grad, x, c, to_x, sums, rows, n, channels, threads);
    else
        backward_f32_f32(grad, x, c, to_x, sums, rows, n, channels, threads);
    for (int64_t channel = 0; channel < channels; channel++, c += CONSTANTS) {
        double total[SUMS] = {0};
        for (int64_t row = channel; row < rows; row += channels)
            for (int64_t piece = row * of_row; piece < (row + 1) * of_row; piece++)
                for (int k = 0; k < SUMS; k++)
                    total[k] += sums[piece * SUMS + k];
        double range = c[BELOW_32] * total[2];
        for (int i = 0; i < GRIDS; i++) {
            range += c[WEIGHT + i] * total[3 + i] / c[RANGE];
            of_weights[i] += total[0] + total[3 + i];
        }
        out[channel] = (float)range;
        of_weights[GRIDS] += total[0] + total[1];
    }
    free(sums);
    for (int i = 0; i <= GRIDS; i++)
        out[channels + i] = (float)of_weights[i];
    return 0;
}

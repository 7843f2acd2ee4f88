// The recurrent product in bf16 with AVX512-BF16: two neighbours in k make one 32-bit lane, and one instruction
// multiplies both and adds up in fp32.
#pragma once

#include <immintrin.h>

#include "tile.h"

#define LSTM_PAIRS_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"

namespace lstm::cpu {

// An instruction set like AVX-512's whose products of bf16 read pairs.
struct Pairs : Isa<64, 4> {};

// What the product of a state of type T reads: T's accumulation type, or bf16 itself.
template <typename Isa, typename T>
using Operand = std::conditional_t<std::is_same_v<Isa, Pairs> && std::is_same_v<T, BFloat16>, BFloat16, Acc<T>>;

// c[rows, 64] = a[rows, k] b, or += if accumulate; b [k / 2, 64] pairs, k even. lda and ldc: elements to the next row.
template <int Rows>
__attribute__((target(LSTM_PAIRS_TARGET))) void multiply_pairs(const BFloat16* a, Index lda, const BFloat16* b, Index k,
                                                               float* c, Index ldc, bool accumulate) {
    __m512 sum[Rows][4];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
            sum[r][v] = accumulate ? _mm512_loadu_ps(c + r * ldc + 16 * v) : _mm512_setzero_ps();
    }
    for (Index p = 0; p < k; p += 2) {
        __m512i row[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) row[v] = _mm512_loadu_si512(b + p * kTile + 32 * v);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
            std::int32_t pair;
            std::memcpy(&pair, a + r * lda + p, sizeof(pair));
            const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)x, (__m512bh)row[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, sum[r][v]);
    }
}

template <typename Isa>
inline void multiply(Index rows, const BFloat16* a, Index lda, const BFloat16* b, Index k, float* c, Index ldc,
                     bool accumulate) {
    static_assert(kRows == 6, "one case for each number of rows");
    constexpr decltype(&multiply_pairs<1>) of_rows[] = {multiply_pairs<1>, multiply_pairs<2>, multiply_pairs<3>,
                                                        multiply_pairs<4>, multiply_pairs<5>, multiply_pairs<6>};
    of_rows[rows - 1](a, lda, b, k, c, ldc, accumulate);
}

// w [4H, H], H even, to one tile of W_hh^T for the forward product: [H / 2, 64] pairs, columns as pack_units has them.
LSTM_HD void pack_unit_pairs(const BFloat16* w, Index hidden, Index tile, BFloat16* to) {
    // a pair lies in w as one 32-bit word, whose value no copy looks at
    pack_units<Pairs>(reinterpret_cast<const float*>(w), hidden, hidden / 2, tile, reinterpret_cast<float*>(to));
}

// w [4H, H] to columns 64 * tile .. of W_hh for the backward product, to [2H, 64] pairs of rows.
LSTM_HD void pack_column_pairs(const BFloat16* w, Index hidden, Index tile, BFloat16* to) {
    const Index first = tile * kTile, count = std::min(kTile, hidden - first);
    for (Index k = 0; k < 4 * hidden; k += 2) {
        const BFloat16 *even = w + k * hidden + first, *odd = even + hidden;
        for (Index j = 0; j < kTile; ++j) {
            to[k * kTile + 2 * j] = j < count ? even[j] : BFloat16{0};
            to[k * kTile + 2 * j + 1] = j < count ? odd[j] : BFloat16{0};
        }
    }
}

}  // namespace lstm::cpu

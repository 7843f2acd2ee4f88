// Weights in fixed point of 24 bits, three bytes instead of a float's four: for products of so few rows that reading
// the weight takes longer than multiplying it.
//
// Of 64 columns of a tile at one k, three vectors of 16 words take the place of four vectors of floats: the upper 24
// bits of the words are columns 0 .. 47, the low bytes of all three together columns 48 .. 63. Who reads a word as an
// integer takes a low byte for part of it; packing rounds such that the whole is nearest. A piece of up to kDepth k has
// a scale for each column, so that a weight is off by less than 2^-23 of the column's largest magnitude: less than what
// rounding does to a sum of some hundred products. A piece stays as floats, and its first scale is negative, if in one
// of its columns something is not finite, many weights are far smaller than the largest, which are less exact, or many
// are as large, whose errors don't cancel.
#pragma once

#include "vectors.h"

namespace lstm::cpu {

#ifdef LSTM_X86
constexpr Index kFixedWords = 48;                                  // of 64 columns at one k
constexpr float kWhole = 0x1.fffff8p30f;                           // what the largest magnitude becomes
constexpr float kLeastLargest = 0x1p-90f, kMostLargest = 0x1p90f;  // whose scales and factors are plain floats
constexpr std::int32_t kSmall = 6;                                 // binary digits below the largest, and more
constexpr Index kOddOfAll = 8;  // at most one in so many is that small, but not 0, or as large as the largest
constexpr Index kAhead = 512;   // words that are asked for before they are read: hardware alone asks too late

using FixedFloats = Vector<Avx512, float>;
typedef std::int32_t FixedWords __attribute__((vector_size(sizeof(FixedFloats))));

// A piece of k x 64 floats becomes fixed point in its place, if it may.
__attribute__((target(LSTM_AVX512_TARGET))) inline void fix(Index k, float* piece, float* scales) {
    using Words = Avx512::Wide;
    const auto at = [&](Index p, int v) LSTM_INLINED { return load_vector<Avx512>(piece + p * kTile + 16 * v); };
    const auto bits_at = [&](Index p, int v) LSTM_INLINED { return bit_cast<FixedWords>(magnitudes(at(p, v))); };
    FixedWords largest[4] = {}, odd[4] = {};  // as bits, which grow with magnitudes; those of NaN are the largest
    for (Index p = 0; p < k; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const FixedWords x = bits_at(p, v);
            largest[v] = x > largest[v] ? x : largest[v];
        }
    }
    for (Index p = 0; p < k; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const FixedWords x = bits_at(p, v);
            odd[v] -= ((x < largest[v] - (kSmall << 23)) | (x == largest[v])) & (x > 0);
        }
    }
    alignas(64) float most[kTile], factors[kTile];
    alignas(64) std::int32_t odd_ones[kTile];
    std::memcpy(most, largest, sizeof(most));
    std::memcpy(odd_ones, odd, sizeof(odd_ones));
    bool may = true;
    for (Index j = 0; j < kTile; ++j) {
        const bool plain = most[j] == 0 || (most[j] > kLeastLargest && most[j] < kMostLargest);
        may &= plain && odd_ones[j] <= k / kOddOfAll;
        scales[j] = most[j] / kWhole;
        factors[j] = most[j] == 0 ? 0 : kWhole / most[j];
    }
    if (!may) {
        scales[0] = -1;
        return;
    }
    for (Index p = 0; p < k; ++p) {
        Words x[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
            x[v] = (Words) __builtin_convertvector(at(p, v) * load_vector<Avx512>(factors + 16 * v), FixedWords);
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) {
            const Words byte = (x[3] + 128) >> (24 - 8 * v) & 255;
            const Words word = ((x[v] - byte + 128) & ~255u) | byte;
            std::memcpy(piece + p * kFixedWords + 16 * v, &word, sizeof(word));
        }
    }
}

// multiply_pass of a piece in fixed point; returns whether all sums are finite.
template <int Rows>
__attribute__((target(LSTM_AVX512_TARGET))) inline bool multiply_fixed(const float* a, Index lda, const float* words,
                                                                       const float* scales, Index k, float* c,
                                                                       Index ldc, bool accumulate) {
    const __m512i low_bytes = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // a word's, four times each
    __m512 sum[Rows][4];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_ps();
    }
#pragma GCC unroll 2
    for (Index p = 0; p < k; ++p, words += kFixedWords) {
        __m512i x[4];
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) {
            x[v] = _mm512_loadu_si512(words + 16 * v);
            __builtin_prefetch(words + kAhead + 16 * v);
        }
        x[3] = _mm512_maskz_shuffle_epi8(0x8888888888888888, x[0], low_bytes);
        x[3] = _mm512_mask_shuffle_epi8(x[3], 0x4444444444444444, x[1], low_bytes);
        x[3] = _mm512_mask_shuffle_epi8(x[3], 0x2222222222222222, x[2], low_bytes);
        __m512 row[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) row[v] = (__m512) __builtin_convertvector((FixedWords)x[v], FixedFloats);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
            const __m512 left = _mm512_set1_ps(a[r * lda + p]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_fmadd_ps(left, row[v], sum[r][v]);
        }
    }
    constexpr int infinite_or_nan = 0x99;
    __mmask16 not_finite = 0;
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            float* const to = c + r * ldc + 16 * v;
            not_finite |= _mm512_fpclass_ps_mask(sum[r][v], infinite_or_nan);
            const __m512 scale = _mm512_loadu_ps(scales + 16 * v);
            const __m512 before = accumulate ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum[r][v], scale, before));
        }
    }
    return not_finite == 0;
}
#endif

}  // namespace lstm::cpu

// Sigmoid and tanh of several vectors side by side: each is one long chain of operations, and the processor has room
// for a few at once.
//
// Sigmoid reaches 0 and 1, tanh -1 and 1; NaN stays NaN; a sigmoid below 2^-126 may be 0. Nothing branches. The error
// is below 2.5 units in the last place; if coarse, for 16-bit states, below 2^-17 of the value.
#pragma once

#include "vectors.h"

namespace lstm::cpu {

#ifdef LSTM_X86
// What the generic form below says, in two instructions: where either is NaN these give their second operand.
__attribute__((target(LSTM_AVX2_TARGET))) inline __m256 clamp(__m256 x, float low, float high, Avx2) {
    return _mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), x));
}
__attribute__((target(LSTM_AVX512_TARGET))) inline __m512 clamp(__m512 x, float low, float high, Avx512) {
    x = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), x);
    return _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), x);
}
#endif
LSTM_HD Vector<Baseline, float> clamp(Vector<Baseline, float> x, float low, float high, Baseline) {
    const Vector<Baseline, float> lows = low - Vector<Baseline, float>{}, highs = high - Vector<Baseline, float>{};
    x = x > highs ? highs : x;
    return x < lows ? lows : x;
}

// x[i] becomes tanh(x[i]) where bit i of kTanh is set, else sigmoid(x[i]).
//
// With z = 2x for tanh and -x for sigmoid, z = n ln2 + r with |r| <= ln2 / 2, e^z is 2^n e^r; e^r = 1 + r + r^2 q(r), q
// a Chebyshev fit. Bits of 2^n for n = -127 .. 128 come from a shift, and mean 0 and infinity at the ends.
template <typename Isa, bool kCoarse, unsigned kTanh, int N>
LSTM_HD void activate(Vector<Isa, float> (&x)[N]) {
    using V = Vector<Isa, float>;
    using Bits = typename Isa::Wide;
    constexpr float shifter = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
    constexpr float fine[] = {0x1.6d1606p-10f, 0x1.12106cp-7f, 0x1.555516p-5f, 0x1.5554d8p-3f, 0.5f};
    constexpr float coarse[] = {0x1.11392cp-7f, 0x1.570970p-5f, 0x1.555636p-3f, 0x1.fffe68p-2f};
    constexpr int terms = kCoarse ? 4 : 5;
    const auto is_tanh = [](int i) LSTM_INLINED { return (kTanh >> i & 1) != 0; };
    V n[N], r[N], q[N], scale[N];
#define LSTM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
    LSTM_EACH x[i] = is_tanh(i) ? clamp(x[i], -10.0f, 10.0f, Isa()) : clamp(x[i], -89.0f, 88.0f, Isa());
    LSTM_EACH scale[i] = x[i] * (is_tanh(i) ? 0x1.715476p1f : -0x1.715476p0f) + shifter;
    LSTM_EACH n[i] = scale[i] - shifter;
    LSTM_EACH r[i] = x[i] * (is_tanh(i) ? 2.0f : -1.0f);
    if constexpr (kCoarse) {
        LSTM_EACH r[i] -= n[i] * 0x1.62e430p-1f;
    } else {  // ln2 in two parts; the first has 9 bits, so that n * part is exact
        LSTM_EACH r[i] -= n[i] * 0x1.63p-1f;
        LSTM_EACH r[i] -= n[i] * -0x1.bd0106p-13f;
    }
    LSTM_EACH q[i] = V{} + (kCoarse ? coarse[0] : fine[0]);
#pragma GCC unroll 8
    for (int k = 1; k < terms; ++k) LSTM_EACH q[i] = q[i] * r[i] + (kCoarse ? coarse[k] : fine[k]);
    LSTM_EACH {
        Bits bits;
        std::memcpy(&bits, &scale[i], sizeof(bits));
        bits = (bits << 23) + 0x3f800000u;
        std::memcpy(&scale[i], &bits, sizeof(bits));
    }
    LSTM_EACH {
        if (is_tanh(i)) {
            const V growth = (q[i] * r[i]) * r[i] + r[i], expm1 = scale[i] * growth + (scale[i] - 1.0f);
            x[i] = expm1 / (expm1 + 2.0f);
        } else {  // no infinity times what may be negative
            const V e_r = (q[i] * r[i] + 1.0f) * r[i] + 1.0f;
            x[i] = 1.0f / (scale[i] * e_r + 1.0f);
        }
    }
#undef LSTM_EACH
}

template <typename Isa, bool kCoarse, unsigned kTanh, int N>
LSTM_HD void activate(Vector<Isa, double> (&x)[N]) {
    for (int i = 0; i < N; ++i) {
        double all[lanes<Isa, double>];
        std::memcpy(all, &x[i], sizeof(all));
        for (double& one : all) one = kTanh >> i & 1 ? math::tanh(one) : math::sigmoid(one);
        std::memcpy(&x[i], all, sizeof(all));
    }
}

// tanh of `count` elements in their place, a multiple of a vector's.
template <typename Isa, bool kCoarse, typename A>
LSTM_HD void tanh_of(A* x, Index count) {
    constexpr Index side = lanes<Isa, A>;
    const auto take = [&](auto& vectors, Index n, Index j) LSTM_INLINED {
#pragma GCC unroll 4
        for (Index i = 0; i < n; ++i) vectors[i] = load_vector<Isa>(x + j + i * side);
        activate<Isa, kCoarse, 0b1111>(vectors);
#pragma GCC unroll 4
        for (Index i = 0; i < n; ++i) store_vector<Isa, A>(vectors[i], x + j + i * side);
    };
    Vector<Isa, A> four[4], one[1];
    Index j = 0;
    for (; j + 4 * side <= count; j += 4 * side) take(four, 4, j);
    for (; j < count; j += side) take(one, 1, j);
}

}  // namespace lstm::cpu

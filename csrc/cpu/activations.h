// Sigmoid and tanh of several vectors side by side: each is one long chain of operations, and the processor has room
// for a few at once.
//
// Sigmoid reaches 0 and 1, tanh -1 and 1; NaN stays NaN; a sigmoid that would be subnormal may be 0. Nothing branches.
// The error is below 2.5 units in the last place; if coarse, for 16-bit states, below 2^-17 of the value.
#pragma once

#include <iterator>

#include "vectors.h"

namespace lstm::cpu {

// What e^r is made of, and how far sigmoid and tanh have to be followed.
template <typename A>
struct Exponential;
template <>
struct Exponential<float> {
    using Word = std::uint32_t;
    static constexpr float shifter = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
    static constexpr float fine[] = {0x1.6d1606p-10f, 0x1.12106cp-7f, 0x1.555516p-5f, 0x1.5554d8p-3f, 0.5f};
    static constexpr float coarse[] = {0x1.11392cp-7f, 0x1.570970p-5f, 0x1.555636p-3f, 0x1.fffe68p-2f};
    static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // n * high is exact
    static constexpr float tanh_is_one = 10.0f, lowest = -89.0f, highest = 88.0f;
    static constexpr int mantissa = 23;
    static constexpr Word one = 0x3f800000;
};
template <>
struct Exponential<double> {
    using Word = std::uint64_t;
    static constexpr double shifter = 0x1.8p52;
    static constexpr double fine[] = {0x1.af38d53857513p-26, 0x1.2891a8c1d838dp-22, 0x1.71de0d9c145d0p-19,
                                      0x1.a019b8ef67c6cp-16, 0x1.a01a01a7c8d47p-13, 0x1.6c16c17893833p-10,
                                      0x1.11111111109adp-7,  0x1.5555555553d4fp-5,  0x1.5555555555556p-3,
                                      0x1.0000000000001p-1};
    static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
    static constexpr double tanh_is_one = 20.0, lowest = -710.0, highest = 709.0;
    static constexpr int mantissa = 52;
    static constexpr Word one = 0x3ff0000000000000;
};

template <typename E, bool kCoarse>
constexpr const auto& fit_of() {
    if constexpr (kCoarse) {
        return E::coarse;
    } else {
        return E::fine;
    }
}

#ifdef LSTM_X86
// What the generic form below says, in two instructions: where either is NaN these give their second operand.
__attribute__((target(LSTM_AVX2_TARGET))) inline __m256 clamp(__m256 x, float low, float high, Avx2) {
    return _mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), x));
}
__attribute__((target(LSTM_AVX2_TARGET))) inline __m256d clamp(__m256d x, double low, double high, Avx2) {
    return _mm256_max_pd(_mm256_set1_pd(low), _mm256_min_pd(_mm256_set1_pd(high), x));
}
__attribute__((target(LSTM_AVX512_TARGET))) inline __m512 clamp(__m512 x, float low, float high, Avx512) {
    x = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), x);
    return _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), x);
}
__attribute__((target(LSTM_AVX512_TARGET))) inline __m512d clamp(__m512d x, double low, double high, Avx512) {
    x = _mm512_maskz_min_pd(0xff, _mm512_set1_pd(high), x);
    return _mm512_maskz_max_pd(0xff, _mm512_set1_pd(low), x);
}
#endif
template <typename V, typename A>
LSTM_HD V clamp(V x, A low, A high, Baseline) {
    const V lows = low - V{}, highs = high - V{};
    x = x > highs ? highs : x;
    return x < lows ? lows : x;
}

// x[i], a vector of A, becomes tanh(x[i]) where bit i of kTanh is set, else sigmoid(x[i]).
//
// With z = 2x for tanh and -x for sigmoid, z = n ln2 + r with |r| <= ln2 / 2, e^z is 2^n e^r; e^r = 1 + r + r^2 q(r), q
// a Chebyshev fit. Bits of 2^n come from a shift, and mean 0 and infinity at the ends: of a float at -127 and 128.
template <typename Isa, bool kCoarse, unsigned kTanh, typename V, int N>
LSTM_HD void activate(V (&x)[N]) {
    using A = std::remove_reference_t<decltype(x[0][0])>;
    using E = Exponential<A>;
    typedef typename E::Word Bits __attribute__((vector_size(sizeof(V))));
    constexpr auto& fit = fit_of<E, kCoarse>();
    constexpr int terms = std::size(fit);
    constexpr A over_ln2 = static_cast<A>(0x1.71547652b82fep0);
    const auto is_tanh = [](int i) LSTM_INLINED { return (kTanh >> i & 1) != 0; };
    V n[N], r[N], q[N], scale[N];
#define LSTM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
    LSTM_EACH x[i] =
        is_tanh(i) ? clamp(x[i], -E::tanh_is_one, E::tanh_is_one, Isa()) : clamp(x[i], E::lowest, E::highest, Isa());
    LSTM_EACH scale[i] = x[i] * (is_tanh(i) ? 2 * over_ln2 : -over_ln2) + E::shifter;
    LSTM_EACH n[i] = scale[i] - E::shifter;
    LSTM_EACH r[i] = x[i] * (is_tanh(i) ? A(2) : A(-1));
    if constexpr (kCoarse) {
        LSTM_EACH r[i] -= n[i] * static_cast<A>(0x1.62e42fefa39efp-1);
    } else {
        LSTM_EACH r[i] -= n[i] * E::ln2_high;
        LSTM_EACH r[i] -= n[i] * E::ln2_low;
    }
    LSTM_EACH q[i] = V{} + fit[0];
#pragma GCC unroll 16
    for (int k = 1; k < terms; ++k) LSTM_EACH q[i] = q[i] * r[i] + fit[k];
    LSTM_EACH {
        Bits bits;
        std::memcpy(&bits, &scale[i], sizeof(bits));
        bits = (bits << E::mantissa) + E::one;
        std::memcpy(&scale[i], &bits, sizeof(bits));
    }
    LSTM_EACH {
        if (is_tanh(i)) {
            const V growth = (q[i] * r[i]) * r[i] + r[i], expm1 = scale[i] * growth + (scale[i] - A(1));
            x[i] = expm1 / (expm1 + A(2));
        } else {  // no infinity times what may be negative
            const V e_r = (q[i] * r[i] + A(1)) * r[i] + A(1);
            x[i] = A(1) / (scale[i] * e_r + A(1));
        }
    }
#undef LSTM_EACH
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

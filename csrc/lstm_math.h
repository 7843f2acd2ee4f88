// One LSTM cell, forward and backward, for the CPU and for CUDA. The equations F1..F6 and B1..B6 are those of
// lstm_fast/reference.py. All arithmetic is in the accumulation type (float, or double for double storage).
//
// Saturated gates are exact: sigmoid reaches 0 and 1, tanh reaches -1 and 1; NaN in gives NaN out. Nothing here relies
// on -ffast-math. On the host the float functions are branch-free, so that a loop over cells vectorises.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LSTM_HD __host__ __device__ __forceinline__
#else
#define LSTM_HD inline __attribute__((always_inline))
#endif

namespace lstm {

// ---- Storage types -------------------------------------------------------------------------------------------------

// The dtype codes that the bindings pass; bindings.cpp shows them to Python as DTYPES.
enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Bytes of an element.
constexpr std::int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Host storage of the two 16-bit types. CUDA code uses __nv_bfloat16 and __half instead.
struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

template <typename T>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename To, typename From>
LSTM_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// load: storage to accumulation type, exact. store<T>: back, rounding to nearest even; NaN stays NaN.
LSTM_HD float load(float x) { return x; }
LSTM_HD double load(double x) { return x; }

LSTM_HD float load(BFloat16 x) { return bit_cast<float>(std::uint32_t{x.bits} << 16); }

LSTM_HD float load(Float16 x) {
    const std::uint32_t sign = (x.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = x.bits & 0x7fffu;
    // Exponent field moved from bias 15 to bias 127; infinity and NaN have the field all ones.
    const std::uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
    const std::uint32_t normal = (magnitude << 13) + rebias;
    // A subnormal is magnitude * 2^-24, an integer that float holds exactly.
    const std::uint32_t subnormal = bit_cast<std::uint32_t>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);
    return bit_cast<float>(sign | (magnitude < 0x0400u ? subnormal : normal));
}

template <typename T>
struct Store;
template <>
struct Store<float> {
    LSTM_HD static float from(float x) { return x; }
};
template <>
struct Store<double> {
    LSTM_HD static double from(double x) { return x; }
};
// The bits of a float, or of a vector of them, to those of bf16 in their lower half.
template <typename Bits>
LSTM_HD Bits round_to_bf16(Bits bits) {
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits quiet = (bits >> 16) | 0x0040u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}
template <>
struct Store<BFloat16> {
    LSTM_HD static BFloat16 from(float x) {
        return {static_cast<std::uint16_t>(round_to_bf16(bit_cast<std::uint32_t>(x)))};
    }
};
template <>
struct Store<Float16> {
    LSTM_HD static Float16 from(float x) {
        const std::uint32_t bits = bit_cast<std::uint32_t>(x);
        const std::uint32_t sign = (bits >> 16) & 0x8000u;
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        // Below 2^-14 the spacing is 2^-24: adding 0.5, whose spacing in float is 2^-24, rounds there to nearest even.
        const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
        const std::uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
        const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
        const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        const bool overflows = magnitude >= 0x477ff000u;  // 65520 and above round to infinity
        return {static_cast<std::uint16_t>(sign | (overflows ? special : finite))};
    }
};

#ifdef __CUDACC__
LSTM_HD float load(__nv_bfloat16 x) { return __bfloat162float(x); }
LSTM_HD float load(__half x) { return __half2float(x); }
template <>
struct Store<__nv_bfloat16> {
    LSTM_HD static __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Store<__half> {
    LSTM_HD static __half from(float x) { return __float2half_rn(x); }
};
#endif

template <typename T>
LSTM_HD T store(Acc<T> x) {
    return Store<T>::from(x);
}

// ---- Elementary functions ------------------------------------------------------------------------------------------

namespace math {

LSTM_HD float exp(float x) { return ::expf(x); }
LSTM_HD float tanh(float x) { return ::tanhf(x); }
LSTM_HD double exp(double x) { return ::exp(x); }
LSTM_HD double tanh(double x) { return ::tanh(x); }

// On a GPU: `fast` by its own exponential and division, a third of the instructions, relative error below 2^-18, which
// fp16's states and TF32's products hide; `fastest` by its own tanh, error below 2^-10.9, for bf16. Elsewhere as above.
enum class Speed { exact, fast, fastest };

template <Speed kSpeed, typename A>
LSTM_HD A exp(A x) {
#ifdef __CUDA_ARCH__
    if constexpr (kSpeed != Speed::exact) return __expf(x);
#endif
    return exp(x);
}
template <Speed kSpeed, typename A>
LSTM_HD A divide(A x, A y) {
#ifdef __CUDA_ARCH__
    if constexpr (kSpeed != Speed::exact) return __fdividef(x, y);
#endif
    return x / y;
}
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float tanh_of_card(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
template <Speed kSpeed, typename A>
LSTM_HD A tanh(A x) {
    if constexpr (kSpeed == Speed::exact) return tanh(x);
#ifdef __CUDA_ARCH__
    if constexpr (kSpeed == Speed::fastest) return tanh_of_card(x);
#endif
    const A magnitude = x < A(0) ? -x : x, square = x * x;
    // 1 - 2 / (e^2|x| + 1) would cancel near 0
    const A near_zero = magnitude + magnitude * square * (A(-1.0 / 3) + square * A(2.0 / 15));
    const A clamped = magnitude > A(10) ? A(10) : magnitude;
    const A far = A(1) - divide<kSpeed>(A(2), exp<kSpeed>(clamped + clamped) + A(1));
    const A result = magnitude < A(0.125) ? near_zero : far;
    return x < A(0) ? -result : result;
}

// 1 / (1 + e^-x), through e^-|x| so that nothing overflows and small values keep their relative accuracy; of the
// fastest, absolute accuracy.
template <Speed kSpeed = Speed::exact, typename A>
LSTM_HD A sigmoid(A x) {
#ifdef __CUDA_ARCH__
    if constexpr (kSpeed == Speed::fastest) return A(0.5) + A(0.5) * tanh_of_card(A(0.5) * x);
#endif
    const A t = exp<kSpeed>(x < A(0) ? x : -x);
    return divide<kSpeed>(x < A(0) ? t : A(1), A(1) + t);
}

}  // namespace math

// ---- The cell ------------------------------------------------------------------------------------------------------

template <typename A>
struct CellForward {
    A i, f, g, o;  // activated gates
    A c, h;        // new state
};

// a_*: pre-activations x W_ih^T + b_ih + h' W_hh^T + b_hh of one unit; c_prev: its previous cell state.
template <math::Speed kSpeed = math::Speed::exact, typename A>
LSTM_HD CellForward<A> cell_forward(A a_i, A a_f, A a_g, A a_o, A c_prev) {
    const A i = math::sigmoid<kSpeed>(a_i);             // F1
    const A f = math::sigmoid<kSpeed>(a_f);             // F2
    const A g = math::tanh<kSpeed>(a_g);                // F3
    const A o = math::sigmoid<kSpeed>(a_o);             // F4
    const A c = f * c_prev + i * g;                     // F5
    return {i, f, g, o, c, o * math::tanh<kSpeed>(c)};  // F6
}

template <typename A>
struct CellBackward {
    A da_i, da_f, da_g, da_o;  // gradients of the pre-activations
    A dc_prev;                 // gradient of c_prev
};

// i, f, g, o, c: what cell_forward returned. dh, dc: gradients of its h and c, dc without the part that comes through
// h. A may be a vector of units.
template <typename A>
LSTM_HD CellBackward<A> cell_backward_of(A i, A f, A g, A o, A tanh_c, A c_prev, A dh, A dc) {
    const A da_o = dh * tanh_c * o * (1 - o);                // B1
    const A dc_total = dc + dh * o * (1 - tanh_c * tanh_c);  // B2
    const A da_i = dc_total * g * i * (1 - i);               // B3
    const A da_f = f * (1 - f) * dc_total * c_prev;          // B4
    const A da_g = dc_total * i * (1 - g * g);               // B5
    return {da_i, da_f, da_g, da_o, dc_total * f};           // B6
}
template <math::Speed kSpeed = math::Speed::exact, typename A>
LSTM_HD CellBackward<A> cell_backward(A i, A f, A g, A o, A c, A c_prev, A dh, A dc) {
    return cell_backward_of(i, f, g, o, math::tanh<kSpeed>(c), c_prev, dh, dc);
}

}  // namespace lstm

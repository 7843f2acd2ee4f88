// Instruction sets, and vectors of hidden units between arrays and registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../lstm_math.h"

// x86's instruction sets. A test leaves them out to see what other processors compile.
#if defined(__x86_64__) && !defined(LSTM_FAST_WITHOUT_X86)
#define LSTM_X86
#include <immintrin.h>
#endif

// A lambda is compiled for the instruction set of the function around it only if it is inlined there.
#define LSTM_INLINED __attribute__((always_inline))

namespace lstm::cpu {

using Index = std::int64_t;

constexpr Index kTile = 64;   // columns of a packed tile
constexpr Index kUnits = 16;  // hidden units of a forward tile: 16 columns for each of the gates i, f, g, o

constexpr int kRows = 6;  // most rows of one block: 6 x 4 sums fit the 32 registers of AVX-512, 6 x 2 the 16 of AVX2

constexpr Index kDepth = 256;     // k of the longest sum in registers, as long ones are less exact than nn.LSTM's
constexpr Index kShortSum = 128;  // of a product whose sums are short in nn.LSTM: by projections, or over rows

// An instruction set: bytes of a vector, how many vectors side by side one pass over k accumulates for each of a
// block's rows, how many registers there are, and how many blocks of rows take turns at a panel.
template <int Bytes, int Vectors, int Registers, int Blocks>
struct Isa {
    template <typename A>
    struct VectorOf {
        typedef A type __attribute__((vector_size(Bytes)));
    };
    typedef std::uint16_t Narrow __attribute__((vector_size(Bytes / 2)));  // as many as a vector has floats
    typedef std::uint32_t Wide __attribute__((vector_size(Bytes)));
    static constexpr int vectors = Vectors, registers = Registers;
    static constexpr Index blocks = Blocks;
    static constexpr Index rows = kRows * Blocks;  // that one step multiplies at a time
    static constexpr Index side = kRows;           // rows of a packed block of a left side
};

template <typename Isa, typename A>
using Vector = typename Isa::template VectorOf<A>::type;
template <typename Isa, typename A>
constexpr Index lanes = sizeof(Vector<Isa, A>) / sizeof(A);

#ifdef LSTM_X86
#define LSTM_AVX2_TARGET "avx2,fma,f16c"
#define LSTM_AVX512_TARGET "avx512f,avx512bw,avx512dq,avx512vl," LSTM_AVX2_TARGET
#define LSTM_PAIRS_TARGET "avx512bf16," LSTM_AVX512_TARGET
#define LSTM_AMX_TARGET "amx-tile,amx-bf16,amx-int8," LSTM_PAIRS_TARGET
using Baseline = Isa<16, 2, 16, 8>;
using Avx2 = Isa<32, 2, 16, 8>;
using Avx512 = Isa<64, 4, 32, 1>;
struct Pairs : Avx512 {};  // AVX-512 whose products of bf16 read pairs of neighbours in k
struct Amx : Pairs {       // whose products are those of registers of 16 rows of bf16 (amx.h)
    static constexpr Index rows = 64, side = 16;
};
struct AmxOverSteps : Avx512 {};  // whose products over all steps are AMX's, as those of a step are of few rows
struct AmxDigits : Amx {};        // whose products of floats are those of digits (digits.h)

// An operand of those: the sum of N bf16. They lie in planes, N * 32 elements behind each other for 32 operands.
template <int N>
struct Planes {
    BFloat16 of[N];
};
// And in fixed point: three digits of 8 bits, in planes of 64 operands. Their rows are made as a whole, with a scale.
struct Digits {
    std::int8_t of[3];
};
#else
using Baseline = Isa<16, 4, 32, 8>;
#endif

// Calls f in a function of its own. A long function that is inlined in many calls its body so, which is then compiled
// once: builds take half the time.
#define LSTM_OUT_OF_LINE(Isa, ...)                                            \
    template <typename F>                                                     \
    __attribute__((noinline __VA_ARGS__)) void out_of_line(Isa, const F& f) { \
        f();                                                                  \
    }
LSTM_OUT_OF_LINE(Baseline)
#ifdef LSTM_X86
LSTM_OUT_OF_LINE(Avx2, , target(LSTM_AVX2_TARGET))
LSTM_OUT_OF_LINE(Avx512, , target(LSTM_AVX512_TARGET))
LSTM_OUT_OF_LINE(Pairs, , target(LSTM_PAIRS_TARGET))
LSTM_OUT_OF_LINE(Amx, , target(LSTM_AMX_TARGET))
#endif
#undef LSTM_OUT_OF_LINE

// What the product of a state of type T reads: T's accumulation type, or bf16 itself.
template <typename Isa, typename T>
struct OperandOf {
    using type = Acc<T>;
};
#ifdef LSTM_X86
template <>
struct OperandOf<Pairs, BFloat16> {
    using type = BFloat16;
};
template <>
struct OperandOf<Amx, BFloat16> {
    using type = Planes<1>;
};
template <>
struct OperandOf<Amx, float> {
    using type = Planes<3>;
};
template <>
struct OperandOf<AmxDigits, float> {
    using type = Digits;
};
#endif
template <typename Isa, typename T>
using Operand = typename OperandOf<Isa, T>::type;

// The instruction set of products over all steps.
#ifdef LSTM_X86
template <typename Isa>
using OverSteps = std::conditional_t<std::is_same_v<Isa, AmxOverSteps>, Amx, Isa>;
#else
template <typename Isa>
using OverSteps = Isa;
#endif

// Whether the processor itself rounds to bf16.
#ifdef LSTM_X86
template <typename Isa>
constexpr bool has_pairs = std::is_base_of_v<Pairs, Isa>;
#else
template <typename Isa>
constexpr bool has_pairs = false;
#endif

// Whether products read operands O from rows in planes.
template <typename O>
constexpr bool in_planes = false;
#ifdef LSTM_X86
template <int N>
constexpr bool in_planes<Planes<N>> = true;
template <>
inline constexpr bool in_planes<Digits> = true;
#endif

// Whether a row becomes operands as a whole, once all of it is known.
template <typename O>
constexpr bool whole_rows = false;
#ifdef LSTM_X86
template <>
inline constexpr bool whole_rows<Digits> = true;
#endif

#ifdef LSTM_X86
// fp16 by the processor's own conversions, from AVX2 on.
__attribute__((target(LSTM_AVX2_TARGET))) inline __m256 load_halves(const Float16* from, Avx2) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
__attribute__((target(LSTM_AVX2_TARGET))) inline void store_halves(__m256 from, Float16* to, Avx2) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
}
__attribute__((target(LSTM_AVX512_TARGET))) inline __m512 load_halves(const Float16* from, Avx512) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
__attribute__((target(LSTM_AVX512_TARGET))) inline void store_halves(__m512 from, Float16* to, Avx512) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, from, _MM_FROUND_TO_NEAREST_INT));
}

// bf16 likewise, which takes what is subnormal for 0, as the products do.
__attribute__((target(LSTM_PAIRS_TARGET))) inline void store_brain(__m512 from, BFloat16* to) {
    const __m256bh narrow = _mm512_cvtneps_pbh(from);
    std::memcpy(to, &narrow, sizeof(narrow));
}

// To each float of a sum the products of two neighbours.
__attribute__((target(LSTM_PAIRS_TARGET))) inline __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

// A vector from as many elements and back. Nothing narrower is stored and read again: a load that meets several
// narrower stores would wait for them.
template <typename Isa, typename T>
LSTM_HD Vector<Isa, Acc<T>> load_vector(const T* from) {
    Vector<Isa, Acc<T>> x;
    if constexpr (std::is_same_v<T, BFloat16>) {
        typename Isa::Narrow narrow;
        std::memcpy(&narrow, from, sizeof(narrow));
        const typename Isa::Wide bits = __builtin_convertvector(narrow, typename Isa::Wide) << 16;
        std::memcpy(&x, &bits, sizeof(x));
    } else if constexpr (!std::is_same_v<T, Float16>) {
        std::memcpy(&x, from, sizeof(x));
    } else if constexpr (std::is_same_v<Isa, Baseline>) {
        for (Index j = 0; j < lanes<Isa, float>; ++j) x[j] = load(from[j]);
    } else {
#ifdef LSTM_X86
        x = load_halves(from, Isa());
#endif
    }
    return x;
}

template <typename Isa, typename T>
LSTM_HD void store_vector(const Vector<Isa, Acc<T>>& from, T* to) {
    if constexpr (std::is_same_v<T, BFloat16> && has_pairs<Isa>) {
#ifdef LSTM_X86
        store_brain(from, to);
#endif
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        typename Isa::Wide bits;
        std::memcpy(&bits, &from, sizeof(bits));
        const auto narrow = __builtin_convertvector(round_to_bf16(bits), typename Isa::Narrow);
        std::memcpy(to, &narrow, sizeof(narrow));
    } else if constexpr (!std::is_same_v<T, Float16>) {
        std::memcpy(to, &from, sizeof(from));
    } else if constexpr (std::is_same_v<Isa, Baseline>) {
        for (Index j = 0; j < lanes<Isa, float>; ++j) to[j] = store<Float16>(from[j]);
    } else {
#ifdef LSTM_X86
        store_halves(from, to, Isa());
#endif
    }
}

template <typename Floats>
LSTM_HD Floats magnitudes(Floats x) {
    typedef std::uint32_t Words __attribute__((vector_size(sizeof(Floats))));
    return bit_cast<Floats>(bit_cast<Words>(x) & 0x7fffffffu);
}

#ifdef LSTM_X86
// Whether the first count < 16 elements are loaded by masks, and 0 behind them; and whether they are stored so, which
// with AVX2 some processors do one by one.
template <typename Isa, typename T>
constexpr bool loads_first = std::is_base_of_v<Avx512, Isa> || (std::is_same_v<Isa, Avx2> && sizeof(T) >= 4);
template <typename Isa>
constexpr bool stores_first = std::is_base_of_v<Avx512, Isa>;

template <typename T>
__attribute__((target(LSTM_AVX512_TARGET))) inline void load_first(const T* from, Index count, T* to, Avx512) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == 8) {
        _mm512_storeu_pd(to, _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
        _mm512_storeu_pd(to + 8, _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask >> 8), from + 8));
    } else if constexpr (sizeof(T) == 4) {
        _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(mask, from));
    } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(mask, from));
    }
}
template <typename T>
__attribute__((target(LSTM_AVX512_TARGET))) inline void store_first(const T* from, Index count, T* to, Avx512) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == 8) {
        _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), _mm512_loadu_pd(from));
        _mm512_mask_storeu_pd(to + 8, static_cast<__mmask8>(mask >> 8), _mm512_loadu_pd(from + 8));
    } else if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(to, mask, _mm512_loadu_ps(from));
    } else {
        _mm256_mask_storeu_epi16(to, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
}

// Of the lanes of a vector from the j-th element on.
__attribute__((target(LSTM_AVX2_TARGET))) inline __m256i mask_of(Index count, Index j, float) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count - j)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
__attribute__((target(LSTM_AVX2_TARGET))) inline __m256i mask_of(Index count, Index j, double) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count - j), _mm256_setr_epi64x(0, 1, 2, 3));
}
__attribute__((target(LSTM_AVX2_TARGET))) inline void load_first(const float* from, Index count, float* to, Avx2) {
    for (Index j = 0; j < kUnits; j += 8)
        _mm256_storeu_ps(to + j, _mm256_maskload_ps(from + j, mask_of(count, j, 0.0f)));
}
__attribute__((target(LSTM_AVX2_TARGET))) inline void load_first(const double* from, Index count, double* to, Avx2) {
    for (Index j = 0; j < kUnits; j += 4)
        _mm256_storeu_pd(to + j, _mm256_maskload_pd(from + j, mask_of(count, j, 0.0)));
}
#endif

// 16 units.
template <typename Isa, typename T>
LSTM_HD void load_all(const T* from, Acc<T>* to) {
    for (Index j = 0; j < kUnits; j += lanes<Isa, Acc<T>>) store_vector<Isa>(load_vector<Isa>(from + j), to + j);
}
template <typename Isa, typename T>
LSTM_HD void store_all(const Acc<T>* from, T* to) {
    for (Index j = 0; j < kUnits; j += lanes<Isa, Acc<T>>) store_vector<Isa, T>(load_vector<Isa>(from + j), to + j);
}

// 16 units; of the last tile only count < 16 exist, and the others are 0.
template <typename Isa, typename T>
LSTM_HD void load_units(const T* from, Index count, Acc<T>* to) {
    if (count == kUnits) return load_all<Isa>(from, to);
#ifdef LSTM_X86
    if constexpr (loads_first<Isa, T>) {
        alignas(64) T all[kUnits];
        load_first(from, count, all, Isa());
        return load_all<Isa>(all, to);
    }
#endif
    out_of_line(Isa(), [&]() LSTM_INLINED {
        for (Index j = 0; j < kUnits; ++j) {
            T x{};
            if (j < count) std::memcpy(&x, from + j, sizeof(x));  // pairs of bf16 come as floats, aligned as bf16
            to[j] = load(x);
        }
    });
}

template <typename Isa, typename T>
LSTM_HD void store_units(const Acc<T>* from, Index count, T* to) {
    if (count == kUnits) return store_all<Isa>(from, to);
#ifdef LSTM_X86
    if constexpr (stores_first<Isa>) {
        alignas(64) T all[kUnits];
        store_all<Isa>(from, all);
        return store_first(all, count, to, Isa());
    }
#endif
    out_of_line(Isa(), [&]() LSTM_INLINED {
        for (Index j = 0; j < count; ++j) to[j] = store<T>(from[j]);
    });
}

// The same of a row of operands, from the unit-th on, which of planes (planes.h) is a multiple of 16.
template <typename Isa, typename O>
LSTM_HD void store_operands(const Acc<O>* from, Index count, O* row, Index unit) {
    store_units<Isa>(from, count, row + unit);
}
template <typename Isa, typename O>
LSTM_HD Vector<Isa, Acc<O>> load_operands(const O* row, Index unit) {
    return load_vector<Isa>(row + unit);
}

// Notes what is infinite in a row that becomes operands O, if those must not be (planes.h).
template <typename O, typename T>
LSTM_HD void look_at(const T*, Index, const O*) {}

// Elements first .. end of a row of operands, of which `count` are those of `from` and the others 0. `first` is a
// multiple of 16.
template <typename Isa, typename O, typename T>
LSTM_HD void copy_operands(const T* from, Index count, Index first, Index end, O* row) {
    out_of_line(Isa(), [&]() LSTM_INLINED {
        if (first < count) look_at(from + first, std::min(count, end) - first, row);
        for (Index j = first; j < end; j += kUnits) {
            alignas(64) Acc<T> units[kUnits] = {};
            if (j < count) load_units<Isa>(from + j, std::min(kUnits, count - j), units);
            store_operands<Isa>(units, std::min(kUnits, end - j), row, j);
        }
    });
}

// to = from + before, any number of elements; before may be null for nothing, and may be `to`.
template <typename Isa, typename T, typename B>
LSTM_HD void store_row(const Acc<T>* from, Index count, const B* before, T* to) {
    out_of_line(Isa(), [&]() LSTM_INLINED {
        using A = Acc<T>;
        Index j = 0;
        for (; j + lanes<Isa, A> <= count; j += lanes<Isa, A>) {
            Vector<Isa, A> x = load_vector<Isa>(from + j);
            if (before != nullptr) x += load_vector<Isa>(before + j);
            store_vector<Isa, T>(x, to + j);
        }
        for (; j < count; ++j) to[j] = store<T>(before == nullptr ? from[j] : from[j] + load(before[j]));
    });
}

// Two rows of a block trade lanes, those with bit Half in their number for those without.
template <int Half, typename Vector, int... Lanes>
LSTM_HD void trade_lanes(Vector& first, Vector& second, std::integer_sequence<int, Lanes...>) {
    constexpr int side = sizeof...(Lanes);  // lane j of the second row is number side + j of the pair
    const Vector a = first, b = second;
#ifdef __clang__
    first = __builtin_shufflevector(a, b, (Lanes & Half ? side + Lanes - Half : Lanes)...);
    second = __builtin_shufflevector(a, b, (Lanes & Half ? side + Lanes : Lanes + Half)...);
#else
    using Lane = std::conditional_t<sizeof(Vector) == 4 * side, std::int32_t, std::int64_t>;
    typedef Lane Mask __attribute__((vector_size(sizeof(Vector))));
    first = __builtin_shuffle(a, b, Mask{(Lanes & Half ? side + Lanes - Half : Lanes)...});
    second = __builtin_shuffle(a, b, Mask{(Lanes & Half ? side + Lanes : Lanes + Half)...});
#endif
}

// A block of one vector's lanes a side, rows[i][j] to rows[j][i]: blocks of half the side change places, ever smaller.
template <typename Vector, int Side, int Half = Side / 2>
LSTM_HD void transpose(Vector (&rows)[Side]) {
    if constexpr (Half > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < Side; ++i) {
            if (!(i & Half)) trade_lanes<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, Side>());
        }
        transpose<Vector, Side, Half / 2>(rows);
    }
}

// Of each of `Side` vectors of so many lanes the sum over its lanes, the i-th's in rows[0][i]; the others are used up.
template <typename Vector, int Side, int Half = Side / 2>
LSTM_HD void sum_lanes(Vector (&rows)[Side]) {
    if constexpr (Half > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < Half; ++i) {
            trade_lanes<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, Side>());
            rows[i] += rows[i + Half];
        }
        sum_lanes<Vector, Side, Half / 2>(rows);
    }
}

}  // namespace lstm::cpu

// The product that the recurrence is made of: a few rows times a tile of 64 columns packed for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../lstm_math.h"

namespace lstm::cpu {

using Index = std::int64_t;

constexpr Index kTile = 64;   // columns of a packed tile
constexpr Index kUnits = 16;  // hidden units of a forward tile: 16 columns for each of the gates i, f, g, o
constexpr int kRows = 6;      // most rows of one block: 6 x 4 accumulators fit the 32 registers of AVX-512 and NEON

// An instruction set: bytes of a vector, and how many vectors side by side one pass over k accumulates for each row.
template <int Bytes, int Vectors>
struct Isa {
    template <typename A>
    struct VectorOf {
        typedef A type __attribute__((vector_size(Bytes)));
    };
    static constexpr int vectors = Vectors;
    template <typename A>
    static constexpr Index columns = Vectors * Bytes / static_cast<Index>(sizeof(A));
};

// c[rows, 64] = a[rows, k] b[k, 64], or += if accumulate. lda and ldc: elements from one row of a and c to the next.
// Each element is one sum in the order of k from 0, so that it does not depend on how rows are put into blocks.
template <typename Isa, int Rows, typename A>
LSTM_HD void multiply_rows(const A* a, Index lda, const A* b, Index k, A* c, Index ldc, bool accumulate) {
    using Vector = typename Isa::template VectorOf<A>::type;
    constexpr Index lanes = sizeof(Vector) / sizeof(A);
    for (Index column = 0; column < kTile; column += Isa::template columns<A>) {
        Vector sum[Rows][Isa::vectors] = {};
        for (Index p = 0; p < k; ++p) {
            Vector row[Isa::vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Isa::vectors; ++v)
                std::memcpy(&row[v], b + p * kTile + column + v * lanes, sizeof(Vector));
#pragma GCC unroll 6
            for (int r = 0; r < Rows; ++r) {
                const A x = a[r * lda + p];
#pragma GCC unroll 4
                for (int v = 0; v < Isa::vectors; ++v) sum[r][v] += x * row[v];
            }
        }
        for (int r = 0; r < Rows; ++r) {
            Vector before[Isa::vectors] = {};
            if (accumulate) std::memcpy(before, c + r * ldc + column, sizeof(before));
            for (int v = 0; v < Isa::vectors; ++v) sum[r][v] += before[v];
            std::memcpy(c + r * ldc + column, sum[r], sizeof(sum[r]));
        }
    }
}

// multiply_rows for 1 <= rows <= kRows.
template <typename Isa, typename A>
LSTM_HD void multiply(Index rows, const A* a, Index lda, const A* b, Index k, A* c, Index ldc, bool accumulate) {
    static_assert(kRows == 6, "one case for each number of rows");
    switch (rows) {
        case 1:
            return multiply_rows<Isa, 1>(a, lda, b, k, c, ldc, accumulate);
        case 2:
            return multiply_rows<Isa, 2>(a, lda, b, k, c, ldc, accumulate);
        case 3:
            return multiply_rows<Isa, 3>(a, lda, b, k, c, ldc, accumulate);
        case 4:
            return multiply_rows<Isa, 4>(a, lda, b, k, c, ldc, accumulate);
        case 5:
            return multiply_rows<Isa, 5>(a, lda, b, k, c, ldc, accumulate);
        default:
            return multiply_rows<Isa, 6>(a, lda, b, k, c, ldc, accumulate);
    }
}

// 16 units between arrays, whole vectors at a time: a load that meets several narrower stores would wait for them.
template <typename Isa, typename A>
LSTM_HD void copy_units(const A* from, A* to) {
    using Vector = typename Isa::template VectorOf<A>::type;
    constexpr Index side = sizeof(Vector) / sizeof(A);
    for (Index j = 0; j < kUnits; j += side) {
        Vector x;
        std::memcpy(&x, from + j, sizeof(Vector));
        std::memcpy(to + j, &x, sizeof(Vector));
    }
}

// As many bf16 as an instruction set's vector has floats, and their bits as those of floats.
template <typename Isa>
struct Bf16Vectors {
    static constexpr Index side = sizeof(typename Isa::template VectorOf<float>::type) / sizeof(float);
    typedef std::uint16_t Narrow __attribute__((vector_size(2 * side)));
    typedef std::uint32_t Wide __attribute__((vector_size(4 * side)));
};

template <typename Isa>
LSTM_HD void copy_units(const BFloat16* from, float* to) {
    using V = Bf16Vectors<Isa>;
    for (Index j = 0; j < kUnits; j += V::side) {
        typename V::Narrow x;
        std::memcpy(&x, from + j, sizeof(x));
        const typename V::Wide bits = __builtin_convertvector(x, typename V::Wide) << 16;
        std::memcpy(to + j, &bits, sizeof(bits));
    }
}

template <typename Isa>
LSTM_HD void copy_units(const float* from, BFloat16* to) {
    using V = Bf16Vectors<Isa>;
    for (Index j = 0; j < kUnits; j += V::side) {
        typename V::Wide bits;
        std::memcpy(&bits, from + j, sizeof(bits));
        const auto x = __builtin_convertvector(round_to_bf16(bits), typename V::Narrow);
        std::memcpy(to + j, &x, sizeof(x));
    }
}

// 16 units between an array and registers; of the last tile only count < 16 exist, and the others are 0.
template <typename Isa, typename T>
LSTM_HD void load_units(const T* from, Index count, Acc<T>* to) {
    if (count < kUnits) {
        for (Index j = 0; j < kUnits; ++j) to[j] = j < count ? load(from[j]) : Acc<T>(0);
    } else if constexpr (std::is_same_v<T, Float16>) {
        for (Index j = 0; j < kUnits; ++j) to[j] = load(from[j]);
    } else {
        copy_units<Isa>(from, to);
    }
}

template <typename Isa, typename T>
LSTM_HD void store_units(const Acc<T>* from, Index count, T* to) {
    if (count < kUnits) {
        for (Index j = 0; j < count; ++j) to[j] = store<T>(from[j]);
    } else if constexpr (std::is_same_v<T, Float16>) {
        for (Index j = 0; j < kUnits; ++j) to[j] = store<T>(from[j]);
    } else {
        copy_units<Isa>(from, to);
    }
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

// w [4H, depth] to one tile of W_hh^T for the forward product, to [depth, 64]: column 16 * gate + j is unit 16 * tile +
// j of that gate. By blocks of 16 x 16, which stay in cache whatever the stride.
template <typename Isa, typename T>
LSTM_HD void pack_units(const T* w, Index hidden, Index depth, Index tile, Acc<T>* to) {
    using A = Acc<T>;
    using Vector = typename Isa::template VectorOf<A>::type;
    constexpr int side = sizeof(Vector) / sizeof(A);
    const Index first = tile * kUnits, units = std::min(kUnits, hidden - first);
    for (Index gate = 0; gate < 4; ++gate) {
        for (Index k = 0; k < depth; k += kUnits) {
            const Index count = std::min(kUnits, depth - k);
            alignas(64) A block[kUnits][kUnits] = {};
            for (Index j = 0; j < units; ++j)
                load_units<Isa>(w + (gate * hidden + first + j) * depth + k, count, block[j]);
            for (Index i = 0; i < count; i += side) {
                for (Index j = 0; j < kUnits; j += side) {
                    Vector rows[side];
                    for (int r = 0; r < side; ++r) std::memcpy(&rows[r], &block[j + r][i], sizeof(Vector));
                    transpose(rows);
                    for (int r = 0; r < std::min<Index>(side, count - i); ++r) {
                        std::memcpy(to + (k + i + r) * kTile + gate * kUnits + j, &rows[r], sizeof(Vector));
                    }
                }
            }
        }
    }
}

// What multiply makes of a tile that pack_units packed, from w [4H, H] itself: c[rows, 64]. Slower a row, and without
// packing: for calls of so few rows that packing would cost more. a: rows of whole vectors, 0 past H.
template <typename Isa, typename T>
LSTM_HD void multiply_unpacked(Index rows, const Acc<T>* a, Index lda, const T* w, Index hidden, Index tile,
                               Acc<T>* c) {
    using A = Acc<T>;
    using Vector = typename Isa::template VectorOf<A>::type;
    constexpr int side = sizeof(Vector) / sizeof(A);
    const Index first = tile * kUnits, units = std::min(kUnits, hidden - first);
    for (Index gate = 0; gate < 4; ++gate) {
        for (Index j = 0; j < kUnits; j += side) {
            const T* row[side];  // a unit past H takes the last one's, and gives 0
            for (int i = 0; i < side; ++i) row[i] = w + (gate * hidden + first + std::min(j + i, units - 1)) * hidden;
            for (Index r = 0; r < rows; ++r) {
                Vector sums[side] = {};  // over k, lane by lane
                for (Index k = 0; k < hidden; k += side) {
                    const Index count = std::min<Index>(side, hidden - k);
                    Vector x, y = {};
                    std::memcpy(&x, a + r * lda + k, sizeof(Vector));
#pragma GCC unroll 16
                    for (int i = 0; i < side; ++i) {
                        if (count == side) {
                            alignas(64) A values[side];
                            for (Index v = 0; v < side; ++v) values[v] = load(row[i][k + v]);
                            std::memcpy(&y, values, sizeof(Vector));
                        } else {
                            for (Index v = 0; v < side; ++v) y[v] = v < count ? load(row[i][k + v]) : A(0);
                        }
                        sums[i] += x * y;
                    }
                }
                transpose(sums);
                for (int i = 1; i < side; ++i) sums[0] += sums[i];
                for (Index i = 0; i < side; ++i)
                    c[r * kTile + gate * kUnits + j + i] = j + i < units ? sums[0][i] : A(0);
            }
        }
    }
}

// w [4H, H] to columns 64 * tile .. of W_hh for the backward product, to [4H, 64].
template <typename Isa, typename T>
LSTM_HD void pack_columns(const T* w, Index hidden, Index tile, Acc<T>* to) {
    for (Index k = 0; k < 4 * hidden; ++k) {
        for (Index j = 0; j < kTile; j += kUnits) {
            const Index column = tile * kTile + j;
            load_units<Isa>(w + k * hidden + column, std::clamp<Index>(hidden - column, 0, kUnits), to + k * kTile + j);
        }
    }
}

}  // namespace lstm::cpu

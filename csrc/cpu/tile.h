// The product that the recurrence is made of: a few rows times a tile of 64 columns packed for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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

// 16 units between an array and registers; of the last tile only count < 16 exist, and the others are 0.
template <typename T>
LSTM_HD void load_units(const T* from, Index count, Acc<T>* to) {
    if (count == kUnits) {
        for (Index j = 0; j < kUnits; ++j) to[j] = load(from[j]);
    } else {
        for (Index j = 0; j < kUnits; ++j) to[j] = j < count ? load(from[j]) : Acc<T>(0);
    }
}

template <typename T>
LSTM_HD void store_units(const Acc<T>* from, Index count, T* to) {
    if (count == kUnits) {
        for (Index j = 0; j < kUnits; ++j) to[j] = store<T>(from[j]);
    } else {
        for (Index j = 0; j < count; ++j) to[j] = store<T>(from[j]);
    }
}

// w [4H, H] to one tile of W_hh^T for the forward product, to [H, 64]: column 16 * gate + j is unit 16 * tile + j of
// that gate. By blocks of 16 x 16, which stay in cache whatever the stride.
template <typename T>
LSTM_HD void pack_units(const T* w, Index hidden, Index tile, Acc<T>* to) {
    const Index first = tile * kUnits, units = std::min(kUnits, hidden - first);
    for (Index k = 0; k < hidden; k += kUnits) {
        const Index count = std::min(kUnits, hidden - k);
        for (Index gate = 0; gate < 4; ++gate) {
            alignas(64) Acc<T> block[kUnits][kUnits] = {};
            for (Index j = 0; j < units; ++j) load_units(w + (gate * hidden + first + j) * hidden + k, count, block[j]);
            for (Index i = 0; i < count; ++i) {
                for (Index j = 0; j < kUnits; ++j) to[(k + i) * kTile + gate * kUnits + j] = block[j][i];
            }
        }
    }
}

// w [4H, H] to columns 64 * tile .. of W_hh for the backward product, to [4H, 64].
template <typename T>
LSTM_HD void pack_columns(const T* w, Index hidden, Index tile, Acc<T>* to) {
    for (Index k = 0; k < 4 * hidden; ++k) {
        for (Index j = 0; j < kTile; j += kUnits) {
            const Index column = tile * kTile + j;
            load_units(w + k * hidden + column, std::clamp<Index>(hidden - column, 0, kUnits), to + k * kTile + j);
        }
    }
}

}  // namespace lstm::cpu

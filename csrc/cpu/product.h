// The one product that everything is made of: a few rows times a tile of 64 columns, and how tiles are packed for it.
//
// An operand is A, the accumulation type, or bf16 where the processor multiplies pairs of it (OperandOf). A packed tile
// is [k, 64]; of bf16 [k / 2, 64, 2], two neighbours in k side by side, with 0 behind an odd k.
#pragma once

#include "vectors.h"

namespace lstm::cpu {

constexpr int kRows = 6;       // most rows of one block: 6 x 4 accumulators fit the 32 registers of AVX-512 and NEON
constexpr Index kDepth = 512;  // longest sum in registers: a tile of so many rows stays in the second cache

// Elements of a packed tile of depth k.
LSTM_HD Index tile_size(Index k) { return (k + k % 2) * kTile; }

// How a product finds element (row, p) of its left side: a[row * lda + p], or, down the columns, a[p * lda + row].
enum class Along { rows, columns };

// c[rows, 64] = a[rows, k] b[k, 64], or += if accumulate. ldb, ldc: elements from one row to the next. Each element is
// one sum in the order of k from 0, so that it does not depend on how rows are put into blocks.
template <typename Isa, int Rows, Along along, typename A>
LSTM_HD void multiply_rows(const A* a, Index lda, const A* b, Index ldb, Index k, A* c, Index ldc, bool accumulate) {
    constexpr Index side = lanes<Isa, A>;
    for (Index column = 0; column < kTile; column += Isa::vectors * side) {
        Vector<Isa, A> sum[Rows][Isa::vectors] = {};
        for (Index p = 0; p < k; ++p) {
            Vector<Isa, A> row[Isa::vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Isa::vectors; ++v)
                std::memcpy(&row[v], b + p * ldb + column + v * side, sizeof(row[v]));
#pragma GCC unroll 6
            for (int r = 0; r < Rows; ++r) {
                const A x = along == Along::rows ? a[r * lda + p] : a[p * lda + r];
#pragma GCC unroll 4
                for (int v = 0; v < Isa::vectors; ++v) sum[r][v] += x * row[v];
            }
        }
        for (int r = 0; r < Rows; ++r) {
            Vector<Isa, A> before[Isa::vectors] = {};
            if (accumulate) std::memcpy(before, c + r * ldc + column, sizeof(before));
            for (int v = 0; v < Isa::vectors; ++v) sum[r][v] += before[v];
            std::memcpy(c + r * ldc + column, sum[r], sizeof(sum[r]));
        }
    }
}

#ifdef __x86_64__
// The same with pairs. Down the columns, a[p * lda + 2 * row] is the pair of p and p + 1, p even.
template <typename Isa, int Rows, Along along>
__attribute__((target(LSTM_PAIRS_TARGET))) inline void multiply_rows(const BFloat16* a, Index lda, const BFloat16* b,
                                                                     Index ldb, Index k, float* c, Index ldc,
                                                                     bool accumulate) {
    __m512 sum[Rows][4];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (Index p = 0; p < k; p += 2) {
        __m512i row[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) row[v] = _mm512_loadu_si512(b + p * ldb + 32 * v);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
            std::int32_t pair = 0;
            if (along == Along::columns) {
                std::memcpy(&pair, a + p * lda + 2 * r, sizeof(pair));
            } else if (p + 1 < k) {
                std::memcpy(&pair, a + r * lda + p, sizeof(pair));
            } else {
                pair = a[r * lda + p].bits;
            }
            const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)x, (__m512bh)row[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            float* const to = c + r * ldc + 16 * v;
            _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
        }
    }
}
#endif

// multiply_rows for any number of rows, in blocks of nearly the same size, and for any k.
template <typename Isa, Along along = Along::rows, typename O, typename A>
LSTM_HD void multiply(Index rows, const O* a, Index lda, const O* b, Index ldb, Index k, A* c, Index ldc,
                      bool accumulate) {
    static_assert(kRows == 6, "one case for each number of rows");
    const Index blocks = (rows + kRows - 1) / kRows, of_row = along == Along::rows ? lda : sizeof(A) / sizeof(O);
    const Index of_depth = along == Along::rows ? 1 : lda;
    Index p = 0;
    do {  // once for k = 0 too, which is a sum of nothing
        const Index depth = std::min(kDepth, k - p);
        for (Index block = 0; block < blocks; ++block) {
            const Index first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
            const O* const a_block = a + first * of_row + p * of_depth;
            const O* const b_block = b + p * ldb;
            A* const c_block = c + first * ldc;
            for (Index r = 0; along == Along::columns && r < count; ++r) {  // c lies far away: let it come meanwhile
                for (Index column = 0; column < kTile; column += 64 / sizeof(A))
                    __builtin_prefetch(c_block + r * ldc + column, 1);
            }
#define LSTM_CASE(n)                                                                               \
    case n:                                                                                        \
        multiply_rows<Isa, n, along>(a_block, lda, b_block, ldb, depth, c_block, ldc, accumulate); \
        break;
            switch (count) { LSTM_CASE(1) LSTM_CASE(2) LSTM_CASE(3) LSTM_CASE(4) LSTM_CASE(5) LSTM_CASE(6) }
#undef LSTM_CASE
        }
        p += kDepth;
        accumulate = true;
    } while (p < k);
}

// ---- Packing -------------------------------------------------------------------------------------------------------

// Up to 64 rows of a matrix, in four groups of up to 16, each group's rows one behind the other in memory.
template <typename T>
struct Groups {
    const T* first[4];
    Index count[4];
};

// Rows of `depth` elements become columns: the tile [depth, 64], 0 where a group has no row. By blocks of one vector's
// lanes a side, from memory to memory by way of registers alone wherever a block is whole.
template <typename Isa, typename T>
LSTM_HD void pack_rows(const Groups<T>& groups, Index depth, Acc<T>* to) {
    using A = Acc<T>;
    constexpr int side = lanes<Isa, A>;
    for (Index group = 0; group < 4; ++group) {
        for (Index k = 0; k < depth; k += side) {
            for (Index j = 0; j < kUnits; j += side) {
                const T* const from = groups.first[group] + j * depth + k;
                A* const tile = to + k * kTile + group * kUnits + j;
                const Index columns = std::min<Index>(side, depth - k);
                Vector<Isa, A> rows[side];
                if (columns == side && groups.count[group] >= j + side) {
#pragma GCC unroll 16
                    for (int r = 0; r < side; ++r) rows[r] = load_vector<Isa>(from + r * depth);
                } else {
                    for (int r = 0; r < side; ++r) {
                        alignas(64) A units[kUnits];
                        load_units<Isa>(from + r * depth, j + r < groups.count[group] ? columns : 0, units);
                        std::memcpy(&rows[r], units, sizeof(rows[r]));
                    }
                }
                transpose(rows);
#pragma GCC unroll 16
                for (int r = 0; r < side; ++r) {
                    if (r < columns) std::memcpy(tile + r * kTile, &rows[r], sizeof(rows[r]));
                }
            }
        }
    }
}

// `columns` <= 64 columns of k rows, the p-th at row(p), to [k, 64] with 0 behind.
template <typename Isa, typename T, typename Row>
LSTM_HD void pack_columns(Index k, Index columns, const Row& row, Acc<T>* to) {
    for (Index p = 0; p < k; ++p) {
        const T* const from = row(p);
        for (Index j = 0; j < kTile; j += kUnits)
            load_units<Isa>(from + j, std::clamp<Index>(columns - j, 0, kUnits), to + p * kTile + j);
    }
}

#ifdef __x86_64__
template <typename Isa>
LSTM_HD void pack_rows(const Groups<BFloat16>& groups, Index depth, BFloat16* to) {
    if (depth % 2 == 0) {  // a pair lies there as one 32-bit word, whose value no copy looks at
        Groups<float> words;
        for (int group = 0; group < 4; ++group) {
            words.first[group] = reinterpret_cast<const float*>(groups.first[group]);
            words.count[group] = groups.count[group];
        }
        return pack_rows<Isa>(words, depth / 2, reinterpret_cast<float*>(to));
    }
    for (Index k = 0; k < depth + depth % 2; ++k) {
        for (Index column = 0; column < kTile; ++column) {
            const Index group = column / kUnits, j = column % kUnits;
            const bool there = k < depth && j < groups.count[group];
            to[(k / 2 * kTile + column) * 2 + k % 2] = there ? groups.first[group][j * depth + k] : BFloat16{0};
        }
    }
}

// Two rows of `count` elements side by side: to[j][0] = even[j], to[j][1] = odd[j]; odd may be null, for zeros.
template <typename Isa>
LSTM_HD void interleave(const BFloat16* even, const BFloat16* odd, Index count, BFloat16* to) {
    constexpr Index side = sizeof(typename Isa::Narrow) / sizeof(BFloat16);
    for (Index j = 0; j < count; j += side) {
        typename Isa::Narrow low = {}, high = {};
        const Index bytes = std::min(side, count - j) * static_cast<Index>(sizeof(BFloat16));
        if (bytes == sizeof(low)) {
            std::memcpy(&low, even + j, sizeof(low));
            if (odd != nullptr) std::memcpy(&high, odd + j, sizeof(high));
        } else {
            std::memcpy(&low, even + j, bytes);
            if (odd != nullptr) std::memcpy(&high, odd + j, bytes);
        }
        const typename Isa::Wide pairs =
            __builtin_convertvector(low, typename Isa::Wide) | __builtin_convertvector(high, typename Isa::Wide) << 16;
        if (bytes == sizeof(low)) {
            std::memcpy(to + 2 * j, &pairs, sizeof(pairs));
        } else {
            std::memcpy(to + 2 * j, &pairs, 2 * bytes);
        }
    }
}

template <typename Isa, typename T, typename Row>
LSTM_HD void pack_columns(Index k, Index columns, const Row& row, BFloat16* to) {
    for (Index p = 0; p < k; p += 2) {
        const BFloat16 *const even = row(p), *const odd = p + 1 < k ? row(p + 1) : nullptr;
        if (columns < kTile) std::fill_n(to + p * kTile, 2 * kTile, BFloat16{0});
        interleave<Isa>(even, odd, columns, to + p * kTile);
    }
}
#endif

// ---- Without packing -----------------------------------------------------------------------------------------------

// The sums over k of X rows of a times W rows of w [.., k]: X * W makes one vector. Lane by lane over k, then over the
// lanes. One row of a takes those of w one after the other, as memory delivers them best; more take them side by side,
// to read each once. c[X, 64] (+)= the sums in its first columns, of which `columns` <= W are kept.
template <typename Isa, int X, typename O, typename T>
LSTM_HD void dot_rows(const O* a, Index lda, const T* w, Index columns, Index k, Acc<T>* c, bool accumulate) {
    using A = Acc<T>;
    constexpr int side = lanes<Isa, A>, W = side / X;
    const auto row = [&](int n)
                         LSTM_INLINED { return w + std::min<Index>(n, columns - 1) * k; };  // past them, the last
    Vector<Isa, A> sums[side];
    const Index whole = k - k % side;
    if constexpr (X == 1) {
        constexpr int parts = 4;  // sums at once: enough to hide the latency of one
#pragma GCC unroll 1
        for (int n = 0; n < W; ++n) {
            const T* const right = row(n);
            Vector<Isa, A> part[parts] = {};
            Index p = 0;
            for (; p + parts * side <= whole; p += parts * side) {
#pragma GCC unroll 4
                for (int i = 0; i < parts; ++i)
                    part[i] += load_vector<Isa>(a + p + i * side) * load_vector<Isa>(right + p + i * side);
            }
            for (; p < whole; p += side) part[0] += load_vector<Isa>(a + p) * load_vector<Isa>(right + p);
            sums[n] = (part[0] + part[1]) + (part[2] + part[3]);
        }
    } else {
        const T* rows[W];
        for (int n = 0; n < W; ++n) rows[n] = row(n);
        for (int i = 0; i < side; ++i) sums[i] = Vector<Isa, A>{};
        for (Index p = 0; p < whole; p += side) {
            Vector<Isa, A> left[X];
#pragma GCC unroll 4
            for (int x = 0; x < X; ++x) left[x] = load_vector<Isa>(a + x * lda + p);
#pragma GCC unroll 8
            for (int n = 0; n < W; ++n) {
                const auto right = load_vector<Isa>(rows[n] + p);
#pragma GCC unroll 4
                for (int x = 0; x < X; ++x) sums[x * W + n] += left[x] * right;
            }
        }
    }
    if (whole < k) {
        alignas(64) A left[X][side] = {}, right[side] = {};
        for (int x = 0; x < X; ++x) {
            for (Index i = whole; i < k; ++i) left[x][i - whole] = load(a[x * lda + i]);
        }
        for (int n = 0; n < W; ++n) {
            for (Index i = whole; i < k; ++i) right[i - whole] = load(row(n)[i]);
            for (int x = 0; x < X; ++x) sums[x * W + n] += load_vector<Isa>(left[x]) * load_vector<Isa>(right);
        }
    }
    transpose(sums);
    for (int i = 1; i < side; ++i) sums[0] += sums[i];
    for (int x = 0; x < X; ++x) {
        for (Index n = 0; n < columns; ++n)
            c[x * kTile + n] = sums[0][x * W + n] + (accumulate ? c[x * kTile + n] : A(0));
    }
}

// What multiply makes of a tile that pack_rows packed, from the rows themselves, for calls of so few rows that packing
// would cost more: c[rows, 64] (+)= a[rows, k] w^T.
template <typename Isa, typename O, typename T>
LSTM_HD void multiply_unpacked(Index rows, const O* a, Index lda, const Groups<T>& groups, Index k, Acc<T>* c,
                               bool accumulate) {
    constexpr int side = lanes<Isa, Acc<T>>, most = side < 4 ? side : 4;
    const auto block = [&](auto x, Index r) LSTM_INLINED {  // x rows from the r-th on
        constexpr int X = decltype(x)::value, W = side / X;
        for (Index group = 0; group < 4; ++group) {
            const Index count = groups.count[group];
            Acc<T>* const to = c + r * kTile + group * kUnits;
            for (Index j = 0; j < count; j += W) {
                dot_rows<Isa, X>(a + r * lda, lda, groups.first[group] + j * k, std::min<Index>(W, count - j), k,
                                 to + j, accumulate);
            }
            for (int n = 0; n < X; ++n) std::fill(to + n * kTile + count, to + n * kTile + kUnits, Acc<T>(0));
        }
    };
    Index r = 0;
    for (; r + most <= rows; r += most) block(std::integral_constant<int, most>(), r);
    for (; most > 2 && r + 2 <= rows; r += 2) block(std::integral_constant<int, most / 2>(), r);
    for (; r < rows; ++r) block(std::integral_constant<int, 1>(), r);
}

}  // namespace lstm::cpu

// The one product that everything is made of: a few rows times a tile of 64 columns, and how tiles are packed for it.
//
// An operand is A, the accumulation type, or bf16 where the processor multiplies pairs of it (OperandOf). A packed tile
// lies in panels of as many columns as one pass over k takes, [64 / width, k, width], each read front to back. Of bf16
// a tile is [k / 2, 64, 2], two neighbours in k side by side, with 0 behind an odd k.
// AMX has tiles of its own (amx.h).
#pragma once

#include "fixed.h"

namespace lstm::cpu {

constexpr Index kDeep = 32;        // k of a packed tile is padded to a multiple,
constexpr Index kDigitsDeep = 64;  // of digits to one of these
constexpr int kBlocksToFetch = 4;  // at least, that share asking for the next panel
constexpr Index kManyRows = 12;    // of a step at most, that leave the second cache to a weight

// Whether the calling thread met what its products can't hold: infinity in planes, or with weights in fixed point a sum
// that is no finite float. Such a call is computed anew.
inline thread_local bool unfit;

LSTM_HD Index round_up(Index n, Index unit) { return (n + unit - 1) / unit * unit; }

// Columns of a panel of operands O.
template <typename Isa, typename O>
constexpr Index panel_width = Isa::vectors * lanes<Isa, O>;
template <typename Isa>
constexpr Index panel_width<Isa, BFloat16> = kTile;
#ifdef LSTM_X86
template <typename Isa, int N>
constexpr Index panel_width<Isa, Planes<N>> = 32;
template <typename Isa>
constexpr Index panel_width<Isa, Digits> = 32;
#endif

// What k of a packed tile of operands O is padded to a multiple of.
template <typename O>
constexpr Index deep = whole_rows<O>  ? kDigitsDeep
                       : in_planes<O> ? kDeep
                                      : 2;

// Whether a tile is one panel of floats, which may be in fixed point (fixed.h).
template <typename Isa, typename O>
constexpr bool whole_panel = std::is_same_v<O, float> && panel_width<Isa, O> == kTile;
// Whether a product can ask, while it reads a tile, for the one that comes next: where each block of rows reads all of
// it, in lines of memory.
template <typename Isa, typename O>
constexpr bool asks = Isa::blocks == 1 && std::is_floating_point_v<O>;

// Elements of a packed tile of depth k.
LSTM_HD Index tile_size(Index k) { return round_up(k, kDigitsDeep) * kTile; }

// The right side of a product, [k, 64]: element (p, column) is b[column / width * panel + p * ld + column % width], of
// a panel's width. `weight`: how many elements has the weight whose tiles are taken one after the other. `scales`:
// [k / kDepth, 64] of a tile whose pieces may be in fixed point, [64] of digits, else null. `next`: the tile to ask for
// meanwhile, of the same depth, or null; `turn` of `turns` blocks of rows at this one is the product's first.
// `columns`: how many the product is asked for, a multiple of 16; it may compute the others too.
template <typename O>
struct Right {
    O* b;
    Index ld, panel;
    Index weight = 0;
    float* scales = nullptr;
    const O* next = nullptr;
    Index turn = 0, turns = 1;
    Index columns = kTile;

    LSTM_HD Right from(Index p) const {
        float* const its_scales = scales == nullptr ? nullptr : scales + p / kDepth * kTile;
        return Right{b + p * ld, ld, panel, weight, its_scales}.only(columns);
    }
    LSTM_HD Right only(Index count) const {
        Right right = *this;
        right.columns = std::min(kTile, round_up(count, kUnits));
        return right;
    }
};

// The packed tile of depth k at b.
template <typename Isa, typename O>
LSTM_HD Right<O> packed_at(O* b, Index k, Index weight = 0) {
    constexpr Index width = panel_width<Isa, std::remove_const_t<O>>;
    return {b, width, round_up(k, deep<std::remove_const_t<O>>) * width, weight};
}

// Whether a weight of so many elements is too large for the second cache beside what else is there; or, where a step
// has many rows, whose states and sums need room as well.
LSTM_HD bool is_far(Index elements) { return elements > 1 << 19; }
LSTM_HD bool is_far_for_many(Index elements) { return elements > 1 << 17; }

// Asks for the next tile of a far weight, if there is another and it is packed: by a thread's first blocks of a step's
// rows, as those that follow find this one in cache, while memory rests. A single block would wait for memory in any
// case. `first`: row of the step, whose blocks so many threads share by turns.
template <typename Isa, typename O>
LSTM_HD void ask_for(const O* next, Index first, Index rows_of_step, Index threads, Right<const O>& right) {
    const bool packed = right.ld == panel_width<Isa, O>;
    const Index turns = ((rows_of_step + kRows - 1) / kRows + threads - 1) / threads;
    const bool far = turns * kRows > kManyRows ? is_far_for_many(right.weight) : is_far(right.weight);
    if (!asks<Isa, O> || !far || !packed || next == right.b || turns == 1) return;
    right.next = next;
    right.turn = (first + kRows - 1) / kRows / threads;
    right.turns = turns;
}

// How many of a step's blocks ask, each for so large a part of the next tile: rather four, each of which has more time.
LSTM_HD Index asking_of(Index turns) { return turns < 4 ? 2 : 4; }

// How a product finds element (row, p) of its left side: a[row * lda + p]; down the columns, a[p * lda + row]; or in
// packed blocks of Isa::side rows, [rows / side, lda, side], so that a block is read front to back.
enum class Along { rows, columns, blocks };

// How many vectors side by side `rows` rows are multiplied by: more for few rows, whose sums would wait for each other.
template <typename Isa, typename A>
constexpr int vectors_for(int rows) {
    int vectors = Isa::vectors;
    while (2 * vectors * lanes<Isa, A> <= kTile && 2 * vectors * rows + 4 <= Isa::registers) vectors *= 2;
    return vectors;
}

// One pass over k: c[rows, n] = a[rows, k] b[k, n], or += if accumulate, of n columns in `Vectors` vectors. ldc:
// elements from one row to the next. Each element is one sum in the order of k from 0, so that it does not depend on
// how rows and columns are put together. At each k it asks for so many elements of b.next.
template <typename Isa, int Rows, int Vectors, Along along, int asked, typename A>
LSTM_HD void multiply_pass(const A* a, Index lda, const Right<const A>& b, Index k, A* c, Index ldc, bool accumulate) {
    constexpr Index side = lanes<Isa, A>;
    Vector<Isa, A> sum[Rows][Vectors] = {};
#pragma GCC unroll 4
    for (Index p = 0; p < k; ++p) {
#pragma GCC unroll 2
        for (Index i = 0; i < asked; i += side) __builtin_prefetch(b.next + p * asked + i, 0, 2);
        Vector<Isa, A> row[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            const A* const panel = b.b + v / Isa::vectors * b.panel;
            std::memcpy(&row[v], panel + p * b.ld + v % Isa::vectors * side, sizeof(row[v]));
        }
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
            const A x = along == Along::rows ? a[r * lda + p] : a[p * lda + r];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[r][v] += x * row[v];
        }
    }
    const auto put = [&](bool add) LSTM_INLINED {
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) {
                A* const to = c + r * ldc + v * side;
                if (add) sum[r][v] += load_vector<Isa>(to);
                store_vector<Isa, A>(sum[r][v], to);
            }
        }
    };
    if (accumulate) {
        put(true);
    } else {
        put(false);
    }
}

#ifdef LSTM_X86
// The same with pairs. Down the columns, a[p * lda + 2 * row] is the pair of p and p + 1, p even.
template <typename Isa, int Rows, int Vectors, Along along, int>
__attribute__((target(LSTM_PAIRS_TARGET))) inline void multiply_pass(const BFloat16* a, Index lda,
                                                                     const Right<const BFloat16>& b, Index k, float* c,
                                                                     Index ldc, bool accumulate) {
    static_assert(Vectors == 4, "a whole tile");
    __m512 sum[Rows][4];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (Index p = 0; p < k; p += 2) {
        __m512i row[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) row[v] = _mm512_loadu_si512(b.b + p * b.ld + 32 * v);
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

// multiply_pass for 1 to kRows rows, of as many columns as one pass takes: more of few rows, if `alone`.
template <typename Isa, Along along, typename O, typename A>
LSTM_HD void multiply_block(Index rows, bool alone, const O* a, Index lda, const Right<const O>& b, Index k, A* c,
                            Index ldc, bool accumulate) {
    for (Index r = 0; along == Along::columns && r < rows; ++r) {  // c lies far away: let it come meanwhile
        for (Index j = 0; j < panel_width<Isa, A>; j += 64 / sizeof(A)) __builtin_prefetch(c + r * ldc + j, 1);
    }
    const auto pass = [&](auto n) LSTM_INLINED {
        constexpr int Rows = decltype(n)::value, wide = vectors_for<Isa, A>(Rows);
        if constexpr (wide > Isa::vectors) {
            if (alone) return multiply_pass<Isa, Rows, wide, along, 0>(a, lda, b, k, c, ldc, accumulate);
        }
#ifdef LSTM_X86
        if constexpr (whole_panel<Isa, O> && along == Along::rows) {
            if (b.scales != nullptr && b.scales[0] >= 0) {
                unfit |= !multiply_fixed<Rows>(a, lda, b.b, b.scales, k, c, ldc, accumulate);
                return;
            }
        }
#endif
        const auto of_some = [&](auto units) LSTM_INLINED {  // columns: 16 for each
            constexpr int some = decltype(units)::value, vectors = some * kUnits / lanes<Isa, A>;
            if constexpr (std::is_floating_point_v<O> && vectors < Isa::vectors) {
                if (b.columns > some * kUnits) return false;
                multiply_pass<Isa, Rows, vectors, along, 0>(a, lda, b, k, c, ldc, accumulate);
                return true;
            }
            return false;
        };
        if (b.next == nullptr &&
            (of_some(std::integral_constant<int, 1>()) || of_some(std::integral_constant<int, 2>()) ||
             of_some(std::integral_constant<int, 3>())))
            return;
        if constexpr (asks<Isa, O> && along == Along::rows) {
            constexpr int width = panel_width<Isa, O>;
            if (b.next != nullptr && asking_of(b.turns) == 2)
                return multiply_pass<Isa, Rows, Isa::vectors, along, width / 2>(a, lda, b, k, c, ldc, accumulate);
            if (b.next != nullptr)
                return multiply_pass<Isa, Rows, Isa::vectors, along, width / 4>(a, lda, b, k, c, ldc, accumulate);
        }
        multiply_pass<Isa, Rows, Isa::vectors, along, 0>(a, lda, b, k, c, ldc, accumulate);
    };
#define LSTM_CASE(n) \
    case n:          \
        return pass(std::integral_constant<int, n>());
    static_assert(kRows == 6, "one case for each number of rows");
    switch (rows) { LSTM_CASE(1) LSTM_CASE(2) LSTM_CASE(3) LSTM_CASE(4) LSTM_CASE(5) LSTM_CASE(6) }
#undef LSTM_CASE
}

// Asks for rows first .. end of a panel.
template <typename O>
LSTM_HD void fetch(const O* b, Index ld, Index first, Index end) {
#pragma GCC unroll 8
    for (Index p = first; p < end; ++p) __builtin_prefetch(b + p * ld);
}

// multiply_pass for any number of rows, in blocks of nearly the same size, for b.columns of a tile, and for any k.
// Some blocks take turns at a panel, which meanwhile stays in cache; their sums stay until all of k has been.
template <typename Isa, Along along, typename O, typename A>
LSTM_HD void multiply_blocks(Index rows, const O* a, Index lda, const Right<const O>& b, Index k, A* c, Index ldc,
                             bool accumulate) {
    constexpr Index side = lanes<Isa, A>;
    constexpr Along in_block = along == Along::rows ? Along::rows : Along::columns;
    const Index blocks = (rows + kRows - 1) / kRows, of_row = along == Along::columns ? sizeof(A) / sizeof(O) : lda;
    const Index of_depth = along == Along::rows ? 1 : along == Along::columns ? lda : kRows;
    const bool alone = blocks == 1 && b.columns == kTile;
    const Index width = side * (alone ? vectors_for<Isa, A>(static_cast<int>(rows)) : Isa::vectors);
    const auto begin = [&](Index i) LSTM_INLINED {
        return along == Along::blocks ? std::min(i * kRows, rows) : rows * i / blocks;
    };
    const auto part_of_next = [&](Index turn, Index p, Index column) LSTM_INLINED {
        const Index asking = asking_of(b.turns), asked = width / asking;
        return b.next != nullptr && turn < asking ? b.next + column * k + (turn * k + p) * asked : nullptr;
    };
    const auto multiply_panels = [&](Index turn, Index end, Index p, Index column) LSTM_INLINED {
        const Index depth = std::min(kDepth, k - p), longest = in_block == Along::columns ? kShortSum : depth;
        Right<const O> panels = b.from(p);
        panels.b += column / panel_width<Isa, A> * b.panel;
        panels.turns = b.turns;
        panels.columns = b.columns - column;
        for (Index block = turn; block < end; ++block) {
            if (is_far(b.weight) && end - turn >= kBlocksToFetch)
                fetch(panels.b + b.panel, b.ld, depth * (block - turn) / (end - turn),
                      depth * (block - turn + 1) / (end - turn));
            panels.next = part_of_next(b.turn + block, p, column);
            const Index first = begin(block), count = begin(block + 1) - first;
            Index q = 0;
            do {  // as below
                multiply_block<Isa, in_block>(count, alone, a + first * of_row + (p + q) * of_depth,
                                              along == Along::blocks ? kRows : lda, q == 0 ? panels : panels.from(q),
                                              std::min(longest, depth - q), c + first * ldc + column, ldc,
                                              accumulate || p + q > 0);
                q += longest;
            } while (q < depth);
        }
    };
    for (Index turn = 0; turn < blocks; turn += Isa::blocks) {
        Index p = 0;
        do {  // once for k = 0 too, which is a sum of nothing
            for (Index column = 0; column < b.columns; column += width)
                multiply_panels(turn, std::min(turn + Isa::blocks, blocks), p, column);
            p += kDepth;
        } while (p < k);
    }
}

// multiply_blocks as a function of its own, one for all its callers. Not out_of_line, whose operands would lie in
// memory.
#define LSTM_MULTIPLY(Isa, ...)                                                                                       \
    template <Along along, typename O, typename A>                                                                    \
    __attribute__((noinline __VA_ARGS__)) void multiply_in(                                                           \
        Isa, Index rows, const O* a, Index lda, const Right<const O>& b, Index k, A* c, Index ldc, bool accumulate) { \
        multiply_blocks<Isa, along>(rows, a, lda, b, k, c, ldc, accumulate);                                          \
    }
LSTM_MULTIPLY(Baseline)
#ifdef LSTM_X86
LSTM_MULTIPLY(Avx2, , target(LSTM_AVX2_TARGET))
LSTM_MULTIPLY(Avx512, , target(LSTM_AVX512_TARGET))
LSTM_MULTIPLY(Pairs, , target(LSTM_PAIRS_TARGET))
#endif
#undef LSTM_MULTIPLY

template <typename Isa, Along along = Along::rows, typename O, typename A>
LSTM_HD void multiply(Index rows, const O* a, Index lda, const Right<const O>& b, Index k, A* c, Index ldc,
                      bool accumulate) {
    multiply_in<along>(Isa(), rows, a, lda, b, k, c, ldc, accumulate);
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
LSTM_HD void pack_rows(const Groups<T>& groups, Index depth, const Right<Acc<T>>& to) {
    out_of_line(Isa(), [&]() LSTM_INLINED {
        using A = Acc<T>;
        constexpr int side = lanes<Isa, A>;
        for (Index group = 0; group < 4; ++group) {
            for (Index k = 0; k < depth; k += side) {
                for (Index j = 0; j < kUnits; j += side) {
                    const T* const from = groups.first[group] + j * depth + k;
                    const Index column = group * kUnits + j, width = panel_width<Isa, A>;
                    A* const tile = to.b + column / width * to.panel + k * to.ld + column % width;
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
                        if (r < columns) std::memcpy(tile + r * to.ld, &rows[r], sizeof(rows[r]));
                    }
                }
            }
        }
    });
}

// The pieces of a packed tile of depth k become fixed point in their place, if they may.
template <typename Isa, typename O>
LSTM_HD void fix_tile([[maybe_unused]] const Right<O>& tile, [[maybe_unused]] Index k) {
#ifdef LSTM_X86
    if constexpr (whole_panel<Isa, O>) {
        for (Index p = 0; p < k; p += kDepth) fix(std::min(kDepth, k - p), tile.from(p).b, tile.from(p).scales);
    }
#endif
}

// Elements of its scales.
LSTM_HD Index scales_size(Index k) { return (k + kDepth - 1) / kDepth * kTile; }

// `columns` <= 64 columns of k rows, the p-th at row(p), to [k, 64] with 0 behind, as far as a product computes
// to.columns.
template <typename Isa, typename T, typename Row>
LSTM_HD void pack_columns(Index k, Index columns, const Row& row, const Right<Acc<T>>& to) {
    out_of_line(Isa(), [&]() LSTM_INLINED {
        using A = Acc<T>;
        constexpr Index side = lanes<Isa, A>, width = panel_width<Isa, A>;
        for (Index p = 0; p < k; ++p) {
            const T* const from = row(p);
            for (Index j = 0; j < to.columns; j += kUnits) {
                alignas(64) A units[kUnits];
                const Index count = std::clamp<Index>(columns - j, 0, kUnits);
                if (count < kUnits) load_units<Isa>(from + j, count, units);
                for (Index i = 0; i < kUnits; i += side) {
                    const auto x = count < kUnits ? load_vector<Isa>(units + i) : load_vector<Isa>(from + j + i);
                    store_vector<Isa, A>(x, to.b + (j + i) / width * to.panel + p * to.ld + (j + i) % width);
                }
            }
        }
    });
}

// k of a packed block of the columns of a[k, columns]: a row more than there is, or in AMX whole steps.
template <typename Isa>
LSTM_HD Index packed_depth(Index k) {
    return Isa::side == kRows ? k + 1 : round_up(k, kDeep);
}

// Columns of a[k, columns] to blocks of kRows of them, [columns / kRows, k + 1, kRows]: a block's columns side by side,
// from the first-th block up to the last-th. Whole vectors are read and written, whose ends the next row overwrites;
// the last row's lie in the row behind it.
template <typename Isa, typename A>
LSTM_HD void pack_blocks(const A* a, Index lda, Index k, Index first, Index last, A* to) {
    constexpr Index side = lanes<Isa, A>;
    for (Index block = first; block < last; ++block) {
        A* const packed = to + (block - first) * packed_depth<Isa>(k) * kRows;
        for (Index p = 0; p < k; ++p) {
            for (Index r = 0; r < kRows; r += side)
                store_vector<Isa, A>(load_vector<Isa>(a + p * lda + block * kRows + r), packed + p * kRows + r);
        }
    }
}

// The same for pairs, which only some processors multiply.
template <typename Isa>
LSTM_HD void pack_rows(const Groups<BFloat16>& groups, Index depth, const Right<BFloat16>& to) {
    if (depth % 2 == 0) {  // a pair lies there as one 32-bit word, whose value no copy looks at
        Groups<float> words;
        for (int group = 0; group < 4; ++group) {
            words.first[group] = reinterpret_cast<const float*>(groups.first[group]);
            words.count[group] = groups.count[group];
        }
        return pack_rows<Isa>(words, depth / 2, Right<float>{reinterpret_cast<float*>(to.b), to.ld, to.panel});
    }
    for (Index k = 0; k < depth + depth % 2; ++k) {
        for (Index column = 0; column < kTile; ++column) {
            const Index group = column / kUnits, j = column % kUnits;
            const bool there = k < depth && j < groups.count[group];
            to.b[(k / 2 * kTile + column) * 2 + k % 2] = there ? groups.first[group][j * depth + k] : BFloat16{0};
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
LSTM_HD void pack_columns(Index k, Index columns, const Row& row, const Right<BFloat16>& to) {
    out_of_line(Isa(), [&]() LSTM_INLINED {
        for (Index p = 0; p < k; p += 2) {
            const BFloat16 *const even = row(p), *const odd = p + 1 < k ? row(p + 1) : nullptr;
            if (columns < kTile) std::fill_n(to.b + p * kTile, 2 * kTile, BFloat16{0});
            interleave<Isa>(even, odd, columns, to.b + p * kTile);
        }
    });
}

}  // namespace lstm::cpu

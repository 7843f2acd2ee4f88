// Products with a weight as it lies, for calls of so few rows that to pack it would take as long.
#pragma once

#include "product.h"

namespace lstm::cpu {

constexpr int kStreams = 8;      // rows that a prefetcher follows side by side
constexpr int kSums = 8;         // side by side, at least: enough to hide the latency of one
constexpr Index kInTurns = 192;  // of a row's elements, at least, pay for blocks that take turns at some rows

// How O and T are multiplied as they lie: neighbours of bf16 as a pair where the processor does so, else one by one.
template <typename Isa, typename O, typename T>
struct AsTheyLie {
    using Sum = Vector<Isa, Acc<T>>;
    static constexpr bool pairs = has_pairs<Isa> && std::is_same_v<O, BFloat16> && std::is_same_v<T, BFloat16>;
    static constexpr Index at_once = (pairs ? 2 : 1) * lanes<Isa, Acc<T>>;  // elements of a factor
    using Factor = std::conditional_t<pairs, typename Isa::Wide, Sum>;

    template <typename Element>
    LSTM_HD static Factor load(const Element* from) {
        if constexpr (pairs) {
            Factor x;
            std::memcpy(&x, from, sizeof(x));
            return x;
        } else {
            return load_vector<Isa>(from);
        }
    }

    LSTM_HD static void add(Sum& sum, const Factor& left, const Factor& right) {
        if constexpr (pairs) {
#ifdef LSTM_X86
            sum = add_pairs(sum, (__m512i)left, (__m512i)right);
#endif
        } else {
            sum += left * right;
        }
    }
};

// The sums over k of X rows of a times W rows of w [.., k]: X * W makes one vector. Lane by lane over k, then over the
// lanes. Rows of w are taken side by side, to read each of a's once, but only some of them where they are more than
// memory delivers so. c[X, 64] (+)= the sums in its first columns, of which `columns` <= W are kept. Meanwhile it
// asks for a share of as much as it reads of w, from `next` on: 1 / share, or none.
template <typename Isa, int X, int share, typename O, typename T>
LSTM_HD void dot_rows(const O* a, Index lda, const T* w, Index columns, Index k, Acc<T>* c, bool accumulate,
                      const T* next = nullptr) {
    using A = Acc<T>;
    using Lie = AsTheyLie<Isa, O, T>;
    using Sum = typename Lie::Sum;
    constexpr int side = lanes<Isa, A>, W = side / X, some = W > kStreams ? 4 : W;
    constexpr int parts = some * X < kSums ? 2 : 1;  // of each sum
    constexpr Index at_once = Lie::at_once;
    const auto row = [&](int n)
                         LSTM_INLINED { return w + std::min<Index>(n, columns - 1) * k; };  // past them, the last
    Sum sums[side];
    const Index whole = k - k % at_once;
#pragma GCC unroll 1
    for (int first = 0; first < W; first += some) {
        const T* rows[some];
        Sum sum[parts][X][some] = {};
        for (int n = 0; n < some; ++n) rows[n] = row(first + n);
        const auto add_all = [&](Index p, Sum(&to)[X][some]) LSTM_INLINED {
            if constexpr (share > 0) {
#pragma GCC unroll 4
                for (Index i = 0; i < at_once * W / share; i += 64 / sizeof(T))
                    __builtin_prefetch(next + p * W / share + i);
            }
            typename Lie::Factor left[X];
#pragma GCC unroll 4
            for (int x = 0; x < X; ++x) left[x] = Lie::load(a + x * lda + p);
#pragma GCC unroll 8
            for (int n = 0; n < some; ++n) {
                const auto right = Lie::load(rows[n] + p);
#pragma GCC unroll 4
                for (int x = 0; x < X; ++x) Lie::add(to[x][n], left[x], right);
            }
        };
        Index p = 0;
        for (; p + parts * at_once <= whole; p += parts * at_once) {
#pragma GCC unroll 2
            for (int i = 0; i < parts; ++i) add_all(p + i * at_once, sum[i]);
        }
        if (p < whole) add_all(p, sum[0]);
        for (int x = 0; x < X; ++x) {
            for (int n = 0; n < some; ++n) {
                if constexpr (parts > 1) sum[0][x][n] += sum[1][x][n];
                sums[x * W + first + n] = sum[0][x][n];
            }
        }
    }
    if (whole < k) {
        alignas(64) O left[X][at_once] = {};
        alignas(64) T right[at_once] = {};
        for (int x = 0; x < X; ++x) std::copy_n(a + x * lda + whole, k - whole, left[x]);
        for (int n = 0; n < W; ++n) {
            std::copy_n(row(n) + whole, k - whole, right);
            for (int x = 0; x < X; ++x) Lie::add(sums[x * W + n], Lie::load(left[x]), Lie::load(right));
        }
    }
    sum_lanes(sums);
    A all[X][W];
    std::memcpy(all, &sums[0], sizeof(all));
    const auto put = [&](Index count) LSTM_INLINED {
        for (int x = 0; x < X; ++x) {
            for (Index n = 0; n < count; ++n) c[x * kTile + n] = all[x][n] + (accumulate ? c[x * kTile + n] : A(0));
        }
    };
    if (columns == W) {  // a constant makes vectors of it
        put(W);
    } else {
        put(columns);
    }
}

// The same for several blocks of X rows, a whole group's columns: they take turns at W rows of w, which stay in the
// first cache, and up to four ask for a share each of those that come next, while memory would rest.
template <typename Isa, int X, int share, typename O, typename T>
LSTM_HD void dot_in_turns(Index blocks, const O* a, Index lda, const Groups<T>& groups, Index k, Acc<T>* c,
                          bool accumulate) {
    out_of_line(Isa(), [&]() LSTM_INLINED {
        constexpr Index W = lanes<Isa, Acc<T>> / X;
        for (Index group = 0; group < 4; ++group) {
            const Index count = groups.count[group];
            for (Index j = 0; j < count; j += W) {
                const T *const w = groups.first[group] + j * k, *next = w + W * k;
                if (j + W >= count && group < 3) next = groups.first[group + 1];
                for (Index block = 0; block < blocks; ++block) {
                    const Index asked = std::min<Index>(block, share - 1);
                    dot_rows<Isa, X, share>(a + block * X * lda, lda, w, std::min<Index>(W, count - j), k,
                                            c + block * X * kTile + group * kUnits + j, accumulate,
                                            next + asked * W * k / share);
                }
            }
        }
    });
}

// What multiply makes of a tile that pack_rows packed, from the rows themselves, for calls of so few rows that packing
// would cost more: c[rows, 64] (+)= a[rows, k] w^T.
template <typename Isa, typename O, typename T>
LSTM_HD void multiply_unpacked(Index rows, const O* a, Index lda, const Groups<T>& groups, Index k, Acc<T>* c,
                               bool accumulate) {
    constexpr int side = lanes<Isa, Acc<T>>, most = side < 4 ? side : 4;
    const Index blocks = Isa::registers < 32 || k < kInTurns ? 0 : rows / most,
                in_turns = blocks < 2 ? 0 : blocks * most;
    if (blocks >= 4) {
        dot_in_turns<Isa, most, 4>(blocks, a, lda, groups, k, c, accumulate);
    } else if (blocks >= 2) {
        dot_in_turns<Isa, most, 2>(blocks, a, lda, groups, k, c, accumulate);
    }
    out_of_line(Isa(), [&]() LSTM_INLINED {
        const auto block = [&](auto x, Index r) LSTM_INLINED {  // x rows from the r-th on
            constexpr int X = decltype(x)::value, W = side / X;
            for (Index group = 0; group < 4; ++group) {
                const Index count = groups.count[group];
                Acc<T>* const to = c + r * kTile + group * kUnits;
                for (Index j = 0; j < count; j += W) {
                    dot_rows<Isa, X, 0>(a + r * lda, lda, groups.first[group] + j * k, std::min<Index>(W, count - j), k,
                                        to + j, accumulate);
                }
            }
        };
        Index r = in_turns;
        for (; r + most <= rows; r += most) block(std::integral_constant<int, most>(), r);
        for (; most > 2 && r + 2 <= rows; r += 2) block(std::integral_constant<int, most / 2>(), r);
        for (; r < rows; ++r) block(std::integral_constant<int, 1>(), r);
    });
    for (Index i = 0; i < 4 * rows; ++i) {  // where a group has fewer columns
        Acc<T>* const to = c + i * kUnits;
        std::fill(to + groups.count[i % 4], to + kUnits, Acc<T>(0));
    }
}

}  // namespace lstm::cpu

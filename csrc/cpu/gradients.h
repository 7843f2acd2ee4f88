// What a chunk of steps that was walked back adds to the gradients of x and of the weights, and the whole backward
// pass.
#pragma once

#include <array>

#include "backward.h"

namespace lstm::cpu {

// Rows of a product whose result is not at once where it belongs.
template <typename Isa>
constexpr Index kRowsAtOnce = (Isa::side == kRows ? 20 : 8) * Isa::side;

constexpr Index kRowsOfSum = 32;  // of one of the sums that are added up to a bias's: as exact as nn.LSTM's

// What a chunk's gradients are multiplied by to give the gradient of one weight.
template <typename T>
struct Factor {
    enum Of { x, states, m } of;         // x, the state before each row, or o tanh(c)
    Index columns;                       // of the factor and of the weight
    const ChunkGradients<Acc<T>>* rows;  // whose columns are the weight's rows
    Gradient<T> gradient;
};

// Factors of one direction, as their tiles follow each other.
template <typename T>
LSTM_HD std::array<Factor<T>, 3> factors_of(const Backward<T>& f, int d) {
    const auto& of = f.gradients[d];
    return {Factor<T>{Factor<T>::x, f.s.input, &f.da, of.w_ih},
            Factor<T>{Factor<T>::states, f.s.features, &f.da, of.w_hh},
            Factor<T>{Factor<T>::m, f.projected ? f.s.hidden : 0, &f.dr, of.w_hr}};
}

// The n-th row of a chunk that is added up, where planes keep their order: gradients often fade on the walk's way back,
// and the smallest come first, or each would be rounded as the largest are.
template <typename Isa, typename T>
LSTM_HD Index row_of_sum(int d, const Chunk& chunk, Index n) {
    return d == 1 && !in_planes<Operand<Isa, T>> ? chunk.rows - 1 - n : n;
}

// One tile of a factor, packed. M: what m is stored as.
template <typename Isa, typename M, typename T>
LSTM_HD void pack_factor(const Backward<T>& f, const Factor<T>& factor, int d, const Chunk& chunk, Index tile,
                         Operand<Isa, T>* packed) {
    const Shape& s = f.s;
    const Index first = tile * kTile, columns = std::min(kTile, factor.columns - first);
    const Right<Operand<Isa, T>> to = packed_at<Isa>(packed, chunk.rows).only(columns);
    if (factor.of == Factor<T>::x) {
        const auto row_of_x = [&](Index n) LSTM_INLINED {
            return f.x + (chunk.base + row_of_sum<Isa, T>(d, chunk, n)) * s.input + first;
        };
        pack_columns<Isa, T>(chunk.rows, columns, row_of_x, to);
    } else if (factor.of == Factor<T>::states) {
        Index t = chunk.first;  // the step of the row at hand: rows come in order
        const auto state_before = [&](Index n) LSTM_INLINED {
            const Index row = row_of_sum<Isa, T>(d, chunk, n);
            while (chunk.base + row >= f.walk.start[t + 1]) ++t;
            while (chunk.base + row < f.walk.start[t]) --t;
            const Index b = chunk.base + row - f.walk.start[t], before = f.walk.before(d, t, b);
            return before < 0 ? f.h0 + (d * s.batch + b) * s.features + first
                              : f.y + ((f.walk.start[before] + b) * s.directions + d) * s.features + first;
        };
        pack_columns<Isa, T>(chunk.rows, columns, state_before, to);
    } else {
        const auto row_of_m = [&](Index n) LSTM_INLINED {
            const Index row = d * f.walk.chunk_rows + row_of_sum<Isa, T>(d, chunk, n);
            return reinterpret_cast<const M*>(f.m) + row * s.hidden + first;
        };
        pack_columns<Isa, M>(chunk.rows, columns, row_of_m, to);
    }
}

// Calls take(factor, tile, its packed columns) for each tile of each gradient that is asked for.
template <typename Isa, typename T, typename Take>
LSTM_HD void for_factors(const Backward<T>& f, int d, const Take& take) {
    Operand<Isa, T>* packed =
        reinterpret_cast<Operand<Isa, T>*>(f.factors) + d * f.factor_tiles * tile_size(f.walk.chunk_rows);
    for (const Factor<T>& factor : factors_of(f, d)) {
        for (Index tile = 0; tile < tiles_of(factor.columns); ++tile, packed += tile_size(f.walk.chunk_rows)) {
            if (factor.gradient.to != nullptr) take(factor, tile, packed);
        }
    }
}

// How the chunk's gradients are packed for products down their columns: pairs with two rows side by side.
template <typename O>
constexpr Along gradients_along = std::is_same_v<O, BFloat16> ? Along::columns : Along::blocks;

// Whether each tile of W_ih is needed once and by one thread, as in packs_in_passing.
template <typename Isa, typename T>
LSTM_HD bool packs_ih_in_passing(const Backward<T>& f, const Team& team) {
    return f.walk.chunks() == 1 && (team.threads == 1 || f.walk.rows() <= kRowsAtOnce<Isa>);
}

// Columns of da, from k on, that are multiplied in one go by a tile of W_ih: all, where a sum has to be rounded or cut
// off to become dx.
template <typename Isa, typename T>
LSTM_HD Index depth_at_once(const Backward<T>& f, Index tile, Index k) {
    const Index depth = 4 * f.s.hidden - k;
    return Backward<T>::rounded || (tile + 1) * kTile > f.s.input ? depth : std::min(kDepth, depth);
}

// What they add to dx of rows first .. first + rows. `next`: the packed piece that is multiplied after this one.
template <typename Isa, typename T>
LSTM_HD void input_gradient(const Backward<T>& f, int d, const Chunk& chunk, Index first, Index rows, Index tile,
                            Index k, const Right<Operand<Isa, T>>& packed, const Operand<Isa, T>* next) {
    using O = Operand<Isa, T>;
    const Index input = f.s.input, count = std::min(kTile, input - tile * kTile);
    const Index depth = depth_at_once<Isa>(f, tile, k);
    const bool add = f.s.directions > 1;
    const O* const left = chunk_split<const O>(f, f.da, d) + (first - chunk.base) * f.da.ld + k;
    auto right = right_side<Isa>(f, f.weights[d].w_ih, input, tile, k, packed);
    ask_for<Isa, O>(next, 0, rows, 1, right);
    T* const dx = f.dx + first * input + tile * kTile;
    if constexpr (!Backward<T>::rounded) {
        if (count == kTile) {
            multiply<Isa>(rows, left, f.da.ld, right, depth, dx, input, add || k > 0);  // B7
            return;
        }
    }
    alignas(64) Acc<T> products[kRowsAtOnce<Isa> * kTile];
    multiply<Isa>(rows, left, f.da.ld, right, depth, products, kTile, false);
    for (Index r = 0; r < rows; ++r) {
        T* const row = dx + r * input;
        store_row<Isa>(products + r * kTile, count, add ? row : nullptr, row);
    }
}

// dx of this thread's tiles and rows: those of absolute number, so that both directions find one thread.
template <typename Isa, typename T>
LSTM_HD void input_gradients(const Backward<T>& f, int d, const Chunk& chunk, const Team& team, int thread) {
    const Index depth = 4 * f.s.hidden, input = f.s.input;
    constexpr Index at_once = kRowsAtOnce<Isa>;
    const auto for_row_blocks = [&](const auto& take) LSTM_INLINED {
        for (Index block = chunk.base / at_once; block * at_once < chunk.base + chunk.rows; ++block) {
            const Index first = std::max(block * at_once, chunk.base);
            take(block, first, std::min((block + 1) * at_once, chunk.base + chunk.rows) - first);
        }
    };
    const auto for_pieces = [&](const auto& take) LSTM_INLINED {  // of da: each stays in cache while the weight goes by
        for (Index k = 0; k < depth; k += kDepth) {
            for (Index tile = 0; tile < f.input_tiles; ++tile) {
                if (k == 0 || depth_at_once<Isa>(f, tile, 0) < depth) take(k, tile);
            }
        }
    };
    if (packs_ih_in_passing<Isa>(f, team)) {
        const auto place = packed_weight<Isa, T>(f.w_ih, depth, input, d, thread);
        for_pieces([&](Index k, Index tile) LSTM_INLINED {
            if (tile % team.threads != thread) return;
            const Index some = depth_at_once<Isa>(f, tile, k);
            const auto packed = packed_at<Isa>(place.b, some, place.weight);
            pack_tile<Isa>(f, f.weights[d].w_ih, input, tile, k, some, packed);
            for_row_blocks([&](Index, Index first, Index rows) LSTM_INLINED {
                input_gradient<Isa>(f, d, chunk, first, rows, tile, k, packed, packed.b);
            });
        });
        return;
    }
    for_row_blocks([&](Index block, Index first, Index rows) LSTM_INLINED {
        for_pieces([&](Index k, Index tile) LSTM_INLINED {
            if ((tile + block) % team.threads != thread) return;
            const auto piece_of = [&](Index of) LSTM_INLINED {
                return packed_weight<Isa, T>(f.w_ih, depth, input, d, of).from(k);
            };
            const Index next = std::min(tile + team.threads, f.input_tiles - 1);
            input_gradient<Isa>(f, d, chunk, first, rows, tile, k, piece_of(tile), piece_of(next).b);
        });
    });
}

// Adds a row's part from chunk number `index` to what the earlier ones gave, from element `at` of a gradient on; after
// the last chunk it is in its place.
template <typename Isa, typename T>
LSTM_HD void add_up(const Backward<T>& f, Index index, const Acc<T>* part, Index count, const Gradient<T>& gradient,
                    Index at) {
    const Acc<T>* const before = index == 0 ? nullptr : gradient.sum + at;
    if (index + 1 == f.walk.chunks()) {
        store_row<Isa>(part, count, before, gradient.to + at);
    } else {
        store_row<Isa>(part, count, before, gradient.sum + at);
    }
}

// Columns first .. first + count of a chunk's gradients, which stay in cache while the factors' tiles go by.
struct Columns {
    Index first, count;
};

// Their sums over the chunk's rows, which end in columns that nobody reads: sums of sums of some rows each.
template <typename Isa, typename O, typename A>
LSTM_HD void sum_columns(const O* rows, Index ld, Index count, const Columns& part, A* sums) {
    constexpr Index side = lanes<Isa, A>;
    const auto take = [&](auto columns, Index first) LSTM_INLINED {
        constexpr Index vectors = decltype(columns)::value / side;
        Vector<Isa, A> all[vectors] = {};
        for (Index begin = 0; begin < count; begin += kRowsOfSum) {
            Vector<Isa, A> some[vectors] = {};
            for (Index row = begin; row < std::min(begin + kRowsOfSum, count); ++row) {
#pragma GCC unroll 16
                for (Index v = 0; v < vectors; ++v)
                    some[v] += load_operands<Isa>(rows + row * ld, part.first + first + v * side);
            }
#pragma GCC unroll 16
            for (Index v = 0; v < vectors; ++v) all[v] += some[v];
        }
        std::memcpy(sums + first, all, sizeof(all));
    };
    Index column = 0;
    for (; column + kTile <= part.count; column += kTile) take(std::integral_constant<Index, kTile>(), column);
    for (; column < part.count; column += kUnits) take(std::integral_constant<Index, kUnits>(), column);
}

// This thread's copy of them for products down the columns, in blocks or with two rows side by side, where those don't
// read rows; and their sums, if `wanted` or if they come with it.
template <typename Isa, typename T>
LSTM_HD void pack_gradients(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d, const Chunk& chunk,
                            const Columns& part, Operand<Isa, T>* to, Acc<T>* sums, bool wanted) {
    using O = Operand<Isa, T>;
    const Index block = part.first / Isa::side, end = block + tiles_of(part.count, Isa::side);
    const Index top = row_of_sum<Isa, T>(d, chunk, 0), ld = top == 0 ? g.ld : -g.ld;
    const O* const from = chunk_split<const O>(f, g, d) + top * g.ld;
    if constexpr (in_planes<O>) {
        pack_blocks<Isa>(from, ld, chunk.rows, block, end, to, sums);
    } else {
        if (wanted) sum_columns<Isa>(from, ld, chunk.rows, part, sums);
        if constexpr (gradients_along<O> == Along::blocks) {
            pack_blocks<Isa>(from, ld, chunk.rows, block, end, to);
        } else {
            for (Index row = 0; row < chunk.rows; row += 2) {
                const O* const even = from + row * ld + part.first;
                interleave<Isa>(even, row + 1 < chunk.rows ? even + ld : nullptr, part.count, to + row * part.count);
            }
        }
    }
}

// B8 of one tile of a weight and one part of its rows: they are the gradients' columns, transposed, times the factor.
template <typename Isa, typename T>
LSTM_HD void weight_gradient(const Backward<T>& f, const Factor<T>& factor, const Chunk& chunk, const Columns& part,
                             const Operand<Isa, T>* packed, const Operand<Isa, T>* of_factor, Index tile, Index index) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    constexpr Along along = gradients_along<O>;
    const Index columns = factor.columns, count = std::min(kTile, columns - tile * kTile), rows = part.count;
    const Index lda = along == Along::blocks ? packed_depth<Isa>(chunk.rows) : rows;
    const Index of_row = along == Along::blocks ? lda : sizeof(A) / sizeof(O);
    const Right<const O> right = packed_at<Isa>(of_factor, chunk.rows).only(count);
    const Index at = part.first * columns + tile * kTile;
    if (count == kTile && (!Backward<T>::rounded || index + 1 < f.walk.chunks())) {
        A* const sum = factor.gradient.sum + at;
        multiply<Isa, along>(rows, packed, lda, right, chunk.rows, sum, columns, index > 0);
        return;
    }
    constexpr Index at_once = kRowsAtOnce<Isa>;
    alignas(64) A products[at_once * kTile];
    for (Index row = 0; row < rows; row += at_once) {
        const Index block = std::min(at_once, rows - row);
        multiply<Isa, along>(block, packed + row * of_row, lda, right, chunk.rows, products, kTile, false);
        for (Index r = 0; r < block; ++r)
            add_up<Isa>(f, index, products + r * kTile, count, factor.gradient, at + (row + r) * columns);
    }
}

// What one part of a chunk's gradients adds to those of weights and, if they are da, of the bias.
template <typename Isa, typename T>
LSTM_HD void part_gradients(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d, const Chunk& chunk,
                            const Columns& part, Index index, int thread) {
    using O = Operand<Isa, T>;
    O* const packed = reinterpret_cast<O*>(g.packed) + thread * f.packed_rows() * g.part;
    Acc<T>* const sums = g.sums + thread * g.part;
    const Gradient<T>& bias = f.gradients[d].bias;
    const bool of_bias = &g == &f.da && bias.to != nullptr;
    pack_gradients<Isa>(f, g, d, chunk, part, packed, sums, of_bias);
    if (of_bias) add_up<Isa>(f, index, sums, part.count, bias, part.first);
    for_factors<Isa>(f, d, [&](const Factor<T>& factor, Index tile, const O* right) LSTM_INLINED {
        if (factor.rows == &g) weight_gradient<Isa>(f, factor, chunk, part, packed, right, tile, index);
    });
}

// All that the walked chunk number `index` gives beside dh. Threads share tiles of factors, and parts of gradients.
template <typename Isa, typename M, typename T>
LSTM_HD void gradients_of_chunk(const Backward<T>& f, const Chunk (&chunks)[2], Index index, const Team& team,
                                int thread) {
    using O = Operand<Isa, T>;
    const Shape& s = f.s;
    Index job = 0;
    const auto mine = [&] { return job++ % team.threads == thread; };
    for (int d = 0; d < s.directions; ++d) {
        for_factors<Isa>(f, d, [&](const Factor<T>& factor, Index tile, O* packed) LSTM_INLINED {
            if (mine()) pack_factor<Isa, M>(f, factor, d, chunks[d], tile, packed);
        });
    }
    meet();
    for (int d = 0; d < s.directions; ++d) {
        if (f.dx != nullptr) input_gradients<Isa>(f, d, chunks[d], team, thread);
        for (const auto* g : {&f.da, &f.dr}) {
            const auto begin = [&](Index part) {  // at whole blocks
                return std::min(round_up(g->columns * part / f.parts, Isa::side), g->columns);
            };
            for (Index part = thread; part < f.parts; part += team.threads) {
                const Columns columns{begin(part), begin(part + 1) - begin(part)};
                if (columns.count > 0) part_gradients<Isa>(f, *g, d, chunks[d], columns, index, thread);
            }
        }
    }
}

// Zeros behind the columns of a chunk's gradients, where products read on.
template <typename Isa, typename T>
LSTM_HD void clear_behind(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d, const Team& team, int thread) {
    using O = Operand<Isa, T>;
    for (Index row = thread; row < f.walk.chunk_rows; row += team.threads) {
        O* const first = chunk_rows<O>(f, g, d) + row * g.ld;
        for (Index column = g.columns; column < f.walk.of_step.in_row(g.columns); ++column) first[column] = O{};
    }
}

// This thread's rows of a chunk's gradients for products over all steps, where only those read planes.
template <typename Isa, typename T>
LSTM_HD void split_gradients(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d, const Chunk& chunk,
                             const Team& team, int thread) {
    const T* const from = chunk_rows<const T>(f, g, d);
    Operand<Isa, T>* const to = chunk_split<Operand<Isa, T>>(f, g, d);
    for (Index row = thread; row < chunk.rows; row += team.threads)
        copy_operands<Isa>(from + row * g.ld, g.columns, 0, f.walk.over_steps.in_row(g.columns), to + row * g.ld);
}

template <typename Isa, typename T>
LSTM_HD void prepare_backward(const Backward<T>& f, const Team& team, int thread) {
    using In = OverSteps<Isa>;
    const Shape& s = f.s;
    for (int d = 0; d < s.directions; ++d) {
        const auto& w = f.weights[d];
        if (!packs_in_passing(f, team)) {
            pack_weight<Isa>(f, w.w_hh, 4 * s.hidden, s.features, f.w_hh, d, team, thread);
            if (f.projected) pack_weight<Isa>(f, w.w_hr, s.features, s.hidden, f.w_hr, d, team, thread);
        }
        if (f.dx != nullptr && !packs_ih_in_passing<In>(f, team))
            pack_weight<In>(f, w.w_ih, 4 * s.hidden, s.input, f.w_ih, d, team, thread);
    }
    const Index ld_h = f.feature_tiles * kTile;
    for (Index i = thread; i < s.directions * s.batch; i += team.threads) {
        const auto begin = [&](Acc<T>* to, const T* from, Index count, Index end) {
            for (Index j = 0; j < end; ++j)
                to[j] = from != nullptr && j < count ? load(from[i * count + j]) : Acc<T>(0);
        };
        begin(f.dh + i * ld_h, f.dh_n, s.features, ld_h);
        begin(f.dc + i * s.hidden, f.dc_n, s.hidden, s.hidden);
    }
    for (int d = 0; in_planes<Operand<Isa, T>> && d < s.directions; ++d) {
        clear_behind<Isa>(f, f.da, d, team, thread);
        clear_behind<Isa>(f, f.dr, d, team, thread);
    }
    if (f.dx != nullptr && s.directions > 1) {  // to which both directions add
        for (Index row = thread; row < f.walk.rows(); row += team.threads)
            std::fill_n(f.dx + row * s.input, s.input, T{});
    }
}

template <typename Isa, typename T>
LSTM_HD void run_thread(const Backward<T>& f, int thread, int threads) {
    using In = OverSteps<Isa>;
    const Shape& s = f.s;
    const Team team = make_team<Isa>(s, f.tiles, threads);
    prepare_backward<Isa>(f, team, thread);
    meet();
    for (Index index = 0; index < f.walk.chunks(); ++index) {
        const Chunk chunks[2] = {{f.walk, index, true}, {f.walk, index, false}};
        walk_back<Isa>(f, chunks, team, thread);
        meet();
        if constexpr (!std::is_same_v<In, Isa>) {
            for (int d = 0; d < s.directions; ++d) {
                split_gradients<In>(f, f.da, d, chunks[d], team, thread);
                split_gradients<In>(f, f.dr, d, chunks[d], team, thread);
            }
            meet();
        }
        gradients_of_chunk<In, Operand<Isa, T>>(f, chunks, index, team, thread);
        meet();
    }
    for (Index i = thread; i < s.directions * s.batch; i += team.threads) {
        const T* const zeros = nullptr;
        if (f.dh0 != nullptr)
            store_row<Isa>(f.dh + i * f.feature_tiles * kTile, s.features, zeros, f.dh0 + i * s.features);
        if (f.dc0 != nullptr) store_row<Isa>(f.dc + i * s.hidden, s.hidden, zeros, f.dc0 + i * s.hidden);
    }
}

}  // namespace lstm::cpu

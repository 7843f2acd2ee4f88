// What a chunk of steps that was walked back adds to the gradients of x and of the weights, and the whole backward
// pass.
#pragma once

#include <array>

#include "backward.h"

namespace lstm::cpu {

// Rows of a product whose result is not at once where it belongs.
template <typename Isa>
constexpr Index kRowsAtOnce = (Isa::side == kRows ? 10 : 8) * Isa::side;

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

// One tile of a factor, packed. M: what m is stored as.
template <typename Isa, typename M, typename T>
LSTM_HD void pack_factor(const Backward<T>& f, const Factor<T>& factor, int d, const Chunk& chunk, Index tile,
                         Operand<Isa, T>* packed) {
    const Shape& s = f.s;
    const Index first = tile * kTile, columns = std::min(kTile, factor.columns - first);
    const Right<Operand<Isa, T>> to = packed_at<Isa>(packed, chunk.rows);
    if (factor.of == Factor<T>::x) {
        const auto row_of_x = [&](Index row) LSTM_INLINED { return f.x + (chunk.base + row) * s.input + first; };
        pack_columns<Isa, T>(chunk.rows, columns, row_of_x, to);
    } else if (factor.of == Factor<T>::states) {
        Index t = chunk.first;  // the step of the row at hand: rows come in order
        const auto state_before = [&](Index row) LSTM_INLINED {
            while (chunk.base + row >= f.walk.start[t + 1]) ++t;
            const Index b = chunk.base + row - f.walk.start[t], before = f.walk.before(d, t, b);
            return before < 0 ? f.h0 + (d * s.batch + b) * s.features + first
                              : f.y + ((f.walk.start[before] + b) * s.directions + d) * s.features + first;
        };
        pack_columns<Isa, T>(chunk.rows, columns, state_before, to);
    } else {
        const auto row_of_m = [&](Index row) LSTM_INLINED {
            return reinterpret_cast<const M*>(f.m) + (d * f.walk.chunk_rows + row) * s.hidden + first;
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

// How the chunk's gradients lie for products down their columns: in AVX-512 as they are.
template <typename Isa>
constexpr Along gradients_along = Isa::rows > kRows ? Along::blocks : Along::columns;

// This thread's part of packing them: in blocks, or with two rows side by side.
template <typename Isa, typename T>
LSTM_HD void pack_gradients(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d, const Chunk& chunk,
                            const Team& team, int thread) {
    using O = Operand<Isa, T>;
    const O* const from = chunk_split<const O>(f, g, d);
    O* const to = chunk_packed<O>(f, g, d);
    if constexpr (gradients_along<Isa> == Along::blocks) {
        const Index blocks = tiles_of(g.columns, Isa::side);
        pack_blocks<Isa>(from, g.ld, chunk.rows, blocks * thread / team.threads, blocks * (thread + 1) / team.threads,
                         to);
    } else if constexpr (sizeof(O) < sizeof(Acc<T>)) {
        for (Index row = 2 * thread; row < chunk.rows; row += 2 * team.threads) {
            const O* const even = from + row * g.ld;
            interleave<Isa>(even, row + 1 < chunk.rows ? even + g.ld : nullptr, g.columns, to + row * g.columns);
        }
    }
}

// Whether each tile of W_ih is needed once and by one thread, as in packs_in_passing.
template <typename Isa, typename T>
LSTM_HD bool packs_ih_in_passing(const Backward<T>& f, const Team& team) {
    return f.walk.chunks() == 1 && (team.threads == 1 || f.walk.rows() <= kRowsAtOnce<Isa>);
}

// What columns k .. k + Isa::depth of da add to dx of rows first .. first + rows and of one tile. Where a sum has to be
// rounded or cut off to become dx, it is made whole at the first k.
template <typename Isa, typename T>
LSTM_HD void input_gradient(const Backward<T>& f, int d, const Chunk& chunk, Index first, Index rows, Index tile,
                            Index place, Index k) {
    using O = Operand<Isa, T>;
    const Index input = f.s.input, depth = 4 * f.s.hidden, count = std::min(kTile, input - tile * kTile);
    const bool add = f.s.directions > 1;
    const O* const left = chunk_split<const O>(f, f.da, d) + (first - chunk.base) * f.da.ld;
    const auto right = right_side<Isa>(f, f.weights[d].w_ih, depth, input, f.w_ih, d, tile, place);
    T* const dx = f.dx + first * input + tile * kTile;
    if constexpr (!Backward<T>::rounded) {
        if (count == kTile) {
            multiply<Isa>(rows, left + k, f.da.ld, right.from(k), std::min(Isa::depth, depth - k), dx, input,
                          add || k > 0);  // B7
            return;
        }
    }
    if (k > 0) return;
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
    const Index depth = 4 * f.s.hidden;
    constexpr Index at_once = kRowsAtOnce<Isa>;
    const auto for_row_blocks = [&](const auto& take) LSTM_INLINED {
        for (Index block = chunk.base / at_once; block * at_once < chunk.base + chunk.rows; ++block) {
            const Index first = std::max(block * at_once, chunk.base);
            take(block, first, std::min((block + 1) * at_once, chunk.base + chunk.rows) - first);
        }
    };
    if (packs_ih_in_passing<Isa>(f, team)) {
        for (Index tile = thread; tile < f.input_tiles; tile += team.threads) {
            pack_tile<Isa>(f, f.weights[d].w_ih, depth, f.s.input, f.w_ih, d, tile, thread);
            for_row_blocks([&](Index, Index first, Index rows) LSTM_INLINED {
                for (Index k = 0; k < depth; k += Isa::depth)
                    input_gradient<Isa>(f, d, chunk, first, rows, tile, thread, k);
            });
        }
        return;
    }
    for_row_blocks([&](Index block, Index first, Index rows) LSTM_INLINED {
        for (Index k = 0; k < depth; k += Isa::depth) {  // a piece of da stays in cache while the weight goes by
            for (Index tile = 0; tile < f.input_tiles; ++tile) {
                if ((tile + block) % team.threads == thread)
                    input_gradient<Isa>(f, d, chunk, first, rows, tile, tile, k);
            }
        }
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

// B8 of one tile of a weight and one part of its rows: they are the gradients' columns, transposed, times the factor.
template <typename Isa, typename T>
LSTM_HD void weight_gradient(const Backward<T>& f, const Factor<T>& factor, int d, const Chunk& chunk, Index part,
                             const Operand<Isa, T>* packed, Index tile, Index index) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    constexpr Along along = gradients_along<Isa>;
    constexpr bool pairs = sizeof(O) < sizeof(A);
    const ChunkGradients<A>& g = *factor.rows;
    const Index columns = factor.columns, count = std::min(kTile, columns - tile * kTile);
    const auto begin = [&](Index i) {  // at whole blocks
        return std::min(round_up(g.columns * i / f.parts, Isa::side), g.columns);
    };
    const Index first = begin(part), rows = begin(part + 1) - first;
    const Index lda = along == Along::blocks ? packed_depth<Isa>(chunk.rows) : pairs ? g.columns : g.ld;
    const Index of_row = along == Along::blocks ? lda : sizeof(A) / sizeof(O);
    const bool packs = along == Along::blocks || pairs;
    const O* const a = (packs ? chunk_packed<const O>(f, g, d) : chunk_split<const O>(f, g, d)) + first * of_row;
    const Right<const O> right = packed_at<Isa>(packed, chunk.rows);
    const Index at = first * columns + tile * kTile;
    if (count == kTile && (!Backward<T>::rounded || index + 1 < f.walk.chunks())) {
        A* const sum = factor.gradient.sum + at;
        multiply<Isa, along>(rows, a, lda, right, chunk.rows, sum, columns, index > 0);
        return;
    }
    constexpr Index at_once = kRowsAtOnce<Isa>;
    alignas(64) A products[at_once * kTile];
    for (Index row = 0; row < rows; row += at_once) {
        const Index block = std::min(at_once, rows - row);
        multiply<Isa, along>(block, a + row * of_row, lda, right, chunk.rows, products, kTile, false);
        for (Index r = 0; r < block; ++r)
            add_up<Isa>(f, index, products + r * kTile, count, factor.gradient, at + (row + r) * columns);
    }
}

// Sums of a few columns of the pre-activations' gradients, whose rows end in columns that nobody reads.
template <typename Isa, Index Columns, typename T>
LSTM_HD void bias_gradient(const Backward<T>& f, int d, const Chunk& chunk, Index column, Index index) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    constexpr Index side = lanes<Isa, A>, vectors = Columns / side;
    const O* const da = chunk_split<const O>(f, f.da, d);
    Vector<Isa, A> sums[vectors] = {};
    for (Index first = 0; first < chunk.rows; first += kRowsOfSum) {
        Vector<Isa, A> part[vectors] = {};
        for (Index row = first; row < std::min(first + kRowsOfSum, chunk.rows); ++row) {
#pragma GCC unroll 16
            for (Index v = 0; v < vectors; ++v) part[v] += load_operands<Isa>(da + row * f.da.ld, column + v * side);
        }
#pragma GCC unroll 16
        for (Index v = 0; v < vectors; ++v) sums[v] += part[v];
    }
    alignas(64) A sum[Columns];
    std::memcpy(sum, sums, sizeof(sum));
    add_up<Isa>(f, index, sum, std::min(Columns, 4 * f.s.hidden - column), f.gradients[d].bias, column);
}

// All that the walked chunk number `index` gives beside dh. Threads share tiles, and the gates of each.
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
        pack_gradients<Isa>(f, f.da, d, chunks[d], team, thread);
        if (f.projected) pack_gradients<Isa>(f, f.dr, d, chunks[d], team, thread);
    }
    meet();
    for (int d = 0; d < s.directions; ++d) {
        if (f.dx != nullptr) input_gradients<Isa>(f, d, chunks[d], team, thread);
        for (Index part = 0; part < f.parts; ++part) {  // which stays in cache while the factors' tiles go by
            for_factors<Isa>(f, d, [&](const Factor<T>& factor, Index tile, const O* packed) LSTM_INLINED {
                if (mine()) weight_gradient<Isa>(f, factor, d, chunks[d], part, packed, tile, index);
            });
        }
        for (Index column = 0, count; f.gradients[d].bias.to != nullptr && column < 4 * s.hidden; column += count) {
            const bool tile = column + kTile <= 4 * s.hidden;
            count = tile ? kTile : kUnits;
            if (!mine()) continue;
            if (tile) {
                bias_gradient<Isa, kTile>(f, d, chunks[d], column, index);
            } else {
                bias_gradient<Isa, kUnits>(f, d, chunks[d], column, index);
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

// What a chunk of steps that was walked back adds to the gradients of x and of the weights, and the whole backward
// pass.
#pragma once

#include <array>

#include "backward.h"

namespace lstm::cpu {

constexpr Index kRowsAtOnce = 64;  // of a product whose result is not at once where it belongs

// What a chunk's gradients are multiplied by to give the gradient of one weight.
template <typename T>
struct Factor {
    enum Of { x, states, m } of;         // x, the state before each row, or o tanh(c)
    Index columns;                       // of the factor and of the weight
    const ChunkGradients<Acc<T>>* rows;  // whose columns are the weight's rows
    Index parts;                         // in which threads share them
    Acc<T>* sum;                         // the gradient; null where not asked for
};

// Factors of one direction, as their tiles follow each other.
template <typename T>
LSTM_HD std::array<Factor<T>, 3> factors_of(const Backward<T>& f, int d) {
    const auto& sums = f.sums[d];
    return {Factor<T>{Factor<T>::x, f.s.input, &f.da, 4, sums.w_ih},
            Factor<T>{Factor<T>::states, f.s.features, &f.da, 4, sums.w_hh},
            Factor<T>{Factor<T>::m, f.projected ? f.s.hidden : 0, &f.dr, 1, sums.w_hr}};
}

// One tile of a factor, packed.
template <typename Isa, typename T>
LSTM_HD void pack_factor(const Backward<T>& f, const Factor<T>& factor, int d, const Chunk& chunk, Index tile,
                         Operand<Isa, T>* packed) {
    using O = Operand<Isa, T>;
    const Shape& s = f.s;
    const Index first = tile * kTile, columns = std::min(kTile, factor.columns - first);
    if (factor.of == Factor<T>::x) {
        const auto row_of_x = [&](Index row) LSTM_INLINED { return f.x + (chunk.base + row) * s.input + first; };
        pack_columns<Isa, T>(chunk.rows, columns, row_of_x, packed);
    } else if (factor.of == Factor<T>::states) {
        Index t = chunk.first;  // the step of the row at hand: rows come in order
        const auto state_before = [&](Index row) LSTM_INLINED {
            while (chunk.base + row >= f.walk.start[t + 1]) ++t;
            const Index b = chunk.base + row - f.walk.start[t], before = f.walk.before(d, t, b);
            return before < 0 ? f.h0 + (d * s.batch + b) * s.features + first
                              : f.y + ((f.walk.start[before] + b) * s.directions + d) * s.features + first;
        };
        pack_columns<Isa, T>(chunk.rows, columns, state_before, packed);
    } else {
        const auto row_of_m = [&](Index row) LSTM_INLINED {
            return reinterpret_cast<const O*>(f.m) + (d * f.walk.chunk_rows + row) * s.hidden + first;
        };
        pack_columns<Isa, O>(chunk.rows, columns, row_of_m, packed);
    }
}

// Calls take(factor, tile, its packed columns) for each tile of each gradient that is asked for.
template <typename Isa, typename T, typename Take>
LSTM_HD void for_factors(const Backward<T>& f, int d, const Take& take) {
    Operand<Isa, T>* packed =
        reinterpret_cast<Operand<Isa, T>*>(f.factors) + d * f.factor_tiles * tile_size(f.walk.chunk_rows);
    for (const Factor<T>& factor : factors_of(f, d)) {
        for (Index tile = 0; tile < tiles_of(factor.columns); ++tile, packed += tile_size(f.walk.chunk_rows)) {
            if (factor.sum != nullptr) take(factor, tile, packed);
        }
    }
}

// The chunk's gradients with two rows side by side.
template <typename Isa, typename T>
LSTM_HD void pair_rows(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d, const Chunk& chunk,
                       const Team& team, int thread) {
    const BFloat16* const from = chunk_rows<const BFloat16>(f, g, d);
    BFloat16* const to = chunk_pairs<BFloat16>(f, g, d);
    for (Index row = 2 * thread; row < chunk.rows; row += 2 * team.threads) {
        const BFloat16* const even = from + row * g.ld;
        interleave<Isa>(even, row + 1 < chunk.rows ? even + g.ld : nullptr, g.columns, to + row * g.columns);
    }
}

// dx of this thread's tiles and rows: those of absolute number, so that both directions find one thread.
template <typename Isa, typename T>
LSTM_HD void input_gradients(const Backward<T>& f, int d, const Chunk& chunk, const Team& team, int thread) {
    using O = Operand<Isa, T>;
    const Index input = f.s.input, depth = 4 * f.s.hidden;
    const bool add = f.s.directions > 1;
    const O* const da = chunk_rows<const O>(f, f.da, d);
    for (Index tile = 0; tile < f.input_tiles; ++tile) {
        const auto right = right_side<Isa>(f, f.weights[d].w_ih, depth, input, f.w_ih, d, tile);
        const Index count = std::min(kTile, input - tile * kTile);
        for (Index block = chunk.base / kRowsAtOnce; block * kRowsAtOnce < chunk.base + chunk.rows; ++block) {
            if ((tile + block) % team.threads != thread) continue;
            const Index first = std::max(block * kRowsAtOnce, chunk.base);
            const Index rows = std::min((block + 1) * kRowsAtOnce, chunk.base + chunk.rows) - first;
            const O* const left = da + (first - chunk.base) * f.da.ld;
            T* const dx = f.dx + first * input + tile * kTile;
            if constexpr (!Backward<T>::rounded) {
                if (count == kTile) {
                    multiply<Isa>(rows, left, f.da.ld, right.b, right.ldb, depth, dx, input, add);  // B7
                    continue;
                }
            }
            alignas(64) Acc<T> products[kRowsAtOnce * kTile];
            multiply<Isa>(rows, left, f.da.ld, right.b, right.ldb, depth, products, kTile, false);
            for (Index r = 0; r < rows; ++r) store_row<Isa>(products + r * kTile, count, dx + r * input, add);
        }
    }
}

// B8 of one tile of a weight and one part of its rows: they are the gradients' columns, transposed, times the factor.
template <typename Isa, typename T>
LSTM_HD void weight_gradient(const Backward<T>& f, const Factor<T>& factor, int d, const Chunk& chunk, Index part,
                             const Operand<Isa, T>* packed, Index tile, bool accumulate) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    constexpr Index unit = sizeof(A) / sizeof(O);  // 2 where products read pairs
    const ChunkGradients<A>& g = *factor.rows;
    const Index columns = factor.columns, count = std::min(kTile, columns - tile * kTile);
    const Index rows = g.columns / factor.parts, first = part * rows, lda = unit == 2 ? g.columns : g.ld;
    const O* const a = (unit == 2 ? chunk_pairs<const O>(f, g, d) : chunk_rows<const O>(f, g, d)) + first * unit;
    A* const to = factor.sum + first * columns + tile * kTile;
    if (count == kTile) {
        multiply<Isa, Along::columns>(rows, a, lda, packed, kTile, chunk.rows, to, columns, accumulate);
        return;
    }
    alignas(64) A products[kRowsAtOnce * kTile];
    for (Index row = 0; row < rows; row += kRowsAtOnce) {
        const Index block = std::min(kRowsAtOnce, rows - row);
        multiply<Isa, Along::columns>(block, a + row * unit, lda, packed, kTile, chunk.rows, products, kTile, false);
        for (Index r = 0; r < block; ++r)
            store_row<Isa, A>(products + r * kTile, count, to + (row + r) * columns, accumulate);
    }
}

// Sums of 16 columns of the pre-activations' gradients.
template <typename Isa, typename T>
LSTM_HD void bias_gradient(const Backward<T>& f, int d, const Chunk& chunk, Index column, bool accumulate) {
    using O = Operand<Isa, T>;
    const Index count = std::min(kUnits, 4 * f.s.hidden - column);
    const O* const da = chunk_rows<const O>(f, f.da, d) + column;
    alignas(64) Acc<T> sum[kUnits] = {}, units[kUnits];
    for (Index row = 0; row < chunk.rows; ++row) {
        load_units<Isa>(da + row * f.da.ld, count, units);
        for (Index j = 0; j < kUnits; ++j) sum[j] += units[j];
    }
    store_row<Isa, Acc<T>>(sum, count, f.sums[d].bias + column, accumulate);
}

// All that a walked chunk gives beside dh. Threads share tiles, and the gates of each.
template <typename Isa, typename T>
LSTM_HD void gradients_of_chunk(const Backward<T>& f, const Chunk (&chunks)[2], bool accumulate, const Team& team,
                                int thread) {
    using O = Operand<Isa, T>;
    const Shape& s = f.s;
    Index job = 0;
    const auto mine = [&] { return job++ % team.threads == thread; };
    for (int d = 0; d < s.directions; ++d) {
        for_factors<Isa>(f, d, [&](const Factor<T>& factor, Index tile, O* packed) LSTM_INLINED {
            if (mine()) pack_factor<Isa>(f, factor, d, chunks[d], tile, packed);
        });
        if constexpr (sizeof(O) < sizeof(Acc<T>)) {
            pair_rows<Isa>(f, f.da, d, chunks[d], team, thread);
            if (f.projected) pair_rows<Isa>(f, f.dr, d, chunks[d], team, thread);
        }
    }
    meet();
    for (int d = 0; d < s.directions; ++d) {
        if (f.dx != nullptr) input_gradients<Isa>(f, d, chunks[d], team, thread);
        for_factors<Isa>(f, d, [&](const Factor<T>& factor, Index tile, const O* packed) LSTM_INLINED {
            for (Index part = 0; part < factor.parts; ++part) {
                if (mine()) weight_gradient<Isa>(f, factor, d, chunks[d], part, packed, tile, accumulate);
            }
        });
        for (Index column = 0; f.sums[d].bias != nullptr && column < 4 * s.hidden; column += kUnits) {
            if (mine()) bias_gradient<Isa>(f, d, chunks[d], column, accumulate);
        }
    }
}

template <typename Isa, typename T>
LSTM_HD void prepare_backward(const Backward<T>& f, const Team& team, int thread) {
    const Shape& s = f.s;
    for (int d = 0; d < s.directions; ++d) {
        const auto& w = f.weights[d];
        pack_weight<Isa>(f, w.w_hh, 4 * s.hidden, s.features, f.w_hh, d, team, thread);
        if (f.projected) pack_weight<Isa>(f, w.w_hr, s.features, s.hidden, f.w_hr, d, team, thread);
        if (f.dx != nullptr) pack_weight<Isa>(f, w.w_ih, 4 * s.hidden, s.input, f.w_ih, d, team, thread);
    }
    const Index ld_h = f.feature_tiles * kTile;
    for (Index i = thread; i < s.directions * s.batch; i += team.threads) {
        for (Index j = 0; j < ld_h; ++j)
            f.dh[i * ld_h + j] = j < s.features ? f.dh_user[i * s.features + j] : Acc<T>(0);
    }
    if (f.dx != nullptr && s.directions > 1) {  // to which both directions add
        for (Index row = thread; row < f.walk.rows(); row += team.threads)
            std::fill_n(f.dx + row * s.input, s.input, T{});
    }
}

// A sum [rows, columns] to the gradient in T.
template <typename Isa, typename T>
LSTM_HD void round_sum(const Acc<T>* sum, T* gradient, Index rows, Index columns, const Team& team, int thread) {
    for (Index row = thread; gradient != nullptr && row < rows; row += team.threads)
        store_row<Isa>(sum + row * columns, columns, gradient + row * columns, false);
}

template <typename Isa, typename T>
LSTM_HD void run_thread(const Backward<T>& f, int thread, int threads) {
    const Shape& s = f.s;
    const Team team = make_team(s, f.tiles, threads);
    prepare_backward<Isa>(f, team, thread);
    meet();
    for (Index index = 0; index < f.walk.chunks(); ++index) {
        const Chunk chunks[2] = {{f.walk, index, true}, {f.walk, index, false}};
        walk_back<Isa>(f, chunks, team, thread);
        meet();
        gradients_of_chunk<Isa>(f, chunks, index > 0, team, thread);
        meet();
    }
    for (Index i = thread; i < s.directions * s.batch; i += team.threads)
        std::copy_n(f.dh + i * f.feature_tiles * kTile, s.features, f.dh_user + i * s.features);
    if constexpr (Backward<T>::rounded) {
        for (int d = 0; d < s.directions; ++d) {
            const auto& from = f.sums[d];
            const auto& to = f.gradients[d];
            round_sum<Isa>(from.w_ih, to.w_ih, 4 * s.hidden, s.input, team, thread);
            round_sum<Isa>(from.w_hh, to.w_hh, 4 * s.hidden, s.features, team, thread);
            round_sum<Isa>(from.w_hr, to.w_hr, s.features, s.hidden, team, thread);
            round_sum<Isa>(from.bias, to.bias, 4, s.hidden, team, thread);
        }
    }
}

}  // namespace lstm::cpu

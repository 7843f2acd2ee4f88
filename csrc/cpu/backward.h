// The backward walk. By chunks of steps: first step by step the gates' gradients and dh, then from the chunk's
// gradients, while they are in cache, dx and what they add to the gradients of the weights.
#pragma once

#include "team.h"

namespace lstm::cpu {

constexpr Index kBackwardRows = 256;  // of a chunk
constexpr Index kInputRows = 64;      // of dx at a time

template <typename T>
struct Backward {
    using A = Acc<T>;
    using Type = T;
    static constexpr bool rounded = !std::is_same_v<T, A>;  // gradients of weights add up elsewhere than in T

    Backward(const Shape& shape, const BackwardArgs& args, Arena& arena)
        : walk(shape, kBackwardRows),
          s(walk.s),
          tiles(tiles_of(s.hidden)),
          input_tiles(tiles_of(s.input)),
          padded(tiles * kTile),
          ld(4 * s.hidden + kUnits),
          x(static_cast<const T*>(args.x)),
          h0(static_cast<const T*>(args.h0)),
          c0(static_cast<const T*>(args.c0)),
          y(static_cast<const T*>(args.y)),
          gates(static_cast<const T*>(args.gates)),
          dy(static_cast<const T*>(args.dy)),
          cells(static_cast<const A*>(args.cells)),
          dh_user(static_cast<A*>(args.dh)),
          dc(static_cast<A*>(args.dc)),
          dx(static_cast<T*>(args.dx)),
          w_hh(arena.take<A>(s.directions * tiles * tile_size(4 * s.hidden))),
          w_ih(arena.take<A>(dx == nullptr ? 0 : s.directions * input_tiles * tile_size(4 * s.hidden))),
          dh(arena.take<A>(s.directions * s.batch * padded)),
          da(arena.take<A>(s.directions * walk.chunk_rows * ld)),
          da_pairs(rounded ? arena.take<A>(s.directions * (walk.chunk_rows + 1) * 4 * s.hidden) : nullptr),
          states(arena.take<A>(s.directions * (tiles + input_tiles) * tile_size(walk.chunk_rows))) {
        for (int d = 0; d < s.directions; ++d) {
            const WeightGradients& g = args.gradients[d];
            weights[d] = {static_cast<const T*>(args.weights[d].w_ih), static_cast<const T*>(args.weights[d].w_hh),
                          nullptr};
            gradients[d] = {static_cast<T*>(g.w_ih), static_cast<T*>(g.w_hh), static_cast<T*>(g.bias)};
            sums[d] = {sum_of(gradients[d].w_ih, s.input, arena), sum_of(gradients[d].w_hh, s.hidden, arena),
                       sum_of(gradients[d].bias, 1, arena)};
        }
    }

    // Where the gradient of a weight with 4H rows adds up: in place, or in scratch memory.
    A* sum_of(T* gradient, Index columns, Arena& arena) const {
        if constexpr (!rounded) {
            return gradient;
        } else {
            return gradient == nullptr ? nullptr : arena.take<A>(4 * s.hidden * columns);
        }
    }

    template <typename P>
    struct OfWeights {
        P w_ih, w_hh, bias;
    };

    const Walk walk;
    const Shape& s;
    const Index tiles, input_tiles;  // of 64 columns, in one direction
    const Index padded;              // H in whole tiles
    const Index ld;                  // of da: not a power of two, whose rows would share a few sets of the cache
    const T *x, *h0, *c0, *y, *gates, *dy;
    OfWeights<const T*> weights[2];
    const A* cells;
    A *dh_user, *dc;
    T* dx;
    OfWeights<T*> gradients[2];
    OfWeights<A*> sums[2];
    A* w_hh;      // [D, tiles, 4H, 64] packed
    A* w_ih;      // [D, input tiles, 4H, 64] packed
    A* dh;        // [D, B, padded]
    A* da;        // [D, rows of a chunk, ld] gradients of the pre-activations
    A* da_pairs;  // [D, rows of a chunk / 2, 4H, 2] the same, where products read pairs
    A* states;    // [D, tiles of x and h, rows of a chunk, 64] packed
};

// A tile of 64 columns of w [4H, columns], packed; of few rows in all, a whole one as it lies.
template <typename O>
struct RightSide {
    const O* b;
    Index ldb;
};

template <typename Isa, typename T>
LSTM_HD bool lies_right(const Backward<T>& f, Index columns, Index tile) {
    return std::is_same_v<Operand<Isa, T>, T> && !std::is_same_v<T, BFloat16> && f.walk.few() &&
           (tile + 1) * kTile <= columns;
}

template <typename Isa, typename T>
LSTM_HD RightSide<Operand<Isa, T>> right_side(const Backward<T>& f, const T* w, Index columns, Index tile,
                                              const Acc<T>* packed) {
    using O = Operand<Isa, T>;
    if constexpr (std::is_same_v<O, T>) {
        if (lies_right<Isa>(f, columns, tile)) return {w + tile * kTile, columns};
    }
    return {reinterpret_cast<const O*>(packed) + tile * tile_size(4 * f.s.hidden), kTile};
}

// This thread's tiles of w [4H, columns] of one direction.
template <typename Isa, typename T>
LSTM_HD void pack_weight(const Backward<T>& f, const T* w, Index columns, Acc<T>* packed, const Team& team,
                         int thread) {
    using O = Operand<Isa, T>;
    for (Index tile = thread; tile < tiles_of(columns); tile += team.threads) {
        if (lies_right<Isa>(f, columns, tile)) continue;
        const Index first = tile * kTile;
        pack_columns<Isa, T>(
            4 * f.s.hidden, std::min(kTile, columns - first),
            [&](Index k) LSTM_INLINED { return w + k * columns + first; },
            reinterpret_cast<O*>(packed) + tile * tile_size(4 * f.s.hidden));
    }
}

// 16 units where they lie, or, where they don't lie as 16 of the accumulation type, their copy.
template <typename Isa, typename T>
LSTM_HD const Acc<T>* staged(const T* units, Index count, Acc<T>* copy) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
        if (count == kUnits) return units;
    }
    load_units<Isa>(units, count, copy);
    return copy;
}

// Row b of step t, units unit .. unit + 16: B1 to B6.
template <typename Isa, typename T>
LSTM_HD void backward_units(const Backward<T>& f, int d, Index t, Index b, Index unit, Operand<Isa, T>* da) {
    using A = Acc<T>;
    const Index hidden = f.s.hidden, count = std::min(kUnits, hidden - unit), rows = f.walk.rows();
    const Index row = f.walk.start[t] + b, state = (d * f.s.batch + b) * hidden + unit;
    const Index before = f.walk.before(d, t, b);
    const T* const gates = f.gates + (d * rows + row) * 4 * hidden + unit;
    alignas(64) A kept[4][kUnits], c_kept[kUnits], prev_kept[kUnits], dc_kept[kUnits], dy_kept[kUnits] = {};
    const A* const i = staged<Isa>(gates, count, kept[0]);
    const A* const forget = staged<Isa>(gates + hidden, count, kept[1]);
    const A* const g = staged<Isa>(gates + 2 * hidden, count, kept[2]);
    const A* const o = staged<Isa>(gates + 3 * hidden, count, kept[3]);
    const A* const c = staged<Isa>(f.cells + (d * rows + row) * hidden + unit, count, c_kept);
    const A* const c_prev =
        before < 0 ? staged<Isa>(f.c0 + state, count, prev_kept)
                   : staged<Isa>(f.cells + (d * rows + f.walk.start[before] + b) * hidden + unit, count, prev_kept);
    const A* const dy =
        f.dy == nullptr ? dy_kept : staged<Isa>(f.dy + (row * f.s.directions + d) * hidden + unit, count, dy_kept);
    const A* const dh = f.dh + (d * f.s.batch + b) * f.padded + unit;
    const A* const dc = staged<Isa>(f.dc + state, count, dc_kept);
    alignas(64) A out[4][kUnits], dc_out[kUnits];
#pragma omp simd
    for (Index j = 0; j < kUnits; ++j) {
        const CellBackward<A> cell = cell_backward(i[j], forget[j], g[j], o[j], c[j], c_prev[j], dh[j] + dy[j], dc[j]);
        out[0][j] = cell.da_i;
        out[1][j] = cell.da_f;
        out[2][j] = cell.da_g;
        out[3][j] = cell.da_o;
        dc_out[j] = cell.dc_prev;
    }
    store_units<Isa>(dc_out, count, f.dc + state);
    for (int k = 0; k < 4; ++k) store_units<Isa>(out[k], count, da + k * hidden + unit);
}

// Tiles `first` and on of what the chunk's gradients are multiplied by: x, or the state before each row.
template <typename Isa, typename T>
LSTM_HD void pack_states(const Backward<T>& f, int d, const Chunk& chunk, const Team& team, int thread) {
    using O = Operand<Isa, T>;
    const Shape& s = f.s;
    O* const to = reinterpret_cast<O*>(f.states) + d * (f.tiles + f.input_tiles) * tile_size(f.walk.chunk_rows);
    for (Index tile = thread; tile < f.input_tiles + f.tiles; tile += team.threads) {
        O* const packed = to + tile * tile_size(f.walk.chunk_rows);
        if (tile < f.input_tiles) {
            const Index first = tile * kTile;
            pack_columns<Isa, T>(
                chunk.rows, std::min(kTile, s.input - first),
                [&](Index row) LSTM_INLINED { return f.x + (chunk.base + row) * s.input + first; }, packed);
            continue;
        }
        const Index first = (tile - f.input_tiles) * kTile;
        Index t = chunk.first;  // the step of the row at hand: rows come in order
        const auto before = [&](Index row) LSTM_INLINED {
            while (chunk.base + row >= f.walk.start[t + 1]) ++t;
            const Index b = chunk.base + row - f.walk.start[t], t_before = f.walk.before(d, t, b);
            return t_before < 0 ? f.h0 + (d * s.batch + b) * s.hidden + first
                                : f.y + (f.walk.start[t_before] + b) * s.directions * s.hidden + d * s.hidden + first;
        };
        pack_columns<Isa, T>(chunk.rows, std::min(kTile, s.hidden - first), before, packed);
    }
}

// dx of this thread's tiles and rows: those of absolute number, so that both directions find one thread.
template <typename Isa, typename T>
LSTM_HD void input_gradients(const Backward<T>& f, int d, const Chunk& chunk, const Team& team, int thread) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    const Index input = f.s.input;
    const O* const da = reinterpret_cast<const O*>(f.da) + d * f.walk.chunk_rows * f.ld;
    const A* const packed = f.w_ih + d * f.input_tiles * tile_size(4 * f.s.hidden) * sizeof(O) / sizeof(A);
    for (Index tile = 0; tile < f.input_tiles; ++tile) {
        const auto right = right_side<Isa>(f, f.weights[d].w_ih, input, tile, packed);
        const Index count = std::min(kTile, input - tile * kTile);
        for (Index block = chunk.base / kInputRows; block * kInputRows < chunk.base + chunk.rows; ++block) {
            if ((tile + block) % team.threads != thread) continue;
            const Index first = std::max(block * kInputRows, chunk.base);
            const Index rows = std::min((block + 1) * kInputRows, chunk.base + chunk.rows) - first;
            const O* const left = da + (first - chunk.base) * f.ld;
            T* const dx = f.dx + first * input + tile * kTile;
            if constexpr (!Backward<T>::rounded) {
                if (count == kTile) {
                    multiply<Isa>(rows, left, f.ld, right.b, right.ldb, 4 * f.s.hidden, dx, input, f.s.directions > 1);
                    continue;
                }
            }
            alignas(64) A products[kInputRows * kTile];
            multiply<Isa>(rows, left, f.ld, right.b, right.ldb, 4 * f.s.hidden, products, kTile, false);  // B7
            for (Index r = 0; r < rows; ++r)
                store_row<Isa>(products + r * kTile, count, dx + r * input, f.s.directions > 1);
        }
    }
}

// B8 of one weight, one tile and one gate: what the chunk adds to sum [4H, columns].
template <typename Isa, typename T>
LSTM_HD void weight_gradient(const Backward<T>& f, int d, const Chunk& chunk, Index gate, const Operand<Isa, T>* states,
                             Index columns, Index tile, Acc<T>* sum, bool accumulate) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    const Index hidden = f.s.hidden, first = tile * kTile, count = std::min(kTile, columns - first);
    constexpr bool pairs = sizeof(O) < sizeof(A);
    const O* a = reinterpret_cast<const O*>(pairs ? f.da_pairs : f.da);
    const Index lda = pairs ? 4 * hidden : f.ld, unit = pairs ? 2 : 1;
    a += (d * (pairs ? f.walk.chunk_rows + f.walk.chunk_rows % 2 : f.walk.chunk_rows)) * lda + gate * hidden * unit;
    A* const to = sum + gate * hidden * columns + first;
    if (count == kTile) {
        multiply<Isa, Along::columns>(hidden, a, lda, states, kTile, chunk.rows, to, columns, accumulate);
        return;
    }
    alignas(64) A products[kInputRows * kTile];
    for (Index row = 0; row < hidden; row += kInputRows) {
        const Index rows = std::min(kInputRows, hidden - row);
        multiply<Isa, Along::columns>(rows, a + row * unit, lda, states, kTile, chunk.rows, products, kTile, false);
        for (Index r = 0; r < rows; ++r)
            store_row<Isa, A>(products + r * kTile, count, to + (row + r) * columns, accumulate);
    }
}

// The chunk's gradients with two rows side by side.
template <typename Isa, typename T>
LSTM_HD void pair_gradients(const Backward<T>& f, int d, const Chunk& chunk, const Team& team, int thread) {
    using O = Operand<Isa, T>;
    const Index columns = 4 * f.s.hidden;
    const O* const from = reinterpret_cast<const O*>(f.da) + d * f.walk.chunk_rows * f.ld;
    O* const to = reinterpret_cast<O*>(f.da_pairs) + d * (f.walk.chunk_rows + f.walk.chunk_rows % 2) * columns;
    for (Index row = 2 * thread; row < chunk.rows; row += 2 * team.threads) {
        for (Index j = 0; j < columns; ++j) {
            to[row * columns + 2 * j] = from[row * f.ld + j];
            to[row * columns + 2 * j + 1] = row + 1 < chunk.rows ? from[(row + 1) * f.ld + j] : O{};
        }
    }
}

// All that a walked chunk gives beside dh. Threads share tiles and gates.
template <typename Isa, typename T>
LSTM_HD void gradients_of_chunk(const Backward<T>& f, const Chunk (&chunks)[2], bool accumulate, const Team& team,
                                int thread) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    const Shape& s = f.s;
    for (int d = 0; d < s.directions; ++d) {
        pack_states<Isa>(f, d, chunks[d], team, thread);
        if constexpr (sizeof(O) < sizeof(A)) pair_gradients<Isa>(f, d, chunks[d], team, thread);
    }
    meet();
    Index job = 0;
    const auto mine = [&] { return job++ % team.threads == thread; };
    for (int d = 0; d < s.directions; ++d) {
        if (f.dx != nullptr) input_gradients<Isa>(f, d, chunks[d], team, thread);
        const O* const states =
            reinterpret_cast<const O*>(f.states) + d * (f.tiles + f.input_tiles) * tile_size(f.walk.chunk_rows);
        for (Index tile = 0; tile < f.input_tiles + f.tiles; ++tile) {
            const bool of_x = tile < f.input_tiles;
            A* const sum = of_x ? f.sums[d].w_ih : f.sums[d].w_hh;
            for (Index gate = 0; sum != nullptr && gate < 4; ++gate) {
                if (!mine()) continue;
                weight_gradient<Isa>(f, d, chunks[d], gate, states + tile * tile_size(f.walk.chunk_rows),
                                     of_x ? s.input : s.hidden, of_x ? tile : tile - f.input_tiles, sum, accumulate);
            }
        }
        for (Index column = 0; f.sums[d].bias != nullptr && column < 4 * s.hidden; column += kUnits) {
            if (!mine()) continue;
            const Index count = std::min(kUnits, 4 * s.hidden - column);
            const O* const da = reinterpret_cast<const O*>(f.da) + d * f.walk.chunk_rows * f.ld + column;
            alignas(64) A sum[kUnits] = {}, units[kUnits];
            for (Index row = 0; row < chunks[d].rows; ++row) {
                load_units<Isa>(da + row * f.ld, count, units);
                for (Index j = 0; j < kUnits; ++j) sum[j] += units[j];
            }
            store_row<Isa, A>(sum, count, f.sums[d].bias + column, accumulate);
        }
    }
}

template <typename Isa, typename T>
LSTM_HD void prepare_backward(const Backward<T>& f, const Team& team, int thread) {
    using O = Operand<Isa, T>;
    constexpr Index in_a = sizeof(Acc<T>) / sizeof(O);
    const Shape& s = f.s;
    for (int d = 0; d < s.directions; ++d) {
        pack_weight<Isa>(f, f.weights[d].w_hh, s.hidden, f.w_hh + d * f.tiles * tile_size(4 * s.hidden) / in_a, team,
                         thread);
        if (f.dx != nullptr)
            pack_weight<Isa>(f, f.weights[d].w_ih, s.input, f.w_ih + d * f.input_tiles * tile_size(4 * s.hidden) / in_a,
                             team, thread);
    }
    for (Index i = thread; i < s.directions * s.batch; i += team.threads) {
        for (Index unit = 0; unit < f.padded; ++unit)
            f.dh[i * f.padded + unit] = unit < s.hidden ? f.dh_user[i * s.hidden + unit] : Acc<T>(0);
    }
    if (f.dx != nullptr && s.directions > 1) {  // to which both directions add
        for (Index row = thread; row < f.walk.rows(); row += team.threads)
            std::fill_n(f.dx + row * s.input, s.input, T{});
    }
}

// The steps of a chunk: da of all its rows, and dh.
template <typename Isa, typename T>
LSTM_HD void walk_back(const Backward<T>& f, const Chunk (&chunks)[2], const Team& team, int thread) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    const Shape& s = f.s;
    for (Index i = 0; i < chunks[0].steps; ++i) {
        for (const bool product : {false, true}) {
            for (int d = 0; d < s.directions; ++d) {
                const Part part = part_of(team, thread, d, f.tiles);
                const Index t = chunks[d].step(i), local = f.walk.start[t] - chunks[d].base;
                O* const da = reinterpret_cast<O*>(f.da) + (d * f.walk.chunk_rows + local) * f.ld;
                if (!product) {
                    for_blocks(team, part, s, t, [&](Index first, Index rows) LSTM_INLINED {
                        const Index end = std::min(part.tile_end * kTile, s.hidden);
                        for (Index b = first; b < first + rows; ++b) {
                            for (Index unit = part.tile * kTile; unit < end; unit += kUnits)
                                backward_units<Isa>(f, d, t, b, unit, da + b * f.ld);
                        }
                    });
                    continue;
                }
                const A* const packed = f.w_hh + d * f.tiles * tile_size(4 * s.hidden) * sizeof(O) / sizeof(A);
                A* const dh = f.dh + d * s.batch * f.padded;
                for (Index tile = part.tile; tile < part.tile_end; ++tile) {
                    const auto right = right_side<Isa>(f, f.weights[d].w_hh, s.hidden, tile, packed);
                    for (Index k = 0; k < 4 * s.hidden; k += kDepth) {  // so much of the tile stays in cache
                        for_blocks(team, part, s, t, [&](Index b, Index rows) LSTM_INLINED {
                            multiply<Isa>(rows, da + b * f.ld + k, f.ld, right.b + k * right.ldb, right.ldb,
                                          std::min(kDepth, 4 * s.hidden - k), dh + b * f.padded + tile * kTile,
                                          f.padded, k > 0);  // B7
                        });
                    }
                }
            }
            if (!team.by_rows && !product) meet();
        }
    }
}

template <typename Isa, typename T>
LSTM_HD void run_thread(const Backward<T>& f, int thread, int threads) {
    const Shape& s = f.s;
    const Team team = make_team(s, threads);
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
        std::copy_n(f.dh + i * f.padded, s.hidden, f.dh_user + i * s.hidden);
    if constexpr (Backward<T>::rounded) {
        for (int d = 0; d < s.directions; ++d) {
            for (Index row = thread; row < 4 * s.hidden; row += team.threads) {
                const auto& [w_ih, w_hh, bias] = f.sums[d];
                if (w_ih != nullptr)
                    store_row<Isa>(w_ih + row * s.input, s.input, f.gradients[d].w_ih + row * s.input, false);
                if (w_hh != nullptr)
                    store_row<Isa>(w_hh + row * s.hidden, s.hidden, f.gradients[d].w_hh + row * s.hidden, false);
                if (bias != nullptr) f.gradients[d].bias[row] = store<T>(bias[row]);
            }
        }
    }
}

}  // namespace lstm::cpu

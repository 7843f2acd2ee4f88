// The forward walk. By chunks of steps: first x W_ih^T of the chunk's rows into a buffer that stays in cache, then step
// by step h W_hh^T on top of it and the gates while both are hot. Where all weights stay in cache and the batch is
// large enough, or in planes the batch as wide as x, it is one product a step instead, of [x_t, h_{t-1}] with both
// weights: longer sums, and nothing to read again.
#pragma once

#include "activations.h"
#include "forward_setup.h"
#include "unpacked.h"

namespace lstm::cpu {

constexpr Index kSideBySide = 4;  // rows whose cells are taken by turns, as each is one long chain

// c[rows, 64] (+)= left[rows, k] times one tile of a weight: packed, or its rows as they lie.
template <typename Isa, typename T>
LSTM_HD void multiply_weight(Index rows, const Operand<Isa, T>* left, Index ld, const Groups<T>& rows_of_w,
                             const Right<const Operand<Isa, T>>& packed, Index k, Acc<T>* c, bool accumulate,
                             bool lies) {
    if constexpr (!in_planes<Operand<Isa, T>>) {
        if (lies) return multiply_unpacked<Isa>(rows, left, ld, rows_of_w, k, c, accumulate);
    }
    multiply<Isa>(rows, left, ld, packed, k, c, kTile, accumulate);
}

// 16 units of h, as y and, unless whole rows become operands (take_states), as the products of the next step read them,
// from the first one of `next`: rounded to T.
template <typename Isa, typename T>
LSTM_HD void store_state(const Forward<T>& f, int d, Index row, Index unit, Index count, const Acc<T>* h,
                         Operand<Isa, T>* next) {
    store_units<Isa>(h, count, f.y + (row * f.s.directions + d) * f.features + unit);
    if constexpr (std::is_same_v<Operand<Isa, T>, Acc<T>>) {
        alignas(64) T rounded[kUnits];
        store_units<Isa>(h, kUnits, rounded);
        load_units<Isa>(rounded, kUnits, next + unit);
    } else if constexpr (!whole_rows<Operand<Isa, T>>) {
        store_operands<Isa>(h, kUnits, next, unit);
    }
}

// Rows of y become the states of the next step, where that takes whole rows: this thread's, or of all its share.
template <typename Isa, typename T>
LSTM_HD void take_states(const Forward<T>& f, const Team& team, int thread, int d, Index t, Operand<Isa, T>* after) {
    const auto take = [&](Index b) LSTM_INLINED {
        const T* const y = f.y + ((f.walk.start[t] + b) * f.s.directions + d) * f.features;
        copy_operands<Isa>(y, f.features, 0, f.ld, after + b * f.ld);
    };
    if (!team.by_rows) {
        for (Index b = thread; b < f.s.steps[t]; b += team.threads) take(b);
        return;
    }
    for_blocks(team, part_of(team, thread, d, f.tiles), f.s, t, [&](Index first, Index rows) LSTM_INLINED {
        for (Index b = first; b < first + rows; ++b) take(b);
    });
}

// Rows b .. b + rows of step t, 64 features: what W_hr makes of o tanh(c).
template <typename Isa, typename T>
LSTM_HD void project_tile(const Forward<T>& f, int d, Index t, Index b, Index rows, Index tile,
                          Operand<Isa, T>* after) {
    using O = Operand<Isa, T>;
    const Index hidden = f.s.hidden, first = f.walk.start[t] + b;
    const O* const m = reinterpret_cast<const O*>(f.m) + (d * f.s.batch + b) * f.ld_m;
    alignas(64) Acc<T> h[Isa::rows * kTile];
    const O* const packed = reinterpret_cast<const O*>(f.w_hr) + (d * f.feature_tiles + tile) * tile_size(hidden);
    const Index piece = in_planes<O> || f.unpacked ? hidden : kShortSum;
    for (Index k = 0; k < hidden; k += piece)
        multiply_weight<Isa, T>(rows, m + k, f.ld_m, plain_rows(f.weights[d].w_hr, f.features, hidden, tile),
                                packed_at<Isa>(packed, hidden).only(f.features - tile * kTile).from(k),
                                std::min(piece, hidden - k), h, k > 0, f.unpacked);
    for (Index r = 0; r < rows; ++r) {
        for (Index unit = tile * kTile; unit < std::min((tile + 1) * kTile, f.features); unit += kUnits)
            store_state<Isa>(f, d, first + r, unit, std::min(kUnits, f.features - unit),
                             h + r * kTile + unit - tile * kTile, after + (b + r) * f.ld + f.h_first);
    }
}

// Asks for where gates and cells will be saved, or y written in inference, of some rows of step t from b on: else one
// store waits for memory after the other, and what comes behind them for a place in the queue.
template <typename T>
LSTM_HD void ask_for_results(const Forward<T>& f, int d, Index t, Index b, Index rows, Index unit) {
    for (Index at = f.walk.start[t] + b, end = at + rows; at < end; ++at) {
        if (f.gates == nullptr) {
            __builtin_prefetch(f.y + (at * f.s.directions + d) * f.features + unit, 1);
            continue;
        }
        const Index row = d * f.walk.rows() + at;
        for (Index gate = 0; gate < 4; ++gate) __builtin_prefetch(f.gates + (row * 4 + gate) * f.s.hidden + unit, 1);
        __builtin_prefetch(f.cells + row * f.s.hidden + unit, 1);
    }
}

// The products of one tile with h_{t-1}, on top of x W_ih^T; joined, of both, in `both`. The part's tiles are walked
// the one or the other way; in passing each of W_hh lies where the first one does.
template <typename Isa, typename T>
LSTM_HD Acc<T>* step_products(const Forward<T>& f, int d, const Chunk& chunk, Index t, Index b, Index rows,
                              const Part& part, Index tile, Index way, bool in_passing, const Operand<Isa, T>* before,
                              Acc<T>* both) {
    using O = Operand<Isa, T>;
    const Index input = f.s.input, features = f.features, first = f.walk.start[t] + b;
    const Index place = in_passing ? part.tile : tile;
    const Index next = in_passing ? place : std::clamp(tile + way, part.tile, part.tile_end - 1);
    const O* const states = before + b * f.ld;
    if (f.asks) ask_for_results(f, d, t, b, rows, tile * kUnits);
    if (f.joined) {
        const Right<const O> whole = packed_ih<Isa, const O>(f, d, tile), ahead = packed_ih<Isa, const O>(f, d, next);
        // Few terms of x have a sum of their own: mostly larger than those of h, they'd have these rounded as they are.
        const Index apart = !in_planes<O> && 2 * input <= features ? input : 0;
        if (apart > 0) multiply<Isa>(rows, states, f.ld, whole, apart, both, kTile, false);
        Right<const O> weights = whole.from(apart);
        ask_for<Isa, O>(ahead.from(apart).b, b, f.s.steps[t], part.block_stride, weights);
        multiply<Isa>(rows, states + apart, f.ld, weights, input + features - apart, both, kTile, apart > 0);
        return both;
    }
    Acc<T>* const products = f.of_tile(d, tile) + (first - chunk.base) * kTile;
    Right<const O> hh = packed_hh<Isa, const O>(f, d, place);
    ask_for<Isa, O>(packed_hh<Isa, const O>(f, d, next).b, b, f.s.steps[t], part.block_stride, hh);
    multiply_weight<Isa, T>(rows, states, f.ld, gate_rows(f.weights[d].w_hh, f.s.hidden, features, tile), hh, features,
                            products, true, f.hh_lies);
    return products;
}

// F1 to F6 from the products [4, 16] of `count` rows of a tile, from row b on, each `ld` behind the one before; or, if
// kTiles, of as many tiles of row b, walked the one or the other way.
template <typename Isa, bool kTiles, typename T>
LSTM_HD void step_gates(const Forward<T>& f, int d, Index t, Index b, Index tile, Index count, Index way,
                        const Acc<T>* products, Index ld, Operand<Isa, T>* after) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    const Index hidden = f.s.hidden;
    const auto row_of = [&](Index n) LSTM_INLINED { return kTiles ? b : b + n; };
    const auto unit_of = [&](Index n) LSTM_INLINED { return (kTiles ? tile + n * way : tile) * kUnits; };
    alignas(64) A gates[kSideBySide][4][kUnits], tanh_c[kSideBySide][kUnits], h[kUnits];
    for (Index first = 0; first < count; first += kSideBySide) {
        const Index some = std::min(kSideBySide, count - first);
        for (Index n = 0; n < some; ++n) {
            const Index row = d * f.s.batch + row_of(first + n), unit = unit_of(first + n);
            const A* const bias = f.bias + d * f.tiles * kTile + 4 * unit;
            const A* const z = products + (first + n) * (kTiles ? ld : kTile);
            A* const c = f.c + row * f.padded + unit;
            for (Index j = 0; j < kUnits; j += lanes<Isa, A>) {
                Vector<Isa, A> gate[4];
#pragma GCC unroll 4
                for (Index k = 0; k < 4; ++k)
                    gate[k] = load_vector<Isa>(z + k * kUnits + j) + load_vector<Isa>(bias + k * kUnits + j);
                activate<Isa, Forward<T>::coarse, 0b0100>(gate);  // F1 to F4
#pragma GCC unroll 4
                for (Index k = 0; k < 4; ++k) store_vector<Isa, A>(gate[k], gates[n][k] + j);
                const auto c_new = gate[1] * load_vector<Isa>(c + j) + gate[0] * gate[2];  // F5
                store_vector<Isa, A>(c_new, c + j);
                store_vector<Isa, A>(c_new, tanh_c[n] + j);
            }
        }
        tanh_of<Isa, Forward<T>::coarse>(tanh_c[0], some * kUnits);
        for (Index n = 0; n < some; ++n) {
            const Index row = row_of(first + n), unit = unit_of(first + n), units = std::min(kUnits, hidden - unit);
            const Index at = f.walk.start[t] + row, state = d * f.s.batch + row;
            for (Index j = 0; j < kUnits; j += lanes<Isa, A>)
                store_vector<Isa, A>(load_vector<Isa>(gates[n][3] + j) * load_vector<Isa>(tanh_c[n] + j), h + j);  // F6
            if (f.feature_tiles == 0) {
                store_state<Isa>(f, d, at, unit, units, h, after + row * f.ld + f.h_first);
            } else if constexpr (!whole_rows<O>) {
                store_operands<Isa>(h, kUnits, reinterpret_cast<O*>(f.m) + state * f.ld_m, unit);
            }
            if (f.gates != nullptr) {
                const Index saved = d * f.walk.rows() + at;
                for (int gate = 0; gate < 4; ++gate)
                    store_units<Isa>(gates[n][gate], units, f.gates + (saved * 4 + gate) * hidden + unit);
                store_units<Isa>(f.c + state * f.padded + unit, units, f.cells + saved * hidden + unit);
            }
        }
    }
}

// x W_ih^T of this thread's part of a chunk.
template <typename Isa, typename T>
LSTM_HD void input_products(const Forward<T>& f, const Team& team, int d, const Part& part, const Chunk& chunk) {
    using O = Operand<Isa, T>;
    const Index input = f.s.input;
    const O* x;  // of the chunk's first row
    if constexpr (std::is_same_v<O, T>) {
        x = f.x + chunk.base * input;
    } else {
        x = reinterpret_cast<const O*>(f.converted) + d * f.walk.chunk_rows * f.ld_x;
    }
    const bool in_passing = packs_in_passing(f, team);
    for (Index tile = part.tile; tile < part.tile_end; ++tile) {
        const auto rows_of_w = gate_rows(f.weights[d].w_ih, f.s.hidden, input, tile);
        const Index place = in_passing ? part.tile : tile;
        if (in_passing) pack_rows<Isa>(rows_of_w, input, packed_ih<Isa, O>(f, d, place));
        const O* const next =
            packed_ih<Isa, const O>(f, d, in_passing ? place : std::min(tile + 1, part.tile_end - 1)).b;
        const auto take = [&](Index first, Index rows, Index rows_of_step, Index threads) LSTM_INLINED {
            Right<const O> packed = packed_ih<Isa, const O>(f, d, place);
            if (first < rows_of_step)  // those of the first step
                ask_for<Isa, O>(next, first, rows_of_step, threads, packed);
            multiply_weight<Isa, T>(rows, x + first * f.ld_x, f.ld_x, rows_of_w, packed, input,
                                    f.of_tile(d, tile) + first * kTile, false, f.unpacked);
        };
        if (part.all_rows(team)) {
            take(0, chunk.rows, chunk.rows, 1);
            continue;
        }
        for (Index t = chunk.first; t < chunk.first + chunk.steps; ++t) {
            for_blocks(team, part, f.s, t, [&](Index b, Index rows) LSTM_INLINED {
                take(f.walk.start[t] - chunk.base + b, rows, f.s.steps[chunk.first], part.block_stride);
            });
        }
    }
}

template <typename Isa, typename T>
LSTM_HD void convert_input(const Forward<T>& f, const Team& team, int thread, int d, const Chunk& chunk) {
    using O = Operand<Isa, T>;
    for (Index row = thread; row < chunk.rows; row += team.threads) {
        const T* const from = f.x + (chunk.base + row) * f.s.input;
        O* const to = reinterpret_cast<O*>(f.converted) + (d * f.walk.chunk_rows + row) * f.ld_x;
        copy_operands<Isa>(from, f.s.input, 0, f.ld_x, to);
    }
}

// Joined: x of step t, this thread's part, into the states that the step will read.
template <typename Isa, typename T>
LSTM_HD void join_input(const Forward<T>& f, const Team& team, const Part& part, Index t, Operand<Isa, T>* states) {
    const Index input = f.s.input, all = tiles_of(input, kUnits);
    const Index first = all * part.tile / f.tiles * kUnits, end = all * part.tile_end / f.tiles * kUnits;
    for_blocks(team, part, f.s, t, [&](Index block, Index rows) LSTM_INLINED {
        for (Index b = block; b < block + rows; ++b) {
            const T* const from = f.x + (f.walk.start[t] + b) * input;
            copy_operands<Isa>(from, input, first, std::min(end, input), states + b * f.ld);
        }
    });
}

// This thread's tiles in a step.
template <typename Isa, typename T>
LSTM_HD void walk_tiles(const Forward<T>& f, const Team& team, const Part& part, int d, const Chunk& chunk, Index t,
                        Index turn, bool in_passing, const Operand<Isa, T>* before, Operand<Isa, T>* after) {
    using A = Acc<T>;
    const Index way = turn == 0 ? 1 : -1;  // there and back: the tiles of the last step's end are still in cache
    const Index together = f.s.steps[t] == 1 && !in_passing ? kSideBySide : 1;
    alignas(64) A both[std::max(Isa::rows, kSideBySide) * kTile];
    for (Index n = part.tile; n < part.tile_end; n += together) {
        const Index tile = turn == 0 ? n : part.tile + part.tile_end - 1 - n;
        const Index some = std::min(together, part.tile_end - n);
        if (in_passing)
            pack_rows<Isa>(gate_rows(f.weights[d].w_hh, f.s.hidden, f.features, tile), f.features,
                           packed_hh<Isa, Operand<Isa, T>>(f, d, part.tile));
        for_blocks(team, part, f.s, t, [&](Index b, Index rows) LSTM_INLINED {
            const A* first = nullptr;
            for (Index i = 0; i < some; ++i) {
                const A* const products = step_products<Isa>(f, d, chunk, t, b, rows, part, tile + way * i, way,
                                                             in_passing, before, both + i * kTile);
                if (i == 0) first = products;
            }
            if (some > 1) {
                const Index ld = f.joined ? kTile : way * f.walk.chunk_rows * kTile;
                step_gates<Isa, true>(f, d, t, b, tile, some, way, first, ld, after);
            } else {
                step_gates<Isa, false>(f, d, t, b, tile, rows, way, first, kTile, after);
            }
        });
    }
}

template <typename Isa, typename T>
LSTM_HD void run_thread(const Forward<T>& f, int thread, int threads) {
    using O = Operand<Isa, T>;
    using In = OverSteps<Isa>;
    const Shape& s = f.s;
    const Team team = make_team<Isa>(s, f.tiles, threads), of_input = input_team(f, team);
    const auto states = [&](int d, Index turn) { return reinterpret_cast<O*>(f.h) + (2 * d + turn) * s.batch * f.ld; };
    const bool in_passing = packs_both_in_passing(f, team);
    prepare_forward<Isa>(f, team, thread);
    for (int d = 0; f.joined && d < s.directions; ++d)
        join_input<Isa>(f, team, part_of(team, thread, d, f.tiles), d == 0 ? 0 : s.time - 1, states(d, 0));
    meet();
    for (Index index = 0; index < f.walk.chunks(); ++index) {
        const Chunk chunks[2] = {{f.walk, index, false}, {f.walk, index, true}};
        if constexpr (!std::is_same_v<Operand<In, T>, T>) {
            for (int d = 0; !f.joined && d < s.directions; ++d) convert_input<In>(f, team, thread, d, chunks[d]);
            if (unfit) f.walk.unfit = true;
            meet();
            if (f.walk.unfit) return;  // all threads do: none has gone on to where it could find something unfit
        }
        for (int d = 0; !f.joined && d < s.directions; ++d)
            input_products<In>(f, of_input, d, part_of(of_input, thread, d, f.tiles), chunks[d]);
        if (of_input.by_rows != team.by_rows) meet();
        for (Index i = 0; i < chunks[0].steps; ++i) {
            const Index step = chunks[0].begin + i, turn = step % 2;
            for (int d = 0; d < s.directions; ++d) {
                const Part part = part_of(team, thread, d, f.tiles);
                const Index t = chunks[d].step(i);
                ask_for_states(team, states(d, turn), s.steps[t] * f.ld);
                walk_tiles<Isa>(f, team, part, d, chunks[d], t, turn, in_passing, states(d, turn), states(d, 1 - turn));
                if (f.joined && step + 1 < s.time)
                    join_input<Isa>(f, team, part, d == 0 ? t + 1 : t - 1, states(d, 1 - turn));
            }
            if (f.feature_tiles > 0) {
                if (!team.by_rows) meet();
                for (int d = 0; d < s.directions; ++d) {
                    const Part part = part_of(team, thread, d, f.feature_tiles);
                    const Index t = chunks[d].step(i);
                    for (Index tile = part.tile; tile < part.tile_end; ++tile) {
                        for_blocks(team, part, s, t, [&](Index b, Index rows) LSTM_INLINED {
                            project_tile<Isa>(f, d, t, b, rows, tile, states(d, 1 - turn));
                        });
                    }
                }
            }
            if (!team.by_rows) meet();
            if constexpr (whole_rows<O>) {
                for (int d = 0; step + 1 < s.time && d < s.directions; ++d)
                    take_states<Isa>(f, team, thread, d, chunks[d].step(i), states(d, 1 - turn));
                if (!team.by_rows) meet();
            }
        }
        meet();  // before others' rows are overwritten
    }
    for (Index i = thread; i < s.directions * s.batch; i += team.threads) {
        const Index d = i / s.batch, b = i % s.batch;
        store_row<Isa>(f.c + i * f.padded, s.hidden, static_cast<const T*>(nullptr), f.c_n + i * s.hidden);
        if (f.h_n == nullptr) continue;
        Index last = 0;  // the step where sequence b ends its walk
        if (d == 0)
            last = std::partition_point(s.steps, s.steps + s.time, [b](Index n) { return n > b; }) - s.steps - 1;
        std::memcpy(f.h_n + i * f.features, f.y + ((f.walk.start[last] + b) * s.directions + d) * f.features,
                    f.features * sizeof(T));
    }
}

}  // namespace lstm::cpu

// The backward walk. By chunks of steps: first step by step the gates' gradients and dh, then from the chunk's
// gradients, while they are in cache, dx and what they add to the gradients of the weights (gradients.h).
#pragma once

#include "activations.h"
#include "team.h"

namespace lstm::cpu {

// Rows of a chunk: the sums that make the weights' gradients are as long as they can be. Fewer of large weights where
// gates' gradients lie in planes as well, which would take more memory than nn.LSTM.
constexpr Index kBackwardRows = 512, kSplitRows = 256;
constexpr Index kFewStepsBack = 4;     // that don't pay for packing weights behind the second cache
constexpr Index kPartBytes = 3 << 18;  // of their gradients, multiplied in one go
constexpr Index kFewRowsOfPart = 64;   // of a call, of whose gradients parts are
constexpr Index kColumnsOfPart = 32;   // so narrow
constexpr Index kLeftBytes = 1 << 19;  // of a left side that stays in the second cache while weights go by

// Gradients of all rows of a chunk, the left side of products along rows and down columns.
template <typename A>
struct ChunkGradients {
    Index columns;
    Index ld;  // from one row to the next: not a power of two, whose rows would share a few sets of the cache
    A* rows;   // [D, rows of a chunk, ld] for products of a step
    A* split;  // the same for those over all steps: these, or where only those read planes a copy in planes
    // Of each thread, of the part at hand of its columns:
    A* packed;  // for products down them: [columns / kRows, rows of a chunk + 1, kRows]; of pairs [rows of a chunk / 2,
                // columns, 2], or AMX's blocks
    A* sums;    // over the rows
    Index part;  // columns of one, and a vector more
};

// Where the gradient of a weight belongs, null where not asked for; and where it adds up over chunks: in its place, or,
// if T rounds, in memory of its own.
template <typename T>
struct Gradient {
    T* to;
    Acc<T>* sum;
};

template <typename T>
struct Backward {
    using A = Acc<T>;
    using Type = T;
    static constexpr bool rounded = !std::is_same_v<T, A>;
    static constexpr bool coarse = sizeof(T) == 2;  // activations, as in the forward pass
    static constexpr Index units = kTile;           // hidden units of a tile

    Backward(const Shape& shape, const BackwardArgs& args, Arena& arena)
        : walk(shape, splits_large(shape) ? kSplitRows : kBackwardRows, true),
          s(walk.s),
          projected(args.weights[0].w_hr != nullptr),
          tiles(tiles_of(s.hidden, units)),
          feature_tiles(tiles_of(s.features)),
          input_tiles(tiles_of(s.input)),
          threads(std::max(s.threads, 1)),
          parts(round_up(parts_at_least(), threads)),
          factor_tiles(input_tiles + feature_tiles + (projected ? tiles : 0)),
          x(static_cast<const T*>(args.x)),
          h0(static_cast<const T*>(args.h0)),
          c0(static_cast<const T*>(args.c0)),
          weights{TypedWeights<T>(args.weights[0]), TypedWeights<T>(args.weights[1])},
          y(static_cast<const T*>(args.y)),
          gates(static_cast<const T*>(args.gates)),
          dy(static_cast<const T*>(args.dy)),
          dh_n(static_cast<const T*>(args.dh_n)),
          dc_n(static_cast<const T*>(args.dc_n)),
          cells(static_cast<const A*>(args.cells)),
          dx(static_cast<T*>(args.dx)),
          dh0(static_cast<T*>(args.dh0)),
          dc0(static_cast<T*>(args.dc0)),
          w_ih{arena.take<A>(
                   dx == nullptr ? 0 : walk.over_steps.room(s.directions * input_tiles * tile_size(4 * s.hidden))),
               nullptr},
          w_hh{arena.take<A>(walk.of_step.room(s.directions * feature_tiles * tile_size(4 * s.hidden))),
               walk.fixes() ? arena.take<float>(s.directions * feature_tiles * scales_size(4 * s.hidden)) : nullptr},
          w_hr{arena.take<A>(projected ? walk.of_step.room(s.directions * tiles * tile_size(s.features)) : 0), nullptr},
          dh(arena.take<A>(s.directions * s.batch * feature_tiles * kTile)),
          dc(arena.take<A>(s.directions * s.batch * s.hidden)),
          dm(arena.take<A>(projected ? s.directions * s.batch * tiles * kTile : 0)),
          m(arena.take<A>(projected ? walk.of_step.room(s.directions * walk.chunk_rows * s.hidden) : 0)),
          da(of_chunk(4 * s.hidden, arena)),
          dr(of_chunk(projected ? s.features : 0, arena)),
          factors(arena.take<A>(walk.over_steps.room(s.directions * factor_tiles * tile_size(walk.chunk_rows)))) {
        for (int d = 0; d < s.directions; ++d) {
            const WeightGradients& g = args.gradients[d];
            gradients[d] = {gradient_of(g.w_ih, 4 * s.hidden * s.input, arena),
                            gradient_of(g.w_hh, 4 * s.hidden * s.features, arena),
                            gradient_of(g.w_hr, s.features * s.hidden, arena),
                            gradient_of(g.bias, 4 * s.hidden, arena)};
        }
    }

    static bool splits_large(const Shape& shape) {
        return shape.instruction_set == InstructionSet::amx_over_steps && is_far(4 * shape.hidden * shape.features);
    }

    // So many that each stays in cache. The gradient of a large weight, if of few rows, is written more than computed:
    // then as many as keep to a few of its rows, which may be pages apart, until they are whole.
    Index parts_at_least() const {
        const Index bytes = walk.over_steps.room(4 * s.hidden * walk.chunk_rows) * static_cast<Index>(sizeof(A));
        const bool writes = walk.rows() <= kFewRowsOfPart && is_far(4 * s.hidden * std::max(s.input, s.features));
        return std::max<Index>({4, bytes / kPartBytes, writes ? 4 * s.hidden / kColumnsOfPart : 0});
    }

    ChunkGradients<A> of_chunk(Index columns, Arena& arena) const {
        const bool planes = walk.over_steps.planes;
        const Index ld = walk.over_steps.in_row(columns) + (planes ? kDeep : kUnits);
        const Index all = columns == 0 ? 0 : s.directions * packed_rows() * ld, size = walk.over_steps.room(all);
        A* const rows = arena.take<A>(walk.of_step.room(all));
        A* const split = walk.alike() ? rows : arena.take<A>(size);
        const Index part = columns == 0 ? 0 : columns / parts + 1 + 2 * kUnits;
        A* const packed = arena.take<A>(walk.over_steps.room(threads * packed_rows() * part));
        return {columns, ld, rows, split, packed, arena.take<A>(threads * part), part};
    }

    // Whether whole tiles of weights are read as they lie, in a call of few rows: of more than forward, as columns are
    // multiplied no slower so; but weights behind the second cache, whose rows are pages apart, at few steps alone.
    bool weights_lie() const {
        const bool near = s.time <= kFewStepsBack || !is_far(4 * s.hidden * s.features);
        return !walk.of_step.planes && walk.rows() <= (near ? 2 : 1) * kFewRows;
    }

    // Enough of them for a chunk's gradients in any form.
    Index packed_rows() const { return round_up(walk.chunk_rows + 1, kDeep); }

    Gradient<T> gradient_of(void* to, Index size, Arena& arena) const {
        T* const typed = static_cast<T*>(to);
        if constexpr (rounded) {
            return {typed, arena.take<A>(to == nullptr || walk.chunks() == 1 ? 0 : size)};
        } else {
            return {typed, typed};
        }
    }

    struct Gradients {
        Gradient<T> w_ih, w_hh, w_hr, bias;
    };

    const Walk walk;
    const Shape& s;
    const bool projected;
    const Index tiles, feature_tiles, input_tiles;  // of 64 hidden units, features of h, and of x
    const Index threads;                            // that take part, at most
    const Index parts;                              // of a chunk's gradients, which threads share
    const Index factor_tiles;                       // of all that gradients are multiplied by
    const T *x, *h0, *c0;
    const TypedWeights<T> weights[2];
    const T *y, *gates, *dy, *dh_n, *dc_n;
    const A* cells;
    T *dx, *dh0, *dc0;
    Gradients gradients[2];
    PackedWeight<A> w_ih;  // [D, input tiles, 4H, 64]
    PackedWeight<A> w_hh;  // [D, feature tiles, 4H, 64]
    PackedWeight<A> w_hr;  // [D, tiles, R, 64]
    A* dh;                 // [D, B, feature tiles, 64]
    A* dc;                 // [D, B, H]
    A* dm;                 // [D, B, tiles, 64] gradient of o tanh(c), where it is projected
    A* m;                  // [D, rows of a chunk, H] o tanh(c)
    ChunkGradients<A> da;  // of the pre-activations, 4H columns
    ChunkGradients<A> dr;  // of the projected h, R columns
    A* factors;            // [D, tiles of x, h and m, rows of a chunk, 64] packed
};

// Rows of direction d in a chunk's gradients, for products of a step and over all steps.
template <typename O, typename T>
LSTM_HD O* chunk_rows(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d) {
    return reinterpret_cast<O*>(g.rows) + d * f.walk.chunk_rows * g.ld;
}
template <typename O, typename T>
LSTM_HD O* chunk_split(const Backward<T>& f, const ChunkGradients<Acc<T>>& g, int d) {
    return reinterpret_cast<O*>(g.split) + d * f.walk.chunk_rows * g.ld;
}

// Whether a tile of a weight is read as it lies: a whole one.
template <typename Isa, typename T>
LSTM_HD bool lies_right(const Backward<T>& f, Index columns, Index tile) {
    return std::is_same_v<Operand<Isa, T>, T> && !std::is_same_v<T, BFloat16> && f.weights_lie() &&
           (tile + 1) * kTile <= columns;
}

// Tile of direction d of packed: [D, tiles, rows, 64].
template <typename Isa, typename T>
LSTM_HD Right<Operand<Isa, T>> packed_weight(const PackedWeight<Acc<T>>& packed, Index rows, Index columns, int d,
                                             Index tile) {
    return packed.template tile<Isa, Operand<Isa, T>>(d * tiles_of(columns) + tile, rows, rows * columns);
}

// Of a tile of w [.., columns], rows k and on: `packed`, or as they lie.
template <typename Isa, typename T>
LSTM_HD Right<const Operand<Isa, T>> right_side(const Backward<T>& f, const T* w, Index columns, Index tile, Index k,
                                                const Right<Operand<Isa, T>>& packed) {
    if constexpr (std::is_same_v<Operand<Isa, T>, T>) {
        if (lies_right<Isa>(f, columns, tile))
            return {w + k * columns + tile * kTile, columns, panel_width<Isa, Acc<T>>};
    }
    return Right<const Operand<Isa, T>>{packed.b, packed.ld, packed.panel, packed.weight, packed.scales}.only(
        columns - tile * kTile);
}

// Packs rows first .. first + rows of a tile, unless they are read as they lie.
template <typename Isa, typename T>
LSTM_HD void pack_tile(const Backward<T>& f, const T* w, Index columns, Index tile, Index first, Index rows,
                       const Right<Operand<Isa, T>>& to) {
    if (lies_right<Isa>(f, columns, tile)) return;
    const T* const begin = w + first * columns + tile * kTile;
    pack_columns<Isa, T>(
        rows, std::min(kTile, columns - tile * kTile), [&](Index k) LSTM_INLINED { return begin + k * columns; }, to);
}

// Whether each tile of the weights that a step multiplies by is needed once and by one thread, which then packs some
// rows of it at a time in one place after the other's use.
template <typename T>
LSTM_HD bool packs_in_passing(const Backward<T>& f, const Team& team) {
    return f.s.time == 1 && (!team.by_rows || team.threads == 1);
}

template <typename Isa, typename T>
LSTM_HD void pack_weight(const Backward<T>& f, const T* w, Index rows, Index columns,
                         const PackedWeight<Acc<T>>& packed, int d, const Team& team, int thread) {
    for (Index k = 0; k < rows; k += kDepth) {  // all tiles' before the next: rows may be pages apart
        const Index some = std::min(kDepth, rows - k);
        for (Index tile = thread; tile < tiles_of(columns); tile += team.threads) {
            const auto piece = packed_weight<Isa, T>(packed, rows, columns, d, tile).from(k);
            pack_tile<Isa>(f, w, columns, tile, k, some, piece);
            if (packed.scales != nullptr) fix_tile<Isa>(piece, some);
        }
    }
}

// 16 units in vectors, from where they lie or, where only count < 16 of them exist, from a copy with 0 behind.
template <typename Isa, typename T>
struct Units {
    LSTM_HD Units(const T* units, Index count) : there(units), whole(count == kUnits) {
        if (!whole) load_units<Isa>(units, count, copy);
    }
    LSTM_HD Vector<Isa, Acc<T>> at(Index j) const {
        return whole ? load_vector<Isa>(there + j) : load_vector<Isa>(copy + j);
    }

    const T* there;
    bool whole;
    alignas(64) Acc<T> copy[kUnits];
};

// Row b of step t, 16 units: B1 to B6 from dh, and dy unless it is null. da, m: those of the row.
template <typename Isa, typename T>
LSTM_HD void backward_units(const Backward<T>& f, int d, Index t, Index b, Index unit, const Acc<T>* dh_row,
                            const T* dy_row, Operand<Isa, T>* da, Operand<Isa, T>* m) {
    using A = Acc<T>;
    const Index hidden = f.s.hidden, count = std::min(kUnits, hidden - unit), rows = f.walk.rows();
    const Index row = f.walk.start[t] + b, state = (d * f.s.batch + b) * hidden + unit;
    const Index before = f.walk.before(d, t, b);
    const T* const gates = f.gates + (d * rows + row) * 4 * hidden + unit;
    const Units<Isa, T> i(gates, count), forget(gates + hidden, count), g(gates + 2 * hidden, count);
    const Units<Isa, T> o(gates + 3 * hidden, count), c_first(f.c0 + state, count);
    const A* const cells = f.cells + d * rows * hidden + unit;
    const Units<Isa, A> c(cells + row * hidden, count), dc(f.dc + state, count);
    const Units<Isa, A> c_before(cells + (before < 0 ? row : f.walk.start[before] + b) * hidden, count);
    const Units<Isa, T> dy(dy_row == nullptr ? gates : dy_row + unit, count);
    alignas(64) A out[4][kUnits], dc_out[kUnits], m_out[kUnits];
    for (Index j = 0; j < kUnits; j += lanes<Isa, A>) {
        Vector<Isa, A> tanh_c[1] = {c.at(j)}, dh = load_vector<Isa>(dh_row + unit + j);
        activate<Isa, Backward<T>::coarse, 1>(tanh_c);
        if (dy_row != nullptr) dh += dy.at(j);
        const auto cell = cell_backward_of(i.at(j), forget.at(j), g.at(j), o.at(j), tanh_c[0],
                                           before < 0 ? c_first.at(j) : c_before.at(j), dh, dc.at(j));
        store_vector<Isa, A>(cell.da_i, out[0] + j);
        store_vector<Isa, A>(cell.da_f, out[1] + j);
        store_vector<Isa, A>(cell.da_g, out[2] + j);
        store_vector<Isa, A>(cell.da_o, out[3] + j);
        store_vector<Isa, A>(cell.dc_prev, dc_out + j);
        store_vector<Isa, A>(o.at(j) * tanh_c[0], m_out + j);
    }
    store_units<Isa>(dc_out, count, f.dc + state);
    for (int k = 0; k < 4; ++k) store_operands<Isa>(out[k], count, da, k * hidden + unit);
    if (f.projected) store_operands<Isa>(m_out, count, m, unit);
}

// Asks for what backward_units will read of a row: the forward pass saved it long ago.
template <typename T>
LSTM_HD void ask_for_row(const Backward<T>& f, int d, Index row, Index unit) {
    const Index hidden = f.s.hidden, saved = d * f.walk.rows() + row;
    for (Index gate = 0; gate < 4; ++gate) __builtin_prefetch(f.gates + (saved * 4 + gate) * hidden + unit);
    __builtin_prefetch(f.cells + saved * hidden + unit);
    if (f.dy != nullptr && !f.projected) __builtin_prefetch(f.dy + (row * f.s.directions + d) * hidden + unit);
}

// One step of one direction, as one thread walks it.
template <typename Isa, typename T>
struct StepBack {
    using A = Acc<T>;
    using O = Operand<Isa, T>;

    LSTM_HD StepBack(const Backward<T>& backward, const Team& in, int thread, int direction, const Chunk& chunk,
                     Index i)
        : f(backward),
          team(in),
          d(direction),
          t(chunk.step(i)),
          units(part_of(team, thread, d, f.tiles)),
          features(part_of(team, thread, d, f.feature_tiles)),
          ld_h(f.feature_tiles * kTile),
          ld_m(f.tiles * kTile),
          dh(f.dh + d * f.s.batch * ld_h),
          dm(f.dm + d * f.s.batch * ld_m),
          dy(f.dy == nullptr ? nullptr : f.dy + (f.walk.start[t] * f.s.directions + d) * f.s.features) {
        const Index local = f.walk.start[t] - chunk.base;
        da = chunk_rows<O>(f, f.da, d) + local * f.da.ld;
        dr = chunk_rows<O>(f, f.dr, d) + local * f.dr.ld;
        m = reinterpret_cast<O*>(f.m) + (d * f.walk.chunk_rows + local) * f.s.hidden;
    }

    const Backward<T>& f;
    const Team& team;
    const int d;
    const Index t;
    const Part units, features;  // this thread's tiles of hidden units and of h
    const Index ld_h, ld_m;
    A *const dh, *const dm;  // of the direction
    const T* const dy;       // of the step, as are the next ones
    O *da, *dr, *m;
};

// This thread's rows of a step: calls take(sequence, the row over all steps that it takes next).
template <typename Isa, typename T, typename Take>
LSTM_HD void for_rows(const StepBack<Isa, T>& step, const Part& part, const Take& take) {
    const Walk& walk = step.f.walk;
    for_blocks(step.team, part, walk.s, step.t, [&](Index first, Index rows) LSTM_INLINED {
        const Index row = walk.start[step.t], t_next = walk.before(step.d, step.t, first);
        const Index behind = (t_next < 0 ? row : walk.start[t_next]) + first;
        for (Index b = first; b < first + rows; ++b) take(b, b + 1 < first + rows ? row + b + 1 : behind);
    });
}

// to[rows, columns] = left[rows, depth] w, this thread's tiles of w [depth, columns].
template <typename Isa, typename T>
LSTM_HD void multiply_step(const StepBack<Isa, T>& step, const Operand<Isa, T>* left, Index ld, const T* w, Index depth,
                           Index columns, const PackedWeight<Acc<T>>& packed, const Part& part, Acc<T>* to,
                           Index ld_to) {
    using O = Operand<Isa, T>;
    const Backward<T>& f = step.f;
    const bool in_passing = packs_in_passing(f, step.team);
    const auto packed_piece = [&](Index tile, Index k) LSTM_INLINED {
        const auto whole = packed_weight<Isa, T>(packed, depth, columns, step.d, in_passing ? part.tile : tile);
        return in_passing ? packed_at<Isa>(whole.b, std::min(kDepth, depth - k), whole.weight) : whole.from(k);
    };
    const auto piece_of = [&](Index tile, Index k)
                              LSTM_INLINED { return right_side<Isa>(f, w, columns, tile, k, packed_piece(tile, k)); };
    const auto multiply_piece = [&](Index tile, Index k, const O* next) LSTM_INLINED {  // which stays for all rows
        const Index some = std::min(kDepth, depth - k);
        if (in_passing) pack_tile<Isa>(f, w, columns, tile, k, some, packed_piece(tile, k));
        Right<const O> right = piece_of(tile, k);
        for_blocks(step.team, part, f.s, step.t, [&](Index b, Index rows) LSTM_INLINED {
            ask_for<Isa, O>(next, b, f.s.steps[step.t], part.block_stride, right);
            multiply<Isa>(rows, left + b * ld + k, ld, right, some, to + b * ld_to + tile * kTile, ld_to, k > 0);
        });
    };
    const Index pieces = tiles_of(depth, kDepth), tiles = part.tile_end - part.tile;
    const bool stays =
        f.walk.of_step.room(f.s.steps[step.t] * depth) * static_cast<Index>(sizeof(Acc<T>)) <= kLeftBytes;
    const bool by_tiles = stays && !in_passing;  // else by pieces of the left side, each of which then stays
    const auto tile_of = [&](Index i) {          // there and back: the tiles of the last step's end are still in cache
        const Index tile = by_tiles ? i / pieces : i % tiles;
        return step.t % 2 == 0 ? part.tile + tile : part.tile_end - 1 - tile;
    };
    const auto first_of = [&](Index i) { return (by_tiles ? i % pieces : i / tiles) * kDepth; };
    for (Index i = 0; i < tiles * pieces; ++i) {
        const Index next = std::min(i + 1, tiles * pieces - 1);
        multiply_piece(tile_of(i), first_of(i), piece_of(tile_of(next), first_of(next)).b);
    }
}

// dr, the gradient of the projected h: dh and dy.
template <typename Isa, typename T>
LSTM_HD void back_to_projection(const StepBack<Isa, T>& step) {
    const Shape& s = step.f.s;
    const Index end = std::min(step.features.tile_end * kTile, s.features);
    for_rows(step, step.features, [&](Index b, Index) LSTM_INLINED {
        const T* const dy = step.dy == nullptr ? nullptr : step.dy + b * s.directions * s.features;
        for (Index j = step.features.tile * kTile; j < end; j += kUnits) {
            alignas(64) Acc<T> dr[kUnits], more[kUnits];
            const Index count = std::min(kUnits, end - j);
            load_units<Isa>(step.dh + b * step.ld_h + j, count, dr);
            if (dy != nullptr) {
                load_units<Isa>(dy + j, count, more);
                store_row<Isa>(dr, kUnits, more, dr);
            }
            store_operands<Isa>(dr, count, step.dr + b * step.f.dr.ld, j);
        }
    });
}

// da, from dr through W_hr where h is projected, else from dh and dy.
template <typename Isa, typename T>
LSTM_HD void back_to_gates(const StepBack<Isa, T>& step) {
    const Backward<T>& f = step.f;
    const Shape& s = f.s;
    if (f.projected)
        multiply_step(step, step.dr, f.dr.ld, f.weights[step.d].w_hr, s.features, s.hidden, f.w_hr, step.units, step.dm,
                      step.ld_m);
    const bool add_dy = !f.projected && step.dy != nullptr;
    const Index end = std::min(step.units.tile_end * kTile, s.hidden);
    for_rows(step, step.units, [&](Index b, Index next) LSTM_INLINED {
        const Acc<T>* const dh = f.projected ? step.dm + b * step.ld_m : step.dh + b * step.ld_h;
        const T* const dy = add_dy ? step.dy + b * s.directions * s.features : nullptr;
        for (Index unit = step.units.tile * kTile; unit < end; unit += kUnits) {
            ask_for_row(f, step.d, next, unit);
            backward_units<Isa>(f, step.d, step.t, b, unit, dh, dy, step.da + b * f.da.ld, step.m + b * s.hidden);
        }
    });
}

// dh of the step before: B7.
template <typename Isa, typename T>
LSTM_HD void back_to_states(const StepBack<Isa, T>& step) {
    const Backward<T>& f = step.f;
    multiply_step(step, step.da, f.da.ld, f.weights[step.d].w_hh, 4 * f.s.hidden, f.s.features, f.w_hh, step.features,
                  step.dh, step.ld_h);
}

// The steps of a chunk: da of all its rows, and dh. Threads that share hidden units meet before they need what others
// wrote.
template <typename Isa, typename T>
LSTM_HD void walk_back(const Backward<T>& f, const Chunk (&chunks)[2], const Team& team, int thread) {
    for (Index i = 0; i < chunks[0].steps; ++i) {
        const StepBack<Isa, T> steps[2] = {{f, team, thread, 0, chunks[0], i},
                                           {f, team, thread, f.s.directions - 1, chunks[f.s.directions - 1], i}};
        if (f.projected) {
            for (int d = 0; d < f.s.directions; ++d) back_to_projection(steps[d]);
            if (!team.by_rows) meet();
        }
        for (int d = 0; d < f.s.directions; ++d) back_to_gates(steps[d]);
        if (!team.by_rows) meet();
        for (int d = 0; d < f.s.directions; ++d) {
            ask_for_states(team, steps[d].da, f.s.steps[steps[d].t] * f.da.ld);
            back_to_states(steps[d]);
        }
    }
}

}  // namespace lstm::cpu

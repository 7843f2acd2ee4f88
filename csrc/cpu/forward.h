// The forward walk. By chunks of steps: first x W_ih^T of the chunk's rows into a buffer that stays in cache, then step
// by step h W_hh^T on top of it and the gates while both are hot. Where all weights stay in cache and the batch is
// large enough, or the batch as wide as x, it is one product a step instead, of [x_t, h_{t-1}] with both weights:
// longer sums, and nothing to read again.
#pragma once

#include <numeric>

#include "activations.h"
#include "team.h"
#include "unpacked.h"

namespace lstm::cpu {

constexpr Index kForwardBytes = 1 << 18;  // of a chunk's pre-activations
constexpr Index kForwardRows = 64;        // of a chunk at least, for which W_ih is read once; of a wide x more
constexpr Index kPlanesRows = 256;        // where its planes take more to read, but at most
constexpr Index kPlanesBytes = 3 << 18;   // of x, which stay in the second cache
constexpr Index kJoinedBytes = 5 << 17;   // of the weights of one product
constexpr Index kJoinedTile = 1 << 18;    // of one tile of them in planes
constexpr Index kJoinedBatch = 4;
constexpr Index kFewSteps = 32;          // that don't pay for packing W_hh, if each is of one row and
constexpr Index kLargeWeight = 1 << 17;  // W_hh has so many elements
static_assert(kFixedSteps > kFewSteps && 2 * kJoinedBytes < 4 * kFixedElements, "W_hh in fixed point is packed alone");
constexpr Index kProjectedSum = 128;  // k of one: what is projected is y, which nn.LSTM makes of short sums
constexpr Index kSideBySide = 4;      // rows whose cells are taken by turns, as each is one long chain

template <typename T>
struct Forward {
    using A = Acc<T>;
    using Type = T;
    static constexpr bool coarse = sizeof(T) == 2;  // activations: their errors vanish in T's
    static constexpr Index units = kUnits;          // hidden units of a tile

    Forward(const Shape& shape, const ForwardArgs& args, Arena& arena)
        : walk(shape, std::max(kForwardBytes / static_cast<Index>(4 * shape.hidden * sizeof(A)), rows_at_least(shape)),
               false),
          s(walk.s),
          tiles(tiles_of(s.hidden, units)),
          padded(tiles * kUnits),
          features(s.features),
          feature_tiles(args.weights[0].w_hr == nullptr ? 0 : tiles_of(features)),
          x(static_cast<const T*>(args.x)),
          h0(static_cast<const T*>(args.h0)),
          c0(static_cast<const T*>(args.c0)),
          weights{TypedWeights<T>(args.weights[0]), TypedWeights<T>(args.weights[1])},
          y(static_cast<T*>(args.y)),
          h_n(static_cast<T*>(args.h_n)),
          c_n(static_cast<T*>(args.c_n)),
          gates(static_cast<T*>(args.gates)),
          cells(static_cast<A*>(args.cells)),
          asks(asks_for_saved()),
          unpacked(walk.few()),
          hh_lies(lies_hh()),
          joined(joins()),
          h_first(joined ? s.input : 0),
          ld(h_first + walk.of_step.in_row(std::max(padded, feature_tiles * kTile))),
          ld_x(walk.over_steps.in_row(s.input)),
          w_ih{arena.take<A>(unpacked ? 0 : walk.over_steps.room(s.directions * tiles * tile_size(depth_ih()))),
               walk.over_steps.digits ? arena.take<float>(s.directions * tiles * scales_size(s.input)) : nullptr},
          w_hh{arena.take<A>(hh_lies || joined ? 0 : walk.of_step.room(s.directions * tiles * tile_size(features))),
               walk.fixes() || walk.of_step.digits ? arena.take<float>(s.directions * tiles * scales_size(features))
                                                   : nullptr},
          bias(arena.take<A>(s.directions * tiles * kTile)),
          converted((std::is_same_v<T, A> && !walk.over_steps.planes) || joined
                        ? nullptr
                        : arena.take<A>(walk.over_steps.room(s.directions * walk.chunk_rows * ld_x))),
          a(arena.take<A>(joined ? 0 : s.directions * tiles * walk.chunk_rows * kTile)),
          h(arena.take<A>(walk.of_step.room(s.directions * 2 * s.batch * ld))),
          c(arena.take<A>(s.directions * s.batch * padded)),
          w_hr(arena.take<A>(unpacked ? 0 : walk.of_step.room(s.directions * feature_tiles * tile_size(s.hidden)))),
          ld_m(walk.of_step.in_row(padded)),
          m(arena.take<A>(feature_tiles == 0 ? 0 : walk.of_step.room(s.directions * s.batch * ld_m))) {}

    // Of a chunk, for which W_ih is read once. Twice as many planes as stay, if that is all: W_ih is packed in passing.
    static Index rows_at_least(const Shape& shape) {
        if (shape.instruction_set < InstructionSet::amx || sizeof(T) != 4)
            return std::max(kForwardRows, shape.input / 4);
        const Index rows = std::accumulate(shape.steps, shape.steps + shape.time, Index{0});
        const bool digits = shape.instruction_set == InstructionSet::amx_digits;
        const Index stay = kPlanesBytes / ((digits ? 3 : 6) * shape.input);
        return rows <= std::min(2 * stay, kPlanesRows) ? rows : std::clamp(stay, kForwardRows, kPlanesRows);
    }

    // Whether x and h are multiplied together: where both weights stay in cache, or where to read W_ih at every step
    // moves less than to write and read pre-activations, and a tile of planes leaves room for them in the second cache.
    bool joins() const {
        const Index depth = s.input + features, bytes = 4 * s.hidden * depth * static_cast<Index>(sizeof(T));
        const bool stay = s.batch >= kJoinedBatch && bytes <= kJoinedBytes;
        const bool room =
            !walk.of_step.planes || walk.of_step.room(depth * kTile) * static_cast<Index>(sizeof(T)) <= kJoinedTile;
        const bool less = s.time > 1 && s.batch >= kForwardRows && s.input <= 8 * s.batch && room;
        return !unpacked && walk.alike() && !walk.of_step.digits && s.input % (walk.of_step.planes ? kDeep : 2) == 0 &&
               (stay || less);
    }

    // Whether W_hh is read as it lies: in a call of few rows, or by single rows for some steps, to whom packing gives
    // little where it is large. Pairs and planes exist only packed.
    bool lies_hh() const {
        const bool pairs = std::is_same_v<T, BFloat16> && s.instruction_set >= InstructionSet::avx512_bf16;
        return unpacked || (s.batch == 1 && s.time <= kFewSteps && 4 * s.hidden * features >= kLargeWeight &&
                            !walk.of_step.planes && !pairs);
    }

    // Whether gates and cells are saved behind the second cache. In planes a tile of a small weight is multiplied
    // before what was asked for its many rows has come.
    bool asks_for_saved() const {
        const bool far = gates != nullptr && is_far(walk.rows() * s.directions * 5 * s.hidden);
        return far && (!walk.of_step.planes || is_far(4 * s.hidden * features));
    }

    // Of a tile of W_ih, or of both weights joined.
    Index depth_ih() const { return joined ? s.input + features : s.input; }

    // The chunk's pre-activations of one tile: [rows of the chunk, 4, 16].
    A* of_tile(int d, Index tile) const { return a + (d * tiles + tile) * walk.chunk_rows * kTile; }

    const Walk walk;
    const Shape& s;
    const Index tiles;          // of 16 hidden units, in one direction
    const Index padded;         // H in whole tiles
    const Index features;       // R
    const Index feature_tiles;  // of 64 features of h; 0 where it is not projected
    const T *x, *h0, *c0;
    const TypedWeights<T> weights[2];
    T *y, *h_n, *c_n, *gates;
    A* cells;
    const bool asks;       // whether to ask for where gates and cells will be saved
    const bool unpacked;   // whether weights are read as they lie
    const bool hh_lies;    // whether W_hh is
    const bool joined;     // whether x and h are multiplied together
    const Index h_first;   // where h begins in a row of states
    const Index ld;        // from one row of states to the next
    const Index ld_x;      // from one row of x to the next, as products read it
    PackedWeight<A> w_ih;  // [D, tiles, I, 64]; joined: [D, tiles, I + R, 64]
    PackedWeight<A> w_hh;  // [D, tiles, R, 64], unless joined
    A* bias;               // [D, tiles, 4, 16]
    A* converted;          // [D, rows of a chunk, ld_x] x, where products don't read T
    A* a;                  // [D, tiles, rows of a chunk, 4, 16] pre-activations, unless joined
    A* h;                  // [D, 2, B, ld] states h_{t-1} and h_t by turns; joined: [x_t, h_{t-1}] and the next
    A* c;                  // [D, B, padded]
    A* w_hr;               // [D, feature tiles, H, 64] packed
    const Index ld_m;      // from one row of m to the next
    A* m;                  // [D, B, ld_m] o tanh(c), where it is projected
};

// One tile of W_ih [I, 64] and of W_hh [R, 64]; joined, one behind the other in one of depth I + R.
template <typename Isa, typename O, typename T>
LSTM_HD Right<O> packed_ih(const Forward<T>& f, int d, Index tile) {
    const Index depth = f.depth_ih();
    return f.w_ih.template tile<Isa, O>(d * f.tiles + tile, depth, f.joined && is_far(4 * f.s.hidden * depth));
}
template <typename Isa, typename O, typename T>
LSTM_HD Right<O> packed_hh(const Forward<T>& f, int d, Index tile) {
    if (f.joined) return packed_ih<Isa, O>(f, d, tile).from(f.s.input);
    const bool far = is_far(4 * f.s.hidden * f.features);
    return f.w_hh.template tile<Isa, O>(d * f.tiles + tile, f.features, far);
}

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
    const Index piece = in_planes<O> || f.unpacked ? hidden : kProjectedSum;
    for (Index k = 0; k < hidden; k += piece)
        multiply_weight<Isa, T>(rows, m + k, f.ld_m, plain_rows(f.weights[d].w_hr, f.features, hidden, tile),
                                packed_at<Isa>(packed, hidden).from(k), std::min(piece, hidden - k), h, k > 0,
                                f.unpacked);
    for (Index r = 0; r < rows; ++r) {
        for (Index unit = tile * kTile; unit < std::min((tile + 1) * kTile, f.features); unit += kUnits)
            store_state<Isa>(f, d, first + r, unit, std::min(kUnits, f.features - unit),
                             h + r * kTile + unit - tile * kTile, after + (b + r) * f.ld + f.h_first);
    }
}

// Asks for where gates and cells will be saved: else one store waits for memory after the other, and what comes behind
// them for a place in the queue.
template <typename T>
LSTM_HD void ask_for_saved(const Forward<T>& f, Index first, Index rows, Index unit) {
    for (Index row = first; row < first + rows; ++row) {
        for (Index gate = 0; gate < 4; ++gate) __builtin_prefetch(f.gates + (row * 4 + gate) * f.s.hidden + unit, 1);
        __builtin_prefetch(f.cells + row * f.s.hidden + unit, 1);
    }
}

// The products of one tile with h_{t-1}, on top of x W_ih^T; joined, of both, in `both`. `place`: where the tile of
// W_hh is, and `next` the one after it.
template <typename Isa, typename T>
LSTM_HD Acc<T>* step_products(const Forward<T>& f, int d, const Chunk& chunk, Index t, Index b, Index rows, Index tile,
                              Index place, Index next, const Operand<Isa, T>* before, Acc<T>* both) {
    using O = Operand<Isa, T>;
    const Index input = f.s.input, features = f.features, first = f.walk.start[t] + b;
    const O* const states = before + b * f.ld;
    if (f.asks) ask_for_saved(f, d * f.walk.rows() + first, rows, tile * kUnits);
    if (f.joined) {
        multiply<Isa>(rows, states, f.ld, packed_ih<Isa, const O>(f, d, tile), input + features, both, kTile, false);
        return both;
    }
    Acc<T>* const products = f.of_tile(d, tile) + (first - chunk.base) * kTile;
    Right<const O> hh = packed_hh<Isa, const O>(f, d, place);
    ask_for<Isa, O>(packed_hh<Isa, const O>(f, d, next).b, features, f.s.steps[t], b > 0, hh);
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

// How threads share x W_ih^T: by tiles where only that is in planes, which want many rows at once.
template <typename T>
LSTM_HD Team input_team(const Forward<T>& f, const Team& team) {
    return {team.threads, team.by_rows && f.walk.alike(), team.blocks, team.rows};
}

// Whether each tile of W_ih is needed once and by one thread, which then packs it in one place after the other's use:
// it never leaves the second cache.
template <typename T>
LSTM_HD bool packs_in_passing(const Forward<T>& f, const Team& team) {
    return !f.unpacked && !f.joined && f.walk.chunks() == 1 && (!team.by_rows || team.threads == 1);
}

// Whether each tile of W_hh is as well.
template <typename T>
LSTM_HD bool packs_both_in_passing(const Forward<T>& f, const Team& team) {
    return f.s.time == 1 && packs_in_passing(f, team);
}

// The tiles of this thread, and the states, as the products read them.
template <typename Isa, typename T>
LSTM_HD void prepare_forward(const Forward<T>& f, const Team& team, int thread) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    using In = OverSteps<Isa>;
    const Shape& s = f.s;
    for (Index i = thread; i < s.directions * f.tiles; i += team.threads) {
        const TypedWeights<T>& w = f.weights[i / f.tiles];
        const Index tile = i % f.tiles, unit = tile * kUnits, count = std::min(kUnits, s.hidden - unit);
        if (!f.unpacked) {
            if (!packs_in_passing(f, input_team(f, team)))
                pack_rows<In>(gate_rows(w.w_ih, s.hidden, s.input, tile), s.input,
                              packed_ih<In, Operand<In, T>>(f, 0, i));
            if (!f.hh_lies && !packs_both_in_passing(f, team))
                pack_rows<Isa>(gate_rows(w.w_hh, s.hidden, f.features, tile), f.features, packed_hh<Isa, O>(f, 0, i));
            if (f.w_hh.scales != nullptr) fix_tile<Isa>(packed_hh<Isa, O>(f, 0, i), f.features);
        }
        for (Index gate = 0; gate < 4; ++gate) {
            A* const bias = f.bias + i * kTile + gate * kUnits;
            for (Index j = 0; j < kUnits; ++j) {
                const Index row = gate * s.hidden + unit + j;
                bias[j] = w.b_ih != nullptr && j < count ? load(w.b_ih[row]) + load(w.b_hh[row]) : A(0);
            }
        }
    }
    for (Index i = thread; !f.unpacked && i < s.directions * f.feature_tiles; i += team.threads) {
        const T* const w = f.weights[i / f.feature_tiles].w_hr;
        pack_rows<Isa>(plain_rows(w, f.features, s.hidden, i % f.feature_tiles), s.hidden,
                       packed_at<Isa>(reinterpret_cast<O*>(f.w_hr) + i * tile_size(s.hidden), s.hidden));
    }
    for (Index i = thread; i < s.directions * s.batch; i += team.threads) {
        const Index d = i / s.batch, b = i % s.batch;
        A* const c = f.c + i * f.padded;
        if (f.c0 == nullptr) std::fill_n(c, f.padded, A(0));
        for (Index unit = 0; f.c0 != nullptr && unit < f.padded; unit += kUnits)
            load_units<Isa>(f.c0 + i * s.hidden + unit, std::min(kUnits, s.hidden - unit), c + unit);
        const Index features = f.h0 == nullptr ? 0 : f.features;  // that are not 0
        for (Index turn = 0; turn < 2; ++turn) {                  // a row may join at any step
            O* const to = reinterpret_cast<O*>(f.h) + ((2 * d + turn) * s.batch + b) * f.ld + f.h_first;
            copy_operands<Isa>(f.h0 + i * features, features, 0, f.ld - f.h_first, to);
        }
        if (f.feature_tiles > 0) copy_operands<Isa>(f.h0, 0, f.padded, f.ld_m, reinterpret_cast<O*>(f.m) + i * f.ld_m);
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
        const auto take = [&](Index first, Index rows) LSTM_INLINED {
            multiply_weight<Isa, T>(rows, x + first * f.ld_x, f.ld_x, rows_of_w, packed_ih<Isa, const O>(f, d, place),
                                    input, f.of_tile(d, tile) + first * kTile, false, f.unpacked);
        };
        if (part.all_rows(team)) {
            take(0, chunk.rows);
            continue;
        }
        for (Index t = chunk.first; t < chunk.first + chunk.steps; ++t) {
            for_blocks(team, part, f.s, t,
                       [&](Index b, Index rows) LSTM_INLINED { take(f.walk.start[t] - chunk.base + b, rows); });
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
                const Index now = tile + way * i, next = std::clamp(now + way, part.tile, part.tile_end - 1);
                const A* const products = step_products<Isa>(f, d, chunk, t, b, rows, now, in_passing ? part.tile : now,
                                                             in_passing ? part.tile : next, before, both + i * kTile);
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

// What a forward walk starts from: how it goes, where everything lies, weights packed and the first states.
#pragma once

#include <numeric>

#include "team.h"

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
          asks(asks_for_results()),
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

    // Whether x and h are multiplied together: where both weights stay in cache; of planes also where to read W_ih at
    // every step moves less than to write and read pre-activations, and a tile leaves room for them in the second
    // cache.
    bool joins() const {
        const Index depth = s.input + features, bytes = 4 * s.hidden * depth * static_cast<Index>(sizeof(T));
        const bool stay = s.batch >= kJoinedBatch && bytes <= kJoinedBytes;
        const bool room = walk.of_step.room(depth * kTile) * static_cast<Index>(sizeof(T)) <= kJoinedTile;
        const bool wide = s.time > 1 && s.batch >= kForwardRows && s.input <= 8 * s.batch;
        const bool less = walk.of_step.planes && wide && room;
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

    // Whether gates and cells, or in inference y, are written behind the second cache. In planes a tile of a small
    // weight is multiplied before what was asked for its many rows has come.
    bool asks_for_results() const {
        const Index of_row = gates != nullptr ? 5 * s.hidden : feature_tiles == 0 ? features : 0;
        const bool in_time = !walk.of_step.planes || (gates != nullptr && is_far(4 * s.hidden * features));
        return in_time && is_far(walk.rows() * s.directions * of_row);
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
    const bool asks;       // whether to ask for where results will be written
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
    return f.w_ih.template tile<Isa, O>(d * f.tiles + tile, depth, 4 * f.s.hidden * depth);
}
template <typename Isa, typename O, typename T>
LSTM_HD Right<O> packed_hh(const Forward<T>& f, int d, Index tile) {
    if (f.joined) return packed_ih<Isa, O>(f, d, tile).from(f.s.input);
    return f.w_hh.template tile<Isa, O>(d * f.tiles + tile, f.features, 4 * f.s.hidden * f.features);
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

}  // namespace lstm::cpu

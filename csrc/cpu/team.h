// What the forward and the backward walk share: memory, rows, and how threads divide them.
#pragma once

#include <atomic>
#include <vector>

#include "arena.h"
#include "digits.h"
#include "layer.h"

namespace lstm::cpu {

// A call of at most so many rows over all steps reads its weights as they lie: to pack them would take as long, but for
// AMX's bf16 from half as many on. With vectors of 512 bits more for large weights, a row for as many elements of both.
constexpr Index kFewRows = 8, kMostFewRows = 24, kElementsOfFewRow = 1 << 14;

// Of more elements than so many a thread, W_hh goes in fixed point (fixed.h), where a step has one block of rows, in as
// many steps as pay for packing it so.
constexpr Index kFixedElements = 7 << 16, kFixedSteps = 48;
static_assert(kFixedSteps > 2 * kFewRows && kFixedSteps > kMostFewRows, "such a call doesn't read weights as they lie");

constexpr Index kBlocksOfThread = 4;    // of sequences of unequal length
constexpr Index kAskedBytes = 5 << 13;  // of what others wrote, most of the first cache

LSTM_HD Index tiles_of(Index columns, Index tile = kTile) { return (columns + tile - 1) / tile; }

// How threads share one direction: each takes row blocks and walks alone through all tiles; or each takes tiles, whose
// weights then stay in its own cache, and they meet at every step.
struct Team {
    int threads;
    bool by_rows;
    Index blocks;  // of rows of one direction, each multiplied in one go
    Index rows;    // of a block at most
};

LSTM_HD Index row_blocks(const Shape& s) { return tiles_of(s.batch, kRows); }

// Threads worth waking: each has to save more than it costs, of the products' time and of what it takes to read the
// weights, and a meeting at every step costs more. Two pay early where W_hh lies in the second cache, as they read half
// of it each; but not in bf16, whose products take less.
inline int useful_threads(const Shape& s, Index rows, Index tiles) {
    const double pairs = 4.0 * s.hidden * (s.input + s.features);  // that a row multiplies and adds
    const double row_work = pairs + 4.0 * s.hidden * 32;           // the gates count as 32 a column
    const double work = row_work * rows / 1e6 + pairs * static_cast<double>(size_of(s.dtype)) / 3e5;
    const Index of_work = static_cast<Index>(std::min(work * s.directions, 1e6));
    const Index threads = std::clamp<Index>(of_work, 1, std::max(s.threads, 1));
    if (s.directions * row_blocks(s) >= threads) return static_cast<int>(threads);
    const double step_work = row_work * s.batch;
    const bool two = s.dtype != Dtype::bfloat16 && 4 * s.hidden * s.features > 1 << 15 && step_work > 1.4e5;
    const Index of_step = std::max<Index>(static_cast<Index>(std::min(step_work / 2e5, 1e6)), two ? 2 : 1);
    return static_cast<int>(std::min({of_step, threads, tiles}));
}

// Whether a step takes less time by rows than by tiles, in nanoseconds of a core that multiplies so many pairs in one
// and reads 30 bytes from behind its second cache.
LSTM_HD bool rows_are_faster(const Shape& s, Index tiles, int threads) {
    const bool digits = s.instruction_set == InstructionSet::amx_digits;
    const bool planes = s.instruction_set == InstructionSet::amx, one = planes && s.dtype == Dtype::bfloat16;
    const double rate = one ? 850 : digits ? 200 : planes ? 170 : 125;
    const double least = one ? 16 : digits || planes ? 8 : 0;  // rows: fewer take as long
    const double pairs = 4.0 * s.hidden * s.features, bytes = (one ? 2 : digits ? 3 : planes ? 6 : 4) * pairs;
    const double batch = static_cast<double>(s.batch), of_row = pairs * s.directions / rate;
    const auto read = [](double size) { return size > (1 << 19) ? size / 30 : 0.0; };
    const double uneven = static_cast<double>(tiles_of(tiles, threads) * threads) / static_cast<double>(tiles);
    const double by_rows = of_row * std::max(batch / threads, least) + read(bytes);
    return by_rows <=
           of_row * std::max(batch, least) / threads * uneven + read(bytes / threads) + 1000 + 150.0 * threads;
}

template <typename Isa>
LSTM_HD Team make_team(const Shape& s, Index tiles, int threads) {
    const bool enough = s.directions * row_blocks(s) >= threads;
    const bool by_rows = threads == 1 || (enough && rows_are_faster(s, tiles, threads));
    Index blocks = tiles_of(s.batch, Isa::rows);
    if (by_rows) {
        const bool even = s.steps[s.time - 1] == s.batch;
        if (!even && threads > 1)  // each thread takes longer sequences and shorter ones
            blocks = std::max(blocks, std::min<Index>(row_blocks(s), kBlocksOfThread * threads));
        while (s.directions * blocks % threads != 0) ++blocks;
        blocks = std::min(blocks, s.batch);
    }
    return {threads, by_rows, blocks, Isa::rows};
}

// One thread's part of a direction, of `tiles` tiles.
struct Part {
    Index block, block_stride, tile, tile_end;

    bool all_rows(const Team& team) const { return block == 0 && (block_stride == 1 || team.blocks == 1); }
};

LSTM_HD Part part_of(const Team& team, int thread, int direction, Index tiles) {
    if (team.by_rows) {
        const Index first = (thread + team.threads - direction * team.blocks % team.threads) % team.threads;
        return {first, team.threads, 0, tiles};
    }
    return {0, 1, tiles * thread / team.threads, tiles * (thread + 1) / team.threads};
}

LSTM_HD void meet() {
#ifdef LSTM_MEET  // tests/cpu_sanitizers.cpp brings a barrier that sanitizers know
    LSTM_MEET;
#else
#pragma omp barrier
#endif
}

// Asks at once for the states that other threads wrote before the team met: as products come to them they would come
// one by one.
template <typename O>
LSTM_HD void ask_for_states(const Team& team, const O* states, Index count) {
    const char* const from = reinterpret_cast<const char*>(states);
    const Index bytes = count * static_cast<Index>(sizeof(O));
    if (team.by_rows || bytes > kAskedBytes) return;
    for (Index i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// How operands of products lie: in planes, of floats or of bf16, or of digits; else as they are.
struct Operands {
    bool planes, three, digits;

    // Operands of a row that holds so many features, and elements of Acc<T> that hold so many operands.
    Index in_row(Index features) const {
        if (digits) return round_up(features, kDigitsDeep) + kDigitsDeep;  // for its scale
        return planes ? round_up(features, kDeep) : features;
    }
    Index room(Index operands) const { return digits ? operands * 3 / 4 : three ? operands * 3 / 2 : operands; }
};

// Steps and rows of a call, and the chunks of steps in which it is walked: each of as many steps as have so many rows,
// in either direction. `back`: direction 0 is walked from its end.
struct Walk {
    Walk(const Shape& shape, Index rows_of_chunk, bool back)
        : s(shape),
          of_step(operands(s.instruction_set >= InstructionSet::amx &&
                           s.instruction_set != InstructionSet::amx_over_steps)),
          over_steps(operands(s.instruction_set >= InstructionSet::amx)),
          start(shape.time + 1, 0) {
        for (Index t = 0; t < s.time; ++t) start[t + 1] = start[t] + s.steps[t];
        const auto rows_between = [&](Index begin, Index end) {
            const Index ahead = start[end] - start[begin], mirrored = start[s.time - begin] - start[s.time - end];
            return s.directions > 1 ? std::max(ahead, mirrored) : back ? mirrored : ahead;
        };
        for (Index begin = 0, end = 0; begin < s.time; begin = end) {
            do ++end;
            while (end < s.time && rows_between(begin, end + 1) <= rows_of_chunk);
            chunk_end.push_back(end);
            chunk_rows = std::max(chunk_rows, rows_between(begin, end));
        }
    }

    Operands operands(bool planes) const {
        const bool digits = planes && s.instruction_set == InstructionSet::amx_digits;
        return {planes, planes && s.dtype == Dtype::float32 && !digits, digits};
    }

    const Shape s;
    const Operands of_step, over_steps;      // of the products of a step, and of those over all steps
    std::vector<Index> start;                // [time + 1] first row of each step, and N
    std::vector<Index> chunk_end;            // [chunks] steps walked by the end of each
    Index chunk_rows = 0;                    // at most
    mutable std::atomic<bool> unfit{false};  // whether a thread met what is (product.h)

    bool alike() const { return of_step.planes == over_steps.planes; }
    Index rows() const { return start.back(); }
    bool few() const {
        const bool pairs = s.dtype == Dtype::bfloat16, more = pairs || s.dtype == Dtype::float32;
        const bool wide = s.instruction_set >= (pairs ? InstructionSet::avx512_bf16 : InstructionSet::avx512);
        const Index elements = more && wide ? 4 * s.hidden * (s.input + s.features) : 0;
        return !of_step.planes && rows() <= std::clamp(elements / kElementsOfFewRow, kFewRows, kMostFewRows);
    }
    // Whether W_hh goes in fixed point.
    bool fixes() const {
        const bool floats = s.dtype == Dtype::float32 && s.instruction_set >= InstructionSet::avx512 && !of_step.planes;
        const Index elements = s.directions * 4 * s.hidden * s.features;
        return floats && s.batch <= kRows && s.time >= kFixedSteps && elements > s.threads * kFixedElements;
    }
    Index chunks() const { return static_cast<Index>(chunk_end.size()); }

    // The step before t in direction d's walk, if sequence b was in it; else -1.
    Index before(int d, Index t, Index b) const {
        const Index t_before = d == 0 ? t - 1 : t + 1;
        return t_before < 0 || t_before >= s.time || b >= s.steps[t_before] ? -1 : t_before;
    }
};

// Chunk number `index` of a walk through t = 0 .. time-1, or back: steps first .. last, both in it.
struct Chunk {
    Chunk(const Walk& walk, Index index, bool back) {
        begin = index == 0 ? 0 : walk.chunk_end[index - 1];
        steps = walk.chunk_end[index] - begin;
        first = back ? walk.s.time - begin - steps : begin;
        base = walk.start[first];
        rows = walk.start[first + steps] - base;
        backwards = back;
    }

    Index step(Index i) const { return backwards ? first + steps - 1 - i : first + i; }  // the i-th of the walk

    Index begin;  // steps walked before it
    Index first, steps;
    Index base, rows;  // first row, and how many
    bool backwards;
};

// Row blocks of one step that a part holds: calls take(first sequence, how many). Who holds all rows divides those that
// the step has, evenly.
template <typename Take>
LSTM_HD void for_blocks(const Team& team, const Part& part, const Shape& s, Index t, const Take& take) {
    const bool all = part.block == 0 && part.block_stride == 1;
    const Index rows = all ? s.steps[t] : s.batch, blocks = all ? tiles_of(rows, team.rows) : team.blocks;
    for (Index block = part.block; block < blocks; block += part.block_stride) {
        const Index first = rows * block / blocks;
        const Index end = std::min(rows * (block + 1) / blocks, s.steps[t]);
        if (first >= end) break;
        take(first, end - first);
    }
}

// The weights of one direction, in their own type.
template <typename T>
struct TypedWeights {
    explicit TypedWeights(const Weights& w)
        : w_ih(static_cast<const T*>(w.w_ih)),
          w_hh(static_cast<const T*>(w.w_hh)),
          b_ih(static_cast<const T*>(w.b_ih)),
          b_hh(static_cast<const T*>(w.b_hh)),
          w_hr(static_cast<const T*>(w.w_hr)) {}

    const T *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};

// A weight's packed tiles, one direction's behind the other's; and the scales of those in fixed point, else null.
template <typename A>
struct PackedWeight {
    A* tiles;
    float* scales;

    // The number-th tile, of depth k, as a product takes it.
    template <typename Isa, typename O>
    LSTM_HD Right<O> tile(Index number, Index k, Index weight = 0) const {
        Right<O> right = packed_at<Isa>(reinterpret_cast<O*>(tiles) + number * tile_size(k), k, weight);
        if (scales != nullptr) right.scales = scales + number * scales_size(k);
        return right;
    }
};

// Rows 16 * tile .. of each gate of w [4H, depth].
template <typename T>
LSTM_HD Groups<T> gate_rows(const T* w, Index hidden, Index depth, Index tile) {
    Groups<T> groups;
    for (Index gate = 0; gate < 4; ++gate) {
        groups.first[gate] = w + (gate * hidden + tile * kUnits) * depth;
        groups.count[gate] = std::min(kUnits, hidden - tile * kUnits);
    }
    return groups;
}

// Rows 64 * tile .. of w [rows, depth].
template <typename T>
LSTM_HD Groups<T> plain_rows(const T* w, Index rows, Index depth, Index tile) {
    Groups<T> groups;
    for (Index group = 0; group < 4; ++group) {
        const Index first = tile * kTile + group * kUnits;
        groups.first[group] = w + first * depth;
        groups.count[group] = std::clamp<Index>(rows - first, 0, kUnits);
    }
    return groups;
}

}  // namespace lstm::cpu

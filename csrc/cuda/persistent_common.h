// What both persistent kernels share: a thread's place, the walk over items, and the matrix product in each kind.
#pragma once

#include <type_traits>

#include "persistent.h"
#include "simt.h"

namespace lstm::persistent {

using simt::Words;

#ifdef __CUDACC__
using Bf16 = __nv_bfloat16;
using Fp16 = __half;
#else
using Bf16 = BFloat16;
using Fp16 = Float16;
#endif

// The kernel of storage type T_ that serves up to kMost_ groups; exact: fp32 without TF32's rounding; in clusters, or
// for a grid.
template <typename T_, bool kExact_, int kMost_, bool kGrid_>
struct Instance {
    using T = T_;
    static constexpr bool kExact = kExact_, kGrid = kGrid_;
    static constexpr int kMost = kMost_;
};

// visit(Instance) for the kernel that serves `groups` groups.
template <bool kGrid, typename Visit>
auto with_instance(Kind kind, int groups, Visit visit) {
    [[maybe_unused]] const int most = most_groups(kind, groups, kGrid);
    const auto by_groups = [&](auto zero) {
        using T = decltype(zero);
        if constexpr (!kGrid) {
            if (most == 6) return visit(Instance<T, false, 6, kGrid>{});
            if constexpr (sizeof(T) == 2) {
                if (most == 8) return visit(Instance<T, false, 8, kGrid>{});
            }
        }
        return visit(Instance<T, false, 4, kGrid>{});
    };
    switch (kind) {
        case Kind::bfloat16:
            return by_groups(Bf16{});
        case Kind::float16:
            return by_groups(Fp16{});
        case Kind::tf32:
            return by_groups(float{});
        default:
            return visit(Instance<float, true, 4, kGrid>{});
    }
}

struct Position {
    int direction;
    int cluster;  // of its direction
    int rank;     // of the block in its cluster
    int ordinal;  // of the cluster among those of all directions
    int warp, lane;
    int group, part;  // of the rows that the warp multiplies forward, and of K
};

template <bool kGrid>
SIMT Position position(const Plan& plan, int first_direction) {
    const int block = static_cast<int>(blockIdx.x);
    // in clusters, as a number that the compiler knows to be all lanes': else each branch on it costs a meeting
    const int warp = static_cast<int>(kGrid ? threadIdx.x / 32 : simt::shuffle(threadIdx.x / 32, 0));
    const int ordinal = block / plan.cluster + first_direction * plan.clusters;
    const int rank = kGrid ? block % plan.cluster : static_cast<int>(simt::cluster_rank());
    const int lane = static_cast<int>(threadIdx.x) % 32, splits = kGrid ? plan.splits : 2;
    return {ordinal / plan.clusters, ordinal % plan.clusters, rank, ordinal, warp, lane, warp / splits, warp % splits};
}

// The cell of a tile that a thread makes: a warp's lie side by side in memory.
struct Cell {
    int column;  // of the product
    bool here;   // else past the tile's columns: no sequence has it, and nothing of it is sent
    int own;     // unit of the block
    int unit;    // of the layer; may be past H

    SIMT Cell(const Plan& plan, const Position& at)
        : column(least(static_cast<int>(threadIdx.x) / (plan.groups * kGroup), kColumns - 1)),
          here(static_cast<int>(threadIdx.x) < plan.columns * plan.groups * kGroup),
          own(static_cast<int>(threadIdx.x) % (plan.groups * kGroup)),
          unit(at.rank * plan.groups * kGroup + own) {}
};

// Tiles are dealt round, so that a cluster's are ordered by length, the longest first.
SIMT int tile_of(const Plan& plan, const Position& at, int slot) { return slot * plan.clusters + at.cluster; }

// Sequences of step t are the first `active` of the batch; theirs are the rows from `first` on.
struct Step {
    int first;
    int active;
};
SIMT Step step_of(const std::int32_t* starts, int batch, int t) {
    if (starts == nullptr) return {t * batch, batch};
    return {starts[t], starts[t + 1] - starts[t]};
}

// Steps of the longest sequence of a tile, its first; 0 if the tile has none.
SIMT int steps_of_tile(const std::int32_t* starts, const Sizes& sizes, int first) {
    if (first >= sizes.batch) return 0;
    int low = 1, high = sizes.steps;  // active sequences never grow from step to step
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (step_of(starts, sizes.batch, middle - 1).active > first) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// The i-th step of the walk over a tile in slot `slot` of the cluster.
struct Item {
    int i, slot;
};
// To the next item in order of i, then slot; false past the last. `longest`: steps[0].
SIMT bool advance(Item& item, const int* steps, int longest, int slots) {
    if (++item.slot == slots || steps[item.slot] <= item.i) item = {item.i + 1, 0};
    return item.i < longest;
}

// A grid's workspace, from where the caller's cluster stands in it.
template <typename Walk>
struct Global {
    const Walk& p;
    const Position& at;

    SIMT unsigned char* start() const { return static_cast<unsigned char*>(p.global); }
    SIMT Index tile(int slot) const { return Index{at.ordinal} * p.plan.tiles + slot; }
    SIMT simt::Flag* flags(int slot) const {  // of each block
        return reinterpret_cast<simt::Flag*>(start() + tile(slot) * flag_bytes(p.plan));
    }
    SIMT float* state(int slot) const {  // [2, threads] of this block
        const Index block = Index{at.ordinal} * p.plan.cluster + at.rank;
        return reinterpret_cast<float*>(start() + p.workspace.state + block * state_bytes(p.plan)) +
               Index{2} * slot * blockDim.x;
    }
    SIMT unsigned char* buffer(int slot, int buffer) const {
        return start() + p.workspace.exchange + (2 * tile(slot) + buffer) * p.workspace.of_buffer;
    }

    // For the whole block: what all blocks published in `fill` (0, 1, ...) of a tile may be collected.
    SIMT void await(int slot, int fill) const {
        for (int rank = static_cast<int>(threadIdx.x); rank < p.plan.cluster; rank += static_cast<int>(blockDim.x)) {
            simt::await(flags(slot) + rank, static_cast<unsigned>(fill + 1));
        }
        simt::sync_threads();
    }
    // For the whole block: all that it had to publish of a fill is published.
    SIMT void signal(int slot) const {
        simt::sync_threads();
        if (threadIdx.x == 0) simt::signal(flags(slot) + at.rank);
    }
};

// W_hh as lanes take it up: of the workspace, by direction, block, warp, word of the lane, and lane.
struct PackedAt {
    int direction, rank, warp, word, lane;
};
template <typename Walk>
SIMT PackedAt packed_at(const Walk& p, Index index) {
    const int lane = static_cast<int>(index % 32), word = static_cast<int>(index / 32 % p.workspace.words);
    const int warp = static_cast<int>(index / 32 / p.workspace.words), warps = warps_of(p.plan);
    return {warp / warps / p.plan.cluster, warp / warps % p.plan.cluster, warp % warps, word, lane};
}
template <typename Walk>
SIMT Words* packed(const Walk& p) {
    return reinterpret_cast<Words*>(static_cast<unsigned char*>(p.global) + p.workspace.weights);
}
// This lane's: word n at [32 n].
template <typename Walk>
SIMT const Words* packed(const Walk& p, const Position& at) {
    const int warp = (at.direction * p.plan.cluster + at.rank) * warps_of(p.plan) + at.warp;
    return packed(p) + Index{warp} * p.workspace.words * 32 + at.lane;
}
template <typename Walk>
LSTM_HD Index packed_count(const Walk& p) {
    return (p.workspace.end - p.workspace.weights) / 16;
}

// Row `row` of an array whose rows lie `stride` bytes apart. Neither is below 0: one instruction multiplies and adds.
template <typename V>
SIMT V* at_row(V* base, int row, int stride) {
    using Byte = std::conditional_t<std::is_const_v<V>, const unsigned char, unsigned char>;
    return reinterpret_cast<V*>(reinterpret_cast<Byte*>(base) +
                                std::uint64_t{static_cast<unsigned>(row)} * static_cast<unsigned>(stride));
}

// What a thread reads or writes of an array: its unit's column, whose rows lie `stride` bytes apart. `kKept`: the
// pointer stays in registers.
template <typename V, bool kKept>
struct Column {
    V* first;
    int stride;

    SIMT Column(V* start, int bytes) : first(kKept ? simt::opaque(start) : start), stride(bytes) {}
    SIMT V* row(int number) const { return at_row(first, number, stride); }
};

// What a thread of either walk knows of its place, its cells and its tiles.
template <typename Walk, bool kGrid>
struct Walker {
    const Walk& p;
    const Position at;
    const Cell cell;

    SIMT explicit Walker(const Walk& walk)
        : p(walk), at(position<kGrid>(walk.plan, walk.direction)), cell(walk.plan, at) {}

    SIMT simt::Barrier* full(int slot, int buffer) const {
        return reinterpret_cast<simt::Barrier*>(simt::shared_memory()) + 2 * slot + buffer;
    }
    SIMT int* steps() const { return reinterpret_cast<int*>(simt::shared_memory() + offset_of_steps(p.plan)); }
    SIMT Global<Walk> global() const { return {p, at}; }
    // This thread's cell in a tile: the first of its two numbers; the other lies a block's threads further.
    SIMT float& state(int slot) const {
        if constexpr (kGrid) return global().state(slot)[threadIdx.x];
        return reinterpret_cast<float*>(simt::shared_memory() +
                                        offset_of_state(p.plan))[2 * slot * blockDim.x + threadIdx.x];
    }
    SIMT Index in_batch(int b) const { return (Index{at.direction} * p.sizes.batch + b) * p.sizes.hidden + cell.unit; }
    SIMT int first_sequence(int slot) const { return tile_of(p.plan, at, slot) * p.plan.columns; }
    SIMT int sequence(int slot) const { return cell.here ? first_sequence(slot) + cell.column : p.sizes.batch; }
    // Whether the warp has cells to make.
    SIMT bool has_cells() const { return at.warp * 32 < p.plan.columns * p.plan.groups * kGroup; }
    SIMT bool within() const { return cell.unit < p.sizes.hidden; }
    // Steps of a tile; `longest` those of the first.
    SIMT int count(int slot, int longest) const { return p.plan.tiles == 1 ? longest : steps()[slot]; }
};

// A phase of a buffer's barrier: buffers take turns, fill by fill.
SIMT unsigned parity_of(int fill) { return (static_cast<unsigned>(fill) / 2) % 2; }

// A value of T in the low bits of a word, and back.
template <typename T>
SIMT std::uint32_t bits(T value) {
    std::uint32_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}
template <typename T>
SIMT T from_bits(std::uint32_t word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

// i, f, g, o of one cell: one access.
template <typename T>
struct alignas(4 * sizeof(T)) Gates {
    T of[4];
};
template <typename T>
SIMT Gates<T> gates_of(const std::uint32_t (&bits)[sizeof(T)]) {
    Gates<T> values;
    std::memcpy(&values, bits, sizeof(values));
    return values;
}

// What a product reads of a state: 16-bit types as they are, fp32 rounded where TF32 is allowed.
template <bool kExact>
SIMT float operand(float x) {
    return kExact ? x : simt::round_tf32(x);
}
template <bool kExact, typename T>
SIMT T operand(T x) {
    return x;
}

// d += a b for one K of 32 bytes (simt::mma).
template <typename T, bool kExact>
SIMT void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (kExact) {
        // a b = (A + a') (B + b') with A, B of 11 bits: without a' b', of relative size 2^-22 (Ootomo and Yokota 2022,
        // whose sum over K is rounded to nearest too, outside of the product that rounds towards zero)
        const std::uint32_t b[2] = {b0, b1};
        std::uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
        for (int j = 0; j < 4; ++j) {
            const float value = bit_cast<float>(a[j]), high = simt::round_tf32(value);
            high_a[j] = bits(high);
            low_a[j] = bits(simt::round_tf32(value - high));
        }
        for (int j = 0; j < 2; ++j) {
            const float value = bit_cast<float>(b[j]), high = simt::round_tf32(value);
            high_b[j] = bits(high);
            low_b[j] = bits(simt::round_tf32(value - high));
        }
        float low[4] = {}, high[4] = {};
        simt::mma<T>(low, low_a, high_b[0], high_b[1]);
        simt::mma<T>(low, high_a, low_b[0], low_b[1]);
        for (int j = 0; j < 4; ++j) d[j] += low[j] - low[j] == 0 ? low[j] : 0;  // of infinity high says all
        simt::mma<T>(high, high_a, high_b[0], high_b[1]);
        for (int j = 0; j < 4; ++j) d[j] += high[j];
    } else {
        simt::mma<T>(d, a, b0, b1);
    }
}

// How a cell's functions are computed: what an error below 2^-10 of a gate does to bf16 is lost in its own rounding.
template <typename T, bool kExact>
constexpr math::Speed speed = kExact                    ? math::Speed::exact
                              : std::is_same_v<T, Bf16> ? math::Speed::fastest
                                                        : math::Speed::fast;

// 16 bytes of T in one.
template <typename T>
SIMT Words pack(const T (&values)[16 / sizeof(T)]) {
    Words words;
    std::memcpy(&words, values, sizeof(words));
    return words;
}

}  // namespace lstm::persistent

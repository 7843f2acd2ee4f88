// The whole recurrence of a layer in one launch: contract and plan. docs/persistent.md has the reasons and the numbers.
//
// A cluster of C blocks holds W_hh of one direction and walks all steps of its own tiles of up to 8 sequences, one item
// (step, tile) after the other. Block r owns the hidden units from r U on, U = 8 G: G groups of 8 units, two warps
// each, over a grid also four or eight. Clusters never wait for one another.
//
// A thread-block cluster exchanges h through distributed shared memory. Where none holds W_hh, or the GPU has none, the
// C blocks are any of a grid that is resident as a whole, and exchange h through global memory: a "grid" plan.
//
// N rows over all steps, T steps, B sequences, H hidden units, D directions, T also the storage dtype. Gates are
// ordered i, f, g, o. All arrays are C-contiguous, need only the alignment of their elements, `gates` 16 bytes, and do
// not overlap. Pointers must stay valid until the work is done: at return on the host, in stream order with CUDA.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../lstm_math.h"

namespace lstm::persistent {

using Index = std::int64_t;

constexpr int kColumns = 8;  // of one matrix product: sequences of a tile at most
constexpr int kGroup = 8;    // hidden units of a group
constexpr int kBlock = 64;   // bytes of K that a lane quad reads at once: two matrix products

// The other operand of a product, [blocks of K, 8 columns, 64 bytes]: a warp reads a block as 512 bytes in its lanes'
// order. The byte of column `column` and byte `k` of K:
LSTM_HD int operand_byte(int column, int k) { return (k / kBlock * kColumns + column) * kBlock + k % kBlock; }

struct Sizes {
    Index all_rows;  // N
    int steps;       // T
    int batch;       // B
    int hidden;      // H
    int directions;  // D
};

// How a launch is laid out.
struct Plan {
    int cluster;     // C blocks: 2 to 16, or as many as the grid has
    int groups;      // G
    int splits;      // warps of a group, each with as large a part of K; 2 in a cluster and backward
    int tiles;       // of a cluster, at most
    int columns;     // sequences of a tile: fewer than a product has columns where clusters would stand idle
    int clusters;    // of a direction
    int shared;      // bytes of a block
    int grid;        // 1 where blocks exchange through global memory
    int directions;  // of one launch: all, or 1 where both can't be resident at once
    int clocks;      // that a step is expected to take
};

// How W_hh is multiplied: in 16 bits, or float as TF32, or float in three TF32 products, which keep fp32's bits.
enum class Kind : int { bfloat16 = 0, float16 = 1, tf32 = 2, float32 = 3 };
LSTM_HD int element_size(Kind kind) { return kind == Kind::bfloat16 || kind == Kind::float16 ? 2 : 4; }

// ---- Where a block keeps what ---------------------------------------------------------------------------------------

// The weights that a warp keeps in registers, of a kernel for up to this many groups; the rest lies in shared memory.
struct Held {
    int blocks;       // forward: of K, 16 registers each
    int at_once;      // of those, how many are multiplied in one go
    int tiles, deep;  // backward: tiles of 16 rows, each `deep` blocks of K, 8 registers each
};
LSTM_HD constexpr Held held(int element, int most_groups) {
    if (element == 2)
        return most_groups == 4 ? Held{8, 4, 4, 4} : most_groups == 6 ? Held{6, 2, 2, 6} : Held{4, 1, 1, 8};
    return most_groups == 4 ? Held{8, 4, 2, 8} : Held{6, 2, 1, 12};
}
// The kernel that serves G groups, by the most it serves; 0 if none does. fp32's three products leave fewer registers.
LSTM_HD int most_groups(Kind kind, int groups, bool grid) {
    const int widest = grid || kind == Kind::float32 ? 4 : kind == Kind::tf32 ? 6 : 8;
    return groups > widest ? 0 : groups <= 4 ? 4 : groups <= 6 ? 6 : 8;
}
LSTM_HD Held held_by(Kind kind, const Plan& plan) {
    return held(element_size(kind), most_groups(kind, plan.groups, plan.grid));
}

LSTM_HD int warps_of(const Plan& plan) { return plan.splits * plan.groups; }
LSTM_HD int threads_of(const Plan& plan) { return 32 * warps_of(plan); }

LSTM_HD int round_up(int x, int to) { return (x + to - 1) / to * to; }
LSTM_HD int most(int a, int b) { return a > b ? a : b; }
LSTM_HD int least(int a, int b) { return a < b ? a : b; }

// Offsets in bytes. Both start with the barriers, 2 a tile; then int [tiles], the steps of each tile; then the state,
// float [tiles, 2, threads], which a grid keeps in global memory.
struct ForwardLayout {
    int part;  // blocks of K of each warp: all hidden units, padded by zeros so that it has as many as it takes at once
    int in_smem;  // of those, how many of each warp's lie in shared memory
    int of_h;     // bytes of a tile's h
    // Words [2, splits, 8, V + 1], V units of the most groups that the kernel serves, of a grid [splits, 8, U + 1];
    // Words [U]; Words [warps, in_smem, 4, 32]; T [tiles, 2, splits part, 8, 64 bytes], of a grid [splits part, 8, 64
    // bytes]
    int partial, bias, weights, h, end;
};
struct BackwardLayout {
    int blocks;    // of K: the four gates of the block's own units
    int tiles;     // of 16 hidden units, each warp's at most
    int in_smem;   // of those, how many lie in shared memory
    int of_block;  // floats that a block sends another
    // Words [warps, in_smem, blocks, 2, 32]; T [2, blocks, 8, 64 bytes]; float [tiles, 2, C, G, 8, travelling], of a
    // grid nothing
    int weights, da, slots, end;
};

LSTM_HD int offset_of_steps(const Plan& plan) { return 16 * plan.tiles; }
LSTM_HD int offset_of_state(const Plan& plan) { return round_up(20 * plan.tiles, 16); }
LSTM_HD int state_bytes(const Plan& plan) { return 8 * plan.tiles * threads_of(plan); }  // of a block
LSTM_HD int after_state(const Plan& plan) { return offset_of_state(plan) + (plan.grid ? 0 : state_bytes(plan)); }

// Columns of the partial sums of dh as a block sends them: two in a message.
LSTM_HD int travelling(const Plan& plan) { return (plan.columns + 1) / 2 * 2; }
LSTM_HD int floats_of_block(const Plan& plan) { return plan.groups * kGroup * travelling(plan); }  // to another one

// Bytes of a column of the gates' sums over a part of K: a word a unit, and one so that banks differ.
LSTM_HD constexpr int column_of_sums(int groups) { return (groups * kGroup + 1) * 16; }

LSTM_HD ForwardLayout forward_layout(Kind kind, const Plan& plan) {
    const Held kept = held_by(kind, plan);
    const int element = element_size(kind);
    const int column = column_of_sums(plan.grid ? plan.groups : most_groups(kind, plan.groups, false));
    const int bytes = plan.cluster * plan.groups * kGroup * element;
    const int part = round_up(bytes, 2 * plan.splits * kBlock) / kBlock / plan.splits;
    ForwardLayout at{};
    at.part = part < kept.blocks ? round_up(part, kept.at_once) : part;
    at.in_smem = most(0, at.part - kept.blocks);
    at.partial = after_state(plan);
    at.bias = at.partial + (plan.grid ? 1 : 2) * plan.splits * kColumns * column;
    at.weights = at.bias + plan.groups * kGroup * 16;
    at.h = at.weights + warps_of(plan) * at.in_smem * 2048;
    at.of_h = kColumns * kBlock * plan.splits * at.part;
    at.end = at.h + (plan.grid ? 1 : plan.tiles * 2) * at.of_h;
    return at;
}

LSTM_HD BackwardLayout backward_layout(Kind kind, const Plan& plan) {
    const int warps = warps_of(plan), all_tiles = (plan.cluster * plan.groups + 1) / 2;
    BackwardLayout at{};
    at.blocks = plan.groups * kGroup * 4 * element_size(kind) / kBlock;
    at.tiles = (all_tiles + warps - 1) / warps;
    at.in_smem = most(0, at.tiles - held_by(kind, plan).tiles);
    at.of_block = floats_of_block(plan);
    at.weights = after_state(plan);
    at.da = at.weights + warps * at.in_smem * at.blocks * 1024;
    at.slots = at.da + 2 * kColumns * kBlock * at.blocks;
    at.end = at.slots + (plan.grid ? 0 : plan.tiles * 2 * plan.cluster * at.of_block * 4);
    return at;
}

// ---- What a launch keeps in global memory ---------------------------------------------------------------------------

// Offsets in bytes. A grid's: first, for each tile of each cluster, a flag of each block, zero before the launch: one
// for all would count one after the other; then the state, float [blocks, tiles, 2, threads]; then what travels, for
// each tile of each cluster twice: forward h, as in shared memory; backward partial sums of dh, float [C owners, C
// sources, G, 8, travelling]. Then, of clusters too, W_hh as the lanes take it up, Words [D, C, warps, words, 32].
struct Workspace {
    Index state, exchange, of_buffer, weights, end;  // of_buffer: bytes
    int words;                                       // of W_hh, of a lane
};
LSTM_HD int flag_bytes(const Plan& plan) { return round_up(4 * plan.cluster, 128); }

LSTM_HD Workspace workspace(bool backward, Kind kind, const Plan& plan, int directions) {
    const int element = element_size(kind);
    const Index clusters = Index{plan.clusters} * directions;
    const int units = plan.cluster * plan.groups * kGroup;
    Workspace at{};
    if (plan.grid) {
        at.state = clusters * plan.tiles * flag_bytes(plan);
        at.exchange = at.state + clusters * plan.cluster * state_bytes(plan);
    }
    const BackwardLayout back = backward_layout(kind, plan);
    at.of_buffer = backward ? Index{plan.cluster} * plan.cluster * back.of_block * 4
                            : round_up(units * element, kBlock) * kColumns;
    at.weights = plan.grid ? at.exchange + clusters * plan.tiles * 2 * at.of_buffer : 0;
    at.words = backward ? back.tiles * back.blocks * 2 : forward_layout(kind, plan).part * 4;
    at.end = at.weights + Index{directions} * plan.cluster * warps_of(plan) * at.words * 512;
    return at;
}

// ---- What a walk reads and writes -----------------------------------------------------------------------------------

struct Forward {
    void* gates;                 // T [N, D, H, 4], on entry x W_ih^T; with cells activated in place
    const void* h0;              // T [D, B, H], null for zeros
    const void* c0;              // T [D, B, H], null for zeros
    const void* w_hh[2];         // of each direction, T [4H, H]
    const void* b_ih[2];         // of each direction, T [4H], or null for zeros
    const void* b_hh[2];         // likewise
    const std::int32_t* starts;  // [T + 1], first row of each step, and N; null when every step has B rows
    void* y;                     // T [N, D * H], written
    void* h_n;                   // T [D, B, H], written
    void* c_n;                   // T [D, B, H], written
    void* cells;                 // float [D, N, H], written: the cell states; null when there will be no backward pass
    Sizes sizes;
    Plan plan;
    void* global;          // its workspace, 16-byte aligned, flags zeroed
    ForwardLayout layout;  // of the plan, as the next two: filled by `run`
    Workspace workspace;
    int direction;  // the launch's first
};

struct Backward {
    const void* gates;           // T [N, D, H, 4], activated
    const void* cells;           // float [D, N, H]
    const void* c0;              // T [D, B, H], null for zeros
    const void* w_hh[2];         // of each direction, T [4H, H]
    const std::int32_t* starts;  // as in Forward
    const void* dy;              // T [N, D * H], null when zero
    const void* dh_n;            // T [D, B, H], null when zero
    const void* dc_n;            // T [D, B, H], null when zero
    void* dgates;                // T [D, N, 4H], written: gradient of the pre-activations
    void* dh0;                   // T [D, B, H], written; null when nobody asks
    void* dc0;                   // T [D, B, H], written; null when nobody asks
    Sizes sizes;
    Plan plan;
    void* global;  // as in Forward, as all that follows
    BackwardLayout layout;
    Workspace workspace;
    int direction;
};

inline void lay_out(Forward& walk, Kind kind) {
    walk.layout = forward_layout(kind, walk.plan);
    walk.workspace = workspace(false, kind, walk.plan, walk.sizes.directions);
}
inline void lay_out(Backward& walk, Kind kind) {
    walk.layout = backward_layout(kind, walk.plan);
    walk.workspace = workspace(true, kind, walk.plan, walk.sizes.directions);
}

// ---- Who calls what -------------------------------------------------------------------------------------------------

// What a device grants: clusters that run at the same time, of so many blocks with so many threads and bytes of shared
// memory each; 0 if none. Of a grid: blocks that do.
using Resident = std::function<int(bool grid, int cluster, int threads, int shared)>;

// The layout expected to be fastest for B sequences in D directions, or one with cluster = 0 if none fits.
Plan plan(Kind kind, bool backward, int hidden, int batch, int directions, const Resident& resident);

// That a step is expected to take torch's own LSTM: a library's product and gates, launched step by step, or a
// persistent kernel where the call is `plain`, of one dense layer in one direction.
double library_clocks(Kind kind, int hidden, int batch, bool plain);

// The kernels' own source on the host, for tests without a GPU: empty, or what went wrong. `schedule`:
// csrc/host/simt.h.
namespace host {
std::string run(const Forward& walk, Kind kind, std::uint64_t schedule);
std::string run(const Backward& walk, Kind kind, std::uint64_t schedule);
}  // namespace host

// On a GPU, queued on `stream` of `device`; empty, or why it could not be. Clusters from compute capability 9.0 on, a
// grid from 8.0.
namespace cuda {
int resident_forward(Kind kind, int device, int cluster, int threads, int shared);
int resident_backward(Kind kind, int device, int cluster, int threads, int shared);
std::string run(const Forward& walk, Kind kind, int device, void* stream);
std::string run(const Backward& walk, Kind kind, int device, void* stream);
int grid_resident_forward(Kind kind, int device, int threads, int shared);
int grid_resident_backward(Kind kind, int device, int threads, int shared);
std::string grid_run(const Forward& walk, Kind kind, int device, void* stream);
std::string grid_run(const Backward& walk, Kind kind, int device, void* stream);
// Copies int32 [count] from the host, through kernel arguments: no wait, and a CUDA graph may capture it.
std::string upload(const std::int32_t* from, int count, void* to, int device, void* stream);

// For each of N packed rows the h of its sequence's step before, in the direction's order, or the initial one.
struct Previous {
    const void* y;               // [N, ...], rows `stride` bytes apart
    const void* initial;         // [B, width], null for zeros
    const std::int32_t* starts;  // [T + 1], as in Forward
    void* before;                // [N, width], written
    Index rows;                  // N
    int steps;                   // T
    int width, stride;           // bytes
    bool reverse;
};
std::string previous(const Previous& p, int device, void* stream);

// The gates' rows of matrices [4H, width], one a direction, unit by unit: row 4 u + k of `to` is row k H + u.
struct Interleaved {
    const void* from[2];
    void* to;                       // [D, 4H, width], written
    int hidden, directions, width;  // width: bytes
};
std::string interleave(const Interleaved& p, int device, void* stream);

// Sums over rows, in fp32 and in the same order on every run.
struct Sums {
    const void* rows;  // T [N, width], contiguous
    Index count;       // N
    int width;
    void* to;     // T [width], written
    void* again;  // the same once more, or null
};
std::string sum(const Sums& sums, Kind kind, int device, void* stream);

// What one step took: "message" of size bytes between two blocks, "exchange" of h with so many units in a cluster of
// so many blocks, "grid" of the same over a grid of so many, "product" of so many multiply-adds by one warp.
struct Latency {
    const char* what;
    int size, blocks;
    double clocks, ns;
};
// Blocks of a cluster, and how many such clusters run at once, one block a multiprocessor.
std::vector<std::pair<int, int>> clusters_at_once(int device);
// Tells `report` of each step as soon as it is measured. Takes a second and the whole device. Both throw
// std::runtime_error: this one where a launch fails, after what was measured before.
void measure_exchange(int device, const std::function<void(const Latency&)>& report);
}  // namespace cuda

}  // namespace lstm::persistent

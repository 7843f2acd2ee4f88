// The backward walk, one thread's share. At step t of a tile, a lane sums what the cluster's blocks sent for its cell
// into dh, makes the gradients of the cell's four gates, and lays them beside those of the block's other cells (B).
// Then each warp multiplies its tiles of W_hh^T (A, in registers: 16 hidden units by the block's own gates) by them:
// this block's part of dh of the step before, for all hidden units, in fp32, which it sends to the units' owners: into
// their shared memory, or of a grid into global memory.
#pragma once

#include "persistent_common.h"

namespace lstm::persistent {

// What the forward walk saved of the next item, loaded while the cluster exchanges dh.
template <typename T>
struct Saved {
    T gates[4];
    T dy;
    float c, c_before;
    int row;  // of [N, ...]; below 0 when the gradients pass through
};

// i, f, g, o of one cell: one access.
template <typename T>
struct alignas(4 * sizeof(T)) Gates {
    T of[4];
};

template <typename T, bool kExact, int kMost, bool kGrid>
struct BackwardKernel {
    static constexpr int kElement = sizeof(T), kTiles = held(kElement, kMost).tiles, kDeep = held(kElement, kMost).deep;
    static constexpr int kChains = kMost == 4 ? 2 : 1;
    static constexpr int kAhead = 3;  // steps that the L2 prefetch runs ahead

    const Backward& p;
    const Position at;

    SIMT explicit BackwardKernel(const Backward& walk) : p(walk), at(position<kGrid>(walk.plan, walk.direction)) {}

    // The lane's cell in a tile. Lanes are those whose sums lie side by side in the slots: see `send`.
    SIMT int unit() const {
        return (at.rank * p.plan.groups + at.group()) * kGroup + unit_in_group();
    }  // may be past H
    SIMT int unit_in_group() const { return at.lane / 2 % 2 * 4 + at.lane / 8; }
    SIMT int column() const { return 4 * at.half() + at.lane / 4 % 2 * 2 + at.lane % 2; }
    SIMT simt::Barrier* full(int slot, int buffer) const {
        return reinterpret_cast<simt::Barrier*>(simt::shared_memory()) + 2 * slot + buffer;
    }
    SIMT int* steps() const { return reinterpret_cast<int*>(simt::shared_memory() + offset_of_steps(p.plan)); }
    // This thread's cell in a tile: the gradient of h that passes by steps it takes no part in, and of c.
    SIMT float& dh_state(int slot) const {
        if constexpr (kGrid) return global().state(slot)[threadIdx.x];
        return reinterpret_cast<float*>(simt::shared_memory() +
                                        offset_of_state(p.plan))[2 * slot * blockDim.x + threadIdx.x];
    }
    SIMT float& dc_state(int slot) const { return (&dh_state(slot))[blockDim.x]; }
    // The gates' gradients of an item. Two take turns: a warp that writes the next but one has passed the barrier of
    // the next, which all warps reach only after this one's product.
    SIMT unsigned char* da(int turn) const {
        return simt::shared_memory() + p.layout.da + turn * kColumns * p.layout.row;
    }
    SIMT Global<Backward> global() const { return {p, at}; }
    // What block `rank` sends to block `owner`, [G, 2, 32]: in the memory of each owner at the same place, or in the
    // grid's.
    SIMT float* from_block(int slot, int buffer, int rank, [[maybe_unused]] int owner) const {
        if constexpr (kGrid) {
            return reinterpret_cast<float*>(global().buffer(slot, buffer)) +
                   Index{owner * p.plan.cluster + rank} * p.plan.groups * 64;
        }
        return reinterpret_cast<float*>(simt::shared_memory() + p.layout.slots) +
               ((2 * slot + buffer) * p.plan.cluster + rank) * p.plan.groups * 64;
    }
    SIMT Index in_batch(int b) const { return (Index{at.direction} * p.sizes.batch + b) * p.sizes.hidden + unit(); }
    SIMT Index in_rows(int row) const { return at.direction * p.sizes.all_rows + row; }
    SIMT int sequence(int slot) const { return tile_of(p.plan, at, slot) * kColumns + column(); }
    SIMT int time_of(const Item& item) const { return at.direction == 0 ? steps()[item.slot] - 1 - item.i : item.i; }
    SIMT unsigned fill_bytes() const { return p.plan.cluster * p.plan.groups * 256; }

    // 16 bytes of W_hh^T for this lane: hidden unit of row lane / 4 + 8 high of tile `tile`, its share of block `block`
    // of the block's own gates, unit by unit, four gates each; zero outside of W_hh.
    SIMT Words weights(int tile, int high, int block) const {
        T values[16 / kElement] = {};
        const int r = at.lane / 4, hidden = p.sizes.hidden;
        const int to = tile * 16 + r / 4 * 8 + high * 4 + r % 4;
        const int first = simt::opaque((block * kBlock + at.lane % 4 * 16) / kElement);  // gate of the block
        for (int j = 0; j < 16 / kElement; ++j) {
            const int own = at.rank * p.plan.groups * kGroup + (first + j) / 4, k = (first + j) % 4;
            if (to >= hidden || own >= hidden) continue;
            const T* w = static_cast<const T*>(p.w_hh[at.direction]);
            values[j] = operand<kExact>(w[(Index{k} * hidden + own) * hidden + to]);
        }
        return pack(values);
    }
    SIMT Words& in_smem(int j, int block, int high) const {
        const int place = (at.warp * p.layout.in_smem + j) * p.layout.blocks + block;
        return reinterpret_cast<Words*>(simt::shared_memory() + p.layout.weights)[(place * 2 + high) * 32 + at.lane];
    }
    SIMT int tile_number(int j) const { return at.warp + j * 2 * p.plan.groups; }  // of this warp's j-th
    SIMT int all_tiles() const { return (p.plan.cluster * p.plan.groups + 1) / 2; }

    SIMT Saved<T> fetch(const Item& item) const {
        const int t = time_of(item), b = sequence(item.slot), hidden = simt::opaque(p.sizes.hidden);
        const Step step = step_of(p.starts, p.sizes.batch, t);
        Saved<T> found{{}, {}, 0.0f, 0.0f, b < step.active ? step.first + b : -1};
        if (found.row < 0 || unit() >= hidden) return found;
        const T* gates = static_cast<const T*>(p.gates) + in_rows(found.row) * 4 * hidden + unit();
        for (int k = 0; k < 4; ++k) found.gates[k] = gates[Index{k} * hidden];
        const float* cells = static_cast<const float*>(p.cells) + unit();
        found.c = cells[in_rows(found.row) * hidden];
        if (p.dy != nullptr) {
            found.dy =
                static_cast<const T*>(p.dy)[(Index{found.row} * p.sizes.directions + at.direction) * hidden + unit()];
        }
        const int before = at.direction == 0 ? t - 1 : t + 1;
        bool starts_here = before < 0 || before == p.sizes.steps;
        if (!starts_here) {
            const Step then = step_of(p.starts, p.sizes.batch, before);
            starts_here = b >= then.active;
            if (!starts_here) found.c_before = cells[in_rows(then.first + b) * hidden];
        }
        if (starts_here) found.c_before = load(static_cast<const T*>(p.c0)[in_batch(b)]);
        const int later = at.direction == 0 ? t - kAhead : t + kAhead;
        if (kMost < 8 && later >= 0 && later < p.sizes.steps) {  // 512 threads have no registers for it
            const Step then = step_of(p.starts, p.sizes.batch, later);
            if (b < then.active) {
                const Index row = in_rows(then.first + b);
                for (int k = 0; k < 4; ++k) {
                    simt::prefetch(static_cast<const T*>(p.gates) + (row * 4 + k) * hidden + unit());
                }
                simt::prefetch(cells + row * hidden);
            }
        }
        return found;
    }

    SIMT void prepare(Words (&w)[kTiles][kDeep][2]) const {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int slot = thread; slot < p.plan.tiles; slot += threads) {
            const int count = steps_of_tile(p.starts, p.sizes, tile_of(p.plan, at, slot));
            steps()[slot] = count;
            if constexpr (!kGrid) {
                for (int buffer = 0; buffer < 2; ++buffer) {
                    simt::init(full(slot, buffer), 1);
                    if (count > buffer) simt::arrive_expecting(full(slot, buffer), fill_bytes());
                }
            }
        }
        if constexpr (!kGrid) simt::publish_barriers();
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int block = 0; block < kDeep; ++block) {
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    const bool mine = tile_number(j) < all_tiles() && block < p.layout.blocks;
                    w[j][block][high] = mine ? weights(tile_number(j), high, block) : Words{0, 0, 0, 0};
                }
            }
        }
        for (int j = 0; j < p.layout.in_smem; ++j) {
            for (int block = 0; block < p.layout.blocks; ++block) {
                for (int high = 0; high < 2; ++high) {
                    in_smem(j, block, high) = weights(tile_number(kTiles + j), high, block);
                }
            }
        }
        for (int slot = 0; slot < p.plan.tiles; ++slot) {
            const int b = sequence(slot);
            const bool mine = b < p.sizes.batch && unit() < p.sizes.hidden;
            dh_state(slot) = mine ? static_cast<const float*>(p.dh)[in_batch(b)] : 0.0f;
            dc_state(slot) = mine ? static_cast<const float*>(p.dc)[in_batch(b)] : 0.0f;
        }
        if constexpr (kGrid) {
            simt::sync_threads();  // all know the steps
        } else {
            simt::sync_cluster();
        }
    }

    // What all blocks sent for this lane's cell in fill `fill`, summed in their order.
    SIMT float received(int slot, int fill) const {
        const float* from = from_block(slot, fill % 2, 0, at.rank) + (2 * at.group() + at.half()) * 32 + at.lane;
        const int stride = p.plan.groups * 64;
        float sum = 0.0f;
        if constexpr (kGrid) {
            global().await(slot, fill);
            const int last = p.plan.cluster - 1;
            for (int first = 0; first <= last; first += 8) {  // eight loads at a time; past the last, it again
                float some[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    some[j] = simt::collect(from + (first + j < last ? first + j : last) * stride);
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) sum += first + j <= last ? some[j] : 0.0f;
            }
        } else {
            simt::wait(full(slot, fill % 2), parity_of(fill));
#pragma unroll 4
            for (int rank = 0; rank < p.plan.cluster; ++rank) sum += from[rank * stride];
        }
        return sum;
    }

    // The block's part of dh for row tile `tile`, to the blocks that own its units. A chunk of four floats is what one
    // lane holds, so that it goes as one message; d's order makes 8 chunks the 32 cells of one reading warp.
    SIMT void send(const float (&d)[4], int tile, int slot, int buffer) const {
        const int r = at.lane / 4, q = at.lane % 4;
        const int group = 2 * tile + r / 4;  // of the cluster
        if (group >= p.plan.cluster * p.plan.groups) return;
        const int owner = group / p.plan.groups;
        float* const to = from_block(slot, buffer, at.rank, owner) + (group % p.plan.groups * 2 + q / 2) * 32 +
                          (r % 4 * 2 + q % 2) * 4;
        const Words words{bits(d[0]), bits(d[1]), bits(d[2]), bits(d[3])};
        if constexpr (kGrid) {
            simt::publish(to, words);
        } else {
            simt::send(to, owner, words, full(slot, buffer));
        }
    }

    SIMT void product(const Words (&w)[kTiles][kDeep][2], int turn, int slot, int buffer) const {
        const unsigned char* column_r = da(turn) + at.lane / 4 * p.layout.row + at.lane % 4 * 16;
        const auto read = [&](int block) {
            return block < p.layout.blocks ? *reinterpret_cast<const Words*>(column_r + block * kBlock)
                                           : Words{0, 0, 0, 0};
        };
        // Tiles share what is read once, where registers allow.
        constexpr bool kShared = kMost == 4;
        Words shared[kDeep];
#pragma unroll
        for (int block = 0; block < kDeep; ++block) shared[block] = kShared ? read(block) : Words{0, 0, 0, 0};
        const auto b = [&](int block) { return kShared ? shared[block] : read(block); };
        const auto sum_and_send = [&](const float (&d)[2][kChains][4], int tile) {
            float sum[4];
            for (int j = 0; j < 4; ++j) {
                sum[j] = d[0][0][j] + d[1][0][j];
                if (kChains == 2) sum[j] += d[0][kChains - 1][j] + d[1][kChains - 1][j];
            }
            send(sum, tile, slot, buffer);
        };
        const auto add = [&](float (&d)[kChains][4], const Words& low, const Words& high, const Words& x) {
            multiply<T, kExact>(d[0], {low.x, high.x, low.y, high.y}, x.x, x.y);
            multiply<T, kExact>(d[kChains - 1], {low.z, high.z, low.w, high.w}, x.z, x.w);
        };
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            if (tile_number(j) >= all_tiles()) break;
            float d[2][kChains][4] = {};  // even and odd blocks; halves of a block apart, where registers allow
#pragma unroll
            for (int block = 0; block < kDeep; block += 2) {
                if (block >= p.layout.blocks) break;
                add(d[0], w[j][block][0], w[j][block][1], b(block));
                add(d[1], w[j][block + 1][0], w[j][block + 1][1], b(block + 1));
            }
            sum_and_send(d, tile_number(j));
        }
        for (int j = 0; j < p.layout.in_smem; ++j) {
            if (tile_number(kTiles + j) >= all_tiles()) break;
            float d[2][kChains][4] = {};
#pragma unroll
            for (int block = 0; block < kDeep; ++block) {
                if (block >= p.layout.blocks) break;
                add(d[block % 2], in_smem(j, block, 0), in_smem(j, block, 1), b(block));
            }
            sum_and_send(d, tile_number(kTiles + j));
        }
    }

    SIMT void run() const {
        Words w[kTiles][kDeep][2];
        prepare(w);
        Item item{0, 0};
        bool more = steps()[0] > 0;
        Saved<T> next{};
        if (more) next = fetch(item);
        for (int turn = 0; more; turn ^= 1) {
            const Item now = item;
            const Saved<T> x = next;
            const bool active = x.row >= 0;
            float dh = dh_state(now.slot), dc = dc_state(now.slot);
            if (now.i > 0) {
                dh += received(now.slot, now.i - 1);
                if (!kGrid && threadIdx.x == 0 && now.i + 1 < steps()[now.slot]) {
                    simt::arrive_expecting(full(now.slot, (now.i - 1) % 2), fill_bytes());
                }
            }
            const CellBackward<float> cell =
                cell_backward<!kExact>(load(x.gates[0]), load(x.gates[1]), load(x.gates[2]), load(x.gates[3]), x.c,
                                       x.c_before, dh + load(x.dy), dc);
            const float found[4] = {cell.da_i, cell.da_f, cell.da_g, cell.da_o};
            Gates<T> da_now, b;
            for (int k = 0; k < 4; ++k) da_now.of[k] = store<T>(active ? found[k] : 0.0f);
            for (int k = 0; k < 4; ++k) b.of[k] = operand<kExact>(da_now.of[k]);
            reinterpret_cast<Gates<T>*>(da(turn) + column() * p.layout.row)[at.group() * kGroup + unit_in_group()] = b;
            dh_state(now.slot) = active ? 0.0f : dh;
            dc_state(now.slot) = active ? cell.dc_prev : dc;
            simt::sync_threads();  // all gradients of the block's cells lie in b
            product(w, turn, now.slot, now.i % 2);
            if constexpr (kGrid) global().signal(now.slot);
            if (active && unit() < p.sizes.hidden) {
                const int hidden = simt::opaque(p.sizes.hidden);
                T* const to = static_cast<T*>(p.dgates) + in_rows(x.row) * 4 * hidden + unit();
                for (int k = 0; k < 4; ++k) to[Index{k} * hidden] = da_now.of[k];
            }
            more = advance(item, steps(), p.plan.tiles);
            if (more) next = fetch(item);
        }
        for (int slot = 0; slot < p.plan.tiles && steps()[slot] > 0; ++slot) {
            const float dh = dh_state(slot) + received(slot, steps()[slot] - 1);
            const int b = sequence(slot);
            if (b >= p.sizes.batch || unit() >= p.sizes.hidden) continue;
            static_cast<float*>(p.dh)[in_batch(b)] = dh;
            static_cast<float*>(p.dc)[in_batch(b)] = dc_state(slot);
        }
        if constexpr (!kGrid) simt::sync_cluster();  // no block ends while another may still write to it
    }
};

}  // namespace lstm::persistent

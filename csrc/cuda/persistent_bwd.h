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
    std::uint32_t gates[sizeof(T)];  // bits of four T
    std::uint32_t dy;                // bits of T
    std::uint32_t c, c_before;       // of float
    int row;                         // of [N, ...]; below 0 when the gradients pass through
    bool first;                      // the sequence starts here, with c0
};

template <typename T, bool kExact, int kMost, bool kGrid>
struct BackwardKernel : Walker<Backward, kGrid> {
    using Base = Walker<Backward, kGrid>;
    using Base::at, Base::cell, Base::count, Base::first_sequence, Base::full, Base::global, Base::has_cells;
    using Base::in_batch, Base::p;
    using Base::sequence, Base::state, Base::steps, Base::within;
    static constexpr int kElement = sizeof(T), kTiles = held(kElement, kMost).tiles, kDeep = held(kElement, kMost).deep;
    static constexpr int kChains = kMost == 4 ? 2 : 1;

    // Of the units that this lane sends of its warp's first tile: their block, none for columns that aren't there;
    // where its messages lie in what a block sends to another, in floats; and which of their columns comes first there.
    const int first_owner, of_message, first_column;

    SIMT static int group_sent(const Position& at) { return 2 * at.warp + at.lane / 16; }
    SIMT explicit BackwardKernel(const Backward& walk)
        : Base(walk),
          first_owner(at.lane % 4 * 2 < walk.plan.columns ? group_sent(at) / walk.plan.groups : walk.plan.cluster),
          of_message(place_of_message(group_sent(at) % walk.plan.groups, at.lane / 4 % 4, at.lane % 4)),
          first_column(swapped(group_sent(at) % walk.plan.groups)) {}

    // The gradient of this thread's h that passes by steps it takes no part in, and of its c.
    SIMT float& dh_state(int slot) const { return state(slot); }
    SIMT float& dc_state(int slot) const { return (&state(slot))[blockDim.x]; }
    // The gates' gradients of an item. Two take turns: a warp that writes the next but one has passed the barrier of
    // the next, which all warps reach only after this one's product.
    SIMT unsigned char* da(int turn) const {
        return simt::shared_memory() + p.layout.da + turn * kColumns * kBlock * p.layout.blocks;
    }
    // What block `rank` sends to block `owner`, of 8 G units in each column: in the memory of each owner at
    // the same place, or in the grid's.
    SIMT float* from_block(int slot, int buffer, int rank, [[maybe_unused]] int owner) const {
        if constexpr (kGrid) {
            return reinterpret_cast<float*>(global().buffer(slot, buffer)) +
                   Index{owner * p.plan.cluster + rank} * p.layout.of_block;
        }
        return reinterpret_cast<float*>(simt::shared_memory() + p.layout.slots) +
               ((2 * slot + buffer) * p.plan.cluster + rank) * p.layout.of_block;
    }
    // In a cluster a lane's four floats are units r and r + 4 of a group of the owner, columns 2 q and 2 q + 1. Lanes q
    // and q ^ 1 make 32 bytes; of the last q, where there is no other, r and r ^ 1. And 32 units of a column, which a
    // warp reads at once, lie in 32 banks, for which groups take turns in the order of the two pieces and of the
    // columns in each.
    SIMT int place(int group, int r, int q) const {
        if (p.plan.columns <= 2 * (q | 1)) return (q * p.plan.groups + group) * 16 + r * 4;
        return q / 2 * p.plan.groups * 32 + group * 32 + r * 8 + (q + group) % 2 * 4;
    }
    SIMT static int swapped(int group) { return group / 2 % 2; }  // whether column 2 q + 1 comes first
    // Over a grid lanes r and r ^ 1 have swapped a column, and a lane has r and r + 4 of two r, of one column: what a
    // warp reads at once lies in one piece, [columns, G, 4, 2].
    SIMT int place_in_grid(int group, int r, int column) const { return (column * p.plan.groups + group) * 8 + r * 2; }

    SIMT int place_of_message(int group, int r, int q) const {
        return kGrid ? place_in_grid(group, r / 2 * 2, 2 * q + r % 2) : place(group, r, q);
    }
    SIMT int place_of_cell() const {
        const int group = cell.own / kGroup, r = cell.own % 4, high = cell.own % kGroup / 4;
        const int column = cell.here ? cell.column : 0;
        if constexpr (kGrid) return place_in_grid(group, r, column) + high;
        return place(group, r, column / 2) + (column % 2 ^ swapped(group)) * 2 + high;
    }
    SIMT int time_of(const Item& item, int longest) const {
        return at.direction == 0 ? count(item.slot, longest) - 1 - item.i : item.i;
    }
    // What a thread has in global memory, where registers allow found once for all items.
    static constexpr bool kKept = kMost == 4 && !kExact && !(kGrid && kElement == 4);
    struct Columns {
        Column<const T, kKept> gates, dy;
        Column<T, kKept> dgates;
        Column<const float, kKept> cells;
        int of_gate;  // bytes from one gate to the next
    };
    SIMT Columns columns() const {
        const int hidden = kKept ? p.sizes.hidden : simt::opaque(p.sizes.hidden);
        const Index before = at.direction * p.sizes.all_rows * hidden;
        const int unit = within() ? cell.unit : 0;
        return {{static_cast<const T*>(p.gates) + 4 * (at.direction * hidden + unit),
                 4 * p.sizes.directions * hidden * kElement},
                {static_cast<const T*>(p.dy) + at.direction * hidden + unit, p.sizes.directions * hidden * kElement},
                {static_cast<T*>(p.dgates) + 4 * before + unit, 4 * hidden * kElement},
                {static_cast<const float*>(p.cells) + before + unit, hidden * 4},
                hidden * kElement};
    }

    SIMT unsigned fill_bytes() const { return p.plan.cluster * p.layout.of_block * 4; }

    // 16 bytes of W_hh^T: hidden unit of row lane / 4 + 8 high of a tile, the lane's share of a block of the block's
    // own gates, unit by unit, four gates each; zero outside of W_hh.
    SIMT static Words word_of_weights(const Backward& p, Index index) {
        const PackedAt place = packed_at(p, index);
        const int high = place.word % 2, block = place.word / 2 % p.layout.blocks, hidden = p.sizes.hidden;
        const int tile = place.warp + place.word / 2 / p.layout.blocks * 2 * p.plan.groups, r = place.lane / 4;
        const int to = tile * 16 + r / 4 * 8 + high * 4 + r % 4;
        const int first = (block * kBlock + place.lane % 4 * 16) / kElement;  // gate of the block
        const T* w = static_cast<const T*>(p.w_hh[place.direction]);
        T values[16 / kElement] = {};
        for (int j = 0; j < 16 / kElement; ++j) {
            const int own = place.rank * p.plan.groups * kGroup + (first + j) / 4, k = (first + j) % 4;
            if (to < hidden && own < hidden) values[j] = operand<kExact>(w[(Index{k} * hidden + own) * hidden + to]);
        }
        return pack(values);
    }
    SIMT Words& in_smem(int j, int block, int high) const {
        const int place = (at.warp * p.layout.in_smem + j) * p.layout.blocks + block;
        return reinterpret_cast<Words*>(simt::shared_memory() + p.layout.weights)[(place * 2 + high) * 32 + at.lane];
    }
    SIMT decltype(auto) from_smem(int j, int block, int high) const {  // in one load where registers allow
        if constexpr (kMost == 4) {
            return simt::read(&in_smem(j, block, high));
        } else {
            return (in_smem(j, block, high));
        }
    }
    SIMT int tile_number(int j) const { return at.warp + j * 2 * p.plan.groups; }  // of this warp's j-th
    SIMT int all_tiles() const { return (p.plan.cluster * p.plan.groups + 1) / 2; }

    // The rows of an item that this thread loads.
    struct Rows {
        int row, saved, before;
        bool first;
    };
    SIMT Rows rows_of(const Item& item, bool more, int longest) const {
        const int t = more ? time_of(item, longest) : 0, b = sequence(item.slot);
        const Step step = step_of(p.starts, p.sizes.batch, t);
        const int row = b < step.active ? step.first + b : -1;
        const bool here = more && row >= 0;
        const int saved = here ? row : 0;

        const int before = at.direction == 0 ? t - 1 : t + 1;
        Step then{0, 0};
        if (before >= 0 && before < p.sizes.steps) then = step_of(p.starts, p.sizes.batch, before);
        return {row, saved, here && b < then.active ? then.first + b : saved, here && b >= then.active};
    }
    // Loads something in any case: without branches there is nothing to wait for.
    SIMT Saved<T> fetch(const Columns& columns, const Rows& rows) const {
        Saved<T> found;  // without zeros, which loads would wait for
        found.row = rows.row;
        found.dy = 0;
        simt::load_bits_of_four(columns.gates.row(rows.saved), found.gates);
        found.c = simt::load_bits(columns.cells.row(rows.saved));
        if (p.dy != nullptr) found.dy = simt::load_bits(columns.dy.row(rows.saved));
        found.c_before = simt::load_bits(columns.cells.row(rows.before));
        found.first = rows.first;
        return found;
    }

    SIMT void prepare(Words (&w)[kTiles][kDeep][2]) const {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int slot = thread; slot < p.plan.tiles; slot += threads) {
            const int count = steps_of_tile(p.starts, p.sizes, first_sequence(slot));
            steps()[slot] = count;
            if constexpr (!kGrid) {
                for (int buffer = 0; buffer < 2; ++buffer) {
                    simt::init(full(slot, buffer), 1);
                    if (count > buffer) simt::arrive_expecting(full(slot, buffer), fill_bytes());
                }
            }
        }
        if constexpr (!kGrid) simt::publish_barriers();
        const Words* const weights = packed(p, at);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int block = 0; block < kDeep; ++block) {
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    const bool mine = j < p.layout.tiles && block < p.layout.blocks;
                    w[j][block][high] =
                        mine ? weights[((j * p.layout.blocks + block) * 2 + high) * 32] : Words{0, 0, 0, 0};
                }
            }
        }
        const int held = kTiles * p.layout.blocks * 2;
        for (int n = 0; n < p.layout.in_smem * p.layout.blocks * 2; ++n) {
            in_smem(0, n / 2, n % 2) = weights[(held + n) * 32];
        }
        for (int slot = 0; slot < p.plan.tiles; ++slot) {
            const int b = sequence(slot);
            const bool mine = b < p.sizes.batch && within();
            dh_state(slot) = mine && p.dh_n != nullptr ? load(static_cast<const T*>(p.dh_n)[in_batch(b)]) : 0.0f;
            dc_state(slot) = mine && p.dc_n != nullptr ? load(static_cast<const T*>(p.dc_n)[in_batch(b)]) : 0.0f;
        }
        if constexpr (kGrid) {
            simt::sync_threads();  // all know the steps
        } else {
            simt::sync_cluster();
        }
    }

    // What all blocks sent for this lane's cell in fill `fill`, summed in their order; over a grid, once it is awaited.
    SIMT float received(int slot, int fill) const {
        const float* from = from_block(slot, fill % 2, 0, at.rank) + place_of_cell();
        // not the layout's, which the compiler would read anew for each load
        const int stride = floats_of_block(p.plan), last = p.plan.cluster - 1;
        if constexpr (!kGrid) simt::wait(full(slot, fill % 2), parity_of(fill));
        const auto one = [&](int rank) {
            if constexpr (kGrid) return simt::collect(from + rank * stride);
            return from[rank * stride];
        };
        const auto past = [&](int rank) {  // of one past the last, which it may be: in shared memory without a branch
            if constexpr (kGrid) return rank <= last ? one(rank) : 0.0f;
            return one(rank < last ? rank : last);
        };
        constexpr int kAtOnce = kExact ? 4 : kGrid ? 32 : 8;  // as registers allow
        float sum = 0.0f;
#pragma unroll 1
        for (int first = 0; first <= last; first += kAtOnce) {
            float some[kAtOnce];
            if (first + kAtOnce <= last + 1) {
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) some[j] = one(first + j);
            } else {
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) some[j] = past(first + j);
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) some[j] = first + j <= last ? some[j] : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; j += 4) sum += (some[j] + some[j + 1]) + (some[j + 2] + some[j + 3]);
        }
        return sum;
    }

    // The block's part of dh for this warp's tile `j`, to the blocks that own its units: a lane's four floats are one
    // message. Tiles of a warp lie 4 G groups apart, which is 4 owners.
    SIMT void send(const float (&d)[4], int j, int slot, int buffer) const {
        const int owner = first_owner + 4 * j;
        const auto pick = [&](int unit, int column) { return bits(column == 0 ? d[2 * unit] : d[2 * unit + 1]); };
        if constexpr (kGrid) {
            const int mine = at.lane / 4 % 2;
            const std::uint32_t low = simt::shuffle(pick(0, 1 - mine), at.lane ^ 4);
            const std::uint32_t high = simt::shuffle(pick(1, 1 - mine), at.lane ^ 4);
            const Words words =
                mine == 0 ? Words{pick(0, 0), pick(1, 0), low, high} : Words{low, high, pick(0, 1), pick(1, 1)};
            if (owner < p.plan.cluster) simt::publish(from_block(slot, buffer, at.rank, owner) + of_message, words);
        } else if (owner < p.plan.cluster) {
            const Words words{pick(0, first_column), pick(1, first_column), pick(0, 1 - first_column),
                              pick(1, 1 - first_column)};
            simt::send(from_block(slot, buffer, at.rank, owner) + of_message, owner, words, full(slot, buffer));
        }
    }

    // Where registers allow, `meanwhile()` is called while the matrix unit is behind and before messages leave.
    template <typename Meanwhile>
    SIMT void product(const Words (&w)[kTiles][kDeep][2], int turn, int slot, int buffer, Meanwhile meanwhile) const {
        const auto* const own = reinterpret_cast<const Words*>(da(turn)) + at.lane;
        const auto read = [&](int block) { return block < p.layout.blocks ? own[block * 32] : Words{0, 0, 0, 0}; };
        // Tiles share what is read once, where registers allow.
        constexpr bool kShared = kMost == 4 && !kExact;
        Words shared[kDeep];
#pragma unroll
        for (int block = 0; block < kDeep; ++block) shared[block] = kShared ? read(block) : Words{0, 0, 0, 0};
        if (kKept) simt::sync_warp();  // or the compiler puts what there is to do besides before it
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
            const bool mine =
                (kKept && j == 0) || tile_number(j) < all_tiles();  // past the last, zeros that nobody sends
            float d[2][kChains][4] = {};  // even and odd blocks; halves of a block apart, where registers allow
#pragma unroll
            for (int block = 0; block < kDeep; block += 2) {
                if ((!kKept || j + block > 0) && (!mine || block >= p.layout.blocks)) break;
                add(d[0], w[j][block][0], w[j][block][1], b(block));
                add(d[1], w[j][block + 1][0], w[j][block + 1][1], b(block + 1));
            }
            if (kKept && j == 0) meanwhile();
            if (!mine) break;
            sum_and_send(d, j);
        }
        for (int j = 0; j < p.layout.in_smem; ++j) {
            if (tile_number(kTiles + j) >= all_tiles()) break;
            float d[2][kChains][4] = {};
#pragma unroll
            for (int block = 0; block < kDeep; ++block) {
                if (block >= p.layout.blocks) break;
                add(d[block % 2], from_smem(j, block, 0), from_smem(j, block, 1), b(block));
            }
            sum_and_send(d, kTiles + j);
        }
    }

    SIMT static float of(std::uint32_t bits) { return load(from_bits<T>(bits)); }
    SIMT void run() const {
        Words w[kTiles][kDeep][2];
        prepare(w);
        Item item{0, 0};
        const int longest = steps()[0];
        bool more = longest > 0;
        const Columns kept = columns();
        Saved<T> x = fetch(kept, rows_of(item, more, longest));
        for (int turn = 0; more; turn ^= 1) {
            const Item now = item;
            const bool active = x.row >= 0;
            float dh = dh_state(now.slot), dc = dc_state(now.slot);
            more = advance(item, steps(), longest, p.plan.tiles);
            Rows rows{};
            if (kKept && !kGrid) rows = rows_of(item, more, longest);  // in the shadow of the wait
            if (kGrid && now.i > 0) global().await(now.slot, now.i - 1);
            if (now.i > 0 && has_cells()) dh += received(now.slot, now.i - 1);
            if (kKept && kGrid) rows = rows_of(item, more, longest);  // as registers allow
            float c_before = bit_cast<float>(x.c_before);
            if (x.first && within()) {
                const auto* const c0 = static_cast<const T*>(p.c0);
                c_before = c0 == nullptr ? 0.0f : load(c0[in_batch(sequence(now.slot))]);
            }
            Saved<T> next;  // of the next item: asked for while no messages travel, which would be in the way
            if constexpr (kKept) next = fetch(kept, rows);
            const Gates<T> was = gates_of<T>(x.gates);
            const CellBackward<float> made =
                cell_backward<speed<T, kExact>>(load(was.of[0]), load(was.of[1]), load(was.of[2]), load(was.of[3]),
                                                bit_cast<float>(x.c), c_before, dh + of(x.dy), dc);
            const float found[4] = {made.da_i, made.da_f, made.da_g, made.da_o};
            Gates<T> da_now, b;
            for (int k = 0; k < 4; ++k) da_now.of[k] = store<T>(active ? found[k] : 0.0f);
            for (int k = 0; k < 4; ++k) b.of[k] = operand<kExact>(da_now.of[k]);
            *reinterpret_cast<Gates<T>*>(da(turn) + operand_byte(cell.column, cell.own * 4 * kElement)) = b;
            dh_state(now.slot) = active ? 0.0f : dh;
            dc_state(now.slot) = active ? made.dc_prev : dc;
            simt::sync_threads();  // all gradients of the block's cells lie in b
            const auto write = [&](const Columns& columns) {
                const bool here = active && within();
                if (!kKept && !here) return;  // which takes fewer registers
                T* const to = columns.dgates.row(x.row);
                for (int k = 0; k < 4; ++k) simt::store_bits(here, at_row(to, k, columns.of_gate), bits(da_now.of[k]));
            };
            product(w, turn, now.slot, now.i % 2, [&] { write(kept); });
            if constexpr (!kKept) {
                write(columns());
                next = fetch(columns(), rows_of(item, more, longest));
            }
            // for the fill after the next, when nobody waits for this warp
            if (!kGrid && threadIdx.x == 0 && now.i > 0 && now.i + 1 < count(now.slot, longest)) {
                simt::arrive_expecting(full(now.slot, (now.i - 1) % 2), fill_bytes());
            }
            if constexpr (kGrid) global().signal(now.slot);
            x = next;
        }
        for (int slot = 0; slot < p.plan.tiles && steps()[slot] > 0; ++slot) {
            const int fill = steps()[slot] - 1;
            if constexpr (kGrid) global().await(slot, fill);
            const float dh = dh_state(slot) + received(slot, fill);
            const int b = sequence(slot);
            if (b >= p.sizes.batch || !within()) continue;
            if (p.dh0 != nullptr) static_cast<T*>(p.dh0)[in_batch(b)] = store<T>(dh);
            if (p.dc0 != nullptr) static_cast<T*>(p.dc0)[in_batch(b)] = store<T>(dc_state(slot));
        }
        if constexpr (!kGrid) simt::sync_cluster();  // no block ends while another may still write to it
    }
};

}  // namespace lstm::persistent

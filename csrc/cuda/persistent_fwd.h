// The forward walk, one thread's share. At step t of a tile, each warp multiplies its half of K for the 32 gate rows of
// its group (A, in registers) by h of the step before (B, in shared memory); the two warps of a group swap halves, so
// that a lane has i, f, g, o of one cell; it makes the new h, and the group sends it into every block of the cluster,
// or of a grid into global memory, from where every block copies it.
#pragma once

#include "persistent_common.h"

namespace lstm::persistent {

// The next item's pre-activations, loaded while the cluster exchanges h.
template <typename T>
struct Preactivation {
    T a[4];
    int row;  // of [N, ...]; below 0 when the state stays
};

template <typename T, bool kExact, int kMost, bool kGrid>
struct ForwardKernel {
    static constexpr int kElement = sizeof(T), kHeld = held(kElement, kMost).blocks;
    static constexpr int kChains = kMost == 4 ? 2 : 1;
    static constexpr int kAhead = 3;  // steps that the L2 prefetch runs ahead

    const Forward& p;
    const Position at;
    const int unit;    // of this lane's cells, in 0 .. H; may be past H
    const int column;  // of this lane's cells in a tile

    SIMT explicit ForwardKernel(const Forward& walk)
        : p(walk),
          at(position<kGrid>(walk.plan, walk.direction)),
          unit((at.rank * walk.plan.groups + at.group()) * kGroup + at.lane / 4),
          column(2 * (at.lane % 4) + at.half()) {}

    SIMT simt::Barrier* full(int slot, int buffer) const {
        return reinterpret_cast<simt::Barrier*>(simt::shared_memory()) + 2 * slot + buffer;
    }
    SIMT int* steps() const { return reinterpret_cast<int*>(simt::shared_memory() + offset_of_steps(p.plan)); }
    SIMT unsigned char* h(int slot, int buffer) const {
        return simt::shared_memory() + p.layout.h + (kGrid ? 0 : 2 * slot + buffer) * kColumns * p.layout.row;
    }
    SIMT Global<Forward> global() const { return {p, at}; }
    // This thread's cell in a tile: c, and h as `bits`.
    SIMT float& c_state(int slot) const {
        if constexpr (kGrid) return global().state(slot)[threadIdx.x];
        return reinterpret_cast<float*>(simt::shared_memory() +
                                        offset_of_state(p.plan))[2 * slot * blockDim.x + threadIdx.x];
    }
    SIMT std::uint32_t& h_state(int slot) const { return reinterpret_cast<std::uint32_t*>(&c_state(slot))[blockDim.x]; }
    SIMT Index in_batch(int b) const { return (Index{at.direction} * p.sizes.batch + b) * p.sizes.hidden + unit; }
    SIMT int sequence(int slot) const { return tile_of(p.plan, at, slot) * kColumns + column; }
    SIMT int time_of(const Item& item) const { return at.direction == 0 ? item.i : steps()[item.slot] - 1 - item.i; }
    SIMT T* gates(int row, int hidden) const {
        return static_cast<T*>(p.gates) + (at.direction * p.sizes.all_rows + row) * 4 * hidden + unit;
    }

    // 16 bytes of W_hh: gate k of the lane's unit, its share of block `block` of K; zero outside of W_hh.
    SIMT Words weights(int k, int block) const {
        T values[16 / kElement] = {};
        const int first = simt::opaque((block * kBlock + at.lane % 4 * 16) / kElement), hidden = p.sizes.hidden;
        const T* row = static_cast<const T*>(p.w_hh[at.direction]) + (Index{k} * hidden + unit) * hidden;
        constexpr int kValues = 16 / kElement;
        if (unit < hidden && first + kValues <= hidden && reinterpret_cast<std::uintptr_t>(row + first) % 16 == 0) {
            const Words words = *reinterpret_cast<const Words*>(row + first);
            std::memcpy(values, &words, sizeof(words));
            for (int j = 0; j < kValues; ++j) values[j] = operand<kExact>(values[j]);
        } else {
            for (int j = 0; j < kValues; ++j) {
                if (unit < hidden && first + j < hidden) values[j] = operand<kExact>(row[first + j]);
            }
        }
        return pack(values);
    }

    SIMT Preactivation<T> fetch(const Item& item) const {
        const int t = time_of(item), b = sequence(item.slot), hidden = simt::opaque(p.sizes.hidden);
        const Step step = step_of(p.starts, p.sizes.batch, t);
        Preactivation<T> found{{}, b < step.active ? step.first + b : -1};
        if (found.row < 0 || unit >= hidden) return found;
        const T* from = gates(found.row, hidden);
        for (int k = 0; k < 4; ++k) found.a[k] = from[Index{k} * hidden];
        const int later = at.direction == 0 ? t + kAhead : t - kAhead;
        if (kMost < 8 && later >= 0 && later < p.sizes.steps) {  // 512 threads have no registers for it
            const Step then = step_of(p.starts, p.sizes.batch, later);
            if (b < then.active) {
                for (int k = 0; k < 4; ++k) simt::prefetch(gates(then.first + b, hidden) + Index{k} * hidden);
            }
        }
        return found;
    }

    // Everything that other blocks may see or fill is ready before the cluster's first barrier.
    SIMT void prepare(Words (&w)[kHeld][4]) const {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int slot = thread; slot < p.plan.tiles; slot += threads) {
            const int count = steps_of_tile(p.starts, p.sizes, tile_of(p.plan, at, slot));
            steps()[slot] = count;
            if constexpr (!kGrid) {
                for (int buffer = 0; buffer < 2; ++buffer) simt::init(full(slot, buffer), 1);
                if (count > 1) simt::arrive_expecting(full(slot, 1), fill_bytes());
                if (count > 2) simt::arrive_expecting(full(slot, 0), fill_bytes());
            }
        }
        if constexpr (!kGrid) simt::publish_barriers();
        const int h_bytes = p.layout.end - p.layout.h;
        for (int j = thread; j < h_bytes / 16; j += threads) {
            reinterpret_cast<Words*>(simt::shared_memory() + p.layout.h)[j] = Words{0, 0, 0, 0};
        }
        for (int j = 0; j < p.layout.blocks / 2; ++j) {
            for (int k = 0; k < 4; ++k) {
                if (j >= kHeld) in_smem(j - kHeld, k) = weights(k, at.half() * (p.layout.blocks / 2) + j);
            }
        }
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool mine = j < p.layout.blocks / 2;
                w[j][k] = mine ? weights(k, at.half() * (p.layout.blocks / 2) + j) : Words{0, 0, 0, 0};
            }
        }
        simt::sync_threads();  // the zeros lie before h0 comes, and all know the steps
        for (int slot = 0; slot < p.plan.tiles; ++slot) {
            const int b = sequence(slot);
            const bool mine = b < p.sizes.batch && unit < p.sizes.hidden;
            const T before = mine ? static_cast<const T*>(p.h0)[in_batch(b)] : T{};
            c_state(slot) = mine ? load(static_cast<const T*>(p.c0)[in_batch(b)]) : 0.0f;
            h_state(slot) = bits(before);
            if constexpr (kGrid) {
                if (steps()[slot] > 0) send(before, slot, 0);
                continue;
            }
            const int first = tile_of(p.plan, at, slot) * kColumns;
            for (int j = thread; j < kColumns * p.sizes.hidden; j += threads) {
                const int row = j / p.sizes.hidden, u = j % p.sizes.hidden;
                if (first + row >= p.sizes.batch) break;
                const Index from = (Index{at.direction} * p.sizes.batch + first + row) * p.sizes.hidden + u;
                reinterpret_cast<T*>(h(slot, 0) + row * p.layout.row)[u] =
                    operand<kExact>(static_cast<const T*>(p.h0)[from]);
            }
        }
        if constexpr (!kGrid) simt::sync_cluster();
    }

    // h of the step before, of all units, lies in h(slot, i % 2).
    SIMT void receive(const Item& now) const {
        const int buffer = now.i % 2;
        if constexpr (kGrid) {
            global().await(now.slot, now.i);
            collect(global().buffer(now.slot, buffer), h(now.slot, buffer));
            simt::sync_threads();
        } else if (now.i > 0) {
            simt::wait(full(now.slot, buffer), parity_of(now.i - 1));
            if (threadIdx.x == 0 && now.i + 2 < steps()[now.slot]) {
                simt::arrive_expecting(full(now.slot, buffer), fill_bytes());
            }
            simt::sync_warp();  // lanes may have left the wait one by one, and products want them together
        }
    }

    // A tile's h, T [8, C U], into rows of the block's own: a warp takes a column, four loads at a time.
    SIMT void collect(const unsigned char* from, unsigned char* to) const {
        const int words = column_bytes() / 16;
        for (int column = at.warp; column < kColumns; column += 2 * p.plan.groups) {
            const auto* source = reinterpret_cast<const Words*>(from + column * column_bytes());
            auto* target = reinterpret_cast<Words*>(to + column * p.layout.row);
            for (int first = at.lane; first < words; first += 4 * 32) {
                Words some[4];
                for (int j = 0; j < 4; ++j) {
                    if (first + 32 * j < words) some[j] = simt::collect(source + first + 32 * j);
                }
                for (int j = 0; j < 4; ++j) {
                    if (first + 32 * j < words) target[first + 32 * j] = some[j];
                }
            }
        }
    }

    SIMT int column_bytes() const { return p.plan.cluster * p.plan.groups * kGroup * kElement; }  // of h as it travels
    SIMT unsigned fill_bytes() const { return kColumns * column_bytes(); }
    SIMT Words& in_smem(int j, int k) const {
        return reinterpret_cast<Words*>(simt::shared_memory() +
                                        p.layout.weights)[((at.warp * p.layout.in_smem + j) * 4 + k) * 32 + at.lane];
    }

    // Row lane / 4 of the four gates, columns 2 q and 2 q + 1, over this warp's half of K: gate[k][column % 2].
    SIMT void product(const Words (&w)[kHeld][4], const unsigned char* h_before, float (&gate)[4][2]) const {
        // Gates i and f, then g and o; halves of a block of K apart, where registers allow, so that chains are short.
        float d[2][kChains][4] = {};
        const int half = p.layout.blocks / 2;
        const unsigned char* column_r =
            h_before + at.lane / 4 * p.layout.row + at.half() * half * kBlock + at.lane % 4 * 16;
        const auto block = [&](int j) { return *reinterpret_cast<const Words*>(column_r + j * kBlock); };
        const auto add = [&](const Words& i, const Words& f, const Words& g, const Words& o, const Words& b) {
            multiply<T, kExact>(d[0][0], {i.x, f.x, i.y, f.y}, b.x, b.y);
            multiply<T, kExact>(d[1][0], {g.x, o.x, g.y, o.y}, b.x, b.y);
            multiply<T, kExact>(d[0][kChains - 1], {i.z, f.z, i.w, f.w}, b.z, b.w);
            multiply<T, kExact>(d[1][kChains - 1], {g.z, o.z, g.w, o.w}, b.z, b.w);
        };
#pragma unroll
        for (int j = 0; j < kHeld; j += 2) {
            if (j < half) {
                add(w[j][0], w[j][1], w[j][2], w[j][3], block(j));
                add(w[j + 1][0], w[j + 1][1], w[j + 1][2], w[j + 1][3], block(j + 1));
            }
        }
        for (int j = 0; j < p.layout.in_smem; ++j) {
            add(in_smem(j, 0), in_smem(j, 1), in_smem(j, 2), in_smem(j, 3), block(kHeld + j));
        }
        for (int k = 0; k < 4; ++k) {
            for (int c = 0; c < 2; ++c) {
                gate[k][c] = d[k / 2][0][k % 2 * 2 + c];
                if (kChains == 2) gate[k][c] += d[k / 2][kChains - 1][k % 2 * 2 + c];
            }
        }
    }

    // Sums over both halves of K for this lane's own column; the partner gets the other one.
    SIMT void swap_halves(const float (&gate)[4][2], int turn, float (&sum)[4]) const {
        Words* const partial = reinterpret_cast<Words*>(simt::shared_memory() + p.layout.partial) + turn * blockDim.x;
        const int mine = at.half(), theirs = 1 - at.half();
        const auto pick = [&](int k, int c) { return c == 0 ? gate[k][0] : gate[k][1]; };
        partial[threadIdx.x] =
            Words{bits(pick(0, theirs)), bits(pick(1, theirs)), bits(pick(2, theirs)), bits(pick(3, theirs))};
        simt::sync_some(1 + at.group(), 64);
        const Words other = partial[threadIdx.x ^ 32];
        const std::uint32_t words[4] = {other.x, other.y, other.z, other.w};
        for (int k = 0; k < 4; ++k) sum[k] = pick(k, mine) + bit_cast<float>(words[k]);
    }

    // The warp's new h, 8 units of 4 columns, into buffer `buffer` of every block, or of the grid.
    SIMT void send(T value, int slot, int buffer) const {
        constexpr int kChunks = 8 * kElement / 16;  // of a column
        const int q = at.lane % 4, part = at.lane / 4 % kChunks;
        std::uint32_t word = bits(operand<kExact>(value));
        if (kElement == 2) {  // units r and r + 1 in one word
            const std::uint32_t other = simt::shuffle(word, at.lane ^ 4);
            word = at.lane / 4 % 2 == 0 ? word | other << 16 : other | word << 16;
        }
        std::uint32_t words[4];
        for (int j = 0; j < 4; ++j) {
            const int r = kElement == 2 ? 2 * j : 4 * part + j;
            words[j] = simt::shuffle(word, 4 * r + q);
        }
        const int column_from = 2 * q + at.half();
        const int in_column = (at.rank * p.plan.groups + at.group()) * kGroup * kElement + part * 16;
        if constexpr (kGrid) {
            if (at.lane < 4 * kChunks) {
                simt::publish(global().buffer(slot, buffer) + column_from * column_bytes() + in_column,
                              Words{words[0], words[1], words[2], words[3]});
            }
            global().signal(slot);
            return;
        }
        unsigned char* const to = h(slot, buffer) + column_from * p.layout.row + in_column;
        for (int rank = at.lane / (4 * kChunks); rank < p.plan.cluster; rank += 8 / kChunks) {
            simt::send(to, rank, Words{words[0], words[1], words[2], words[3]}, full(slot, buffer));
        }
    }

    SIMT void run() const {
        Words w[kHeld][4];
        prepare(w);
        Item item{0, 0};
        bool more = steps()[0] > 0;
        Preactivation<T> next{};
        if (more) next = fetch(item);
        for (int turn = 0; more; turn ^= 1) {
            const Item now = item;
            const Preactivation<T> x = next;
            const bool active = x.row >= 0;
            const int before = now.i % 2;
            receive(now);
            float gate[4][2], sum[4];
            product(w, h(now.slot, before), gate);
            float c = c_state(now.slot);
            T h_now = from_bits<T>(h_state(now.slot));
            swap_halves(gate, turn, sum);
            const CellForward<float> cell = cell_forward<!kExact>(load(x.a[0]) + sum[0], load(x.a[1]) + sum[1],
                                                                  load(x.a[2]) + sum[2], load(x.a[3]) + sum[3], c);
            if (active) {
                c = cell.c;
                h_now = store<T>(cell.h);
            }
            const bool last = now.i + 1 == steps()[now.slot];
            if (!last) send(h_now, now.slot, 1 - before);
            c_state(now.slot) = c;
            h_state(now.slot) = bits(h_now);
            if (active && unit < p.sizes.hidden) write(x.row, cell, h_now);
            if (last && sequence(now.slot) < p.sizes.batch && unit < p.sizes.hidden) {
                static_cast<T*>(p.h_n)[in_batch(sequence(now.slot))] = h_now;
                static_cast<T*>(p.c_n)[in_batch(sequence(now.slot))] = store<T>(c);
            }
            more = advance(item, steps(), p.plan.tiles);
            if (more) next = fetch(item);
        }
        if constexpr (!kGrid) simt::sync_cluster();  // no block ends while another may still write to it
    }

    SIMT void write(int row, const CellForward<float>& cell, T h_now) const {
        const int hidden = simt::opaque(p.sizes.hidden);
        static_cast<T*>(p.y)[(Index{row} * p.sizes.directions + at.direction) * hidden + unit] = h_now;
        if (p.cells == nullptr) return;
        static_cast<float*>(p.cells)[(at.direction * p.sizes.all_rows + row) * hidden + unit] = cell.c;
        T* const to = gates(row, hidden);
        to[0] = store<T>(cell.i);
        to[hidden] = store<T>(cell.f);
        to[Index{2} * hidden] = store<T>(cell.g);
        to[Index{3} * hidden] = store<T>(cell.o);
    }
};

}  // namespace lstm::persistent

// The forward walk, one thread's share. At step t of a tile, each warp multiplies its part of K for the 32 gate rows of
// its group (A, in registers) by h of the step before (B, in shared memory) and lays the sums into shared memory, from
// where each thread takes i, f, g, o of its cell; it makes the new h, which its warp sends into every block of the
// cluster, or of a grid into global memory, from where every block copies it.
#pragma once

#include "persistent_common.h"

namespace lstm::persistent {

// An item's pre-activations, but for the biases.
template <typename T>
struct Preactivation {
    std::uint32_t a[sizeof(T)];  // bits of four T
    int row;                     // of [N, ...]; below 0 when the state stays
};

// What an item leaves in global memory.
template <typename T>
struct Result {
    T gates[4], h;
    float c;
    int row;  // as above
};

template <typename T, bool kExact, int kMost, bool kGrid>
struct ForwardKernel : Walker<Forward, kGrid> {
    using Base = Walker<Forward, kGrid>;
    using Base::at, Base::cell, Base::count, Base::first_sequence, Base::full, Base::global, Base::has_cells;
    using Base::in_batch, Base::p;
    using Base::sequence, Base::state, Base::steps, Base::within;
    static constexpr int kElement = sizeof(T), kHeld = held(kElement, kMost).blocks;
    static constexpr int kChains = kMost == 4 ? 2 : 1;
    static constexpr int kAtOnce =
        kExact ? (kGrid ? 1 : 2) : held(kElement, kMost).at_once;  // blocks, as registers allow
    static_assert(kHeld % kAtOnce == 0);

    const int found_outgoing;  // see `outgoing`

    SIMT explicit ForwardKernel(const Forward& walk) : Base(walk), found_outgoing(place_of_message(walk.plan, at)) {}

    SIMT int offset_of_h(int slot, int buffer) const {
        return p.layout.h + (kGrid ? 0 : 2 * slot + buffer) * p.layout.of_h;
    }
    SIMT unsigned char* h(int slot, int buffer) const { return simt::shared_memory() + offset_of_h(slot, buffer); }
    SIMT float& c_state(int slot) const { return state(slot); }
    SIMT std::uint32_t& h_state(int slot) const {  // as `bits`
        return reinterpret_cast<std::uint32_t*>(&state(slot))[blockDim.x];
    }
    // What a thread has in global memory, where registers allow found once for all items.
    static constexpr bool kKept = kMost == 4 && !kExact;
    // The fastest takes a register more than 512 threads have.
    static constexpr math::Speed kSpeed = kMost == 8 && !kExact ? math::Speed::fast : speed<T, kExact>;
    struct Columns {
        Column<T, kKept> gates, y;
        Column<float, kKept> cells;
    };
    // What isn't urgent of a cell stands behind a branch of its own: over a grid all warps meet before, and the kernel
    // of the most groups has no registers for it elsewhere.
    static constexpr bool kApart = kGrid || kMost == 8;
    SIMT static int kept_here(int x) { return kKept ? simt::opaque(x) : x; }
    SIMT Columns columns() const {
        const int hidden = kKept ? p.sizes.hidden : simt::opaque(p.sizes.hidden);
        const Index before = at.direction * p.sizes.all_rows * hidden;
        const int unit = within() ? cell.unit : 0;
        return {
            {static_cast<T*>(p.gates) + 4 * (at.direction * hidden + unit), 4 * p.sizes.directions * hidden * kElement},
            {static_cast<T*>(p.y) + at.direction * hidden + unit, p.sizes.directions * hidden * kElement},
            {static_cast<float*>(p.cells) + before + unit, hidden * 4}};
    }

    // 16 bytes of W_hh: gate k of a group's unit lane / 4, the lane's share of a block of K; zero outside of W_hh.
    SIMT static Words word_of_weights(const Forward& p, Index index) {
        const PackedAt place = packed_at(p, index);
        const int splits = p.plan.splits, k = place.word % 4;
        const int block = place.warp % splits * p.layout.part + place.word / 4;
        const int first = (block * kBlock + place.lane % 4 * 16) / kElement, hidden = p.sizes.hidden;
        const int unit = (place.rank * p.plan.groups + place.warp / splits) * kGroup + place.lane / 4;
        const T* row = static_cast<const T*>(p.w_hh[place.direction]) + (Index{k} * hidden + unit) * hidden;
        T values[16 / kElement] = {};
        for (int j = 0; j < 16 / kElement; ++j) {
            if (unit < hidden && first + j < hidden) values[j] = operand<kExact>(row[first + j]);
        }
        return pack(values);
    }

    // Loads something in any case: without branches there is nothing to wait for.
    SIMT Preactivation<T> fetch(const Columns& columns, const Item& item, bool more) const {
        const int b = sequence(item.slot);
        const Step step = step_of(p.starts, p.sizes.batch, more ? time_of(item) : 0);
        Preactivation<T> found;  // without zeros, which loads would wait for
        found.row = b < step.active ? step.first + b : -1;
        simt::load_bits_of_four(columns.gates.row(more && found.row >= 0 ? found.row : 0), found.a);
        return found;
    }
    SIMT int time_of(const Item& item) const {
        const int last = steps()[item.slot] - 1;
        return at.direction == 0 ? item.i : last - item.i;
    }

    // Everything that other blocks may see or fill is ready before the cluster's first barrier.
    SIMT void prepare(Words (&w)[kHeld][4]) const {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        for (int slot = thread; slot < p.plan.tiles; slot += threads) {
            const int count = steps_of_tile(p.starts, p.sizes, first_sequence(slot));
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
        if (thread < p.plan.groups * kGroup) biases()[thread] = bias_of(thread);
        const Words* const weights = packed(p, at);
        for (int n = 0; n < 4 * p.layout.in_smem; ++n) in_smem(n / 4, n % 4) = weights[(4 * kHeld + n) * 32];
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                w[j][k] = j < p.layout.part ? weights[(4 * j + k) * 32] : Words{0, 0, 0, 0};
            }
        }
        simt::sync_threads();  // the zeros lie before h0 comes, and all know the steps
        for (int slot = 0; slot < p.plan.tiles; ++slot) {
            const int b = sequence(slot);
            const bool mine = b < p.sizes.batch && within();
            const T before = mine && p.h0 != nullptr ? static_cast<const T*>(p.h0)[in_batch(b)] : T{};
            c_state(slot) = mine && p.c0 != nullptr ? load(static_cast<const T*>(p.c0)[in_batch(b)]) : 0.0f;
            h_state(slot) = bits(before);
            if constexpr (kGrid) {
                if (steps()[slot] == 0) continue;
                send(before, slot, 0);
                global().signal(slot);
                continue;
            }
            if (p.h0 == nullptr) continue;
            const int first = first_sequence(slot), warps = warps_of(p.plan);
            for (int row = at.warp; row < p.plan.columns && first + row < p.sizes.batch; row += warps) {
                const T* from =
                    static_cast<const T*>(p.h0) + (Index{at.direction} * p.sizes.batch + first + row) * p.sizes.hidden;
                for (int u = at.lane; u < p.sizes.hidden; u += 32) {
                    *reinterpret_cast<T*>(h(slot, 0) + operand_byte(row, u * kElement)) = operand<kExact>(from[u]);
                }
            }
        }
        if constexpr (!kGrid) simt::sync_cluster();
    }

    // h of the step before, of all units, lies in h(slot, i % 2).
    SIMT void receive(const Item& now) const {
        const int buffer = now.i % 2;
        if constexpr (kGrid) {
            const unsigned char* const from = simt::opaque(global().buffer(now.slot, buffer));  // before the wait
            global().await(now.slot, now.i);
            collect(from, h(now.slot, buffer));
            simt::sync_threads();
        } else if (now.i > 0) {
            simt::wait(full(now.slot, buffer), parity_of(now.i - 1));
            simt::sync_warp();  // lanes may have left the wait one by one, and products want them together
        }
    }

    // A tile's h into the block's own copy.
    SIMT void collect(const unsigned char* from, unsigned char* to) const {
        const auto* source = reinterpret_cast<const Words*>(from) + threadIdx.x;
        auto* target = reinterpret_cast<Words*>(to) + threadIdx.x;
        const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
        const int blocks = at.lane / 4 < p.plan.columns ? (column_bytes() / 16 + 3 - at.lane % 4) / 4 : 0;
#pragma unroll 4
        for (int block = at.warp; block < blocks; block += warps) {
            simt::collect(target, source);
            target += threads;
            source += threads;
        }
        simt::collected();
    }

    // Of each own unit the biases of the four gates, in fp32.
    SIMT Words* biases() const { return reinterpret_cast<Words*>(simt::shared_memory() + p.layout.bias); }
    SIMT Words bias_of(int own) const {
        const int hidden = p.sizes.hidden, unit = at.rank * p.plan.groups * kGroup + own;
        float sums[4] = {};
        for (const void* const of : {p.b_ih[at.direction], p.b_hh[at.direction]}) {
            if (of == nullptr || unit >= hidden) continue;
            for (int k = 0; k < 4; ++k) sums[k] += load(static_cast<const T*>(of)[k * hidden + unit]);
        }
        return Words{bits(sums[0]), bits(sums[1]), bits(sums[2]), bits(sums[3])};
    }

    SIMT Words bias_of_cell() const { return simt::read(biases() + (kMost < 8 ? cell.own : simt::opaque(cell.own))); }
    // What the cell adds to its sum over h.
    SIMT static void with_biases(const Preactivation<T>& x, const Words& bias, float (&input)[4]) {
        const Gates<T> a = gates_of<T>(x.a);
        input[0] = load(a.of[0]) + bit_cast<float>(bias.x);
        input[1] = load(a.of[1]) + bit_cast<float>(bias.y);
        input[2] = load(a.of[2]) + bit_cast<float>(bias.z);
        input[3] = load(a.of[3]) + bit_cast<float>(bias.w);
    }

    SIMT int column_bytes() const { return p.plan.cluster * p.plan.groups * kGroup * kElement; }  // of h as it travels
    SIMT unsigned fill_bytes() const { return p.plan.columns * column_bytes(); }
    SIMT Words& in_smem(int j, int k) const {
        return reinterpret_cast<Words*>(simt::shared_memory() +
                                        p.layout.weights)[((at.warp * p.layout.in_smem + j) * 4 + k) * 32 + at.lane];
    }
    SIMT decltype(auto) from_smem(int j, int k) const {  // in one load where registers allow
        if constexpr (kMost == 4) {
            return simt::read(&in_smem(j, k));
        } else {
            return (in_smem(j, k));
        }
    }

    // Row lane / 4 of the four gates, columns 2 q and 2 q + 1, over this warp's part of K: gate[k][column % 2].
    // `meanwhile(0)` to `meanwhile(kAtOnce - 1)` are what to do besides, where registers allow: without branches in it,
    // the matrix unit doesn't stand still.
    template <typename Meanwhile>
    SIMT void product(const Words (&w)[kHeld][4], const Words* own, float (&gate)[4][2], Meanwhile meanwhile) const {
        // Gates i and f, then g and o; halves of a block of K apart, where registers allow, so that chains are short.
        float d[2][kChains][4] = {};
        const int part = p.layout.part;

        const auto add = [&](const Words& i, const Words& f, const Words& g, const Words& o, const Words& b) {
            multiply<T, kExact>(d[0][0], {i.x, f.x, i.y, f.y}, b.x, b.y);
            multiply<T, kExact>(d[1][0], {g.x, o.x, g.y, o.y}, b.x, b.y);
            multiply<T, kExact>(d[0][kChains - 1], {i.z, f.z, i.w, f.w}, b.z, b.w);
            multiply<T, kExact>(d[1][kChains - 1], {g.z, o.z, g.w, o.w}, b.z, b.w);
        };
        if constexpr (kKept) {
            static_assert(kAtOnce > 2, "`run` has something to do in parts 0 and 2");
            Words b[kAtOnce];
            for (int n = 0; n < kAtOnce; ++n) b[n] = simt::read(own + n * 32);
            simt::sync_warp();  // or the compiler puts what there is to do besides before it
#pragma unroll
            for (int j = 0; j < kHeld; j += kAtOnce) {
                if (j > 0 && j >= part) break;
                const bool more = j + kAtOnce < kHeld && j + kAtOnce < part;
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) {
                    add(w[j + n][0], w[j + n][1], w[j + n][2], w[j + n][3], b[n]);
                    if (more) b[n] = simt::read(own + (j + kAtOnce + n) * 32);  // while others are multiplied
                    if (j == 0) meanwhile(n);
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < kHeld; j += kAtOnce) {
                if ((kElement == 2 && j == 0) || j < part) {  // one there is; to know it takes registers in fp32
                    Words b[kAtOnce];
                    for (int n = 0; n < kAtOnce; ++n) b[n] = own[(j + n) * 32];
                    for (int n = 0; n < kAtOnce; ++n) add(w[j + n][0], w[j + n][1], w[j + n][2], w[j + n][3], b[n]);
                }
            }
        }
        for (int j = 0; j < p.layout.in_smem; ++j) {
            add(from_smem(j, 0), from_smem(j, 1), from_smem(j, 2), from_smem(j, 3), own[(kHeld + j) * 32]);
        }
        for (int k = 0; k < 4; ++k) {
            for (int c = 0; c < 2; ++c) {
                gate[k][c] = d[k / 2][0][k % 2 * 2 + c];
                if (kChains == 2) gate[k][c] += d[k / 2][kChains - 1][k % 2 * 2 + c];
            }
        }
    }

    // Where sums over a part of K lie, in bytes. In a cluster all distances are known to the compiler, so that nothing
    // is computed between the products and the barrier, or between it and the cells.
    SIMT int of_column() const { return column_of_sums(kGrid ? p.plan.groups : kMost); }
    SIMT int of_part() const { return kColumns * of_column(); }
    SIMT int of_buffer() const { return 2 * of_part(); }
    SIMT int place_of_sums(int part, int column, int own) const {
        return p.layout.partial + part * of_part() + column * of_column() + own * 16;
    }
    SIMT static Words* words_at(int place) { return reinterpret_cast<Words*>(simt::shared_memory() + place); }
    SIMT void lay(const float (&gate)[4][2], int place) const {
        for (int c = 0; c < 2; ++c) {
            *words_at(place + c * of_column()) =
                Words{bits(gate[0][c]), bits(gate[1][c]), bits(gate[2][c]), bits(gate[3][c])};
        }
    }
    // Over all parts, of this thread's cell.
    SIMT void take(int place, float (&sum)[4]) const {
        const Words a = simt::read(words_at(place)), b = simt::read(words_at(place + of_part()));
        sum[0] = bit_cast<float>(a.x) + bit_cast<float>(b.x);
        sum[1] = bit_cast<float>(a.y) + bit_cast<float>(b.y);
        sum[2] = bit_cast<float>(a.z) + bit_cast<float>(b.z);
        sum[3] = bit_cast<float>(a.w) + bit_cast<float>(b.w);
#pragma unroll 1
        for (int part = 2; kGrid && part < p.plan.splits; part += 2) {
            place += 2 * of_part();
            const Words c = simt::read(words_at(place)), d = simt::read(words_at(place + of_part()));
            sum[0] += bit_cast<float>(c.x) + bit_cast<float>(d.x);
            sum[1] += bit_cast<float>(c.y) + bit_cast<float>(d.y);
            sum[2] += bit_cast<float>(c.z) + bit_cast<float>(d.z);
            sum[3] += bit_cast<float>(c.w) + bit_cast<float>(d.w);
        }
    }

    // The warp's new h into buffer `buffer` of every block, or of the grid: lanes side by side hold units side by side,
    // kUnits of them a message.
    static constexpr int kUnits = 16 / kElement, kMessages = 32 / kUnits;  // of a warp
    SIMT static int place_of_message(const Plan& plan, const Position& at) {
        const int first = at.warp * 32 + at.lane % kMessages * kUnits, own = plan.groups * kGroup;
        if (first >= plan.columns * own) return -1;
        return operand_byte(first / own, (at.rank * own + first % own) * kElement);
    }
    SIMT int outgoing() const {  // where in a buffer of h the lane's message goes; below 0 if it has none
        if constexpr (kMost < 8) return found_outgoing;
        Position again = at;
        again.lane = simt::opaque(at.lane);
        return place_of_message(p.plan, again);
    }
    SIMT void send(T value, int slot, int buffer) const {
        std::uint32_t word = bits(operand<kExact>(value));
        if (kElement == 2) {
            const std::uint32_t other = simt::shuffle(word, at.lane ^ 1);
            word = at.lane % 2 == 0 ? word | other << 16 : other | word << 16;
        }
        std::uint32_t words[4];
        for (int j = 0; j < 4; ++j) words[j] = simt::shuffle(word, at.lane % kMessages * kUnits + j * (kUnits / 4));
        const Words values{words[0], words[1], words[2], words[3]};
        const int place = outgoing();
        if constexpr (kGrid) {
            if (at.lane < kMessages && place >= 0) simt::publish(global().buffer(slot, buffer) + place, values);
        } else {
            unsigned char* const to = h(slot, buffer) + place;
            for (int rank = place < 0 ? p.plan.cluster : at.lane / kMessages; rank < p.plan.cluster;
                 rank += 32 / kMessages) {
                simt::send(to, rank, values, full(slot, buffer));
            }
        }
    }

    SIMT void run() const {
        Words w[kHeld][4];
        prepare(w);
        Item item{0, 0};
        const int longest = steps()[0];
        bool more = longest > 0;
        const bool cells = simt::opaque(has_cells() ? 1 : 0) != 0;  // found once
        const Columns kept = columns();
        Preactivation<T> next, x = fetch(kept, item, more);
        Result<T> result{{}, {}, 0.0f, -1};  // of the item before: messages go first, and what isn't urgent waits
        // Two buffers of sums take turns: a warp that lays sums for the next but one item has passed the barrier of the
        // next, which all reach after taking this one's. A grid's blocks meet anyway before the next.
        int laid = place_of_sums(at.part, at.lane % 4 * 2, at.group * kGroup + at.lane / 4);
        int taken = place_of_sums(0, cell.column, cell.own);
        while (more) {
            const Item now = item;
            const bool active = x.row >= 0 && within();  // units past H stay 0
            const int before = now.i & 1;
            more = advance(item, steps(), longest, p.plan.tiles);
            const bool last = now.i + 1 == count(now.slot, longest);
            const int own = kept_here(offset_of_h(now.slot, before) + (at.part * p.layout.part * 32 + at.lane) * 16);
            float c = 0.0f;
            std::uint32_t h_bits = 0;
            const auto load_state = [&] {
                c = c_state(now.slot);
                h_bits = h_state(now.slot);
            };
            if (kGrid) load_state();  // from global memory: behind the wait
            receive(now);
            float gate[4][2], sum[4], input[4];
            product(w, reinterpret_cast<const Words*>(simt::shared_memory() + own), gate, [&](int part) {
                if (kKept && part == 0) write(kept, result);
                if (kKept && part == 2) next = fetch(kept, item, more);
            });
            lay(gate, laid);  // before loads, which it would queue behind
            Words bias;
            if (kKept) bias = bias_of_cell();
            if (kApart && !kGrid) load_state();
            simt::sync_threads();  // all parts of K lie there
            CellForward<float> made{};
            T h_now{};
            const auto finish = [&] {
                // for the fill after the next, when nobody waits for this warp
                if (!kGrid && threadIdx.x == 0 && now.i > 0 && now.i + 2 < count(now.slot, longest)) {
                    simt::arrive_expecting(full(now.slot, before), fill_bytes());
                }
                c_state(now.slot) = c;
                h_state(now.slot) = bits(h_now);
                result = {{store<T>(made.i), store<T>(made.f), store<T>(made.g), store<T>(made.o)}, h_now, c, x.row};
                if (last && sequence(now.slot) < p.sizes.batch && within()) {
                    static_cast<T*>(p.h_n)[in_batch(sequence(now.slot))] = h_now;
                    static_cast<T*>(p.c_n)[in_batch(sequence(now.slot))] = store<T>(c);
                }
            };
            if (cells) {
                take(taken, sum);
                if (!kKept) bias = bias_of_cell();  // as registers allow
                with_biases(x, bias, input);
                if (!kApart) load_state();
                made =
                    cell_forward<kSpeed>(input[0] + sum[0], input[1] + sum[1], input[2] + sum[2], input[3] + sum[3], c);
                if (active) c = made.c;
                h_now = active ? store<T>(made.h) : from_bits<T>(h_bits);
                if (!last) send(h_now, now.slot, 1 - before);
                if (!kApart) finish();
            }
            if (kGrid && !last) global().signal(now.slot);  // which all warps meet for
            if (kApart && cells) finish();
            if constexpr (!kGrid) {
                const int other = taken < p.layout.partial + of_buffer() ? of_buffer() : -of_buffer();
                laid += other;
                taken += other;
            }
            if constexpr (kKept) {
                x = next;
            } else {
                write(columns(), result);
                x = fetch(columns(), item, more);
            }
        }
        if (kKept) write(kept, result);
        if constexpr (!kGrid) simt::sync_cluster();  // no block ends while another may still write to it
    }

    SIMT void write(const Columns& columns, const Result<T>& result) const {
        const bool here = result.row >= 0 && within(), saved = here && p.cells != nullptr;
        if (!kKept && kElement == 4 && !here) return;  // which takes fewer registers
        simt::store_bits(here, columns.y.row(result.row), bits(result.h));
        simt::store_bits(saved, columns.cells.row(result.row), bits(result.c));
        simt::store_four(saved, columns.gates.row(result.row), result.gates);
    }
};

}  // namespace lstm::persistent

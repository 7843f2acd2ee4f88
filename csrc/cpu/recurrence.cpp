#include "recurrence.h"

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "tile.h"
#ifdef __x86_64__
#include "pairs.h"
#else
namespace lstm::cpu {
template <typename Isa, typename T>
using Operand = Acc<T>;
}  // namespace lstm::cpu
#endif

namespace lstm::cpu {
namespace {

struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <typename A>
using Scratch = std::unique_ptr<A[], Free>;

template <typename A>
Scratch<A> scratch(Index size) {
    return Scratch<A>(static_cast<A*>(::operator new(size * sizeof(A), std::align_val_t(64))));
}

// How threads share one direction: each takes row blocks and walks alone through all tiles; or, when there are fewer
// blocks than threads, each takes tiles and they meet after every step.
struct Team {
    int threads;
    bool by_rows;
    Index blocks;  // row blocks of one direction, each of at most kRows rows
    Index tiles;
};

LSTM_HD Index row_blocks(const Shape& s) { return (s.batch + kRows - 1) / kRows; }

// Threads worth waking: each has to save more than it costs, and a meeting after every step costs more.
int useful_threads(const Shape& s, Index rows, Index tiles) {
    const double row_work = 4.0 * s.hidden * (s.hidden + 32);  // multiply-adds; the gates count as 32 a column
    const double work = row_work * rows * s.directions / 1e6, step_work = row_work * s.batch / 2e5;
    const Index threads = std::clamp<Index>(static_cast<Index>(std::min(work, 1e6)), 1, std::max(s.threads, 1));
    if (s.directions * row_blocks(s) >= threads) return static_cast<int>(threads);
    return static_cast<int>(
        std::clamp<Index>(static_cast<Index>(std::min(step_work, 1e6)), 1, std::min(threads, tiles)));
}

LSTM_HD Team make_team(const Shape& s, Index tiles, int threads) {
    Index blocks = row_blocks(s);
    const bool by_rows = s.directions * blocks >= threads;
    if (by_rows) {
        while (s.directions * blocks % threads != 0) ++blocks;
        blocks = std::min(blocks, s.batch);
    }
    return {threads, by_rows, blocks, tiles};
}

// One thread's part of a direction.
struct Part {
    Index block, block_stride, tile, tile_end;
};

LSTM_HD Part part_of(const Team& team, int thread, int direction) {
    if (team.by_rows) {
        const Index first = (thread + team.threads - direction * team.blocks % team.threads) % team.threads;
        return {first, team.threads, 0, team.tiles};
    }
    return {0, 1, team.tiles * thread / team.threads, team.tiles * (thread + 1) / team.threads};
}

LSTM_HD Index block_row(const Team& team, Index batch, Index block) { return batch * block / team.blocks; }

LSTM_HD void meet() {
#pragma omp barrier
}

// A call of at most so many rows over all steps reads w_hh as it lies: to pack it takes as long. fp16 converts too
// slowly.
constexpr Index kFewRows = 8;

// What the product reads of a state.
template <typename O, typename T>
LSTM_HD O operand(T x) {
    if constexpr (std::is_same_v<O, T>) {
        return x;
    } else {
        return load(x);
    }
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <typename T>
struct Forward {
    using A = Acc<T>;

    Forward(const Shape& shape, const ForwardArgs& args, const std::vector<Index>& starts)
        : s(shape),
          start(starts.data()),
          tiles((s.hidden + kUnits - 1) / kUnits),
          padded(tiles * kUnits),
          gates(static_cast<T*>(args.gates)),
          h0(static_cast<const T*>(args.h0)),
          c0(static_cast<const T*>(args.c0)),
          w_hh{static_cast<const T*>(args.w_hh[0]), static_cast<const T*>(args.w_hh[1])},
          y(static_cast<T*>(args.y)),
          h_n(static_cast<T*>(args.h_n)),
          c_n(static_cast<T*>(args.c_n)),
          cells(static_cast<A*>(args.cells)),
          packs(std::is_same_v<T, Float16> || starts.back() > kFewRows),
          pairs(packs && s.hidden % 2 == 0),
          packed(scratch<A>(packs ? s.directions * tiles * s.hidden * kTile : 0)),
          h(scratch<A>(s.directions * 2 * s.batch * padded)),
          c(scratch<A>(s.directions * s.batch * padded)) {}

    const Shape s;
    const Index* start;  // [time + 1] first row of each step, and N
    const Index tiles;   // of one direction
    const Index padded;  // H in whole tiles
    T* gates;
    const T *h0, *c0, *w_hh[2];
    T *y, *h_n, *c_n;
    A* cells;
    const bool packs;   // whether w_hh is packed
    const bool pairs;   // whether products may read pairs of bf16
    Scratch<A> packed;  // [D, tiles, H, 64]
    Scratch<A> h;       // [D, 2, B, padded] h_{t-1} and h_t by turns
    Scratch<A> c;       // [D, B, padded]
};

// Rows b .. b + rows of step t, 16 units: the product with h_{t-1}, then the gates while it is hot.
template <typename Isa, typename T>
LSTM_HD void forward_tile(const Forward<T>& f, int d, Index t, Index b, Index rows, Index tile,
                          const Operand<Isa, T>* h_prev, Operand<Isa, T>* h) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    const Index hidden = f.s.hidden, unit = tile * kUnits, count = std::min(kUnits, hidden - unit);
    alignas(64) A product[kRows * kTile];  // [rows, 4, 16]
    for (Index r = 0; r < rows; ++r) {     // while the product runs
        const T* gates = f.gates + (d * f.start[f.s.time] + f.start[t] + b + r) * 4 * hidden + unit;
        for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + gate * hidden, 1);
    }
    if (f.packs) {
        const O* packed = reinterpret_cast<const O*>(f.packed.get()) + (d * f.tiles + tile) * hidden * kTile;
        multiply<Isa>(rows, h_prev + b * f.padded, f.padded, packed, hidden, product, kTile, false);
    } else if constexpr (std::is_same_v<O, A>) {
        multiply_unpacked<Isa>(rows, h_prev + b * f.padded, f.padded, f.w_hh[d], hidden, tile, product);
    }
    for (Index r = 0; r < rows; ++r) {
        const Index row = f.start[t] + b + r, state = (d * f.s.batch + b + r) * f.padded + unit;
        T* gates = f.gates + (d * f.start[f.s.time] + row) * 4 * hidden + unit;
        A* c = f.c.get() + state;
        O* h_row = h + (b + r) * f.padded + unit;
        alignas(64) A a[4][kUnits], h_new[kUnits];
        for (int gate = 0; gate < 4; ++gate) load_units<Isa>(gates + gate * hidden, count, a[gate]);
#pragma omp simd
        for (Index j = 0; j < kUnits; ++j) {
            const A* z = product + r * kTile + j;
            const CellForward<A> cell =
                cell_forward(a[0][j] + z[0], a[1][j] + z[16], a[2][j] + z[32], a[3][j] + z[48], c[j]);
            a[0][j] = cell.i;
            a[1][j] = cell.f;
            a[2][j] = cell.g;
            a[3][j] = cell.o;
            c[j] = cell.c;
            h_new[j] = cell.h;
        }
        alignas(64) T h_rounded[kUnits];
        store_units<Isa>(h_new, kUnits, h_rounded);
        T* const y = f.y + row * f.s.directions * hidden + d * hidden + unit;
        std::memcpy(y, h_rounded, count * sizeof(T));
        if constexpr (std::is_same_v<O, T>) {
            std::memcpy(h_row, h_rounded, sizeof(h_rounded));
        } else {
            load_units<Isa>(h_rounded, kUnits, h_row);
        }
        if (f.cells != nullptr) {
            for (int gate = 0; gate < 4; ++gate) store_units<Isa>(a[gate], count, gates + gate * hidden);
            store_units<Isa>(c, count, f.cells + (d * f.start[f.s.time] + row) * hidden + unit);
        }
    }
}

template <typename Isa, typename T>
LSTM_HD void forward_thread(const Forward<T>& f, int thread, int threads) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    const Shape& s = f.s;
    const Team team = make_team(s, f.tiles, threads);
    const Index hidden = s.hidden, states = s.directions * s.batch;
    O* const packed = reinterpret_cast<O*>(f.packed.get());
    O* const states_of_h = reinterpret_cast<O*>(f.h.get());
    for (Index i = thread; f.packs && i < s.directions * f.tiles; i += team.threads) {
        if constexpr (std::is_same_v<O, A>) {
            pack_units<Isa>(f.w_hh[i / f.tiles], hidden, hidden, i % f.tiles, packed + i * hidden * kTile);
        } else {
            pack_unit_pairs(f.w_hh[i / f.tiles], hidden, i % f.tiles, packed + i * hidden * kTile);
        }
    }
    for (Index i = thread; i < states; i += team.threads) {  // both turns of h: a row may join at any step
        const Index d = i / s.batch, b = i % s.batch;
        for (Index unit = 0; unit < f.padded; unit += kUnits) {
            const Index count = std::min(kUnits, hidden - unit);
            load_units<Isa>(f.c0 + i * hidden + unit, count, f.c.get() + i * f.padded + unit);
            for (Index turn = 0; turn < 2; ++turn) {
                O* to = states_of_h + ((2 * d + turn) * s.batch + b) * f.padded + unit;
                for (Index j = 0; j < kUnits; ++j) to[j] = j < count ? operand<O>(f.h0[i * hidden + unit + j]) : O{};
            }
        }
    }
    meet();
    for (int d = 0; d < s.directions; ++d) {
        const Part part = part_of(team, thread, d);
        O* h[2] = {states_of_h + 2 * d * s.batch * f.padded, states_of_h + (2 * d + 1) * s.batch * f.padded};
        for (Index step = 0; step < s.time; ++step) {
            const Index t = d == 0 ? step : s.time - 1 - step;
            for (Index tile = part.tile; tile < part.tile_end; ++tile) {
                for (Index block = part.block; block < team.blocks; block += part.block_stride) {
                    const Index b = block_row(team, s.batch, block);
                    const Index end = std::min(block_row(team, s.batch, block + 1), s.steps[t]);
                    if (b >= end) break;
                    forward_tile<Isa>(f, d, t, b, end - b, tile, h[step % 2], h[(step + 1) % 2]);
                }
            }
            if (!team.by_rows) meet();
        }
    }
    meet();
    for (Index i = thread; i < states; i += team.threads) {
        const Index d = i / s.batch, b = i % s.batch;
        Index last = 0;  // the step where sequence b ends its walk
        if (d == 0)
            last = std::partition_point(s.steps, s.steps + s.time, [b](Index n) { return n > b; }) - s.steps - 1;
        const T* y = f.y + (f.start[last] + b) * s.directions * hidden + d * hidden;
        std::copy(y, y + hidden, f.h_n + i * hidden);
        for (Index unit = 0; unit < hidden; ++unit) f.c_n[i * hidden + unit] = store<T>(f.c[i * f.padded + unit]);
    }
}

// ---- Backward ------------------------------------------------------------------------------------------------------

template <typename T>
struct Backward {
    using A = Acc<T>;

    Backward(const Shape& shape, const BackwardArgs& args, const std::vector<Index>& starts)
        : s(shape),
          pairs(s.hidden % 2 == 0),
          start(starts.data()),
          tiles((s.hidden + kTile - 1) / kTile),
          padded(tiles * kTile),
          gates(static_cast<const T*>(args.gates)),
          cells(static_cast<const A*>(args.cells)),
          c0(static_cast<const T*>(args.c0)),
          w_hh{static_cast<const T*>(args.w_hh[0]), static_cast<const T*>(args.w_hh[1])},
          dy(static_cast<const T*>(args.dy)),
          dh_user(static_cast<A*>(args.dh)),
          dc(static_cast<A*>(args.dc)),
          dgates(static_cast<T*>(args.dgates)),
          packed(scratch<A>(s.directions * tiles * 4 * s.hidden * kTile)),
          dh(scratch<A>(s.directions * s.batch * padded)),
          da(std::is_same_v<T, A> ? nullptr : scratch<A>(s.directions * 2 * s.batch * 4 * s.hidden)) {}

    const Shape s;
    const bool pairs;    // whether products may read pairs of bf16
    const Index* start;  // [time + 1] first row of each step, and N
    const Index tiles;   // of one direction
    const Index padded;  // H in whole tiles
    const T* gates;
    const A* cells;
    const T *c0, *w_hh[2], *dy;
    A *dh_user, *dc;
    T* dgates;
    Scratch<A> packed;  // [D, tiles, 4H, 64]
    Scratch<A> dh;      // [D, B, padded]
    Scratch<A> da;      // [D, 2, B, 4H] by turns, where dgates are rounded
};

// Row b of step t, units unit .. unit + 16: B1 to B6. da: null where dgates itself serves.
template <typename Isa, typename T>
LSTM_HD void backward_units(const Backward<T>& f, int d, Index t, Index b, Index unit, Acc<T>* da) {
    using A = Acc<T>;
    const Index hidden = f.s.hidden, count = std::min(kUnits, hidden - unit), rows = f.start[f.s.time];
    const Index row = f.start[t] + b, state = (d * f.s.batch + b) * hidden + unit;
    const Index before = d == 0 ? t - 1 : t + 1;  // the walk's previous step, if the sequence was in it
    const bool joins = before < 0 || before >= f.s.time || b >= f.s.steps[before];
    const T* gates = f.gates + (d * rows + row) * 4 * hidden + unit;
    const A* dh_row = f.dh.get() + (d * f.s.batch + b) * f.padded + unit;
    alignas(64) A gate[4][kUnits], c[kUnits], c_prev[kUnits], dh[kUnits], dc[kUnits], dy[kUnits] = {};
    for (int k = 0; k < 4; ++k) load_units<Isa>(gates + k * hidden, count, gate[k]);
    load_units<Isa>(f.cells + (d * rows + row) * hidden + unit, count, c);
    if (joins) {
        load_units<Isa>(f.c0 + state, count, c_prev);
    } else {
        load_units<Isa>(f.cells + (d * rows + f.start[before] + b) * hidden + unit, count, c_prev);
    }
    load_units<Isa>(dh_row, kUnits, dh);
    load_units<Isa>(f.dc + state, count, dc);
    if (f.dy != nullptr) load_units<Isa>(f.dy + row * f.s.directions * hidden + d * hidden + unit, count, dy);
#pragma omp simd
    for (Index j = 0; j < kUnits; ++j) {
        const CellBackward<A> cell =
            cell_backward(gate[0][j], gate[1][j], gate[2][j], gate[3][j], c[j], c_prev[j], dh[j] + dy[j], dc[j]);
        gate[0][j] = cell.da_i;
        gate[1][j] = cell.da_f;
        gate[2][j] = cell.da_g;
        gate[3][j] = cell.da_o;
        dc[j] = cell.dc_prev;
    }
    store_units<Isa>(dc, count, f.dc + state);
    for (int k = 0; k < 4; ++k) {
        store_units<Isa>(gate[k], count, f.dgates + (d * rows + row) * 4 * hidden + k * hidden + unit);
        if constexpr (!std::is_same_v<T, Operand<Isa, T>>)
            store_units<Isa>(gate[k], count, da + (b * 4 + k) * hidden + unit);
    }
}

template <typename Isa, typename T>
LSTM_HD void backward_thread(const Backward<T>& f, int thread, int threads) {
    using A = Acc<T>;
    using O = Operand<Isa, T>;
    O* const packed = reinterpret_cast<O*>(f.packed.get());
    const Shape& s = f.s;
    const Team team = make_team(s, f.tiles, threads);
    const Index hidden = s.hidden, states = s.directions * s.batch, tile_size = 4 * hidden * kTile;
    for (Index i = thread; i < s.directions * f.tiles; i += team.threads) {
        if constexpr (std::is_same_v<O, A>) {
            pack_columns<Isa>(f.w_hh[i / f.tiles], hidden, i % f.tiles, packed + i * tile_size);
        } else {
            pack_column_pairs(f.w_hh[i / f.tiles], hidden, i % f.tiles, packed + i * tile_size);
        }
    }
    for (Index i = thread; i < states; i += team.threads) {
        for (Index unit = 0; unit < f.padded; ++unit) {
            f.dh[i * f.padded + unit] = unit < hidden ? f.dh_user[i * hidden + unit] : A(0);
        }
    }
    meet();
    for (int d = 0; d < s.directions; ++d) {
        const Part part = part_of(team, thread, d);
        A* dh = f.dh.get() + d * s.batch * f.padded;
        for (Index step = 0; step < s.time; ++step) {
            const Index t = d == 0 ? s.time - 1 - step : step;
            const Index unit_end = std::min(part.tile_end * kTile, hidden);
            A* da_turn = nullptr;
            const O* da;  // [steps[t], 4H]
            if constexpr (std::is_same_v<T, O>) {
                da = f.dgates + (d * f.start[s.time] + f.start[t]) * 4 * hidden;
            } else {
                da = da_turn = f.da.get() + (2 * d + step % 2) * s.batch * 4 * hidden;
            }
            for (Index block = part.block; block < team.blocks; block += part.block_stride) {
                const Index end = std::min(block_row(team, s.batch, block + 1), s.steps[t]);
                for (Index b = block_row(team, s.batch, block); b < end; ++b) {
                    for (Index unit = part.tile * kTile; unit < unit_end; unit += kUnits) {
                        backward_units<Isa>(f, d, t, b, unit, da_turn);
                    }
                }
            }
            if (!team.by_rows) meet();
            for (Index tile = part.tile; tile < part.tile_end; ++tile) {
                for (Index gate = 0; gate < 4; ++gate) {  // B7; a quarter of the tile at a time stays in cache
                    const O* quarter = packed + (d * f.tiles + tile) * tile_size + gate * hidden * kTile;
                    for (Index block = part.block; block < team.blocks; block += part.block_stride) {
                        const Index b = block_row(team, s.batch, block);
                        const Index end = std::min(block_row(team, s.batch, block + 1), s.steps[t]);
                        if (b >= end) break;
                        multiply<Isa>(end - b, da + (b * 4 + gate) * hidden, 4 * hidden, quarter, hidden,
                                      dh + b * f.padded + tile * kTile, f.padded, gate > 0);
                    }
                }
            }
        }
    }
    meet();
    for (Index i = thread; i < states; i += team.threads) {
        std::copy_n(f.dh.get() + i * f.padded, hidden, f.dh_user + i * hidden);
    }
}

// ---- Instruction sets and dtypes -----------------------------------------------------------------------------------

template <typename Isa, typename T>
LSTM_HD void run_thread(const Forward<T>& f, int thread, int threads) {
    forward_thread<Isa>(f, thread, threads);
}
template <typename Isa, typename T>
LSTM_HD void run_thread(const Backward<T>& f, int thread, int threads) {
    backward_thread<Isa>(f, thread, threads);
}

#ifdef __x86_64__
using Baseline = Isa<16, 2>;
template <typename Job>
__attribute__((target("avx2,fma"))) void run_avx2(const Job& job, int thread, int threads) {
    run_thread<Isa<32, 2>>(job, thread, threads);
}
template <typename Job>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const Job& job, int thread,
                                                                                       int threads) {
    run_thread<Isa<64, 4>>(job, thread, threads);
}
template <typename Job>
__attribute__((target(LSTM_PAIRS_TARGET))) void run_pairs(const Job& job, int thread, int threads) {
    run_thread<Pairs>(job, thread, threads);
}
template <typename Job>
constexpr bool is_bf16 = std::is_same_v<Job, Forward<BFloat16>> || std::is_same_v<Job, Backward<BFloat16>>;
#else
using Baseline = Isa<16, 4>;
#endif

template <typename Job>
void run_baseline(const Job& job, int thread, int threads) {
    run_thread<Baseline>(job, thread, threads);
}

template <typename Job>
auto kernel_of([[maybe_unused]] const Job& job, [[maybe_unused]] InstructionSet set) {
#ifdef __x86_64__
    if constexpr (is_bf16<Job>) {
        if (set == InstructionSet::avx512_bf16 && job.pairs) return run_pairs<Job>;
    }
    if (set >= InstructionSet::avx512) return run_avx512<Job>;
    if (set == InstructionSet::avx2) return run_avx2<Job>;
#endif
    return run_baseline<Job>;
}

template <typename Job, typename Args>
void run(const Shape& shape, const Args& args) {
    std::vector<Index> start(shape.time + 1, 0);
    for (Index t = 0; t < shape.time; ++t) start[t + 1] = start[t] + shape.steps[t];
    const Job job(shape, args, start);
    const auto kernel = kernel_of(job, shape.instruction_set);
#ifdef _OPENMP
#pragma omp parallel num_threads(useful_threads(shape, start.back(), job.tiles))
    kernel(job, omp_get_thread_num(), omp_get_num_threads());  // which may be fewer than asked for
#else
    kernel(job, 0, 1);
#endif
}

template <template <typename> class Job, typename Args>
void run_dtype(const Shape& shape, const Args& args) {
    switch (shape.dtype) {
        case Dtype::float32:
            return run<Job<float>>(shape, args);
        case Dtype::float64:
            return run<Job<double>>(shape, args);
        case Dtype::bfloat16:
            return run<Job<BFloat16>>(shape, args);
        case Dtype::float16:
            return run<Job<Float16>>(shape, args);
    }
}

}  // namespace

InstructionSet best_instruction_set() {
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return InstructionSet::avx512_bf16;
    if (avx512) return InstructionSet::avx512;
    if (avx2) return InstructionSet::avx2;
#endif
    return InstructionSet::baseline;
}

void recurrence_forward(const Shape& shape, const ForwardArgs& args) { run_dtype<Forward>(shape, args); }

void recurrence_backward(const Shape& shape, const BackwardArgs& args) { run_dtype<Backward>(shape, args); }

}  // namespace lstm::cpu

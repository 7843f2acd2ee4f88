// Products in AMX's registers of 16 rows by 64 bytes: one instruction adds up what 16 rows of 32 k make with 32 k of 16
// columns, of bf16 in fp32. What is subnormal counts as 0.
//
// A float is the sum of three bf16, its planes (Planes in vectors.h). Six of their nine products are added up; the
// other three are below 2^-24 of the whole, as much as a float rounds. An instruction rounds once for 32 k, so that
// sums are as exact as those of floats. Infinity has no planes: who splits it takes note, and the call is computed anew
// without AMX.
//
// A row of the left side lies as [k / 32, planes, 32]; packed blocks as [rows / 16, k / 32, planes, 16, 32]; and a tile
// of the right side as [2, k / 32, planes, 2, 16 pairs of k, 16 columns, 2]. All have zeros behind k.
#pragma once

#include "product.h"

#ifdef LSTM_X86
// A function with a target can be forced into one that names it too, and is merely offered to others. APART is for long
// ones with many callers.
#define LSTM_AMX __attribute__((target(LSTM_AMX_TARGET))) inline
#define LSTM_AMX_APART __attribute__((target(LSTM_AMX_TARGET), noinline)) inline
#define LSTM_AMX_INLINED __attribute__((target(LSTM_AMX_TARGET), always_inline)) inline

namespace lstm::cpu {

// The registers' shapes: 0 to 3 are sums, two blocks of rows by two of columns, or one of rows by four of columns.
struct alignas(64) Registers {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {};
};

// What the calling thread knows of its registers: how many rows each of two blocks has, the second of one block none;
// or kOfDigits, where 0 to 4 are sums, and 5 and 6 the left side (digits.h).
constexpr Index kOfDigits = -1;
struct ThreadState {
    Index first, second;
};
inline thread_local ThreadState thread_state;

LSTM_AMX void set_registers(Index first, Index second) {
    ThreadState& state = thread_state;
    if (state.first == first && state.second == second) return;
    Registers shapes;
    const auto a = static_cast<std::uint8_t>(first), b = static_cast<std::uint8_t>(second);
    const std::uint8_t of_two[] = {a, a, b, b, a, b, 16, 16}, of_one[] = {a, a, a, a, a, 16, 16, 16};
    const std::uint8_t of_digits[] = {a, a, a, a, a, a, a, 16};
    std::memcpy(shapes.rows, second > 0 ? of_two : second == 0 ? of_one : of_digits, sizeof(of_two));
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    state.first = first;
    state.second = second;
}

// The calling thread's use of the registers.
struct RegistersInUse {
    RegistersInUse() { thread_state = {0, 0}; }
    __attribute__((target(LSTM_AMX_TARGET))) ~RegistersInUse() { asm volatile("tilerelease"); }
    RegistersInUse(const RegistersInUse&) = delete;
};

// GCC's own intrinsics do not say that they touch memory. Strides are in bytes.
template <int N>
LSTM_HD void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(N));
}
template <int N>
LSTM_HD void tile_load(const void* from, Index stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(N), "r"(from), "r"(stride) : "memory");
}
template <int N>
LSTM_HD void tile_store(void* to, Index stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(N), "r"(to), "r"(stride) : "memory");
}
template <int Sum, int A, int B>
LSTM_HD void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

constexpr Index kBlock = 16 * kDeep;                   // bf16 of a register
constexpr Index kRightPlane = 2 * kBlock;              // of a plane of 32 k and 32 columns of a tile
constexpr Index kRowBytes = kDeep * sizeof(BFloat16);  // of a register

// One block of rows of the left side: elements from a row to the next, from a plane, and from 32 k to those behind.
struct Left {
    const BFloat16* a;
    Index row, plane, step;

    LSTM_HD const BFloat16* at(Index i, int p) const { return a + i * step + p * plane; }
    LSTM_HD Index bytes() const { return row * static_cast<Index>(sizeof(BFloat16)); }
};

// Asks for 16 rows.
LSTM_HD void fetch_block(const BFloat16* first, Index row) {
#pragma GCC unroll 16
    for (Index r = 0; r < 16; ++r) __builtin_prefetch(first + r * row);
}

// Sums 0 and 1 of one block of rows and 2 and 3 of another grow by what their 32 * steps k make with those of 32
// columns. Meanwhile `next` is asked for, unless it is null: where the next ones will be.
template <int N>
LSTM_HD void add_two_blocks(const Left& first, const Left& second, const BFloat16* b, Index steps, const float* next,
                            Index ldc) {
    for (Index i = 0; i < steps; ++i, b += N * kRightPlane) {
        if (next != nullptr) {
            for (Index r = 32 * i / steps; r < 32 * (i + 1) / steps; ++r) {
                __builtin_prefetch(next + r * ldc, 1);
                __builtin_prefetch(next + r * ldc + 16, 1);
            }
        }
        const auto left = [&](int p) LSTM_INLINED {
            tile_load<4>(first.at(i, p), first.bytes());
            tile_load<5>(second.at(i, p), second.bytes());
        };
        const auto right = [&](int p) LSTM_INLINED {
            tile_load<6>(b + p * kRightPlane, kRowBytes);
            tile_load<7>(b + p * kRightPlane + kBlock, kRowBytes);
        };
        const auto dots = [&](int part) LSTM_INLINED {
            tile_dot<0, 4, 6>();
            tile_dot<1, 4, 7>();
            tile_dot<2, 5, 6>();
            tile_dot<3, 5, 7>();
            if constexpr (N == 3) {  // a sixth of the next step's operands
                const Left& rows = part < 3 ? first : second;
                fetch_block(rows.at(i + 1, part % 3), rows.row);
                fetch_block(b + N * kRightPlane + part * kBlock, kDeep);
            }
        };
        left(0), right(0), dots(0);
        if constexpr (N == 3) {
            left(2), dots(1);
            left(1), dots(2);
            right(1), dots(3);
            left(0), dots(4);
            right(2), dots(5);
        }
    }
}

// The same of one block of rows: sums 0 to 3 of 64 columns, or with three planes 0 and 1 of 32.
template <int N>
LSTM_HD void add_one_block(const Left& left, const BFloat16* b, const BFloat16* more, Index steps) {
    for (Index i = 0; i < steps; ++i, b += N * kRightPlane, more += N * kRightPlane) {
        if constexpr (N == 1) {
            tile_load<4>(left.at(i, 0), left.bytes());
            tile_load<5>(b, kRowBytes);
            tile_load<6>(b + kBlock, kRowBytes);
            tile_dot<0, 4, 5>();
            tile_load<7>(more, kRowBytes);
            tile_dot<1, 4, 6>();
            tile_load<5>(more + kBlock, kRowBytes);
            tile_dot<2, 4, 7>();
            tile_dot<3, 4, 5>();
        } else {
            tile_load<2>(left.at(i, 0), left.bytes());
            tile_load<5>(b, kRowBytes);
            tile_load<3>(left.at(i, 1), left.bytes());
            tile_load<4>(left.at(i, 2), left.bytes());
            tile_dot<0, 2, 5>();
            tile_load<6>(b + kBlock, kRowBytes);
            tile_dot<0, 4, 5>();
            tile_dot<0, 3, 5>();
            tile_load<7>(b + kRightPlane, kRowBytes);
            tile_dot<1, 2, 6>();
            tile_dot<1, 4, 6>();
            tile_dot<1, 3, 6>();
            tile_load<5>(b + kRightPlane + kBlock, kRowBytes);
            tile_dot<0, 3, 7>();
            tile_dot<0, 2, 7>();
            tile_load<6>(b + 2 * kRightPlane, kRowBytes);
            tile_dot<1, 3, 5>();
            tile_dot<1, 2, 5>();
            tile_load<7>(b + 2 * kRightPlane + kBlock, kRowBytes);
            tile_dot<0, 2, 6>();
            tile_dot<1, 2, 7>();
        }
    }
}

// Rows of one block, or of two whose second begins at row `second` of c and at element `below` of the left side, times
// 32 columns, of one block with one plane 64; from 0 or from c, to c.
template <int N>
LSTM_HD void multiply_two_blocks(Index rows, Index second, const Left& left, Index below, const BFloat16* b,
                                 Index steps, float* c, Index ldc, bool accumulate, const float* next, Index ld_next) {
    float* const under = c + second * ldc;
    const Index bytes = ldc * static_cast<Index>(sizeof(float));
    set_registers(second, rows - second);
    if (accumulate) {
        tile_load<0>(c, bytes);
        tile_load<1>(c + 16, bytes);
        tile_load<2>(under, bytes);
        tile_load<3>(under + 16, bytes);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    add_two_blocks<N>(left, {left.a + below, left.row, left.plane, left.step}, b, steps, next, ld_next);
    tile_store<0>(c, bytes);
    tile_store<1>(c + 16, bytes);
    tile_store<2>(under, bytes);
    tile_store<3>(under + 16, bytes);
}

template <int N>
LSTM_HD void multiply_one_block(Index rows, const Left& left, const BFloat16* b, const BFloat16* more, Index steps,
                                float* c, Index ldc, bool accumulate) {
    const Index bytes = ldc * static_cast<Index>(sizeof(float));
    set_registers(rows, 0);
    if (accumulate) {
        tile_load<0>(c, bytes);
        tile_load<1>(c + 16, bytes);
        if constexpr (N == 1) {
            tile_load<2>(c + 32, bytes);
            tile_load<3>(c + 48, bytes);
        }
    } else {
        tile_zero<0>();
        tile_zero<1>();
        if constexpr (N == 1) {
            tile_zero<2>();
            tile_zero<3>();
        }
    }
    add_one_block<N>(left, b, more, steps);
    tile_store<0>(c, bytes);
    tile_store<1>(c + 16, bytes);
    if constexpr (N == 1) {
        tile_store<2>(c + 32, bytes);
        tile_store<3>(c + 48, bytes);
    }
}

// Rows of so many columns, of a tile of 64, are added to those of c.
LSTM_HD void add_rows(Index rows, Index columns, const float* tile, float* c, Index ldc) {
    for (Index r = 0; r < rows; ++r) {
        for (Index j = 0; j < columns; j += 16)
            store_vector<Amx, float>(load_vector<Amx>(c + r * ldc + j) + load_vector<Amx>(tile + r * kTile + j),
                                     c + r * ldc + j);
    }
}

// multiply for any number of rows, and any k whose operands have zeros behind: blocks of rows take turns at 32 columns
// and at some k, which meanwhile stay in the first cache. Sums go on where they were, so that nothing depends on how
// rows and k are divided; but those over many chunks of rows begin anew in each, as each product would round to a
// number as large as all of them.
template <Along along, int N>
__attribute__((noinline, target(LSTM_AMX_TARGET))) void multiply_in(Amx, Index rows, const Planes<N>* a, Index lda,
                                                                    const Right<const Planes<N>>& b, Index k, float* c,
                                                                    Index ldc, bool accumulate) {
    static_assert(along != Along::columns, "those are packed in blocks");
    constexpr Index at_once = 512 / kDeep;  // steps of 32 k
    constexpr bool packed = along == Along::blocks;
    const Index blocks = round_up(rows, 32) / 32, size = packed ? 32 : (rows + blocks - 1) / blocks;
    const Index all = round_up(k, kDeep) / kDeep;
    const auto* const left = reinterpret_cast<const BFloat16*>(a);
    const auto* const right = reinterpret_cast<const BFloat16*>(b.b);
    const Index half = b.panel * N;  // from 32 columns to the next
    alignas(64) float apart[32 * kTile];
    Index i = 0;
    do {  // once for k = 0 too, which is a sum of nothing
        const Index steps = std::min(at_once, all - i);
        for (Index column = 0; column < kTile; column += 32) {
            for (Index row = 0; row < rows; row += size) {
                const Index count = std::min(size, rows - row), second = packed ? 16 : (count + 1) / 2;
                const BFloat16* const first = left + row * lda * N + i * N * (packed ? kBlock : kDeep);
                const Left block =
                    packed ? Left{first, kDeep, kBlock, N * kBlock} : Left{first, lda * N, kDeep, N * kDeep};
                const BFloat16* const columns = right + i * N * kRightPlane + column / 32 * half;
                float* const whole = c + row * ldc + column;
                const bool anew = packed && accumulate, onto = accumulate && !packed;
                float* const sum = anew ? apart : whole;
                const Index ld = anew ? kTile : ldc;
                if (count > 16) {
                    const bool lowest = row + size >= rows, far = i == 0 && ldc != kTile;
                    const float* const next = !far || (lowest && column > 0) ? nullptr
                                              : lowest                       ? c + 32
                                                                             : c + (row + size) * ldc + column;
                    multiply_two_blocks<N>(count, second, block, second * lda * N, columns, steps, sum, ld, onto, next,
                                           ldc);
                    if (anew) add_rows(count, 32, sum, whole, ldc);
                } else if (N > 1 || column == 0) {  // of one plane all columns at once
                    multiply_one_block<N>(count, block, columns, columns + half, steps, sum, ld, onto);
                    if (anew) add_rows(count, N > 1 ? 32 : kTile, sum, whole, ldc);
                }
            }
        }
        i += at_once;
        accumulate = true;
    } while (i < all);
}

}  // namespace lstm::cpu
#endif

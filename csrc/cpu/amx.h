// Products of bf16 in AMX's registers of 16 rows by 64 bytes: one instruction adds up what 16 rows of 32 k make with 32
// k of 16 columns, in fp32. A packed tile of pairs has four such blocks of columns side by side; the left side's rows
// are read as they lie, or from packed blocks [rows / 16, k / 32, 16, 32].
//
// What is subnormal counts as 0. One instruction's sum over its 32 k is added to the sum so far.
#pragma once

#ifdef __x86_64__
#include "product.h"

namespace lstm::cpu {

// The registers' shapes: 0 to 3 are sums, two blocks of rows by two of columns, or one of rows by four of columns.
struct alignas(64) Registers {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {};
};

// How many rows each block that the calling thread's registers are set to has; of one block, the second is 0.
struct RowsOfBlocks {
    Index first, second;
};
inline thread_local RowsOfBlocks registers_have = {0, 0};

__attribute__((target(LSTM_AMX_TARGET))) inline void set_registers(Index first, Index second) {
    if (registers_have.first == first && registers_have.second == second) return;
    Registers shapes;
    const auto a = static_cast<std::uint8_t>(first), b = static_cast<std::uint8_t>(second);
    const std::uint8_t of_two[] = {a, a, b, b, a, b, 16, 16}, of_one[] = {a, a, a, a, a, 16, 16, 16};
    std::memcpy(shapes.rows, second > 0 ? of_two : of_one, 8);
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    registers_have = {first, second};
}

// The calling thread's use of the registers.
struct RegistersInUse {
    RegistersInUse() { registers_have = {0, 0}; }
    __attribute__((target(LSTM_AMX_TARGET))) ~RegistersInUse() { asm volatile("tilerelease"); }
    RegistersInUse(const RegistersInUse&) = delete;
};

// GCC's own intrinsics do not say that they touch memory. Strides are in bytes.
#define LSTM_TILE_ZERO(n) asm volatile("tilezero %%tmm" #n::)
#define LSTM_TILE_LOAD(n, from, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #n::"r"(from), "r"(stride) : "memory")
#define LSTM_TILE_STORE(n, to, stride) \
    asm volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define LSTM_TILE_DOT(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)

// The left side: its first row, and how many elements lie between rows of a block, and between 32 k and the next.
struct Left {
    const BFloat16* a;
    Index row, step;
};

constexpr Index kPairBytes = 2 * kTile * sizeof(BFloat16);  // from one pair of k of a packed tile to the next

// Two blocks of rows times 32 columns: sums 0 and 1 of the first, 2 and 3 of the second.
__attribute__((target(LSTM_AMX_TARGET))) inline void add_two_blocks(const Left& first, const Left& second,
                                                                    const BFloat16* b, Index steps) {
    for (Index i = 0; i < steps; ++i, b += kDeep * kTile) {
        LSTM_TILE_LOAD(4, first.a + i * first.step, 2 * first.row);
        LSTM_TILE_LOAD(6, b, kPairBytes);
        LSTM_TILE_LOAD(7, b + 32, kPairBytes);
        LSTM_TILE_DOT(0, 4, 6);
        LSTM_TILE_LOAD(5, second.a + i * second.step, 2 * second.row);
        LSTM_TILE_DOT(1, 4, 7);
        LSTM_TILE_DOT(2, 5, 6);
        LSTM_TILE_DOT(3, 5, 7);
    }
}

// One block of rows times 64 columns.
__attribute__((target(LSTM_AMX_TARGET))) inline void add_one_block(const Left& left, const BFloat16* b, Index steps) {
    for (Index i = 0; i < steps; ++i, b += kDeep * kTile) {
        LSTM_TILE_LOAD(4, left.a + i * left.step, 2 * left.row);
        LSTM_TILE_LOAD(5, b, kPairBytes);
        LSTM_TILE_LOAD(6, b + 32, kPairBytes);
        LSTM_TILE_DOT(0, 4, 5);
        LSTM_TILE_LOAD(7, b + 64, kPairBytes);
        LSTM_TILE_DOT(1, 4, 6);
        LSTM_TILE_LOAD(5, b + 96, kPairBytes);
        LSTM_TILE_DOT(2, 4, 7);
        LSTM_TILE_DOT(3, 4, 5);
    }
}

// The last k % 32 of some rows, with zeros behind: what lies there is read no further.
struct Rest {
    __attribute__((target(LSTM_AMX_TARGET))) Rest(Index rows, const Left& left, Index k) {
        const __mmask32 there = (1u << k % kDeep) - 1;
        for (Index r = 0; r < rows; ++r)
            _mm512_store_si512(copy + r * kDeep,
                               _mm512_maskz_loadu_epi16(there, left.a + r * left.row + k / kDeep * left.step));
    }
    Left left() const { return {copy, kDeep, 0}; }

    alignas(64) BFloat16 copy[16 * kDeep];
};

// What follows are the sums of one block of rows or two, from 0 or from c, to c.
__attribute__((target(LSTM_AMX_TARGET))) inline void multiply_two_blocks(Index rows, Index second_row, const Left& left,
                                                                         Index to_second, const BFloat16* b, Index k,
                                                                         bool rest, float* c, Index ldc,
                                                                         bool accumulate) {
    const Left second = {left.a + to_second, left.row, left.step};
    float* const below = c + second_row * ldc;
    const Index bytes = ldc * static_cast<Index>(sizeof(float));
    set_registers(second_row, rows - second_row);
    if (accumulate) {
        LSTM_TILE_LOAD(0, c, bytes);
        LSTM_TILE_LOAD(1, c + 16, bytes);
        LSTM_TILE_LOAD(2, below, bytes);
        LSTM_TILE_LOAD(3, below + 16, bytes);
    } else {
        LSTM_TILE_ZERO(0);
        LSTM_TILE_ZERO(1);
        LSTM_TILE_ZERO(2);
        LSTM_TILE_ZERO(3);
    }
    const Index steps = rest ? k / kDeep : round_up(k, kDeep) / kDeep;
    add_two_blocks(left, second, b, steps);
    if (rest) {
        const Rest above(second_row, left, k), under(rows - second_row, second, k);
        add_two_blocks(above.left(), under.left(), b + steps * kDeep * kTile, 1);
    }
    LSTM_TILE_STORE(0, c, bytes);
    LSTM_TILE_STORE(1, c + 16, bytes);
    LSTM_TILE_STORE(2, below, bytes);
    LSTM_TILE_STORE(3, below + 16, bytes);
}

__attribute__((target(LSTM_AMX_TARGET))) inline void multiply_one_block(Index rows, const Left& left, const BFloat16* b,
                                                                        Index k, bool rest, float* c, Index ldc,
                                                                        bool accumulate) {
    const Index bytes = ldc * static_cast<Index>(sizeof(float));
    set_registers(rows, 0);
    if (accumulate) {
        LSTM_TILE_LOAD(0, c, bytes);
        LSTM_TILE_LOAD(1, c + 16, bytes);
        LSTM_TILE_LOAD(2, c + 32, bytes);
        LSTM_TILE_LOAD(3, c + 48, bytes);
    } else {
        LSTM_TILE_ZERO(0);
        LSTM_TILE_ZERO(1);
        LSTM_TILE_ZERO(2);
        LSTM_TILE_ZERO(3);
    }
    const Index steps = rest ? k / kDeep : round_up(k, kDeep) / kDeep;
    add_one_block(left, b, steps);
    if (rest) {
        const Rest last(rows, left, k);
        add_one_block(last.left(), b + steps * kDeep * kTile, 1);
    }
    LSTM_TILE_STORE(0, c, bytes);
    LSTM_TILE_STORE(1, c + 16, bytes);
    LSTM_TILE_STORE(2, c + 32, bytes);
    LSTM_TILE_STORE(3, c + 48, bytes);
}

// multiply for pairs, any number of rows and any k: the blocks of rows take turns at half a tile's columns and at
// Isa::depth of k, which meanwhile stay in the first cache.
template <Along along>
__attribute__((noinline, target(LSTM_AMX_TARGET))) void multiply_in(Amx, Index rows, const BFloat16* a, Index lda,
                                                                    const Right<const BFloat16>& b, Index k, float* c,
                                                                    Index ldc, bool accumulate) {
    static_assert(along != Along::columns, "those are packed in blocks");
    constexpr bool packed = along == Along::blocks;
    const Index blocks = round_up(rows, 32) / 32, size = packed ? 32 : (rows + blocks - 1) / blocks;
    Index p = 0;
    do {  // once for k = 0 too, which is a sum of nothing
        const Index depth = std::min(Amx::depth, k - p);
        const bool rest = !packed && depth % kDeep != 0;
        const BFloat16 *const left = a + (packed ? p * 16 : p), *const right = b.b + p * b.ld;
        const auto of_row = [&](Index row) LSTM_INLINED {
            return packed ? Left{left + row * lda, kDeep, 16 * kDeep} : Left{left + row * lda, lda, kDeep};
        };
        for (Index column = 0; column < kTile; column += 32) {
            for (Index row = 0; row < rows; row += size) {
                const Index count = std::min(size, rows - row), second = packed ? 16 : (count + 1) / 2;
                if (count <= 16) {  // whole tiles at once, with the first half
                    if (column == 0)
                        multiply_one_block(count, of_row(row), right, depth, rest, c + row * ldc, ldc, accumulate);
                    continue;
                }
                multiply_two_blocks(count, second, of_row(row), second * lda, right + 2 * column, depth, rest,
                                    c + row * ldc + column, ldc, accumulate);
            }
        }
        p += Amx::depth;
        accumulate = true;
    } while (p < k);
}

// Columns of a[k, columns] to blocks of 16 of them, [columns / 16, k / 32, 16, 32] with zeros behind k, from the
// first-th block up to the last-th. Rows of a end in columns that nobody needs, up to a multiple of 16.
template <typename Isa>
LSTM_HD void pack_blocks(const BFloat16* a, Index lda, Index k, Index first, Index last, BFloat16* to) {
    for (Index block = first; block < last; ++block) {
        for (Index p = 0; p < k; p += kDeep) {
            Vector<Isa, float> pairs[16];
            const auto row = [&](Index q) LSTM_INLINED {
                typename Isa::Narrow units = {};
                if (q < k) std::memcpy(&units, a + q * lda + block * 16, sizeof(units));
                return __builtin_convertvector(units, typename Isa::Wide);
            };
            for (int r = 0; r < 16; ++r) {
                const typename Isa::Wide both = row(p + 2 * r) | row(p + 2 * r + 1) << 16;
                std::memcpy(&pairs[r], &both, sizeof(both));
            }
            transpose(pairs);
            std::memcpy(to + (block * round_up(k, kDeep) + p) * 16, pairs, sizeof(pairs));
        }
    }
}

}  // namespace lstm::cpu
#endif

// Floats for AMX in fixed point of 24 bits, as three digits of 8: half the bytes and two thirds of the instructions of
// three bf16 (amx.h), as one multiplies 64 k of whole numbers.
//
// A row of the left side, and a column of a weight, has a scale, so that its largest magnitude becomes 127 * 2^16. Of
// the nine products of digits all but the lowest are added up, exactly, in sums of whole numbers: by their place. So an
// operand is off by some 2^-24 of the largest in its row or column, and a sum is as exact as one of floats unless
// most that counts in it is far below both. Hence who makes digits takes note of rows with few large elements and of
// columns with many small ones, as of what is not finite: large ones of a row always meet large ones of a column, or
// the call is computed anew with planes.
//
// A row lies as [k / 64, digits, 64] and behind it its scale; a tile as [2, k / 64, digits, 2, 16, 16 columns, 4], with
// scales [64]. In 64 k those of i, 16 + i, 32 + i and 48 + i are neighbours. All have zeros behind k.
#pragma once

#include "planes.h"

#ifdef LSTM_X86
namespace lstm::cpu {

constexpr float kMostDigits = 127 << 16;          // what the largest magnitude becomes
constexpr float kOfScale = 127 << 8;              // two scales make up for the places below those of the third sum
constexpr std::int32_t kLargeDigits = 5;          // binary digits below the largest: large still
constexpr Index kDigitsBlock = 16 * kDigitsDeep;  // bytes of a register
constexpr Index kDigitsStep = 3 * kDigitsDeep;    // of 64 k of a row
constexpr Index kRightStep = 6 * kDigitsBlock;    // of 64 k of 32 columns of a tile

// Of a row, or a column of a weight: what it becomes digits by, and how many elements are large, and how many not 0.
struct Scaled {
    const float* from;
    Index count;
    float largest = 0, factor = 0;
    std::int32_t least_large = 1;  // as bits, which grow with magnitudes
    Index large = 0, there = 0;    // of those whose digits were asked for

    float scale() const { return largest / kOfScale; }
    bool plain() const { return largest == 0 || (largest > kLeastLargest && largest < kMostLargest); }
    // In a row all that is not 0 is large, or more than a column may have small.
    bool fit_row() const { return plain() && (large == there || large >= 3 * count / 8 + 8); }
    bool fit_column() const { return plain() && (there == 0 || count - large <= 5 * count / 16 + 8); }
};

LSTM_AMX_INLINED Floats load_some(const float* from, Index count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(count, 16)), from);
}

LSTM_AMX_INLINED Scaled scaled(const float* from, Index count) {
    Scaled row{from, count};
    FixedWords most = {};  // as bits; those of NaN are the largest
    for (Index k = 0; k < count; k += 16) {
        const auto bits = bit_cast<FixedWords>(magnitudes(load_some(from + k, count - k)));
        most = bits > most ? bits : most;
    }
    std::int32_t each[16];
    std::memcpy(each, &most, sizeof(most));
    const std::int32_t bits = *std::max_element(each, each + 16);
    std::memcpy(&row.largest, &bits, sizeof(bits));
    row.factor = row.largest == 0 ? 0 : kMostDigits / row.largest;
    row.least_large = std::max(bits - (kLargeDigits << 23), 1);
    return row;
}

// The three digits of whole numbers, in the lower bytes of words.
LSTM_AMX_INLINED Pairs16 digits_of(Floats x) {
    const auto whole = bit_cast<Pairs16>(_mm512_maskz_cvtps_epi32(0xffff, (__m512)x));
    return (whole + 0x808080u) ^ 0x808080u;
}

// Of four neighbours' digits each one's own: byte 2 - p of the i-th word becomes byte i of the p-th.
LSTM_AMX_INLINED void take_bytes(const Pairs16 (&word)[4], __m512i (&digits)[3]) {
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) {
        const int shift = 16 - 8 * p;
        const Pairs16 second = p == 2 ? word[1] << 8 : word[1] >> (shift - 8);
        auto bytes = (__m512i)(word[0] >> shift);
        bytes = _mm512_mask_mov_epi8(bytes, 0x2222222222222222, (__m512i)second);
        bytes = _mm512_mask_mov_epi8(bytes, 0x4444444444444444, (__m512i)(word[2] << (16 - shift)));
        digits[p] = _mm512_mask_mov_epi8(bytes, 0x8888888888888888, (__m512i)(word[3] << (24 - shift)));
    }
}

// 64 k of it from the k-th on, as their three digits.
LSTM_AMX_INLINED void take_digits(Scaled& row, Index k, __m512i (&digits)[3]) {
    Pairs16 word[4];  // of three signed bytes
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const Floats x = load_some(row.from + k + 16 * i, row.count - k - 16 * i);
        const auto bits = bit_cast<__m512i>(magnitudes(x));
        row.large += __builtin_popcount(_mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(row.least_large)));
        row.there += __builtin_popcount(_mm512_test_epi32_mask(bits, bits));
        word[i] = digits_of(x * row.factor);
    }
    take_bytes(word, digits);
}

// A row of the left side in `end` operands, the last 64 of which are for its scale.
LSTM_AMX_APART void put_row(const float* from, Index count, Index end, Digits* to) {
    Scaled row = scaled(from, count);
    for (Index k = 0; k < end - kDigitsDeep; k += kDigitsDeep) {
        __m512i digits[3];
        take_digits(row, k, digits);
        std::memcpy(to + k, digits, sizeof(digits));
    }
    const float scale = row.scale();
    std::memcpy(to + end - kDigitsDeep, &scale, sizeof(scale));
    unfit |= !row.fit_row();
}
template <typename Isa>
LSTM_HD void copy_operands(const float* from, Index count, Index, Index end, Digits* row) {
    put_row(from, count, end, row);
}

// pack_rows: zeros where a group has no row, and behind depth.
LSTM_AMX_APART void pack_digits(const Groups<float>& groups, Index depth, const Right<Digits>& tile) {
    for (Index group = 0; group < 4; ++group) {
        auto* const to = reinterpret_cast<std::int8_t*>(tile.b + group / 2 * tile.panel) + group % 2 * kDigitsBlock;
        Scaled columns[16];
        for (Index r = 0; r < groups.count[group]; ++r) columns[r] = scaled(groups.first[group] + r * depth, depth);
        for (Index k = 0; k < depth; k += kDigitsDeep) {
            Floats digits[3][16] = {};  // four neighbours a lane, whose value no copy looks at
            for (Index r = 0; r < groups.count[group]; ++r) {
                __m512i some[3];
                take_digits(columns[r], k, some);
                for (int p = 0; p < 3; ++p) digits[p][r] = bit_cast<Floats>(some[p]);
            }
            for (int p = 0; p < 3; ++p) {
                transpose(digits[p]);
                std::memcpy(to + k / kDigitsDeep * kRightStep + 2 * p * kDigitsBlock, digits[p], sizeof(digits[p]));
            }
        }
        for (Index r = 0; r < 16; ++r) {
            tile.scales[group * 16 + r] = columns[r].scale();
            unfit |= !columns[r].fit_column();
        }
    }
}
template <typename Isa>
LSTM_HD void pack_rows(const Groups<float>& groups, Index depth, const Right<Digits>& to) {
    pack_digits(groups, depth, to);
}

LSTM_HD FixedWords load_words(const std::int32_t* from) {
    FixedWords words;
    std::memcpy(&words, from, sizeof(words));
    return words;
}

template <int Sum, int A, int B>
LSTM_HD void tile_dot_digits() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

// Up to 16 rows times 16 columns: the sums of four places in registers 0 to 4, of the third in 2 and 3, so that no sum
// waits for its last product.
LSTM_HD void add_digits(const std::int8_t* a, Index lda, const std::int8_t* b, Index steps) {
    for (Index i = 0; i < steps; ++i, a += kDigitsStep, b += kRightStep) {
        const auto right = [&](Index digit) LSTM_INLINED { tile_load<7>(b + 2 * digit * kDigitsBlock, kDigitsDeep); };
        tile_load<5>(a, lda);
        tile_load<6>(a + kDigitsDeep, lda);
        right(0), tile_dot_digits<0, 5, 7>();
        tile_dot_digits<1, 6, 7>();
        right(2), tile_dot_digits<3, 5, 7>();
        tile_dot_digits<4, 6, 7>();
        right(1), tile_dot_digits<1, 5, 7>();
        tile_dot_digits<2, 6, 7>();
        tile_load<6>(a + 2 * kDigitsDeep, lda);
        tile_dot_digits<4, 6, 7>();
        right(0), tile_dot_digits<3, 6, 7>();
    }
}

// What they make goes to c, or is added to it. The rows of a are `lda` bytes apart and end in their scales.
LSTM_HD void multiply_digits(Index rows, const std::int8_t* a, Index lda, const std::int8_t* b, const float* scales,
                             Index steps, float* c, Index ldc, bool accumulate) {
    alignas(64) std::int32_t sums[5][16][16];
    set_registers(rows, kOfDigits);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    tile_zero<4>();
    add_digits(a, lda, b, steps);
    tile_store<0>(sums[0], 64);
    tile_store<1>(sums[1], 64);
    tile_store<2>(sums[2], 64);
    tile_store<3>(sums[3], 64);
    tile_store<4>(sums[4], 64);
    const auto put = [&](auto add) LSTM_INLINED {
        const Floats of_column = load_vector<Amx>(scales);
#pragma GCC unroll 4
        for (Index r = 0; r < rows; ++r) {
            float of_row = 0;
            std::memcpy(&of_row, a + (r + 1) * lda - kDigitsStep, sizeof(of_row));
            const auto words = [&](int sum) LSTM_INLINED { return load_words(sums[sum][r]); };
            const auto floats = [](FixedWords x) LSTM_INLINED { return __builtin_convertvector(x, Floats); };
            const Floats high = floats(words(0)) * 256.f + floats(words(1));
            const Floats low = floats(words(4)) * (1 / 256.f) + floats(words(2) + words(3));
            const Floats product = (high * 256.f + low) * (of_column * of_row);
            store_vector<Amx, float>(add ? product + load_vector<Amx>(c + r * ldc) : product, c + r * ldc);
        }
    };
    accumulate ? put(std::true_type()) : put(std::false_type());
}

// multiply for any number of rows, in blocks of nearly the same size, and any k whose operands have zeros behind.
template <Along along>
__attribute__((noinline, target(LSTM_AMX_TARGET))) void multiply_in(AmxDigits, Index rows, const Digits* a, Index lda,
                                                                    const Right<const Digits>& b, Index k, float* c,
                                                                    Index ldc, bool accumulate) {
    static_assert(along == Along::rows, "nothing else is made digits");
    const Index blocks = round_up(rows, 16) / 16;
    const auto bytes = [](const Digits* digits) { return reinterpret_cast<const std::int8_t*>(digits); };
    for (Index group = 0; group < 4; ++group) {
        for (Index block = 0; block < blocks; ++block) {
            const Index first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
            multiply_digits(count, bytes(a + first * lda), 3 * lda,
                            bytes(b.b + group / 2 * b.panel) + group % 2 * kDigitsBlock, b.scales + 16 * group,
                            round_up(k, kDigitsDeep) / kDigitsDeep, c + first * ldc + 16 * group, ldc, accumulate);
        }
    }
}

}  // namespace lstm::cpu
#endif

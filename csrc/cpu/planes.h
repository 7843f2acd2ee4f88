// Operands for AMX (amx.h): floats split into planes, rows of the left side, and packed tiles and blocks.
#pragma once

#include "amx.h"

#ifdef LSTM_X86
namespace lstm::cpu {

using Floats = Vector<Amx, float>;
using Pairs16 = Amx::Wide;  // of bf16, the first in the lower half

// x with the lower half of each word rounded off.
LSTM_HD Pairs16 round_to_upper(Floats x) { return (bit_cast<Pairs16>(x) + 0x8000u) & 0xffff0000u; }

// The three planes of x, each the upper half of a word: to the nearest, so that the last is exact.
LSTM_HD void split(Floats x, Pairs16 (&planes)[3]) {
    planes[0] = round_to_upper(x);
    x -= bit_cast<Floats>(planes[0]);
    planes[1] = round_to_upper(x);
    planes[2] = bit_cast<Pairs16>(x - bit_cast<Floats>(planes[1]));
}

// The larger of a magnitude so far and those of x, of which NaN are none.
LSTM_HD Floats larger(Floats so_far, Floats x) {
    const Floats magnitude = magnitudes(x);
    return magnitude > so_far ? magnitude : so_far;
}

// Makes a note of magnitudes that round to infinity.
LSTM_AMX void note(Floats largest) {
    if (_mm512_cmp_ps_mask(largest, _mm512_set1_ps(0x1.ffp127f), _CMP_GE_OQ) != 0) unfit = true;
}

// Where the unit-th of a row's operands lies, in the first plane.
template <int N, typename Row>
LSTM_HD auto unit_at(Row* row, Index unit) {
    using Element = std::conditional_t<std::is_const_v<Row>, const BFloat16, BFloat16>;
    return reinterpret_cast<Element*>(row) + unit / kDeep * N * kDeep + unit % kDeep;
}

LSTM_HD std::uint32_t first_bits(Index count, Index most) {
    return count >= most ? ~0u : (1u << std::max<Index>(count, 0)) - 1;
}

// Notes what is infinite in a row that store_operands takes.
LSTM_AMX_APART void look_at(const float* row, Index count, const Planes<3>*) {
    Floats largest = {};
    for (Index j = 0; j < count; j += 16)
        largest = larger(largest, _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(count - j, 16)), row + j));
    note(largest);
}

// 16 units of a row of the left side, from the unit-th on, in each of its planes.
template <typename Isa, int N>
LSTM_HD void store_operands(const float* from, Index count, Planes<N>* row, Index unit) {
    BFloat16* const to = unit_at<N>(row, unit);
    if constexpr (N == 1) {
        store_units<Isa>(from, count, to);
    } else {
        Pairs16 planes[3];
        split(load_vector<Isa>(from), planes);
#pragma GCC unroll 3
        for (int p = 0; p < N; ++p) {
            const auto upper = __builtin_convertvector(planes[p] >> 16, Amx::Narrow);
            std::memcpy(to + p * kDeep, &upper, sizeof(upper));
        }
    }
}

// What store_operands stored there.
template <typename Isa, int N>
LSTM_HD Floats load_operands(const Planes<N>* row, Index unit) {
    const BFloat16* const from = unit_at<N>(row, unit);
    Floats sum = {};
#pragma GCC unroll 3
    for (int p = N - 1; p >= 0; --p) sum += load_vector<Isa>(from + p * kDeep);
    return sum;
}

// Where the pairs of k and k + 1 begin in a tile, of 16 columns from `column` on.
template <int N>
LSTM_HD BFloat16* pairs_at(const Right<Planes<N>>& tile, Index k, int plane, Index column) {
    const Index step = k / kDeep * N + plane, half = column / 32 * tile.panel * N;
    return reinterpret_cast<BFloat16*>(tile.b) + half + step * kRightPlane + column % 32 / 16 * kBlock + k % kDeep * 16;
}

// 16 columns of k and k + 1 to a tile.
LSTM_AMX_INLINED void put_pairs(Floats even, Floats odd, const Right<Planes<3>>& tile, Index k, Index column,
                                Floats& largest) {
    Pairs16 low[3], high[3];
    split(even, low);
    split(odd, high);
    largest = larger(larger(largest, even), odd);
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) {
        const Pairs16 pairs = low[p] >> 16 | (high[p] & 0xffff0000u);
        std::memcpy(pairs_at(tile, k, p, column), &pairs, sizeof(pairs));
    }
}

// pack_rows: zeros where a group has no row, and behind depth.
LSTM_AMX_APART void pack_rows_in(Amx, const Groups<float>& groups, Index depth, const Right<Planes<3>>& tile) {
    Floats largest = {};
    for (Index group = 0; group < 4; ++group) {
        for (Index k = 0; k < round_up(depth, kDeep); k += 16) {
            const auto there = static_cast<__mmask16>(first_bits(depth - k, 16));
            Floats rows[16];
            for (Index r = 0; r < 16; ++r) {
                const __mmask16 mask = r < groups.count[group] ? there : 0;
                rows[r] = _mm512_maskz_loadu_ps(mask, groups.first[group] + r * depth + k);
            }
            transpose(rows);
#pragma GCC unroll 8
            for (Index r = 0; r < 16; r += 2) put_pairs(rows[r], rows[r + 1], tile, k + r, group * 16, largest);
        }
    }
    note(largest);
}

LSTM_AMX_APART void pack_rows_in(Amx, const Groups<BFloat16>& groups, Index depth, const Right<Planes<1>>& tile) {
    for (Index group = 0; group < 4; ++group) {
        for (Index k = 0; k < depth; k += kDeep) {
            const __mmask32 there = first_bits(depth - k, kDeep);
            Floats rows[16];  // of 16 pairs of k, whose value no copy looks at
            for (Index r = 0; r < 16; ++r) {
                const __mmask32 mask = r < groups.count[group] ? there : 0;
                rows[r] = bit_cast<Floats>(_mm512_maskz_loadu_epi16(mask, groups.first[group] + r * depth + k));
            }
            transpose(rows);
            std::memcpy(pairs_at(tile, k, 0, group * 16), rows, sizeof(rows));
        }
    }
}

// Of a row's operands in one plane `there` from `column` on, in the lower halves of words; 0 of a row that is null.
template <int N>
LSTM_AMX_INLINED Pairs16 load_plane(const Planes<N>* row, int plane, Index column, __mmask16 there) {
    if (row == nullptr) return Pairs16{};
    const __m256i narrow = _mm256_maskz_loadu_epi16(there, unit_at<N>(row, column) + plane * kDeep);
    return __builtin_convertvector(bit_cast<Amx::Narrow>(narrow), Pairs16);
}

// 16 columns of k and k + 1 to a tile, from rows that are 0 where null.
template <int N>
LSTM_AMX_INLINED void pack_pairs(const Planes<N>* even, const Planes<N>* odd, __mmask16 there,
                                 const Right<Planes<N>>& tile, Index k, Index column, Floats&) {
#pragma GCC unroll 3
    for (int p = 0; p < N; ++p) {
        const Pairs16 pairs = load_plane(even, p, column, there) | load_plane(odd, p, column, there) << 16;
        std::memcpy(pairs_at(tile, k, p, column), &pairs, sizeof(pairs));
    }
}
LSTM_AMX_INLINED void pack_pairs(const BFloat16* even, const BFloat16* odd, __mmask16 there,
                                 const Right<Planes<1>>& tile, Index k, Index column, Floats& largest) {
    pack_pairs(reinterpret_cast<const Planes<1>*>(even), reinterpret_cast<const Planes<1>*>(odd), there, tile, k,
               column, largest);
}
LSTM_AMX_INLINED void pack_pairs(const float* even, const float* odd, __mmask16 there, const Right<Planes<3>>& tile,
                                 Index k, Index column, Floats& largest) {
    Floats rows[2] = {};
    if (even != nullptr) rows[0] = _mm512_maskz_loadu_ps(there, even + column);
    if (odd != nullptr) rows[1] = _mm512_maskz_loadu_ps(there, odd + column);
    put_pairs(rows[0], rows[1], tile, k, column, largest);
}

// pack_columns: zeros behind the columns and behind k.
template <typename T, int N, typename Row>
LSTM_AMX_APART void pack_columns_in(Amx, Index k, Index columns, const Row& row, const Right<Planes<N>>& tile) {
    Floats largest = {};
    for (Index p = 0; p < round_up(k, kDeep); p += 2) {
        const T *const even = p < k ? row(p) : nullptr, *const odd = p + 1 < k ? row(p + 1) : nullptr;
#pragma GCC unroll 4
        for (Index column = 0; column < kTile; column += 16) {
            const auto there = static_cast<__mmask16>(first_bits(columns - column, 16));
            pack_pairs(even, odd, there, tile, p, column, largest);
        }
    }
    note(largest);
}

template <typename Isa, typename T, int N>
LSTM_HD void pack_rows(const Groups<T>& groups, Index depth, const Right<Planes<N>>& to) {
    pack_rows_in(Isa(), groups, depth, to);
}
template <typename Isa, typename T, int N, typename Row>
LSTM_HD void pack_columns(Index k, Index columns, const Row& row, const Right<Planes<N>>& to) {
    pack_columns_in<T>(Isa(), k, columns, row, to);
}

// 32 rows of 8 columns to as many rows of a block, whose 32 elements are then added to their sum, pairwise. Masks of
// ones keep GCC from warnings of its own.
LSTM_AMX_INLINED void turn_columns(const BFloat16* from, Index ld, BFloat16* to, Floats (&sums)[8]) {
    __m512i rows[8], words[8];  // in a quarter the row r, 8 + r, 16 + r or 24 + r
#pragma GCC unroll 8
    for (Index r = 0; r < 8; ++r) {
        const auto row = [&](Index quarter) LSTM_INLINED {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (8 * quarter + r) * ld));
        };
        rows[r] = _mm512_maskz_inserti32x4(0xffff, _mm512_zextsi128_si512(row(0)), row(1), 1);
        rows[r] = _mm512_maskz_inserti32x4(0xffff, rows[r], row(2), 2);
        rows[r] = _mm512_maskz_inserti32x4(0xffff, rows[r], row(3), 3);
    }
#pragma GCC unroll 4
    for (Index r = 0; r < 8; r += 2) {
        words[r] = _mm512_maskz_unpacklo_epi16(~0u, rows[r], rows[r + 1]);
        words[r + 1] = _mm512_maskz_unpackhi_epi16(~0u, rows[r], rows[r + 1]);
    }
#pragma GCC unroll 4
    for (Index i = 0; i < 4; ++i) {  // of rows 0 to 3 and 4 to 7: columns 2 i and 2 i + 1
        const Index r = i / 2;
        const __m512i upper = i % 2 == 0 ? _mm512_maskz_unpacklo_epi32(0xffff, words[r], words[r + 2])
                                         : _mm512_maskz_unpackhi_epi32(0xffff, words[r], words[r + 2]);
        const __m512i lower = i % 2 == 0 ? _mm512_maskz_unpacklo_epi32(0xffff, words[r + 4], words[r + 6])
                                         : _mm512_maskz_unpackhi_epi32(0xffff, words[r + 4], words[r + 6]);
        rows[2 * i] = _mm512_maskz_unpacklo_epi64(0xff, upper, lower);
        rows[2 * i + 1] = _mm512_maskz_unpackhi_epi64(0xff, upper, lower);
    }
    const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
#pragma GCC unroll 8
    for (Index i = 0; i < 8; ++i) {
        std::memcpy(to + i * kDeep, &rows[i], sizeof(rows[i]));
        sums[i] = (Floats)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)rows[i], ones);
    }
}

// Columns of a[k, columns] to blocks of 16 of them, from the first-th block up to the last-th, and their sums over k.
// Rows of a end in columns that nobody needs, up to a multiple of 16.
template <typename Isa, int N>
LSTM_AMX_APART void pack_blocks(const Planes<N>* a, Index lda, Index k, Index first, Index last, Planes<N>* to,
                                float* column_sums) {
    const Index ld = lda * N;
    auto* packed = reinterpret_cast<BFloat16*>(to);
    for (Index block = first; block < last; ++block, packed += round_up(k, kDeep) * N * 16) {
        Floats sums[16];
        for (Index half = 0; half < 2; ++half) {
            const BFloat16* const from = unit_at<N>(a, block * 16 + half * 8);
            Floats some[8] = {};
            for (Index p = 0; p < k; p += kDeep) {
                for (int plane = 0; plane < N; ++plane) {
                    const BFloat16* const rows = from + p * ld + plane * kDeep;
                    BFloat16* const columns = packed + (p / kDeep * N + plane) * kBlock + half * 8 * kDeep;
                    if (p + kDeep <= k) {
                        turn_columns(rows, ld, columns, some);
                        continue;
                    }
                    BFloat16 copy[kDeep * 8] = {};
                    for (Index r = 0; r < k - p; ++r) std::copy_n(rows + r * ld, 8, copy + r * 8);
                    turn_columns(copy, 8, columns, some);
                }
            }
            std::copy_n(some, 8, sums + half * 8);
        }
        sum_lanes(sums);
        store_vector<Isa, float>(sums[0], column_sums + (block - first) * 16);
    }
}

}  // namespace lstm::cpu
#endif

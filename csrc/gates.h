// The gate kernel: what follows the recurrent product in one step of one direction, forward and backward. This header
// is the contract; csrc/cuda launches it on a GPU, csrc/host runs the same source on a CPU.
//
// N rows over all steps, B sequences, H hidden units, D directions, T the storage dtype, A the accumulation dtype
// (double for float64, else float). Gates are ordered i, f, g, o. A step is named by its direction, its first row and
// its rows: sequence b of it is row first + b of the arrays over N, row b of the others.
//
// All arrays are C-contiguous and need only the alignment of their elements; 16-byte accesses are used where every
// pointer and H allow. Arrays do not overlap. Rows that are not the step's are neither read nor written, but for the
// neighbouring step's cells. Pointers must stay valid until the work is done: at return on the host, in stream order
// with CUDA.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "lstm_math.h"

namespace lstm {

using Index = std::int64_t;

struct GateSizes {
    Index all_rows;    // N
    Index batch;       // B
    Index hidden;      // H >= 1
    Index directions;  // D
};

struct ForwardStep {
    void* gates;  // T [D, N, 4H], on entry x W_ih^T + b_ih + b_hh; with cells in place activated, else only read
    const void* product;  // A [B, 4H], h' W_hh^T of this step
    void* c;              // A [D, B, H], in place: the cell state
    void* h;              // T [D, B, H], written
    void* y;              // T [N, D * H], written: h again, direction d in columns d * H ..
    void* cells;          // A [D, N, H], written: c again; null when there will be no backward pass
    GateSizes sizes;
    Index direction, first, rows;
};

struct BackwardStep {
    const void* gates;  // T [D, N, 4H], activated
    const void* cells;  // A [D, N, H]
    const void* c0;     // T [D, B, H]
    const void* dy;     // T [N, D * H], gradient of y; null when zero
    const void* dh;     // A [D, B, H], gradient of h but for dy
    void* dc;           // A [D, B, H], in place: gradient of c on entry, of the step before's c on return
    void* dgates;       // T [D, N, 4H], written: gradient of the pre-activations
    GateSizes sizes;
    Index direction, first, rows;
    // The step before in the direction's walk: its cells are c' of sequences below previous_rows, c0 of the others,
    // which start here. 0, 0 at the walk's first step.
    Index previous_first, previous_rows;
};

// Elements of T in one 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

inline bool aligned(std::initializer_list<const void*> pointers) {
    for (const void* p : pointers) {
        if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) return false;
    }
    return true;
}

// Whether every access of `width` units may be made of 16-byte ones. Rows are multiples of H, so that H decides.
inline bool vectorises(const ForwardStep& s, int width) {
    return s.sizes.hidden % width == 0 && aligned({s.gates, s.product, s.c, s.h, s.y, s.cells});
}
inline bool vectorises(const BackwardStep& s, int width) {
    return s.sizes.hidden % width == 0 && aligned({s.gates, s.cells, s.c0, s.dy, s.dh, s.dc, s.dgates});
}

// 16 bytes in one access.
#ifdef __CUDACC__
using Chunk = uint4;
#else
using Chunk = std::uint32_t __attribute__((vector_size(16), may_alias));
#endif

LSTM_HD void store_chunk(Chunk* to, Chunk chunk) {
#ifdef __CUDA_ARCH__
    // nvcc splits some assignments into four stores
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(chunk.x),
                 "r"(chunk.y), "r"(chunk.z), "r"(chunk.w)
                 : "memory");
#else
    *to = chunk;
#endif
}

// VEC neighbouring elements of storage type S, to and from registers; with VEC > 1 in whole chunks.
template <int VEC, typename S>
LSTM_HD void load_pack(const S* from, Acc<S> (&to)[VEC]) {
    if constexpr (VEC == 1) {
        to[0] = load(*from);
    } else {
        Chunk chunks[VEC * sizeof(S) / sizeof(Chunk)];
        for (unsigned q = 0; q < VEC * sizeof(S) / sizeof(Chunk); ++q)
            chunks[q] = reinterpret_cast<const Chunk*>(from)[q];
        S values[VEC];
        std::memcpy(values, chunks, sizeof(values));
        for (int j = 0; j < VEC; ++j) to[j] = load(values[j]);
    }
}

template <int VEC, typename S>
LSTM_HD void store_pack(const Acc<S> (&from)[VEC], S* to) {
    if constexpr (VEC == 1) {
        *to = store<S>(from[0]);
    } else {
        S values[VEC];
        for (int j = 0; j < VEC; ++j) values[j] = store<S>(from[j]);
        Chunk chunks[VEC * sizeof(S) / sizeof(Chunk)];
        std::memcpy(chunks, values, sizeof(values));
        for (unsigned q = 0; q < VEC * sizeof(S) / sizeof(Chunk); ++q)
            store_chunk(reinterpret_cast<Chunk*>(to) + q, chunks[q]);
    }
}

// One thread's share, forward: units unit .. unit + VEC of sequence b.
template <typename T, int VEC>
LSTM_HD void update(const ForwardStep& s, Index b, Index unit) {
    using A = Acc<T>;
    const Index hidden = s.sizes.hidden, row = s.first + b;
    const Index saved = s.direction * s.sizes.all_rows + row;               // of [D, N, ...]
    const Index state = (s.direction * s.sizes.batch + b) * hidden + unit;  // in [D, B, H]
    T* gates = static_cast<T*>(s.gates) + saved * 4 * hidden + unit;
    const A* product = static_cast<const A*>(s.product) + b * 4 * hidden + unit;
    A* c_state = static_cast<A*>(s.c) + state;
    A a[4][VEC], z[4][VEC], c[VEC], h[VEC];
    for (int k = 0; k < 4; ++k) {
        load_pack(gates + k * hidden, a[k]);
        load_pack(product + k * hidden, z[k]);
    }
    load_pack(c_state, c);
    for (int j = 0; j < VEC; ++j) {
        const CellForward<A> cell =  // F1..F6
            cell_forward(a[0][j] + z[0][j], a[1][j] + z[1][j], a[2][j] + z[2][j], a[3][j] + z[3][j], c[j]);
        a[0][j] = cell.i;
        a[1][j] = cell.f;
        a[2][j] = cell.g;
        a[3][j] = cell.o;
        c[j] = cell.c;
        h[j] = cell.h;
    }
    store_pack(c, c_state);
    store_pack(h, static_cast<T*>(s.h) + state);
    store_pack(h, static_cast<T*>(s.y) + (row * s.sizes.directions + s.direction) * hidden + unit);
    if (s.cells == nullptr) return;
    store_pack(c, static_cast<A*>(s.cells) + saved * hidden + unit);
    for (int k = 0; k < 4; ++k) store_pack(a[k], gates + k * hidden);
}

// One thread's share, backward.
template <typename T, int VEC>
LSTM_HD void update(const BackwardStep& s, Index b, Index unit) {
    using A = Acc<T>;
    const Index hidden = s.sizes.hidden, row = s.first + b, before = s.direction * s.sizes.all_rows;
    const Index saved = before + row;
    const Index state = (s.direction * s.sizes.batch + b) * hidden + unit;
    const T* gates = static_cast<const T*>(s.gates) + saved * 4 * hidden + unit;
    const A* cells = static_cast<const A*>(s.cells);
    T* dgates = static_cast<T*>(s.dgates) + saved * 4 * hidden + unit;
    A* dc_state = static_cast<A*>(s.dc) + state;
    A a[4][VEC], c[VEC], c_prev[VEC], dh[VEC], dc[VEC];
    for (int k = 0; k < 4; ++k) load_pack(gates + k * hidden, a[k]);
    load_pack(cells + saved * hidden + unit, c);
    if (b < s.previous_rows) {
        load_pack(cells + (before + s.previous_first + b) * hidden + unit, c_prev);
    } else {
        load_pack(static_cast<const T*>(s.c0) + state, c_prev);
    }
    load_pack(static_cast<const A*>(s.dh) + state, dh);
    load_pack(dc_state, dc);
    if (s.dy != nullptr) {
        A dy[VEC];
        load_pack(static_cast<const T*>(s.dy) + (row * s.sizes.directions + s.direction) * hidden + unit, dy);
        for (int j = 0; j < VEC; ++j) dh[j] += dy[j];
    }
    for (int j = 0; j < VEC; ++j) {
        const CellBackward<A> cell =  // B1..B6
            cell_backward(a[0][j], a[1][j], a[2][j], a[3][j], c[j], c_prev[j], dh[j], dc[j]);
        a[0][j] = cell.da_i;
        a[1][j] = cell.da_f;
        a[2][j] = cell.da_g;
        a[3][j] = cell.da_o;
        dc[j] = cell.dc_prev;
    }
    store_pack(dc, dc_state);
    for (int k = 0; k < 4; ++k) store_pack(a[k], dgates + k * hidden);
}

// The step on the host, for tests without a GPU: the kernel's own source (csrc/host/simt.h).
namespace host {
void run_step(const ForwardStep& step, Dtype dtype);
void run_step(const BackwardStep& step, Dtype dtype);
}  // namespace host

// The step on a GPU, queued on `stream` of `device`; nullptr, or CUDA's words for why it could not be.
namespace cuda {
const char* run_step(const ForwardStep& step, Dtype dtype, int device, void* stream);
const char* run_step(const BackwardStep& step, Dtype dtype, int device, void* stream);
}  // namespace cuda

}  // namespace lstm

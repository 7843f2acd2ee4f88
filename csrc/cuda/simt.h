// What the kernels need of a GPU, by name: the only PTX of the project. csrc/host/simt.h gives the same names the same
// meaning on a CPU, where tests run the kernels' own source; a kernel includes this header and gets whichever serves.
//
// threadIdx, blockIdx, blockDim and gridDim are CUDA's own. "Warp-wide": all 32 lanes call together, and none goes on
// before all have come. Pointers to shared memory are generic pointers into the calling block's own.
#pragma once

#include <cstdint>

#include "../lstm_math.h"

#ifndef __CUDACC__
#include "../host/simt.h"
#else

#define SIMT __device__ __forceinline__

namespace lstm::simt {

// 16 bytes, the unit of loads, stores and messages.
using Words = uint4;

// ---- Indices and memory ---------------------------------------------------------------------------------------------

SIMT unsigned cluster_rank() {  // this block's place in its cluster
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The block's dynamic shared memory, 128-byte aligned.
SIMT unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

SIMT std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes of shared memory in one load, which the compiler would take apart for values that are used one by one.
SIMT Words read(const Words* from) {
    Words value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(shared_address(from))
                 : "memory");
    return value;
}

// x, computed where the call stands and no longer known to the compiler: what follows from it is computed again at each
// use, not kept; and it is kept itself, not computed again.
SIMT int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
template <typename V>
SIMT V* opaque(V* x) {
    asm volatile("" : "+l"(x));
    return x;
}

// The 2 or 4 bytes at p in global memory, in the low bits, loaded where the call stands: nothing waits for them before
// they are used, as a conversion or a choice between two loads would.
template <typename T>
SIMT std::uint32_t load_bits(const T* p) {
    std::uint32_t bits;
    if constexpr (sizeof(T) == 2) {
        asm volatile("ld.global.u16 %0, [%1];" : "=r"(bits) : "l"(__cvta_generic_to_global(p)) : "memory");
    } else {
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(__cvta_generic_to_global(p)) : "memory");
    }
    return bits;
}

// The low bits of `bits` into the 2 or 4 bytes at p in global memory, if there is anything to store: without a branch,
// so that other work goes on around it.
template <typename T>
SIMT void store_bits(bool there, T* p, std::uint32_t bits) {
    if constexpr (sizeof(T) == 2) {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u16 [%0], %1; }" ::"l"(__cvta_generic_to_global(p)),
            "r"(bits), "r"(static_cast<unsigned>(there))
            : "memory");
    } else {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u32 [%0], %1; }" ::"l"(__cvta_generic_to_global(p)),
            "r"(bits), "r"(static_cast<unsigned>(there))
            : "memory");
    }
}

// The same of four in a row, aligned to their size: two or four words.
template <typename T>
SIMT void load_bits_of_four(const T* p, std::uint32_t (&bits)[sizeof(T)]) {
    if constexpr (sizeof(T) == 2) {
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                     : "=r"(bits[0]), "=r"(bits[1])
                     : "l"(__cvta_generic_to_global(p))
                     : "memory");
    } else {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                     : "l"(__cvta_generic_to_global(p))
                     : "memory");
    }
}
template <typename T>
SIMT void store_four(bool there, T* p, const T (&values)[4]) {
    std::uint32_t bits[sizeof(T)];
    std::memcpy(bits, values, 4 * sizeof(T));
    if constexpr (sizeof(T) == 2) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.u32 [%0], {%1, %2}; }" ::"l"(
                         __cvta_generic_to_global(p)),
                     "r"(bits[0]), "r"(bits[1]), "r"(static_cast<unsigned>(there))
                     : "memory");
    } else {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4}; }" ::"l"(
                         __cvta_generic_to_global(p)),
                     "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3]), "r"(static_cast<unsigned>(there))
                     : "memory");
    }
}

// ---- Warps and blocks -----------------------------------------------------------------------------------------------

SIMT std::uint32_t shuffle(std::uint32_t value, unsigned lane) { return __shfl_sync(0xffffffffu, value, lane); }

SIMT void sync_warp() { __syncwarp(); }

SIMT void sync_threads() { __syncthreads(); }

SIMT void sync_cluster() { asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory"); }

// ---- Messages: 16-byte stores into another block's shared memory, counted by a barrier there ------------------------

// A phase of a Barrier ends when as many arrivals as it was made for have come and all bytes expected of it have
// landed.
using Barrier = std::uint64_t;  // in shared memory

// One thread of the block; seen by the cluster after publish_barriers and sync_cluster.
SIMT void init(Barrier* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

SIMT void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, and `bytes` more to land before the current phase may end.
SIMT void arrive_expecting(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

SIMT std::uint64_t nanoseconds() {
    std::uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

constexpr std::int64_t kPatience = 10'000'000'000;  // nanoseconds

// Signed: nothing promises that this clock never goes back a little.
SIMT std::int64_t waited_since(std::uint64_t start) { return static_cast<std::int64_t>(nanoseconds() - start); }

SIMT bool ended(Barrier* barrier, unsigned parity) {
    std::uint32_t done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Returns once the phase of this parity (0, 1, 0, ... from the start) has ended, and all that landed in it is visible.
// A wait of ten seconds is a bug: it stops the kernel with an error instead of hanging the card.
SIMT void wait(Barrier* barrier, unsigned parity) {
    if (!ended(barrier, parity)) {
        const std::uint64_t start = nanoseconds();
        while (!ended(barrier, parity)) {
            if (waited_since(start) > kPatience) __trap();
        }
    }
    // Of shared memory alone: an acquire of all memory would empty the L1 cache at every step.
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// Stores `value` at the place of `to` in the block of this rank, where `barrier`'s place then counts 16 bytes as
// landed. The cluster has two blocks or more (PTX ISA, st.async); the rank may be the caller's own.
SIMT void send(void* to, unsigned rank, Words value, Barrier* barrier) {
    std::uint32_t address, counted;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(counted)
        : "memory");
}

// ---- Words for the whole grid: in global memory, counted by a flag there --------------------------------------------

// All blocks that wait for one another have to be resident at the same time.
using Flag = std::uint32_t;  // in global memory, 0 before the launch

// Stores 16 bytes in global memory, for whoever awaits this block's next signal.
SIMT void publish(void* to, Words value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

// One thread for its block, after sync_threads: all that the block has published is there, and the flag counts one
// more.
SIMT void signal(Flag* flag) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory"); }

// One thread for its block, before sync_threads: returns once the flag has counted so many signals. Traps like `wait`.
SIMT void await(const Flag* flag, unsigned signals) {
    const std::uint64_t start = nanoseconds();
    for (unsigned seen = 0;;) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        if (seen >= signals) return;
        if (waited_since(start) > kPatience) __trap();
    }
}

// What another block has published, past the L1 cache, which never hears of it.
SIMT float collect(const float* from) {
    float value;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}

// 16 bytes of it into shared memory; there for the caller after `collected`.
SIMT void collect(Words* to, const Words* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from))
                 : "memory");
}
SIMT void collected() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- Matrix product, warp-wide --------------------------------------------------------------------------------------

// d [16, 8] += a [16, K] b [K, 8] in fp32, rounded towards zero, K = 32 bytes of T; float means TF32, whose low 13 bits
// are ignored. Lane 4 r + q holds: d[0], d[1] of row r, columns 2 q, 2 q + 1; d[2], d[3] of row r + 8. Words a[0], a[2]
// of row r and a[1], a[3] of row r + 8; b0, b1 of column r. Which K a word stands for is the caller's choice, the same
// for a and b: word q of the K's first half for a[0], a[1] and b0, of its second half for a[2], a[3] and b1.
template <typename T>
SIMT void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);

#define LSTM_MMA(T, SHAPE_AND_TYPES)                                                                              \
    template <>                                                                                                   \
    SIMT void mma<T>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {            \
        asm volatile("mma.sync.aligned." SHAPE_AND_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
    }
LSTM_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
LSTM_MMA(__half, "m16n8k16.row.col.f32.f16.f16.f32")
LSTM_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef LSTM_MMA

// x rounded to TF32: 10 bits of mantissa, to nearest, ties away from zero. Volatile, or the compiler rounds weights
// once and for all before the loop, and keeps both parts in registers that it doesn't have.
SIMT float round_tf32(float x) {
    std::uint32_t bits;
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

}  // namespace lstm::simt

#endif

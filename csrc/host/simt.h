// csrc/cuda/simt.h on a CPU: every name means here what it means on a GPU, so that tests run the kernels' own source.
//
// Each CUDA thread of a launch is a fibre; one runs until it must wait for others. Who runs next, and when a message
// lands, is the schedule's choice, so that a missing barrier or a buffer used too early shows as a wrong result under
// some schedule, and a wait that never ends as an error. Blocks start with shared memory full of NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "../lstm_math.h"

#define SIMT inline

namespace lstm::host {

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct Launch {
    Dim3 grid, block;
    unsigned cluster;        // blocks of a cluster, along x; of those that wait for one another where there are none
    std::size_t shared;      // bytes of a block
    std::uint64_t schedule;  // 0: in order, messages land at once; else the seed of an adversary
    void* global = nullptr;  // what blocks publish in; where there is any, there are no clusters
    std::size_t global_bytes = 0;
};

// Runs `thread` once for every CUDA thread of the launch, one cluster after the other. Empty, or words on what went
// wrong: nobody can go on, a barrier or message misused, lanes of a warp in different warp-wide operations.
std::string run(const Launch& launch, const std::function<void()>& thread);

}  // namespace lstm::host

namespace lstm {

// Of the running thread.
extern thread_local host::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

struct alignas(16) Words {
    std::uint32_t x, y, z, w;
};

// The state of a phase, in the 8 bytes of a Barrier.
using Barrier = std::uint64_t;

unsigned cluster_rank();
unsigned char* shared_memory();
inline Words read(const Words* from) { return *from; }
template <typename T>
std::uint32_t load_bits(const T* p) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, p, sizeof(T));
    return bits;
}
template <typename T>
void store_bits(bool there, T* p, std::uint32_t bits) {
    if (there) std::memcpy(p, &bits, sizeof(T));
}
template <typename T>
void load_bits_of_four(const T* p, std::uint32_t (&bits)[sizeof(T)]) {
    std::memcpy(bits, p, 4 * sizeof(T));
}
template <typename T>
void store_four(bool there, T* p, const T (&values)[4]) {
    if (there) std::memcpy(p, values, 4 * sizeof(T));
}
template <typename V>
V opaque(V x) {
    return x;
}

std::uint32_t shuffle(std::uint32_t value, unsigned lane);
void sync_warp();
void sync_threads();

void sync_cluster();

void init(Barrier* barrier, unsigned arrivals);
inline void publish_barriers() {}
void arrive_expecting(Barrier* barrier, unsigned bytes);
void wait(Barrier* barrier, unsigned parity);
void send(void* to, unsigned rank, Words value, Barrier* barrier);

using Flag = std::uint32_t;

void publish(void* to, Words value);
void signal(Flag* flag);
void await(const Flag* flag, unsigned signals);
float collect(const float* from);
void collect(Words* to, const Words* from);
void collected();

// Adds up exactly, then rounds towards zero: the products' sum is what tensor cores are at their worst.
template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);

inline float round_tf32(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return x;
    return bit_cast<float>((bits + 0x1000u) & 0xffffe000u);
}

}  // namespace simt
}  // namespace lstm

#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a mistake
#include "simt.h"

#include <sys/mman.h>

#include <new>

#include "cluster.h"

namespace lstm {

thread_local host::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

using host::Cluster;
using host::Failure;
using host::kLanes;
using host::Means;

constexpr std::size_t kMostShared = 227 * 1024;
constexpr unsigned kMostOfCluster = 16, kMostTogether = 256;

template <typename T>
float element(std::uint32_t word, int j);
template <>
float element<BFloat16>(std::uint32_t word, int j) {
    return load(BFloat16{static_cast<std::uint16_t>(word >> (16 * j))});
}
template <>
float element<Float16>(std::uint32_t word, int j) {
    return load(Float16{static_cast<std::uint16_t>(word >> (16 * j))});
}
template <>
float element<float>(std::uint32_t word, int) {
    return bit_cast<float>(word & 0xffffe000u);
}

float towards_zero(double x) {
    const auto nearest = static_cast<float>(x);
    return std::fabs(double{nearest}) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Fragments {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
};

template <typename T>
constexpr const char* kProduct = "mma<float>";
template <>
constexpr const char* kProduct<BFloat16> = "mma<BFloat16>";
template <>
constexpr const char* kProduct<Float16> = "mma<Float16>";

template <typename T>
void multiply(void* const* operands) {
    constexpr int kInWord = 4 / static_cast<int>(sizeof(T)), kDepth = 8 * kInWord;
    double a[16][kDepth], b[8][kDepth];
    for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
        const auto* own = static_cast<const Fragments*>(operands[lane]);
        const int r = lane / 4, q = lane % 4;
        for (int j = 0; j < kInWord; ++j) {
            for (int w = 0; w < 4; ++w) a[r + w % 2 * 8][(w / 2 * 4 + q) * kInWord + j] = element<T>(own->a[w], j);
            for (int w = 0; w < 2; ++w) b[r][(w * 4 + q) * kInWord + j] = element<T>(own->b[w], j);
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            float& d = static_cast<Fragments*>(operands[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2];
            double sum = d;
            for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[column][k];
            d = towards_zero(sum);
        }
    }
}

host::Shared shared(std::size_t size) {
    constexpr std::align_val_t kAligned{128};
    return {static_cast<unsigned char*>(operator new(size, kAligned)),
            [](unsigned char* memory) { operator delete(memory, kAligned); }};
}

struct Pages {  // zeroed, and taken from the machine only where touched
    explicit Pages(std::size_t size)
        : size(size), start(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        if (start == MAP_FAILED) throw Failure{"there is no memory for the fibres' stacks"};
    }
    ~Pages() { munmap(start, size); }
    Pages(const Pages&) = delete;
    unsigned char* bytes() const { return static_cast<unsigned char*>(start); }
    const std::size_t size;
    void* const start;
};

}  // namespace

namespace simt {

unsigned cluster_rank() { return Cluster::active->rank(); }
unsigned char* shared_memory() { return Cluster::active->block().memory; }

std::uint32_t shuffle(std::uint32_t value, unsigned lane) {
    struct Operands {
        std::uint32_t value, result;
        unsigned lane;
    } own{value, 0, lane};
    Cluster::active->warp_wide("shuffle", &own, [](void* const* all) {
        for (unsigned j = 0; j < kLanes; ++j) {
            auto* one = static_cast<Operands*>(all[j]);
            one->result = static_cast<Operands*>(all[one->lane % kLanes])->value;
        }
    });
    return own.result;
}

void sync_warp() {
    Cluster::active->warp_wide("sync_warp", nullptr, [](void* const*) {});
}
void sync_threads() { Cluster::active->sync_block(); }

void sync_cluster() { Cluster::active->sync_cluster(); }

void init(Barrier* barrier, unsigned arrivals) { Cluster::active->init(barrier, arrivals); }
void arrive_expecting(Barrier* barrier, unsigned bytes) { Cluster::active->arrive(barrier, bytes); }
void wait(Barrier* barrier, unsigned parity) { Cluster::active->wait(barrier, parity); }

void send(void* to, unsigned rank, Words value, Barrier* barrier) {
    Cluster::active->check_rank(rank);
    Cluster::active->send({Means::message, rank, Cluster::active->offset(to, sizeof(Words), "a message's target"),
                           Cluster::active->offset(barrier, sizeof(Barrier), "a barrier"), nullptr, value});
}

void publish(void* to, Words value) {
    Cluster::active->check_global(to, sizeof(Words));
    Cluster::active->send({Means::words, Cluster::active->rank(), 0, 0, to, value});
}
void signal(Flag* flag) {
    Cluster::active->check_global(flag, sizeof(Flag));
    Cluster::active->send({Means::signal, Cluster::active->rank(), 0, 0, flag, {}});
}
void await(const Flag* flag, unsigned signals) { Cluster::active->await(flag, signals); }
float collect(const float* from) { return Cluster::active->collect(from); }
void collect(Words* to, const Words* from) {
    Cluster::active->offset(to, sizeof(Words), "what is collected");
    Cluster::active->copy(to, from);
}
void collected() { Cluster::active->copied(); }

template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    Fragments own{d, a, {b0, b1}};
    Cluster::active->warp_wide(kProduct<T>, &own, multiply<T>);
}
template void mma<BFloat16>(float (&)[4], const std::uint32_t (&)[4], std::uint32_t, std::uint32_t);
template void mma<Float16>(float (&)[4], const std::uint32_t (&)[4], std::uint32_t, std::uint32_t);
template void mma<float>(float (&)[4], const std::uint32_t (&)[4], std::uint32_t, std::uint32_t);

}  // namespace simt

namespace host {

std::string run(const Launch& launch, const std::function<void()>& thread) {
    const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
    const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    const unsigned most = launch.global == nullptr ? kMostOfCluster : kMostTogether;
    if (blocks == 0 || threads == 0 || threads > 1024 || launch.shared > kMostShared || launch.cluster == 0 ||
        launch.cluster > most || launch.grid.x % launch.cluster != 0) {
        return "a launch has blocks of 1 to 1024 threads and up to 227 KiB, along the grid's x in clusters of 1 to 16, "
               "or "
               "without clusters up to 256 that wait for one another";
    }
    try {
        const Pages stacks(launch.cluster * threads * host::kStack);
        std::vector<Shared> memory;  // of each block: apart, so that a sanitizer sees where each ends
        for (unsigned rank = 0; rank < launch.cluster; ++rank) memory.emplace_back(shared(launch.shared));
        for (unsigned number = 0; number < blocks / launch.cluster; ++number) {
            Cluster cluster(launch, number, stacks.bytes(), memory, thread);
            cluster.run();
        }
    } catch (const Failure& failure) {
        return failure.words;
    }
    return {};
}

}  // namespace host
}  // namespace lstm

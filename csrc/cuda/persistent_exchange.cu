// What the persistent kernels' design rests on, measured on the card at hand: a message between two blocks of a
// cluster, a whole exchange of h in a cluster, a step of the grid through L2, and the matrix product.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "persistent_launch.h"
#include "simt.h"

namespace lstm::persistent::cuda {
namespace {

using namespace lstm::simt;

constexpr int kSteps = 2000, kRuns = 9, kThreads = 256, kMostThreads = 512, kScratch = 1 << 16, kFlags = 1024;

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or an innocent call would find it
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Times {
    unsigned long long clocks, nanoseconds;  // of all steps, by the grid's first thread
};

SIMT unsigned long long clocks() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(now));
    return now;
}

class Stopwatch {
  public:
    SIMT explicit Stopwatch(Times* times) : times_(times), clocks_(clocks()), nanoseconds_(nanoseconds()) {}
    SIMT void stop() {
        if (blockIdx.x != 0 || threadIdx.x != 0) return;
        times_->clocks = clocks() - clocks_;
        times_->nanoseconds = nanoseconds() - nanoseconds_;
    }

  private:
    Times* times_;
    unsigned long long clocks_;
    std::uint64_t nanoseconds_;
};

// Two buffers and two barriers, armed, as the recurrence has them.
SIMT Barrier* barriers(unsigned bytes) {
    auto* full = reinterpret_cast<Barrier*>(shared_memory());
    if (threadIdx.x == 0) {
        for (int j = 0; j < 2; ++j) {
            init(full + j, 1);
            arrive_expecting(full + j, bytes);
        }
    }
    publish_barriers();
    sync_cluster();
    return full;
}

// Block 0 sends 16 bytes to block 1, which answers: two messages a step.
__global__ void __launch_bounds__(32) ping_pong(Times* times) {
    Barrier* const full = barriers(16);
    const unsigned rank = cluster_rank();
    unsigned char* const words = shared_memory() + 128;
    Stopwatch watch(times);
    for (int step = 0; step < kSteps && threadIdx.x == 0; ++step) {
        const unsigned parity = static_cast<unsigned>(step) / 2 % 2;
        Barrier* const here = full + step % 2;
        if (rank == 0) send(words, 1, Words{1, 2, 3, 4}, here);
        wait(here, parity);
        arrive_expecting(here, 16);
        if (rank == 1) send(words, 0, Words{1, 2, 3, 4}, here);
    }
    watch.stop();
    sync_cluster();
}

// Every block sends its slice of h (8 sequences, `groups` times 8 units of 16 bits) to all blocks and waits for theirs,
// in the recurrence's messages: 64 bytes a warp, of 16 each, to 8 blocks at a time.
__global__ void __launch_bounds__(kMostThreads) exchange_steps(Times* times, int cluster, int groups) {
    const unsigned bytes = static_cast<unsigned>(cluster * groups) * 128;
    Barrier* const full = barriers(bytes);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
    unsigned char* const h = shared_memory() + 128 + cluster_rank() * groups * 128 + lane % 4 * 16;
    Stopwatch watch(times);
    for (int step = 0; step < kSteps; ++step) {
        Barrier* const here = full + step % 2;
        for (int part = warp; part < 2 * groups; part += warps) {
            unsigned char* const to = h + step % 2 * bytes + part * 64;
            for (int rank = lane / 4; rank < cluster; rank += 8) {
                send(to, static_cast<unsigned>(rank), Words{1, 2, 3, 4}, here);
            }
        }
        wait(here, static_cast<unsigned>(step) / 2 % 2);
        if (threadIdx.x == 0) arrive_expecting(here, bytes);
        sync_warp();  // no lane is still waiting when its warp's next messages let the others go on
    }
    watch.stop();
    sync_cluster();
}

// The same over a grid: every block publishes its share of h, signals, awaits all signals and collects the whole.
__global__ void __launch_bounds__(kThreads, 1) grid_steps(Times* times, unsigned char* global, unsigned words) {
    auto* const flags = reinterpret_cast<Flag*>(global);
    auto* const here = reinterpret_cast<Words*>(shared_memory());
    const unsigned share = (words + gridDim.x - 1) / gridDim.x;
    Stopwatch watch(times);
    for (unsigned step = 0; step < kSteps; ++step) {
        auto* const h = reinterpret_cast<Words*>(global + kFlags) + step % 2 * words;
        for (unsigned j = threadIdx.x; j < share && blockIdx.x * share + j < words; j += kThreads) {
            publish(h + blockIdx.x * share + j, Words{1, 2, 3, 4});
        }
        sync_threads();
        if (threadIdx.x == 0) signal(flags + blockIdx.x);
        for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) await(flags + block, step + 1);
        sync_threads();
        for (unsigned j = threadIdx.x; j < words; j += kThreads) collect(here + j, h + j);
        collected();
        sync_threads();
    }
    watch.stop();
}

// Four independent chains of products in each of 8 warps, two warps in a quarter of the multiprocessor.
__global__ void __launch_bounds__(kThreads) products(Times* times, float* out) {
    float d[4][4] = {};
    const std::uint32_t a[4] = {threadIdx.x, 1, 2, 3};
    Stopwatch watch(times);
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int chain = 0; chain < 4; ++chain) mma<__nv_bfloat16>(d[chain], a, 4, 5);
    }
    watch.stop();
    for (int chain = 0; chain < 4; ++chain) out[threadIdx.x * 4 + chain] = d[chain][0] + d[chain][1];
}

// Memory on the card, freed with its owner.
class Buffer {
  public:
    explicit Buffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes), "cudaMalloc"); }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    template <typename T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
};

class Launcher {
  public:
    Launcher(int device, const std::function<void(const Latency&)>& report) : device_(device), report_(report) {}

    // The median of several runs, a step.
    template <typename Run>
    void measure(const char* what, int size, int blocks, double per_step, Run run) {
        std::vector<Times> found;
        for (int j = 0; j < kRuns; ++j) {
            check(cudaMemset(scratch(), 0, kScratch), "cudaMemset");
            check(run(), what);
            check(cudaDeviceSynchronize(), what);
            Times times{};
            check(cudaMemcpy(&times, this->times(), sizeof(times), cudaMemcpyDeviceToHost), "cudaMemcpy");
            found.push_back(times);
        }
        std::sort(found.begin(), found.end(), [](const Times& x, const Times& y) { return x.clocks < y.clocks; });
        const Times& median = found[kRuns / 2];
        const double steps = kSteps * per_step;
        report_({what, size, blocks, static_cast<double>(median.clocks) / steps,
                 static_cast<double>(median.nanoseconds) / steps});
    }

    template <typename... Arguments>
    cudaError_t clustered(void (*kernel)(Arguments...), int cluster, int threads, int shared,
                          Arguments... arguments) const {
        const cudaError_t error = prepare(reinterpret_cast<const void*>(kernel), cluster, device_);
        if (error != cudaSuccess) return error;
        const Configuration launch(cluster, cluster, threads, shared, nullptr);
        return cudaLaunchKernelEx(&launch.config, kernel, arguments...);
    }

    Times* times() const { return times_.as<Times>(); }
    void* scratch() const { return scratch_.as<void>(); }

    // h of 8 sequences, in a cluster.
    void measure_cluster(int cluster, int hidden) {
        const int groups = hidden / 8 / cluster, threads = std::min(64 * groups, kMostThreads);
        const int shared = 128 + 2 * 8 * 2 * hidden;
        measure("exchange", hidden, cluster, 1.0,
                [&] { return clustered(exchange_steps, cluster, threads, shared, times(), cluster, groups); });
    }

    // The same over a grid.
    void measure_grid(int blocks, int hidden) {
        auto words = static_cast<unsigned>(hidden);  // of 16 bits: 16 bytes a unit
        measure("grid", hidden, blocks, 1.0, [&] {
            Times* to = times();
            void* global = scratch();
            void* arguments[] = {&to, &global, &words};
            const auto grid = dim3(static_cast<unsigned>(blocks));
            return cudaLaunchCooperativeKernel(grid_steps, grid, dim3(kThreads), arguments, 16 * words, nullptr);
        });
    }

  private:
    int device_;
    const std::function<void(const Latency&)>& report_;
    Buffer times_{sizeof(Times)}, scratch_{kScratch};
};

}  // namespace

std::vector<std::pair<int, int>> clusters_at_once(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    const auto* const kernel = reinterpret_cast<const void*>(exchange_steps);
    std::vector<std::pair<int, int>> found;
    for (int cluster = 2; cluster <= 16; cluster *= 2) {
        int count = 0;
        const Configuration launch(cluster, cluster, kMostThreads, 200 * 1024, nullptr);
        cudaError_t error = prepare(kernel, cluster, device);
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
        found.emplace_back(cluster, granted(error) ? count : 0);
    }
    return found;
}

void measure_exchange(int device, const std::function<void(const Latency&)>& report) {
    const auto clusters = clusters_at_once(device);
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    Launcher launch(device, report);
    launch.measure("message", 16, 2, 2.0, [&] { return launch.clustered(ping_pong, 2, 32, 1024, launch.times()); });
    launch.measure("product", 2048, 1, 8.0, [&] {
        products<<<1, kThreads>>>(launch.times(), static_cast<float*>(launch.scratch()));
        return cudaGetLastError();
    });
    for (int blocks : {32, 64, multiprocessors}) {
        for (int hidden : {512, 1024}) launch.measure_grid(blocks, hidden);
    }
    for (const auto& [cluster, at_once] : clusters) {  // the largest last: it is the likeliest to fail
        for (int hidden : {128, 256, 512, 768}) {      // 128: what tiles of 2 sequences of 512 units exchange
            if (at_once > 0) launch.measure_cluster(cluster, hidden);
        }
    }
}

}  // namespace lstm::persistent::cuda

// The CPU kernels under a sanitizer, without Python: `make sanitize` compiles this file with ASan and UBSan, and with
// TSan, which knows std::thread and not OpenMP's. Every dtype, instruction set and way through the kernels; results of
// several threads are those of one, bit by bit; and threads that share kept blocks.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace {

// All threads of a call wait for the last.
class Barrier {
  public:
    void expect(int threads) { threads_ = threads; }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int round = round_;
        if (++arrived_ == threads_) {
            arrived_ = 0;
            ++round_;
            changed_.notify_all();
        } else {
            changed_.wait(lock, [&] { return round_ != round; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int threads_ = 1, arrived_ = 0, round_ = 0;
} barrier;

}  // namespace

#define LSTM_MEET barrier.wait()
#include "../csrc/cpu/arena.cpp"
#include "../csrc/cpu/block.cpp"
#include "../csrc/cpu/jobs_amx.cpp"
#include "../csrc/cpu/jobs_avx2.cpp"
#include "../csrc/cpu/jobs_avx512.cpp"
#include "../csrc/cpu/jobs_baseline.cpp"
#include "../csrc/cpu/kept.cpp"
#include "../csrc/cpu/layer.cpp"

namespace {

using namespace lstm;
using namespace lstm::cpu;
using Bytes = std::vector<unsigned char>;

struct Case {
    std::vector<Index> steps;
    Index input, hidden, projected;  // projected: 0 for none
    int directions;
};

const Case kCases[] = {
    {{1}, 5, 7, 0, 1},                            // few rows, no whole vector
    {{3, 3}, 64, 64, 0, 2},                       // few rows, whole tiles read in place
    {{8, 8, 7}, 200, 250, 195, 1},                // few rows of large weights, in turns
    {{40}, 130, 150, 20, 2},                      // one step: weights packed in passing
    {{6, 5, 3, 3, 1}, 9, 33, 0, 2},               // odd sizes, unequal lengths
    {{13, 13, 13, 7}, 16, 48, 0, 1},              // joined product, rows shared by threads
    {{13, 13, 13, 7}, 16, 48, 20, 2},             // the same, projected
    {{2, 2, 2, 2, 2, 1}, 70, 130, 65, 2},         // tiles shared by threads, projected
    {{1, 1, 1, 1, 1, 1, 1, 1, 1}, 6, 450, 0, 1},  // W_hh read as it lies
    {{90, 80}, 6, 384, 0, 1},                     // gradients by pieces
    {std::vector<Index>(48, 2), 6, 420, 0, 2},    // W_hh in fixed point, on three threads too
    {std::vector<Index>(200, 3), 4, 20, 0, 2},    // several chunks
    {std::vector<Index>(200, 3), 4, 20, 6, 1},
    {std::vector<Index>(6, 24), 6, 128, 0, 2},  // floats in planes
    {std::vector<Index>(26, 24), 40, 128, 32, 1},
    {std::vector<Index>(11, 33), 20, 75, 0, 1},   // the same, padded
    {std::vector<Index>(90, 3), 128, 192, 0, 1},  // in planes over all steps: tiles shared by threads, in chunks
    {[] {
         std::vector<Index> steps(10, 20);
         steps.resize(60, 3);
         return steps;
     }(),
     128, 192, 33, 1},  // the same: rows shared, projected
    {[] {
         std::vector<Index> steps(40, 13);
         steps.resize(60, 7);
         return steps;
     }(),
     15, 130, 0, 2},                               // rows shared by threads, in chunks that don't line up
    {std::vector<Index>(22, 12), 140, 256, 0, 1},  // floats in digits, in chunks
};

template <typename T>
std::vector<T> random(Index size, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<float> of(-0.5f, 0.5f);
    std::vector<T> values(size);
    for (T& value : values) value = store<T>(of(generator));
    return values;
}

template <template <typename> class Job, typename T, typename Args>
void run_with(Shape shape, const Args& args) {
    shape.instruction_set = serving<Job, T>(shape);
    Arena count;
    Job<T>(shape, args, count);
    Arena arena(count.used());
    const Job<T> job(shape, args, arena);
    barrier.expect(shape.threads);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < shape.threads; ++thread)
        threads.emplace_back([&, thread] { kernel_of<Job<T>>(shape.instruction_set)(job, thread, shape.threads); });
    for (std::thread& thread : threads) thread.join();
}

template <typename... Arrays>
Bytes bytes_of(const Arrays&... arrays) {
    Bytes all;
    const auto append = [&](const auto& array) {
        const auto* first = reinterpret_cast<const unsigned char*>(array.data());
        all.insert(all.end(), first, first + array.size() * sizeof(array[0]));
    };
    (append(arrays), ...);
    return all;
}

// Everything that a layer writes, forward and backward.
template <typename T>
Bytes layer(const Case& c, int threads, InstructionSet set, Dtype dtype) {
    using A = Acc<T>;
    Index rows = 0;
    for (const Index n : c.steps) rows += n;
    const Index batch = c.steps[0], hidden = c.hidden, features = c.projected > 0 ? c.projected : hidden;
    const Shape shape{c.steps.data(), static_cast<Index>(c.steps.size()),
                      batch,          c.input,
                      hidden,         features,
                      c.directions,   dtype,
                      threads,        set};
    const auto x = random<T>(rows * c.input, 1), h0 = random<T>(c.directions * batch * features, 2);
    const auto c0 = random<T>(c.directions * batch * hidden, 3);
    const auto w_ih = random<T>(4 * hidden * c.input, 4), w_hh = random<T>(4 * hidden * features, 5);
    const auto bias = random<T>(4 * hidden, 6), w_hr = random<T>(features * hidden, 7);
    const auto dy = random<T>(rows * c.directions * features, 8);
    std::vector<T> y(dy.size()), h_n(h0.size()), c_n(c0.size()), gates(c.directions * rows * 4 * hidden), dx(x.size());
    std::vector<A> cells(c.directions * rows * hidden);
    const auto dh_n = random<T>(h0.size(), 9), dc_n = random<T>(c0.size(), 10);
    std::vector<T> dh0(h0.size()), dc0(c0.size());
    const Weights w{w_ih.data(), w_hh.data(), bias.data(), bias.data(), c.projected > 0 ? w_hr.data() : nullptr};
    run_with<Forward, T>(
        shape,
        ForwardArgs{
            x.data(), h0.data(), c0.data(), {w, w}, y.data(), h_n.data(), c_n.data(), gates.data(), cells.data()});
    std::vector<T> y_inferred(y.size()), c_inferred(c_n.size());  // inference from zeros
    run_with<Forward, T>(
        shape,
        ForwardArgs{
            x.data(), nullptr, nullptr, {w, w}, y_inferred.data(), nullptr, c_inferred.data(), nullptr, nullptr});
    std::vector<std::vector<T>> gradients;
    for (int d = 0; d < 2; ++d) {
        for (const Index size : {w_ih.size(), w_hh.size(), bias.size(), w_hr.size()}) gradients.emplace_back(size);
    }
    const auto of = [&](int d) {
        return WeightGradients{gradients[4 * d].data(), gradients[4 * d + 1].data(), gradients[4 * d + 2].data(),
                               c.projected > 0 ? gradients[4 * d + 3].data() : nullptr};
    };
    run_with<Backward, T>(shape, BackwardArgs{x.data(),
                                              h0.data(),
                                              c0.data(),
                                              {w, w},
                                              y.data(),
                                              gates.data(),
                                              cells.data(),
                                              dy.data(),
                                              dh_n.data(),
                                              dc_n.data(),
                                              dx.data(),
                                              dh0.data(),
                                              dc0.data(),
                                              {of(0), of(1)}});
    Bytes all = bytes_of(y, h_n, c_n, gates, cells, y_inferred, c_inferred, dx, dh0, dc0);
    for (const auto& gradient : gradients) {
        const Bytes more = bytes_of(gradient);
        all.insert(all.end(), more.begin(), more.end());
    }
    return all;
}

template <typename T>
int differences(Dtype dtype) {
    int found = 0;
    for (int set = 0; set <= static_cast<int>(best_instruction_set()); ++set) {
        if (static_cast<InstructionSet>(set) == InstructionSet::avx512_slow_bf16) continue;  // one of the two before
        for (const Case& c : kCases) {
            const Bytes alone = layer<T>(c, 1, static_cast<InstructionSet>(set), dtype);
            for (const int threads : {2, 3}) {
                if (layer<T>(c, threads, static_cast<InstructionSet>(set), dtype) == alone) continue;
                std::printf("dtype %d, instruction set %d, H %ld, %d threads: other bits than with one\n",
                            static_cast<int>(dtype), set, static_cast<long>(c.hidden), threads);
                ++found;
            }
        }
    }
    return found;
}

// Threads that take, write, read and give back: how many found what another had written.
int kept_blocks() {
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int own = 0; own < 4; ++own) {
        threads.emplace_back([&, own] {
            for (int turn = 0; turn < 200; ++turn) {
                const std::int64_t bytes = kLeastSaved + (turn * 7 + own) % 5 * kLeastSaved / 3;
                const auto block = take_block(bytes);
                auto* const words = reinterpret_cast<volatile int*>(block->data);
                const std::int64_t last = bytes / 4 - 1;
                words[0] = words[last] = own;
                std::this_thread::yield();
                wrong += words[0] != own || words[last] != own;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    return wrong;
}

}  // namespace

int main() {
    const int found = kept_blocks() + differences<float>(Dtype::float32) + differences<double>(Dtype::float64) +
                      differences<BFloat16>(Dtype::bfloat16) + differences<Float16>(Dtype::float16);
    std::printf("%d differences\n", found);
    return found == 0 ? 0 : 1;
}

#include "limits.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <chrono>

#include "amx.h"

namespace lstm::cpu {
namespace {

template <typename Isa>
constexpr int kSums = kRows * Isa::vectors;  // as many as a product's block has: they hide the multiply-adds' latency
constexpr int kRounds = 20;
constexpr Index kSteps = 400000;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Has the compiler believe that x is changed and used here.
template <typename X>
LSTM_HD void touch(X& x) {
#ifdef LSTM_X86
    asm volatile("" : "+v"(x));
#else
    asm volatile("" : "+w"(x));
#endif
}

// One thread's multiply-adds; operations of one step.
template <typename Isa, typename A>
LSTM_HD double multiply_add() {
    Vector<Isa, A> sum[kSums<Isa>] = {}, x = Vector<Isa, A>{} + A(0.5), y = Vector<Isa, A>{} + A(0.25);
    for (auto& each : sum) touch(each);  // else all are known to be alike
    for (Index i = 0; i < kSteps; ++i) {
        touch(x);
#pragma GCC unroll 24
        for (int s = 0; s < kSums<Isa>; ++s) sum[s] = sum[s] * y + x;
    }
    for (auto& each : sum) touch(each);
    return 2.0 * kSums<Isa> * lanes<Isa, A>;
}

template <typename A>
double baseline_step() {
    return multiply_add<Baseline, A>();
}
#ifdef LSTM_X86
template <typename A>
__attribute__((target(LSTM_AVX2_TARGET))) double avx2_step() {
    return multiply_add<Avx2, A>();
}
template <typename A>
__attribute__((target(LSTM_AVX512_TARGET))) double avx512_step() {
    return multiply_add<Avx512, A>();
}
__attribute__((target(LSTM_PAIRS_TARGET))) double pairs_step() {
    __m512 sum[kSums<Pairs>];
    for (auto& each : sum) {
        each = _mm512_setzero_ps();
        touch(each);
    }
    __m512i x = _mm512_set1_epi32(0x3f003f00), y = _mm512_set1_epi32(0x3e803e80);  // pairs of 0.5 and of 0.25
    for (Index i = 0; i < kSteps; ++i) {
        touch(x);
#pragma GCC unroll 24
        for (auto& each : sum) each = _mm512_dpbf16_ps(each, (__m512bh)x, (__m512bh)y);
    }
    for (auto& each : sum) touch(each);
    return 4.0 * kSums<Pairs> * 16;
}
__attribute__((target(LSTM_AMX_TARGET))) double amx_step() {
    const RegistersInUse registers;
    set_registers(16, 16);
    for (Index i = 0; i < kSteps; ++i) {
        tile_dot<0, 4, 6>();
        tile_dot<1, 4, 7>();
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
    }
    return 4.0 * 2 * 16 * 16 * kDeep;
}
#endif

template <typename A>
auto step_of([[maybe_unused]] InstructionSet set) {
#ifdef LSTM_X86
    if (set >= InstructionSet::avx512) return avx512_step<A>;
    if (set == InstructionSet::avx2) return avx2_step<A>;
#endif
    return baseline_step<A>;
}

// The shortest of several rounds of `work` on all threads at once.
template <typename Work>
double shortest([[maybe_unused]] int threads, const Work& work) {
    double best = 1e9;
    for (int round = 0; round < kRounds; ++round) {
        double start = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
        {
#ifdef _OPENMP
#pragma omp barrier
#pragma omp master
#endif
            start = now();
            work();
        }
        best = std::min(best, now() - start);
    }
    return best;
}

}  // namespace

double peak_rate(Dtype dtype, InstructionSet set, int threads) {
    auto step = dtype == Dtype::float64 ? step_of<double>(set) : step_of<float>(set);
#ifdef LSTM_X86
    if (dtype == Dtype::bfloat16 && set == InstructionSet::avx512_bf16) step = pairs_step;
    if (dtype == Dtype::bfloat16 && set == InstructionSet::amx) step = amx_step;
#endif
    return step() * static_cast<double>(kSteps) * threads / shortest(threads, step);
}

double meeting_seconds([[maybe_unused]] int threads) {
#ifdef _OPENMP
    constexpr int meetings = 2000;
    if (threads > 1) {
        return shortest(threads,
                        [] {
                            for (int i = 0; i < meetings; ++i) {
#pragma omp barrier
                            }
                        }) /
               meetings;
    }
#endif
    return 0;
}

}  // namespace lstm::cpu

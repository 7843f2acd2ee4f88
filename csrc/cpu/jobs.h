// The walks of a layer, each compiled once for every instruction set, in a file apiece: they take long to compile.
#pragma once

#include "forward.h"
#include "gradients.h"

namespace lstm::cpu {

// One thread's part of a Job, a Forward or a Backward.
template <typename Job>
void run_baseline(const Job& job, int thread, int threads);
#ifdef LSTM_X86
template <typename Job>
__attribute__((target(LSTM_AVX2_TARGET))) void run_avx2(const Job& job, int thread, int threads);
template <typename Job>
__attribute__((target(LSTM_AVX512_TARGET))) void run_avx512(const Job& job, int thread, int threads);
template <typename Job>
__attribute__((target(LSTM_PAIRS_TARGET))) void run_pairs(const Job& job, int thread, int threads);
template <typename Job>
__attribute__((target(LSTM_AMX_TARGET))) void run_amx(const Job& job, int thread, int threads);
template <typename Job>
__attribute__((target(LSTM_AMX_TARGET))) void run_amx_over_steps(const Job& job, int thread, int threads);
template <typename Job>
__attribute__((target(LSTM_AMX_TARGET))) void run_amx_digits(const Job& job, int thread, int threads);
#endif

// run_thread, which notes what is unfit for a product, and forgets what an earlier call noted.
template <typename Isa, typename Job>
LSTM_HD void run_noting(const Job& job, int thread, int threads) {
    unfit = false;
    run_thread<Isa>(job, thread, threads);
    if (unfit) job.walk.unfit = true;
}

#define LSTM_INSTANTIATE(run, T)                                   \
    template void run(const Forward<T>&, int thread, int threads); \
    template void run(const Backward<T>&, int thread, int threads);
#define LSTM_INSTANTIATE_ALL(run)  \
    LSTM_INSTANTIATE(run, float)   \
    LSTM_INSTANTIATE(run, double)  \
    LSTM_INSTANTIATE(run, Float16) \
    LSTM_INSTANTIATE(run, BFloat16)

}  // namespace lstm::cpu

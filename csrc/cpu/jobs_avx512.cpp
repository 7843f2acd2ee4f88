#include "jobs.h"

#ifdef LSTM_X86
namespace lstm::cpu {

template <typename Job>
void run_avx512(const Job& job, int thread, int threads) {
    run_noting<Avx512>(job, thread, threads);
}
template <typename Job>
void run_pairs(const Job& job, int thread, int threads) {
    run_noting<Pairs>(job, thread, threads);
}
LSTM_INSTANTIATE_ALL(run_avx512)
LSTM_INSTANTIATE(run_pairs, BFloat16)

}  // namespace lstm::cpu
#endif

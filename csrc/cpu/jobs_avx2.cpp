#include "jobs.h"

#ifdef LSTM_X86
namespace lstm::cpu {

template <typename Job>
void run_avx2(const Job& job, int thread, int threads) {
    run_noting<Avx2>(job, thread, threads);
}
LSTM_INSTANTIATE_ALL(run_avx2)

}  // namespace lstm::cpu
#endif

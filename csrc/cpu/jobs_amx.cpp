#ifdef __x86_64__
#include "jobs.h"

namespace lstm::cpu {

template <typename Job>
void run_amx(const Job& job, int thread, int threads) {
    const RegistersInUse registers;
    run_thread<Amx>(job, thread, threads);
    if (thread_state.infinite) job.walk.infinite = true;
}
LSTM_INSTANTIATE(run_amx, float)
LSTM_INSTANTIATE(run_amx, BFloat16)

}  // namespace lstm::cpu
#endif

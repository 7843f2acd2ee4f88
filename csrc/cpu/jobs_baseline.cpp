#include "jobs.h"

namespace lstm::cpu {

template <typename Job>
void run_baseline(const Job& job, int thread, int threads) {
    run_noting<Baseline>(job, thread, threads);
}
LSTM_INSTANTIATE_ALL(run_baseline)

}  // namespace lstm::cpu

#include "jobs.h"

#ifdef LSTM_X86
namespace lstm::cpu {

template <typename Job>
void run_amx(const Job& job, int thread, int threads) {
    const RegistersInUse registers;
    run_noting<Amx>(job, thread, threads);
}
template <typename Job>
void run_amx_over_steps(const Job& job, int thread, int threads) {
    const RegistersInUse registers;
    run_noting<AmxOverSteps>(job, thread, threads);
}
template <typename Job>
void run_amx_digits(const Job& job, int thread, int threads) {
    const RegistersInUse registers;
    run_noting<AmxDigits>(job, thread, threads);
}
template void run_amx_digits(const Forward<float>&, int thread, int threads);
LSTM_INSTANTIATE(run_amx, float)
LSTM_INSTANTIATE(run_amx, BFloat16)
LSTM_INSTANTIATE(run_amx_over_steps, float)

}  // namespace lstm::cpu
#endif

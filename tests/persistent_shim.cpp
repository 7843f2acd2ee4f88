// The host run of a persistent kernel, for ctypes: tests/test_persistent_faults.py builds it with broken kernels. Of
// the forward walk, or with LSTM_BACKWARD of the other; LSTM_GRID says whether over the grid.
#include <string>

#include "cuda/persistent_bwd.h"
#include "cuda/persistent_fwd.h"
#include "host/persistent_launch.h"

using namespace lstm::persistent;

namespace {

Sizes sizes(const std::int64_t* n) {
    return {n[0], static_cast<int>(n[1]), static_cast<int>(n[2]), static_cast<int>(n[3]), static_cast<int>(n[4])};
}

Plan plan(const std::int64_t* n) {
    return {static_cast<int>(n[5]),  static_cast<int>(n[6]),  static_cast<int>(n[7]),  static_cast<int>(n[8]),
            static_cast<int>(n[9]),  static_cast<int>(n[10]), static_cast<int>(n[11]), static_cast<int>(n[12]),
            static_cast<int>(n[13]), static_cast<int>(n[14])};
}

// One kernel of bf16 for up to four groups, for clusters or for the grid: more would take time to compile.
template <template <typename, bool, int, bool> class Kernel, typename Walk>
const char* run(Walk walk, std::uint64_t schedule) {
    static std::string words;
    lay_out(walk, Kind::bfloat16);
    words = host::launch<Kernel, Instance<Bf16, false, 4, LSTM_GRID>>(walk, schedule);
    return words.c_str();
}

}  // namespace

#ifndef LSTM_BACKWARD

// p: gates, h0, c0, w_hh, b_ih and b_hh of both directions, starts, y, h_n, c_n, cells, workspace; n: N, T, B, H, D,
// then the plan.
extern "C" const char* walk(void* const* p, const std::int64_t* n, std::uint64_t schedule) {
    const auto* starts = static_cast<const std::int32_t*>(p[9]);
    const Forward of{p[0],  p[1],  p[2],     {p[3], p[4]}, {p[5], p[6]}, {p[7], p[8]}, starts, p[10], p[11],
                     p[12], p[13], sizes(n), plan(n),      p[14],        {},           {},     0};
    return run<ForwardKernel>(of, schedule);
}

#else

// p: gates, cells, c0, w_hh of both directions, starts, dy, dh_n, dc_n, dgates, dh0, dc0, workspace.
extern "C" const char* walk(void* const* p, const std::int64_t* n, std::uint64_t schedule) {
    const auto* starts = static_cast<const std::int32_t*>(p[5]);
    const Backward of{p[0],  p[1],  p[2],     {p[3], p[4]}, starts, p[6], p[7], p[8], p[9],
                      p[10], p[11], sizes(n), plan(n),      p[12],  {},   {},   0};
    return run<BackwardKernel>(of, schedule);
}

#endif

// What this machine could do at most: rates that measured times are compared with.
#pragma once

#include "layer.h"

namespace lstm::cpu {

// Floating-point operations in a second, a multiply-add counted as two, that `threads` threads keep up in registers in
// the arithmetic of the products of `dtype`; the best of several rounds of a few milliseconds.
double peak_rate(Dtype dtype, InstructionSet set, int threads);

// Seconds that `threads` threads take to meet; 0 for one.
double meeting_seconds(int threads);

}  // namespace lstm::cpu

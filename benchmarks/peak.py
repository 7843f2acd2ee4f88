"""The rate of fp32 multiply-adds that one core keeps up in registers: the limit that rates are compared with."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

# 24 sums, as many as a 6 x 4 block has: enough to hide the latency of two multiply-adds a cycle.
_SOURCE = r"""
#include <chrono>
#include <cstdio>
#ifdef __AVX512F__
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
int main() {
    double best = 0;
    for (int round = 0; round < 20; ++round) {
        Vector sum[kSums], x = Vector{} + 0.5f, y = Vector{} + 0.25f;
        for (int s = 0; s < kSums; ++s) sum[s] = Vector{} + static_cast<float>(s);
        const int steps = 2000000;
        const double start = now();
        for (int i = 0; i < steps; ++i) {
            asm volatile("" : "+x"(x), "+x"(y));  // so that no step is left out
#pragma GCC unroll 24
            for (int s = 0; s < kSums; ++s) sum[s] = sum[s] * y + x;
        }
        const double rate = 2.0 * kSums * (kBytes / 4) * steps / (now() - start) / 1e9;
        Vector total = {};
        for (int s = 0; s < kSums; ++s) total += sum[s];
        asm volatile("" : : "x"(total));
        if (rate > best) best = rate;
    }
    std::printf("%f\n", best);
}
"""


def peak_gflops() -> float | None:
    """The best of twenty rounds, in Gflop/s; None without a C++ compiler."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "peak.cpp"), Path(folder, "peak")
        source.write_text(_SOURCE)
        subprocess.run([*compiler, "-O3", "-march=native", str(source), "-o", str(program)], check=True)
        return float(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)

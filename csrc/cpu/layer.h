// One layer on a CPU: all steps and directions, its products over all steps too, in one call forward and one backward.
// This header is the contract.
//
// N rows over all steps, B sequences, I input features, H hidden units, R features of h (H unless it is projected), D
// directions, T the storage dtype, A the accumulation dtype (double for float64, else float). Row (t, b) lies at
// steps[0] + ... + steps[t-1] + b. Direction 0 walks t = 0 .. time-1, direction 1 the other way; a sequence joins that
// walk at its own last step. Gates are ordered i, f, g, o.
//
// All arrays are C-contiguous and need only the alignment of their elements. Nothing written may overlap anything else
// in the call, and nothing is kept after it. What is "written" is written fully.
// The same input gives the same bits on the same number of threads, in any one instruction set; on any number, unless
// W_hh goes in fixed point (Walk::fixes) or a few rows read weights as they lie in AVX-512. Both functions throw
// std::bad_alloc for lack of scratch memory (a packed copy of the weights, some steps of gates, a few states), and
// nothing else.
#pragma once

#include <cstdint>

#include "../lstm_math.h"

namespace lstm::cpu {

// Named avx512_slow_bf16 or amx, layer.cpp chooses for each call among those before it as well. The last two it alone
// names, for floats: AMX for products over all steps, AVX-512 for those of a step; and AMX in digits.
enum class InstructionSet : int {
    baseline = 0,
    avx2 = 1,
    avx512 = 2,
    avx512_bf16 = 3,
    avx512_slow_bf16 = 4,  // the processor multiplies pairs of bf16 at half the rate of floats, not at twice
    amx = 5,
    amx_over_steps = 6,
    amx_digits = 7
};

// The best one that this CPU runs; it runs all those before it too.
InstructionSet best_instruction_set();

struct Shape {
    const std::int64_t* steps;       // [time] active sequences of each step: >= 1, never growing, the first is batch
    std::int64_t time;               // >= 1
    std::int64_t batch;              // B >= 1
    std::int64_t input;              // I >= 0
    std::int64_t hidden;             // H >= 1
    std::int64_t features;           // R >= 1
    int directions;                  // D: 1 or 2
    Dtype dtype;                     // T
    int threads;                     // at most so many; small problems take fewer
    InstructionSet instruction_set;  // one that this CPU runs
};

struct Weights {
    const void* w_ih;  // T [4H, I]
    const void* w_hh;  // T [4H, R]
    const void* b_ih;  // T [4H], or null with b_hh
    const void* b_hh;  // T [4H]
    const void* w_hr;  // T [R, H]; null where R is H and h is not projected
};

struct ForwardArgs {
    const void* x;       // T [N, I]
    const void* h0;      // T [D, B, R]; null for zeros
    const void* c0;      // T [D, B, H]; null for zeros
    Weights weights[2];  // one for each direction
    void* y;             // T [N, D * R], written: direction d fills columns d * R ..
    void* h_n;           // T [D, B, R], written: each sequence's state after its own last step of the walk; may be null
    void* c_n;           // T [D, B, H], written
    void* gates;         // T [D, N, 4H], written: activated, for the backward pass; null when there will be none
    void* cells;         // A [D, N, H], written: c_t for the backward pass; null likewise
};

struct WeightGradients {
    void* w_ih;  // T [4H, I], written; null where not asked for
    void* w_hh;  // T [4H, R], likewise
    void* bias;  // T [4H], likewise: the gradient of b_ih, and of b_hh
    void* w_hr;  // T [R, H], likewise
};

struct BackwardArgs {
    const void* x;       // T [N, I]
    const void* h0;      // T [D, B, R]
    const void* c0;      // T [D, B, H]
    Weights weights[2];  // one for each direction; biases are not read
    const void* y;       // T [N, D * R] from the forward call
    const void* gates;   // T [D, N, 4H] from the forward call
    const void* cells;   // A [D, N, H] from the forward call
    const void* dy;      // T [N, D * R] gradient of y; null when zero
    const void* dh_n;    // T [D, B, R] gradient of h_n; null when zero
    const void* dc_n;    // T [D, B, H] gradient of c_n; null when zero
    void* dx;            // T [N, I], written; null where not asked for
    void* dh0;           // T [D, B, R], likewise
    void* dc0;           // T [D, B, H], likewise
    WeightGradients gradients[2];
};

void layer_forward(const Shape& shape, const ForwardArgs& args);
void layer_backward(const Shape& shape, const BackwardArgs& args);

}  // namespace lstm::cpu

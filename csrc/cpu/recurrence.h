// The whole recurrence of one layer, all steps and directions, in one call. This header is the contract.
//
// N rows over all steps, B sequences, H hidden units, D directions, T the storage dtype, A the accumulation dtype
// (double for float64, else float). Row (t, b) lies at steps[0] + ... + steps[t-1] + b. Direction 0 walks t = 0 ..
// time-1, direction 1 the other way; a sequence joins that walk at its own last step. Gates are ordered i, f, g, o.
//
// All arrays are C-contiguous and need only the alignment of their elements. Nothing written may overlap anything else
// in the call, and nothing is kept after it. What is "written" is written fully and read only where "in place" is said.
// The same input gives the same bits, whatever the number of threads, in any one instruction set. Both functions throw
// std::bad_alloc for lack of scratch memory (a copy of w_hh in A, and a few states), and nothing else.
#pragma once

#include <cstdint>

#include "../lstm_math.h"

namespace lstm::cpu {

enum class InstructionSet : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best one that this CPU runs; it runs all those before it too.
InstructionSet best_instruction_set();

struct Shape {
    const std::int64_t* steps;       // [time] active sequences of each step: >= 1, never growing, the first is batch
    std::int64_t time;               // >= 1
    std::int64_t batch;              // B >= 1
    std::int64_t hidden;             // H >= 1
    int directions;                  // D: 1 or 2
    Dtype dtype;                     // T
    int threads;                     // at most so many; small problems take fewer
    InstructionSet instruction_set;  // one that this CPU runs
};

struct ForwardArgs {
    void* gates;          // T [D, N, 4H], in place: x W_ih^T + b_ih + b_hh; on return activated, unspecified if !cells
    const void* h0;       // T [D, B, H]
    const void* c0;       // T [D, B, H]
    const void* w_hh[2];  // T [4H, H], one for each direction
    void* y;              // T [N, D * H], written: direction d fills columns d * H ..
    void* h_n;            // T [D, B, H], written: each sequence's state after its own last step of the walk
    void* c_n;            // T [D, B, H], written
    void* cells;          // A [D, N, H], written: c_t for the backward pass; null when there will be none
};

struct BackwardArgs {
    const void* gates;    // T [D, N, 4H] activated gates, from the forward call
    const void* cells;    // A [D, N, H] from the forward call
    const void* c0;       // T [D, B, H]
    const void* w_hh[2];  // T [4H, H], one for each direction
    const void* dy;       // T [N, D * H] gradient of y; null when zero
    void* dh;             // A [D, B, H], in place: gradient of h_n on entry, of h0 on return
    void* dc;             // A [D, B, H], in place: gradient of c_n on entry, of c0 on return
    void* dgates;         // T [D, N, 4H], written: gradient of the pre-activations
};

void recurrence_forward(const Shape& shape, const ForwardArgs& args);
void recurrence_backward(const Shape& shape, const BackwardArgs& args);

}  // namespace lstm::cpu

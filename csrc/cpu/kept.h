// Large memory that a training step needs, and the next step again.
#pragma once

#include <cstdint>
#include <memory>

#include "block.h"

namespace lstm::cpu {

// What is saved: from here on malloc asks the system for each block, and gives its pages back with it.
constexpr std::int64_t kLeastSaved = std::int64_t{32} << 20;
// Gradients of weights, which are alike and go together: malloc gives back what is free at its end beyond twice the
// largest block that it had of the system.
constexpr std::int64_t kLeastGradient = std::int64_t{1} << 20;

// Keeps a block for the next who asks for as much; up to 1 GiB of them, of which the system may take the pages beyond
// 128 MiB when it is short of others.
struct Keep {
    void operator()(Block* block) const;
};
using KeptBlock = std::unique_ptr<Block, Keep>;

// A block of that size or of up to twice as much: of those kept the smallest, and of the smallest the last; or a new
// one. Where none serves, as much as is asked for is freed first, of what was kept the longest.
KeptBlock take_block(std::int64_t bytes);  // throws std::bad_alloc

}  // namespace lstm::cpu

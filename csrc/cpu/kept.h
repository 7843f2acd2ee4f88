// Large memory that a training step needs until its end, and the next step again.
#pragma once

#include <cstdint>
#include <memory>

#include "block.h"

namespace lstm::cpu {

// From here on malloc asks the system for each block, and gives its pages back with it.
constexpr std::int64_t kLeastKept = std::int64_t{32} << 20;

// Keeps a block for the next who asks for as much; up to 1 GiB of them, whose pages the system may take when it is
// short of others.
struct Keep {
    void operator()(Block* block) const;
};
using KeptBlock = std::unique_ptr<Block, Keep>;

// A block of that size or of up to twice as much: of those kept the smallest, and of the smallest the last; or a new
// one. Where none serves, all that are kept are freed first.
KeptBlock take_block(std::int64_t bytes);  // throws std::bad_alloc

}  // namespace lstm::cpu

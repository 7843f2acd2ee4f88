// The memory that a call needs for itself.
#pragma once

#include <cstdint>
#include <memory>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "block.h"

namespace lstm::cpu {

// Arrays carved from one block. The first use counts the bytes, with null for every array; an arena made with that
// count gives them. Arrays begin at multiples of 64 bytes and hold anything. A block of up to 128 MiB is kept for the
// process's next call, whose pages then need not be made anew.
class Arena {
  public:
    Arena() = default;
    explicit Arena(std::int64_t bytes);  // throws std::bad_alloc
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <typename A>
    A* take(std::int64_t size) {
        char* const array = block_ == nullptr ? nullptr : block_->data + used_;
        used_ += (size * static_cast<std::int64_t>(sizeof(A)) + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__  // nothing may be read or written behind an array
        if (block_ != nullptr)
            __asan_poison_memory_region(array + size * sizeof(A),
                                        used_ + 64 - (array - block_->data) - size * sizeof(A));
        used_ += 64;
#endif
        return reinterpret_cast<A*>(array);
    }
    std::int64_t used() const { return used_; }

  private:
    std::unique_ptr<Block> block_;
    std::int64_t used_ = 0;
};

}  // namespace lstm::cpu

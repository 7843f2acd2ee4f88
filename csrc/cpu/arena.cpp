#include "arena.h"

#include <atomic>

namespace lstm::cpu {
namespace {

constexpr std::int64_t kMostKept = std::int64_t{128} << 20;

// What the last call left, or null. A call takes it away, so that calls side by side have one each.
std::atomic<Block*> kept{nullptr};

}  // namespace

Arena::Arena(std::int64_t bytes) : block_(kept.exchange(nullptr)) {
    if (block_ != nullptr && block_->size >= bytes) return;
    block_.reset();  // before there is another
    block_ = std::make_unique<Block>(bytes);
}

Arena::~Arena() {
    if (block_ == nullptr) return;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(block_->data, block_->size);
#endif
    if (block_->size <= kMostKept) block_.reset(kept.exchange(block_.release()));
}

}  // namespace lstm::cpu

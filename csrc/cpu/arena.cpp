#include "arena.h"

#include <atomic>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lstm::cpu {
namespace {

constexpr std::int64_t kHugePage = std::int64_t{2} << 20, kMostKept = std::int64_t{128} << 20;

// What the last call left, or null. A call takes it away, so that calls side by side have one each.
std::atomic<char*> kept{nullptr};

std::int64_t& size_of(char* block) { return *reinterpret_cast<std::int64_t*>(block); }

}  // namespace

void ask_for_huge_pages([[maybe_unused]] void* result, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    static const bool zeroed_in_cache = sysconf(_SC_LEVEL2_CACHE_SIZE) >= kHugePage;
    constexpr std::uintptr_t page = kHugePage;
    const auto begin = reinterpret_cast<std::uintptr_t>(result);
    const std::uintptr_t from = (begin + page - 1) / page * page, to = (begin + bytes) / page * page;
    if (zeroed_in_cache && from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

Arena::Arena(std::int64_t bytes) {
    block_ = kept.exchange(nullptr);
    if (block_ != nullptr && size_of(block_) >= bytes) return;
    std::free(block_);
    const std::int64_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    block_ = static_cast<char*>(std::aligned_alloc(kHugePage, size));
    if (block_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(block_, size, MADV_HUGEPAGE);
#endif
    size_of(block_) = size;
}

Arena::~Arena() {
    if (block_ == nullptr) return;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(block_, size_of(block_));
#endif
    std::free(size_of(block_) > kMostKept ? block_ : kept.exchange(block_));
}

}  // namespace lstm::cpu

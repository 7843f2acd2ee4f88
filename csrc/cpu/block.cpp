#include "block.h"

#include <algorithm>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lstm::cpu {

void ask_for_huge_pages([[maybe_unused]] void* result, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    static const bool zeroed_in_cache = sysconf(_SC_LEVEL2_CACHE_SIZE) >= kHugePage;
    constexpr std::uintptr_t page = kHugePage;
    const auto begin = reinterpret_cast<std::uintptr_t>(result);
    const std::uintptr_t from = (begin + page - 1) / page * page, to = (begin + bytes) / page * page;
    if (zeroed_in_cache && from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

Block::Block(std::int64_t bytes)
    : size((std::max(bytes, std::int64_t{1}) + kHugePage - 1) / kHugePage * kHugePage),
      data(static_cast<char*>(std::aligned_alloc(kHugePage, size))) {
    if (data == nullptr) throw std::bad_alloc();
}

}  // namespace lstm::cpu

// Small kernels for tests/test_simt.py, on the host layer.
#include <cstring>
#include <string>

#include "host/simt.h"

using namespace lstm;

namespace {

const char* keep(const std::string& words) {
    static thread_local std::string kept;
    kept = words;
    return kept.c_str();
}

template <typename T>
void product(const std::uint8_t* a, const std::uint8_t* b, float* d) {
    // Fragments as PTX ISA draws them for mma.m16n8k16 (16 bits) and m16n8k8 (tf32): groupID = lane / 4,
    // threadID_in_group = lane % 4. Words of a: row groupID or + 8, K from 2 (or 1) threadID_in_group, or 8 (or 4)
    // more.
    constexpr int kInWord = 4 / sizeof(T), kDepth = 8 * kInWord;
    const int group = static_cast<int>(threadIdx.x) / 4, thread = static_cast<int>(threadIdx.x) % 4;
    const auto word = [&](const std::uint8_t* matrix, int row, int k) {
        std::uint32_t bits;
        std::memcpy(&bits, matrix + (row * kDepth + k) * sizeof(T), 4);
        return bits;
    };
    const int k = thread * kInWord, half = kDepth / 2;
    const std::uint32_t fragment[4] = {word(a, group, k), word(a, group + 8, k), word(a, group, k + half),
                                       word(a, group + 8, k + half)};
    float sum[4] = {1, 2, 3, 4};
    simt::mma<T>(sum, fragment, word(b, group, k), word(b, group, k + half));
    for (int j = 0; j < 4; ++j) d[(group + j / 2 * 8) * 8 + 2 * thread + j % 2] = sum[j];
}

}  // namespace

// a [16, K], b [8, K] of the type (0 bf16, 1 fp16, 2 tf32), d [16, 8] = (1, 2, 3, 4 by place in the fragment) + a b^T.
extern "C" const char* product(int type, const std::uint8_t* a, const std::uint8_t* b, float* d) {
    const host::Launch one{{1, 1, 1}, {32, 1, 1}, 1, 0, 1};
    return keep(host::run(one, [&] {
        if (type == 0) return product<BFloat16>(a, b, d);
        if (type == 1) return product<Float16>(a, b, d);
        product<float>(a, b, d);
    }));
}

extern "C" float round_tf32(float x) { return simt::round_tf32(x); }

// out [blocks, y, x, 6]: what each thread of a grid of 4 x 3 blocks of 8 x 4 threads, in clusters of 2, says it is.
extern "C" const char* indices(std::int32_t* out) {
    const host::Launch launch{{4, 3, 1}, {8, 4, 1}, 2, 0, 1};
    return keep(host::run(launch, [&] {
        const unsigned block = blockIdx.y * gridDim.x + blockIdx.x, thread = threadIdx.y * blockDim.x + threadIdx.x;
        const unsigned found[6] = {blockIdx.x,  blockIdx.y,           threadIdx.x,
                                   threadIdx.y, simt::cluster_rank(), simt::shuffle(thread, 31 - thread)};
        for (int j = 0; j < 6; ++j) out[(block * 32 + thread) * 6 + j] = static_cast<std::int32_t>(found[j]);
    }));
}

// Rounds in which each of 4 blocks sends its number to all, waits and adds up what came: sums [blocks, rounds].
extern "C" const char* ring(std::uint64_t schedule, int rounds, int buffers, std::int32_t* sums) {
    struct Memory {
        simt::Barrier full[2];
        simt::Words words[2][4];
    };
    const host::Launch launch{{4, 1, 1}, {32, 1, 1}, 4, sizeof(Memory), schedule};
    return keep(host::run(launch, [&] {
        auto* memory = reinterpret_cast<Memory*>(simt::shared_memory());
        const unsigned rank = simt::cluster_rank(), lane = threadIdx.x;
        if (lane == 0) {
            for (auto& barrier : memory->full) {
                simt::init(&barrier, 1);
                simt::arrive_expecting(&barrier, 64);
            }
        }
        simt::publish_barriers();
        simt::sync_cluster();
        for (int round = 0; round < rounds; ++round) {
            const int buffer = round % 2, place = buffer % buffers;
            const auto value = static_cast<std::uint32_t>(round * 10 + static_cast<int>(rank));
            if (lane < 4) simt::send(&memory->words[place][rank], lane, {value, 0, 0, 0}, &memory->full[buffer]);
            simt::wait(&memory->full[buffer], static_cast<unsigned>(round) / 2 % 2);
            simt::shuffle(0, 0);  // others may go on meanwhile
            std::uint32_t sum = 0;
            for (int j = 0; j < 4; ++j) sum += memory->words[place][j].x;
            simt::sync_threads();
            if (lane == 0 && round + 2 < rounds) simt::arrive_expecting(&memory->full[buffer], 64);
            if (lane == 0) sums[rank * rounds + round] = static_cast<std::int32_t>(sum);
        }
        simt::sync_cluster();
    }));
}

// Pairs of warps that exchange numbers through shared memory, at the block's barrier (1) or at none (0): sums [128] of
// what each thread got in all rounds.
extern "C" const char* exchange(std::uint64_t schedule, int barriers, std::int32_t* sums) {
    constexpr int kRounds = 4;
    const host::Launch launch{{1, 1, 1}, {128, 1, 1}, 1, 2 * 128 * sizeof(std::int32_t), schedule};
    return keep(host::run(launch, [&] {
        const int thread = static_cast<int>(threadIdx.x);
        std::int32_t sum = 0;
        for (int round = 0; round < kRounds; ++round) {
            auto* buffer = reinterpret_cast<std::int32_t*>(simt::shared_memory()) + round % 2 * 128;
            buffer[thread] = 1000 * round + thread;
            if (barriers != 0) simt::sync_threads();
            simt::sync_warp();
            sum += buffer[thread ^ 32];
        }
        sums[thread] = sum;
    }));
}

// Bytes that may land before anyone expects them. Block 1 arrives twice, late the second time: found [32], what
// each lane of the second warp then reads, the sum of both messages and of what was stored before the last arrival.
extern "C" const char* early(std::uint64_t schedule, std::int32_t* found) {
    struct Memory {
        simt::Barrier full;
        std::int32_t before_last;
        alignas(16) simt::Words words[2];
    };
    const host::Launch launch{{2, 1, 1}, {64, 1, 1}, 2, sizeof(Memory), schedule};
    return keep(host::run(launch, [&] {
        auto* memory = reinterpret_cast<Memory*>(simt::shared_memory());
        const unsigned thread = threadIdx.x;
        if (thread == 0) simt::init(&memory->full, 2);
        simt::publish_barriers();
        simt::sync_cluster();
        if (simt::cluster_rank() == 0) {
            if (thread < 2) simt::send(&memory->words[thread], 1, {10 + thread, 0, 0, 0}, &memory->full);
            simt::sync_cluster();
            return simt::sync_cluster();
        }
        simt::sync_cluster();
        if (thread == 0) simt::arrive_expecting(&memory->full, 32);
        if (thread < 32) {
            for (int j = 0; j < 20; ++j) simt::sync_warp();
            if (thread == 0) {
                memory->before_last = 100;
                simt::arrive_expecting(&memory->full, 0);
            }
        } else {
            simt::wait(&memory->full, 0);
            found[thread - 32] =
                memory->before_last + static_cast<std::int32_t>(memory->words[0].x + memory->words[1].x);
        }
        simt::sync_cluster();
    }));
}

// Two clusters of 16 blocks of 256 threads; every block gets the place in the grid of all blocks of its cluster:
// sums [32]. And fresh [32]: whether a block's memory starts aligned and as NaN.
extern "C" const char* large(std::uint64_t schedule, std::int32_t* sums, std::int32_t* fresh) {
    struct Memory {
        simt::Words words[16];
        simt::Barrier full;
    };
    const host::Launch launch{{32, 1, 1}, {256, 1, 1}, 16, sizeof(Memory), schedule};
    return keep(host::run(launch, [&] {
        auto* memory = reinterpret_cast<Memory*>(simt::shared_memory());
        if (threadIdx.x == 0) {
            bool all = reinterpret_cast<std::uintptr_t>(memory) % 128 == 0;
            for (std::size_t j = 0; j < sizeof(Memory); ++j) all = all && simt::shared_memory()[j] == 0xff;
            fresh[blockIdx.x] = all;
            simt::init(&memory->full, 1);
            simt::arrive_expecting(&memory->full, sizeof(memory->words));
        }
        simt::publish_barriers();
        simt::sync_cluster();
        if (threadIdx.x < 16) {
            simt::send(&memory->words[simt::cluster_rank()], threadIdx.x, {blockIdx.x, 0, 0, 0}, &memory->full);
        }
        simt::wait(&memory->full, 0);
        std::uint32_t sum = 0;
        for (const simt::Words& words : memory->words) sum += words.x;
        if (threadIdx.x == 255) sums[blockIdx.x] = static_cast<std::int32_t>(sum);
        simt::sync_cluster();
    }));
}

// A launch of nothing, of a size that a card may not take.
extern "C" const char* launch(unsigned blocks, unsigned threads, unsigned cluster, unsigned shared) {
    return keep(host::run({{blocks, 1, 1}, {threads, 1, 1}, cluster, shared, 0}, [] {}));
}

// What goes wrong, by number.
extern "C" const char* wrong(int which) {
    const std::uint64_t schedule = which == 12 ? 1 : 0;  // 1: messages land as late as they can
    const host::Launch launch{{2, 1, 1}, {64, 1, 1}, which == 7 ? 1u : 2u, 256, schedule};
    return keep(host::run(launch, [&] {
        auto* barrier = reinterpret_cast<simt::Barrier*>(simt::shared_memory());
        auto* words = simt::shared_memory() + 128;
        const unsigned thread = threadIdx.x;
        const bool first = thread == 0 && simt::cluster_rank() == 0;
        float d[4];
        if (thread == 0 && which != 1 && which != 18) simt::init(barrier, 1);
        simt::sync_threads();
        switch (which) {
            case 0:  // nobody arrives
                return simt::wait(barrier, 0);
            case 1:  // never made
                return simt::wait(barrier, 0);
            case 2:  // made again
                if (first) simt::init(barrier, 1);
                return;
            case 3:  // one arrival too many
                if (first) {
                    simt::arrive_expecting(barrier, 16);
                    simt::arrive_expecting(barrier, 16);
                }
                return;
            case 4:  // half a warp goes elsewhere
                if (thread % 32 < 16) simt::shuffle(0, 0);
                return simt::mma<float>(d, {0, 0, 0, 0}, 0, 0);
            case 5:  // one thread leaves
                if (!first) simt::sync_threads();
                return;
            case 6:  // beyond the cluster
                return simt::send(words, 2, {}, barrier);
            case 7:  // a cluster of one
                return simt::send(words, 0, {}, barrier);
            case 8:  // off by 8 bytes
                return simt::send(words + 8, 1, {}, barrier);
            case 9:  // past the end
                return simt::send(words + 128, 1, {}, barrier);
            case 10:  // to a block that has ended
                if (simt::cluster_rank() == 1) return;
                for (int j = 0; j < 1000; ++j) simt::shuffle(0, 0);
                if (first) simt::send(words, 1, {}, barrier);
                return;
            case 11:  // half of the block waits for the other half
                if (thread < 32) simt::sync_threads();
                return;
            case 12:  // sent, and nobody stays for it
                if (first) simt::send(words, 1, {}, barrier);
                return;
            case 13:  // the cluster's very last thread sends to a block that has ended
                if (thread == 63 && simt::cluster_rank() == 1) simt::send(words, 0, {}, barrier);
                return;
            case 14:  // just before shared memory
                return simt::send(simt::shared_memory() - 16, 1, {}, barrier);
            case 15:  // lanes multiply different types
                if (thread % 2 == 0) return simt::mma<BFloat16>(d, {0, 0, 0, 0}, 0, 0);
                return simt::mma<Float16>(d, {0, 0, 0, 0}, 0, 0);
            case 16:  // a barrier that nobody arrives at
                if (first) simt::init(barrier + 1, 0);
                return;
            case 17:  // a barrier in a thread's own memory
                simt::Barrier own;
                return simt::wait(&own, 0);
            case 18:  // counted at no barrier
                if (first) simt::send(words, 1, {}, barrier);
                return simt::sync_cluster();
            case 19:  // two phases end before those who wait look again
                if (thread != 63) return simt::wait(barrier, 0);
                simt::arrive_expecting(barrier, 0);
                return simt::arrive_expecting(barrier, 0);
            case 20:  // one thread leaves before a product
                if (thread % 32 != 5) simt::sync_warp();
                return;
        }
    }));
}

// Rounds in which each of 40 blocks publishes its number in global memory, one warp each half of it, signals, waits for
// all signals and adds up what it collects: sums [blocks, rounds]. fault: 0 none, 1 one buffer instead of two, 2 nobody
// waits, 3 a signal before the block's other warp has published, 4 no wait for what is collected.
extern "C" const char* grid(std::uint64_t schedule, int rounds, int fault, std::int32_t* sums) {
    constexpr unsigned kBlocks = 40;
    struct alignas(16) Memory {
        simt::Words words[2][kBlocks][2];
        simt::Flag flag;
    } memory{};
    const host::Launch launch{{kBlocks, 1, 1}, {64, 1, 1}, kBlocks,       sizeof(memory.words[0]),
                              schedule,        &memory,    sizeof(memory)};
    return keep(host::run(launch, [&] {
        const unsigned block = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (int round = 0; round < rounds; ++round) {
            auto& words = memory.words[fault == 1 ? 0 : round % 2];
            const auto value = static_cast<std::uint32_t>(round * 10 + static_cast<int>(block));
            if (lane == 0) simt::publish(&words[block][warp], {value, 0, 0, 0});
            if (fault != 3) simt::sync_threads();
            if (threadIdx.x == 0) {
                simt::signal(&memory.flag);
                if (fault != 2) simt::await(&memory.flag, kBlocks * static_cast<unsigned>(round + 1));
            }
            simt::sync_threads();
            if (threadIdx.x == 0) {
                std::uint32_t sum = 0;
                auto* const here = reinterpret_cast<simt::Words*>(simt::shared_memory());
                for (unsigned j = 0; j < 2 * kBlocks; ++j) simt::collect(here + j, &words[j / 2][j % 2]);
                if (fault != 4) simt::collected();
                for (unsigned j = 0; j < 2 * kBlocks; ++j) sum += here[j].x;
                sums[block * static_cast<unsigned>(rounds) + static_cast<unsigned>(round)] =
                    static_cast<std::int32_t>(sum);
            }
        }
    }));
}

extern "C" const char* wrong_in_a_grid(int which) {
    alignas(16) simt::Words words[2] = {};
    const host::Launch launch{{2, 1, 1}, {32, 1, 1}, 2, 256, 0, words, sizeof(words)};
    return keep(host::run(launch, [&] {
        auto* flag = reinterpret_cast<simt::Flag*>(words);
        switch (which) {
            case 0:  // past the end
                return simt::publish(words + 2, {});
            case 1:  // off by 4 bytes
                return simt::collect(reinterpret_cast<simt::Words*>(simt::shared_memory()),
                                     reinterpret_cast<simt::Words*>(flag + 1));
            case 2:  // only one of two signals
                if (blockIdx.x == 0 && threadIdx.x == 0) simt::signal(flag);
                return simt::await(flag, 2);
            case 3:
                return simt::sync_cluster();
            case 4:
                return simt::send(simt::shared_memory(), 1, {},
                                  reinterpret_cast<simt::Barrier*>(simt::shared_memory()));
        }
    }));
}

#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <random>
#include <vector>

namespace lstm {

thread_local host::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

using simt::Barrier;
using simt::Words;

constexpr unsigned kLanes = 32, kBarriers = 16;
constexpr std::size_t kStack = 64 * 1024;

struct Failure {
    std::string words;
};

// What a Barrier's 8 bytes hold.
struct Phase {
    std::int32_t bytes;  // expected and not yet landed; negative when they landed first
    std::uint8_t arrivals, count, parity, mark;
};
constexpr std::uint8_t kMark = 0xb5;  // shared memory starts as 0xff, so that an unmade barrier shows
static_assert(sizeof(Phase) == sizeof(Barrier), "a phase is what a barrier holds");

// Threads that wait for one another.
struct Meeting {
    std::vector<unsigned> waiting;
};

struct Warp {
    Meeting meeting;
    const char* operation = nullptr;
    void* operands[kLanes];
};

struct Block {
    unsigned char* memory;  // of the launch's arena
    unsigned alive;
    std::vector<Warp> warps;
    Meeting barriers[kBarriers];
};

struct Fibre {
    ucontext_t context;
    unsigned block, thread;       // block: rank in the cluster
    const char* waits = nullptr;  // for what; null while it can run
    const Barrier* at = nullptr;  // the barrier it waits at, with a parity
    unsigned parity = 0;
};

struct Message {
    unsigned block;
    std::size_t to, counted;  // offsets in the block's memory
    Words value;
};

class Cluster;
thread_local Cluster* active = nullptr;

// How an adversary chooses: at random, or by fixed ranks of blocks or warps; when messages land.
enum class Order { in_turn, random, by_block, by_warp };
enum class Landing { at_once, random, last, newest_first };

class Cluster {
  public:
    Cluster(const host::Launch& launch, unsigned number, unsigned char* stacks, unsigned char* memory,
            const std::function<void()>& thread)
        : launch_(launch), number_(number), body_(thread), random_(launch.schedule * 7919 + number) {
        threads_ = launch.block.x * launch.block.y * launch.block.z;
        blocks_.resize(launch.cluster);
        fibres_.resize(launch.cluster * threads_);
        for (unsigned rank = 0; rank < launch.cluster; ++rank) {
            blocks_[rank].memory = memory + rank * stride(launch);
            blocks_[rank].alive = threads_;
            blocks_[rank].warps.resize((threads_ + kLanes - 1) / kLanes);
        }
        std::fill_n(memory, launch.cluster * stride(launch), static_cast<unsigned char>(0xff));
        if (launch.schedule != 0) {
            order_ = std::array{Order::random, Order::by_block, Order::by_warp}[launch.schedule % 3];
            landing_ = std::array{Landing::last, Landing::random, Landing::at_once,
                                  Landing::newest_first}[launch.schedule / 3 % 4];
        }
        for (unsigned j = 0; j < fibres_.size(); ++j) {
            Fibre& fibre = fibres_[j];
            fibre.block = j / threads_;
            fibre.thread = j % threads_;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = stacks + j * kStack;
            fibre.context.uc_stack.ss_size = kStack;
            fibre.context.uc_link = nullptr;
            makecontext(&fibre.context, enter, 0);
        }
        ranks_.resize(fibres_.size() / kLanes + launch.cluster + 1);
        for (unsigned j = 0; j < ranks_.size(); ++j) ranks_[j] = j;
        std::shuffle(ranks_.begin(), ranks_.end(), random_);
        for (unsigned j = 0; j < fibres_.size(); ++j) ready(j);
    }

    static std::size_t stride(const host::Launch& launch) { return (launch.shared + 127) / 128 * 128; }

    void run() {
        unsigned left = static_cast<unsigned>(fibres_.size());
        while (left > 0) {
            if (!failure_.empty()) throw Failure{failure_};
            if (landing_ == Landing::random && !messages_.empty() && random_() % 8 == 0) land_one();
            if (runnable_.empty()) {
                if (messages_.empty()) throw Failure{stuck()};
                land_one();
                continue;
            }
            resume(next());
            if (ended_) --left;
        }
        if (!messages_.empty()) throw Failure{"a message was still on its way when the cluster had ended"};
    }

    // ---- What a running fibre asks for

    Block& block() { return blocks_[fibres_[current_].block]; }
    unsigned rank() const { return fibres_[current_].block; }
    unsigned thread() const { return fibres_[current_].thread; }

    // Waits until `count` threads have come; the last one to come goes through `act` first, for all.
    template <typename Act>
    void meet(Meeting& meeting, std::size_t count, const char* what, Act act) {
        if (meeting.waiting.size() + 1 == count) {
            act();
            for (const unsigned other : meeting.waiting) ready(other);
            meeting.waiting.clear();
            ready(current_);
            leave(nullptr);  // another may go first
        } else {
            meeting.waiting.push_back(current_);
            leave(what);
        }
    }

    template <typename Act>
    void warp_wide(const char* operation, void* operands, Act act) {
        Warp& warp = block().warps[thread() / kLanes];
        if (warp.meeting.waiting.empty()) {
            warp.operation = operation;
        } else if (warp.operation != operation) {
            fail(std::string("lanes of one warp are in different operations: ") + warp.operation + " and " + operation);
        }
        warp.operands[thread() % kLanes] = operands;
        meet(warp.meeting, kLanes, operation, [&] { act(warp.operands); });
    }

    void sync_block(unsigned number, unsigned count) {
        if (number >= kBarriers || count % kLanes != 0) fail("a block has barriers 0 to 15, of whole warps");
        meet(block().barriers[number], count, "sync", [] {});
    }

    void sync_cluster() {
        meet(all_, fibres_.size(), "sync_cluster", [] {});
    }

    Phase& phase(Barrier* barrier) {
        auto* phase = reinterpret_cast<Phase*>(barrier);
        if (phase->mark != kMark) fail("a barrier is used before init");
        return *phase;
    }

    void wait(Barrier* barrier, unsigned parity) {
        if (phase(barrier).parity != parity) return;
        fibres_[current_].at = barrier;
        fibres_[current_].parity = parity;
        waiting_.push_back(current_);
        leave("wait");
    }

    void arrive(Barrier* barrier, unsigned bytes) {
        Phase& now = phase(barrier);
        if (now.arrivals == 0) fail("more arrivals at a barrier than it was made for");
        --now.arrivals;
        now.bytes += static_cast<std::int32_t>(bytes);
        end_if_complete(barrier);
    }

    void send(const Message& message) {
        messages_.push_back(message);
        if (landing_ == Landing::at_once) land(messages_.size() - 1);
    }

    std::size_t offset(const void* p, std::size_t size, const char* what) {
        const auto at = static_cast<std::size_t>(static_cast<const unsigned char*>(p) - block().memory);
        if (at + size > launch_.shared || at % size != 0) {
            fail(std::string(what) + " is outside of shared memory or not aligned");
        }
        return at;
    }

    void check_rank(unsigned rank) {
        if (launch_.cluster < 2) fail("a message needs a cluster of two blocks or more");
        if (rank >= launch_.cluster) fail("a message goes to a rank that the cluster does not have");
    }

    [[noreturn]] void fail(const std::string& words) {
        failure_ = words + " (" + place(current_) + ")";
        for (;;) leave(nullptr);
    }

  private:
    static void enter() {
        active->body_();
        active->end();
    }

    void end() {
        --block().alive;
        ended_ = true;
        for (;;) leave(nullptr);
    }

    void resume(unsigned number) {
        current_ = number;
        const Fibre& fibre = fibres_[number];
        const host::Dim3 dims = launch_.block;
        const unsigned flat = number_ * launch_.cluster + fibre.block;
        threadIdx = {fibre.thread % dims.x, fibre.thread / dims.x % dims.y, fibre.thread / (dims.x * dims.y)};
        blockIdx = {flat % launch_.grid.x, flat / launch_.grid.x % launch_.grid.y,
                    flat / (launch_.grid.x * launch_.grid.y)};
        blockDim = dims;
        gridDim = launch_.grid;
        ended_ = false;
        swapcontext(&home_, &fibres_[number].context);
    }

    void leave(const char* what) {
        fibres_[current_].waits = what;
        swapcontext(&fibres_[current_].context, &home_);
    }

    void ready(unsigned number) {
        fibres_[number].waits = nullptr;
        const unsigned rank = order_ == Order::by_block  ? ranks_[fibres_[number].block]
                              : order_ == Order::by_warp ? ranks_[number / kLanes]
                                                         : 0;
        runnable_.push_back({rank, number});
        if (order_ == Order::by_block || order_ == Order::by_warp) std::push_heap(runnable_.begin(), runnable_.end());
    }

    unsigned next() {
        if (order_ == Order::by_block || order_ == Order::by_warp) {
            std::pop_heap(runnable_.begin(), runnable_.end());
        } else if (order_ == Order::random) {
            std::swap(runnable_[random_() % runnable_.size()], runnable_.back());
        }
        const unsigned number = runnable_.back().second;
        runnable_.pop_back();
        return number;
    }

    void land_one() {
        if (landing_ == Landing::newest_first) return land(messages_.size() - 1);
        land(random_() % messages_.size());
    }

    void land(std::size_t which) {
        const Message message = messages_[which];
        messages_[which] = messages_.back();
        messages_.pop_back();
        Block& target = blocks_[message.block];
        if (target.alive == 0) failure_ = "a message lands in a block whose threads have all ended";
        std::memcpy(target.memory + message.to, &message.value, sizeof(Words));
        auto* barrier = reinterpret_cast<Barrier*>(target.memory + message.counted);
        auto* now = reinterpret_cast<Phase*>(barrier);
        if (now->mark != kMark) failure_ = "a message is counted at a barrier before its init";
        now->bytes -= static_cast<std::int32_t>(sizeof(Words));
        end_if_complete(barrier);
    }

    void end_if_complete(Barrier* barrier) {
        auto* now = reinterpret_cast<Phase*>(barrier);
        if (now->arrivals != 0 || now->bytes != 0) return;
        now->arrivals = now->count;
        now->parity ^= 1;
        const auto goes_on = [&](unsigned number) {
            return fibres_[number].at == barrier && fibres_[number].parity != now->parity;
        };
        for (const unsigned number : waiting_) {
            if (goes_on(number)) ready(number);
        }
        waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), goes_on), waiting_.end());
    }

    std::string place(unsigned number) const {
        return "block " + std::to_string(fibres_[number].block) + " of the cluster, thread " +
               std::to_string(fibres_[number].thread);
    }

    std::string stuck() const {
        std::string words = "deadlock: nobody can go on and nothing is on its way:";
        std::vector<std::pair<std::string, unsigned>> counts;
        for (const Fibre& fibre : fibres_) {
            if (fibre.waits == nullptr) continue;
            auto found = std::find_if(counts.begin(), counts.end(), [&](auto& c) { return c.first == fibre.waits; });
            if (found == counts.end()) found = counts.insert(counts.end(), {fibre.waits, 0});
            ++found->second;
        }
        for (const auto& [what, count] : counts) words += " " + std::to_string(count) + " threads in " + what + ";";
        return words;
    }

    const host::Launch& launch_;
    const unsigned number_;
    const std::function<void()>& body_;
    std::mt19937_64 random_;
    Order order_ = Order::in_turn;
    Landing landing_ = Landing::at_once;
    unsigned threads_ = 0, current_ = 0;
    bool ended_ = false;
    std::string failure_;
    ucontext_t home_{};
    std::vector<Block> blocks_;
    std::vector<Fibre> fibres_;
    std::vector<unsigned> ranks_, waiting_;
    std::vector<std::pair<unsigned, unsigned>> runnable_;
    std::vector<Message> messages_;
    Meeting all_;
};

template <typename T>
float element(std::uint32_t word, int j);
template <>
float element<BFloat16>(std::uint32_t word, int j) {
    return load(BFloat16{static_cast<std::uint16_t>(word >> (16 * j))});
}
template <>
float element<Float16>(std::uint32_t word, int j) {
    return load(Float16{static_cast<std::uint16_t>(word >> (16 * j))});
}
template <>
float element<float>(std::uint32_t word, int) {
    return bit_cast<float>(word & 0xffffe000u);
}

float towards_zero(double x) {
    const auto nearest = static_cast<float>(x);
    return std::fabs(double{nearest}) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Fragments {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
};

template <typename T>
void multiply(void* const* operands) {
    constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
    const auto lane = [&](int r, int q) { return static_cast<Fragments*>(operands[4 * r + q]); };
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            float& d = lane(row % 8, column / 2)->d[row / 8 * 2 + column % 2];
            double sum = d;
            for (int half = 0; half < 2; ++half) {
                for (int q = 0; q < 4; ++q) {
                    const std::uint32_t a = lane(row % 8, q)->a[half * 2 + row / 8], b = lane(column, q)->b[half];
                    for (int j = 0; j < kInWord; ++j) sum += double{element<T>(a, j)} * element<T>(b, j);
                }
            }
            d = towards_zero(sum);
        }
    }
}

struct Pages {  // zeroed, and taken from the machine only where touched
    explicit Pages(std::size_t size)
        : size(size), start(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        if (start == MAP_FAILED) throw Failure{"there is no memory for the fibres' stacks"};
    }
    ~Pages() { munmap(start, size); }
    Pages(const Pages&) = delete;
    unsigned char* bytes() const { return static_cast<unsigned char*>(start); }
    const std::size_t size;
    void* const start;
};

}  // namespace

namespace simt {

unsigned cluster_rank() { return active->rank(); }
unsigned char* shared_memory() { return active->block().memory; }

std::uint32_t shuffle(std::uint32_t value, unsigned lane) {
    struct Operands {
        std::uint32_t value, result;
        unsigned lane;
    } own{value, 0, lane};
    active->warp_wide("shuffle", &own, [](void* const* all) {
        for (unsigned j = 0; j < kLanes; ++j) {
            auto* one = static_cast<Operands*>(all[j]);
            one->result = static_cast<Operands*>(all[one->lane % kLanes])->value;
        }
    });
    return own.result;
}

void sync_warp() {
    active->warp_wide("sync_warp", nullptr, [](void* const*) {});
}
void sync_threads() { active->sync_block(0, blockDim.x * blockDim.y * blockDim.z); }
void sync_some(unsigned number, unsigned threads) { active->sync_block(number, threads); }
void sync_cluster() { active->sync_cluster(); }

void init(Barrier* barrier, unsigned arrivals) {
    active->offset(barrier, sizeof(Barrier), "a barrier");
    const Phase phase{0, static_cast<std::uint8_t>(arrivals), static_cast<std::uint8_t>(arrivals), 0, kMark};
    if (reinterpret_cast<const Phase*>(barrier)->mark == kMark) active->fail("a barrier is made twice");
    std::memcpy(barrier, &phase, sizeof(phase));
}

void arrive_expecting(Barrier* barrier, unsigned bytes) { active->arrive(barrier, bytes); }
void wait(Barrier* barrier, unsigned parity) { active->wait(barrier, parity); }

void send(void* to, unsigned rank, Words value, Barrier* barrier) {
    active->check_rank(rank);
    active->send({rank, active->offset(to, sizeof(Words), "a message's target"),
                  active->offset(barrier, sizeof(Barrier), "a barrier"), value});
}

template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    Fragments own{d, a, {b0, b1}};
    active->warp_wide("mma", &own, multiply<T>);
}
template void mma<BFloat16>(float (&)[4], const std::uint32_t (&)[4], std::uint32_t, std::uint32_t);
template void mma<Float16>(float (&)[4], const std::uint32_t (&)[4], std::uint32_t, std::uint32_t);
template void mma<float>(float (&)[4], const std::uint32_t (&)[4], std::uint32_t, std::uint32_t);

}  // namespace simt

namespace host {

std::string run(const Launch& launch, const std::function<void()>& thread) {
    const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
    const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    Cluster* const outer = active;
    std::string words;
    try {
        const Pages stacks(launch.cluster * threads * kStack);
        const Pages memory(launch.cluster * Cluster::stride(launch) + 128);
        for (unsigned number = 0; number < blocks / launch.cluster; ++number) {
            Cluster cluster(launch, number, stacks.bytes(), memory.bytes(), thread);
            active = &cluster;
            cluster.run();
        }
    } catch (const Failure& failure) {
        words = failure.words;
    }
    active = outer;
    return words;
}

}  // namespace host
}  // namespace lstm

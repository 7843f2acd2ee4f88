// A cluster of blocks on one CPU thread: its fibres, who of them runs next, and when its messages land.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "simt.h"

namespace lstm::host {

using simt::Barrier;
using simt::Words;

constexpr unsigned kLanes = 32;
constexpr std::size_t kStack = 64 * 1024;

struct Failure {
    std::string words;
};

// What a Barrier's 8 bytes hold.
struct Phase {
    std::int32_t bytes;  // expected and not yet landed; negative when they landed first
    std::uint32_t arrivals : 12, count : 12, parity : 1, mark : 7;
};
constexpr unsigned kMostArrivals = 4095;
constexpr unsigned kMark = 0x35;  // shared memory starts as 0xff, so that an unmade barrier shows
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
    unsigned char* memory;  // shared
    unsigned alive;
    std::vector<Warp> warps;
    Meeting barrier;
};

struct Fibre {
    Context context;
    unsigned block, thread;                        // block: rank in the cluster
    const char* waits = nullptr;                   // for what; null while it can run
    const void* at = nullptr;                      // the Barrier or flag it waits at, if it does
    unsigned operand = 0;                          // the parity or the signals it waits for there
    std::vector<std::pair<Words*, Words>> copies;  // to its block's memory, which come when it asks for them
};

// What is on its way: a message to another block's shared memory, words for the whole grid, or a signal that they came.
enum class Means { message, words, signal };
struct Message {
    Means means;
    unsigned block;           // where a message goes; of words and signals, whose they are
    std::size_t to, counted;  // of a message: offsets in the block's memory
    void* global;             // of words: where they go; of a signal: its flag
    Words value;
    std::uint64_t number = 0;  // in the order of sending
};

// A block's shared memory.
using Shared = std::unique_ptr<unsigned char[], void (*)(unsigned char*)>;

// How an adversary chooses: at random, or by fixed ranks of blocks or warps; when messages land.
enum class Order { in_turn, random, by_block, by_warp };
enum class Landing { at_once, random, last, newest_first };

class Cluster {
  public:
    static inline thread_local Cluster* active = nullptr;  // whose fibre runs on this thread

    Cluster(const Launch& launch, unsigned number, unsigned char* stacks, const std::vector<Shared>& memory,
            const std::function<void()>& thread)
        : launch_(launch), number_(number), body_(thread), random_(launch.schedule * 7919 + number) {
        threads_ = launch.block.x * launch.block.y * launch.block.z;
        blocks_.resize(launch.cluster);
        fibres_.resize(launch.cluster * threads_);
        for (unsigned rank = 0; rank < launch.cluster; ++rank) {
            blocks_[rank].memory = memory[rank].get();
            std::fill_n(blocks_[rank].memory, launch.shared, static_cast<unsigned char>(0xff));
            blocks_[rank].alive = threads_;
            blocks_[rank].warps.resize((threads_ + kLanes - 1) / kLanes);
        }
        if (launch.schedule != 0) {
            order_ = std::array{Order::random, Order::by_block, Order::by_warp}[launch.schedule % 3];
            landing_ = std::array{Landing::last, Landing::random, Landing::at_once,
                                  Landing::newest_first}[launch.schedule / 3 % 4];
        }
        for (unsigned j = 0; j < fibres_.size(); ++j) {
            Fibre& fibre = fibres_[j];
            fibre.block = j / threads_;
            fibre.thread = j % threads_;
            fibre.context.begin_with(enter, stacks + j * kStack, kStack);
        }
        ranks_.resize(fibres_.size() / kLanes + launch.cluster + 1);
        for (unsigned j = 0; j < ranks_.size(); ++j) ranks_[j] = j;
        std::shuffle(ranks_.begin(), ranks_.end(), random_);
        for (unsigned j = 0; j < fibres_.size(); ++j) ready(j);
    }

    void run() {
        active = this;
        unsigned left = static_cast<unsigned>(fibres_.size());
        while (left > 0) {
            if (landing_ == Landing::random && !messages_.empty() && random_() % 8 == 0) land_one();
            if (runnable_.empty()) {
                if (messages_.empty()) throw Failure{stuck()};
                land_one();
                if (!failure_.empty()) throw Failure{failure_};
                continue;
            }
            resume(next());
            if (ended_) --left;
            if (!failure_.empty()) throw Failure{failure_};
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

    void sync_block() {
        meet(block().barrier, threads_, "sync_threads", [] {});
    }

    void sync_cluster() {
        if (launch_.global != nullptr) fail("sync_cluster needs a cluster, and this launch has none");
        meet(all_, fibres_.size(), "sync_cluster", [] {});
    }

    void init(Barrier* barrier, unsigned arrivals) {
        offset(barrier, sizeof(Barrier), "a barrier");
        if (arrivals == 0 || arrivals > kMostArrivals) fail("a barrier is made for 1 to 4095 arrivals");
        auto* phase = reinterpret_cast<Phase*>(barrier);
        if (phase->mark == kMark) fail("a barrier is made twice");
        *phase = {0, arrivals, arrivals, 0, kMark};
    }

    Phase& phase(Barrier* barrier) {
        offset(barrier, sizeof(Barrier), "a barrier");
        auto* phase = reinterpret_cast<Phase*>(barrier);
        if (phase->mark != kMark) fail("a barrier is used before init");
        return *phase;
    }

    // As on a GPU, who looks again only when two phases have ended finds the parity of before, and goes on waiting.
    void wait(Barrier* barrier, unsigned parity) {
        if (parity > 1) fail("a phase's parity is 0 or 1");
        const Phase& now = phase(barrier);
        pause();
        while (now.parity == parity) {
            fibres_[current_].at = barrier;
            fibres_[current_].operand = parity;
            waiting_.push_back(current_);
            leave("wait");
        }
    }

    void arrive(Barrier* barrier, unsigned bytes) {
        Phase& now = phase(barrier);
        if (now.arrivals == 0) fail("more arrivals at a barrier than it was made for");
        --now.arrivals;
        now.bytes += static_cast<std::int32_t>(bytes);
        end_if_complete(barrier);
    }

    void await(const simt::Flag* flag, unsigned signals) {
        check_global(flag, sizeof(*flag));
        pause();
        while (*flag < signals) {
            fibres_[current_].at = flag;
            fibres_[current_].operand = signals;
            waiting_.push_back(current_);
            leave("await");
        }
    }

    template <typename T>
    T collect(const T* from) {
        check_global(from, sizeof(T));
        pause();
        return *from;
    }

    void copy(Words* to, const Words* from) { fibres_[current_].copies.emplace_back(to, collect(from)); }
    void copied() {
        for (const auto& [to, value] : fibres_[current_].copies) *to = value;
        fibres_[current_].copies.clear();
    }

    void send(Message message) {
        message.number = sent_++;
        messages_.push_back(message);
        if (landing_ == Landing::at_once) land(messages_.size() - 1);
        pause();
    }

    std::size_t offset(const void* p, std::size_t size, const char* what) {
        const auto at = static_cast<std::size_t>(static_cast<const unsigned char*>(p) - block().memory);
        if (at >= launch_.shared || launch_.shared - at < size || at % size != 0) {
            fail(std::string(what) + " is outside of shared memory or not aligned");
        }
        return at;
    }

    void check_global(const void* p, std::size_t size) {
        const auto at = reinterpret_cast<std::uintptr_t>(p), start = reinterpret_cast<std::uintptr_t>(launch_.global);
        if (at < start || at - start + size > launch_.global_bytes || at % size != 0) {
            fail("words for the grid are outside of its global memory or not aligned");
        }
    }

    void check_rank(unsigned rank) {
        if (launch_.global != nullptr) fail("a message needs a cluster, and this launch has none");
        if (launch_.cluster < 2) fail("a message needs a cluster of two blocks or more");
        if (rank >= launch_.cluster) fail("a message goes to a rank that the cluster does not have");
    }

    // The fibre is abandoned, so that nothing may be left on its stack that owns memory.
    [[noreturn]] void fail(std::string words) {
        failure_ = std::move(words);
        failure_ += " (" + place(current_) + ")";
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
        const Dim3 dims = launch_.block;
        const unsigned flat = number_ * launch_.cluster + fibre.block;
        threadIdx = {fibre.thread % dims.x, fibre.thread / dims.x % dims.y, fibre.thread / (dims.x * dims.y)};
        blockIdx = {flat % launch_.grid.x, flat / launch_.grid.x % launch_.grid.y,
                    flat / (launch_.grid.x * launch_.grid.y)};
        blockDim = dims;
        gridDim = launch_.grid;
        ended_ = false;
        home_.leave_for(fibres_[number].context);
    }

    // Lets others go first, where the schedule wants it.
    void pause() {
        const bool goes = order_ == Order::in_turn  ? false
                          : order_ == Order::random ? random_() % 4 == 0
                                                    : !runnable_.empty() && runnable_.front().first > rank_of(current_);
        if (!goes) return;
        ready(current_);
        leave(nullptr);
    }

    void leave(const char* what) {
        fibres_[current_].waits = what;
        fibres_[current_].context.leave_for(home_);
    }

    bool ranked() const { return order_ == Order::by_block || order_ == Order::by_warp; }

    unsigned rank_of(unsigned number) const {  // the highest goes first
        return !ranked() ? 0 : ranks_[order_ == Order::by_block ? fibres_[number].block : number / kLanes];
    }

    void ready(unsigned number) {
        fibres_[number].waits = nullptr;
        fibres_[number].at = nullptr;
        runnable_.push_back({rank_of(number), number});
        if (ranked()) std::push_heap(runnable_.begin(), runnable_.end());
    }

    unsigned next() {
        if (ranked()) {
            std::pop_heap(runnable_.begin(), runnable_.end());
        } else {
            const std::size_t which = order_ == Order::random ? random_() % runnable_.size() : 0;
            if (which == 0) {
                const unsigned number = runnable_.front().second;
                runnable_.pop_front();
                return number;
            }
            std::swap(runnable_[which], runnable_.back());
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
        if (message.means == Means::words) return void(std::memcpy(message.global, &message.value, sizeof(Words)));
        if (message.means == Means::signal) return land_signal(message);
        Block& target = blocks_[message.block];
        auto* barrier = reinterpret_cast<Barrier*>(target.memory + message.counted);
        auto* now = reinterpret_cast<Phase*>(barrier);
        if (target.alive == 0) return lose(message, "a message lands in a block whose threads have all ended");
        if (now->mark != kMark) return lose(message, "a message is counted at a barrier before its init");
        std::memcpy(target.memory + message.to, &message.value, sizeof(Words));
        now->bytes -= static_cast<std::int32_t>(sizeof(Words));
        end_if_complete(barrier);
    }

    // After all words that its block had published before it.
    void land_signal(const Message& signal) {
        for (std::size_t j = 0; j < messages_.size();) {
            const Message& other = messages_[j];
            const bool covered = other.block == signal.block && other.number < signal.number;
            if (covered && other.means == Means::words) {
                land(j);  // another takes its place
            } else {
                ++j;
            }
        }
        const auto* flag = static_cast<simt::Flag*>(signal.global);
        const unsigned count = ++*static_cast<simt::Flag*>(signal.global);
        wake([&](const Fibre& fibre) { return fibre.at == flag && fibre.operand <= count; });
    }

    template <typename Matches>
    void wake(Matches matches) {
        const auto stays = [&](unsigned number) { return !matches(fibres_[number]); };
        const auto first = std::stable_partition(waiting_.begin(), waiting_.end(), stays);
        std::for_each(first, waiting_.end(), [&](unsigned number) { ready(number); });
        waiting_.erase(first, waiting_.end());
    }

    void lose(const Message& message, const char* why) {
        failure_ = std::string(why) + " (block " + std::to_string(message.block) + " of cluster " +
                   std::to_string(number_) + ", byte " + std::to_string(message.to) + ")";
    }

    void end_if_complete(Barrier* barrier) {
        auto* now = reinterpret_cast<Phase*>(barrier);
        if (now->arrivals != 0 || now->bytes != 0) return;
        now->arrivals = now->count;
        now->parity ^= 1;
        wake([&](const Fibre& fibre) { return fibre.at == barrier; });
    }

    std::string place(unsigned number) const {
        const Fibre& fibre = fibres_[number];
        return "block " + std::to_string(fibre.block) + " of cluster " + std::to_string(number_) + ", warp " +
               std::to_string(fibre.thread / kLanes) + ", thread " + std::to_string(fibre.thread);
    }

    std::string what(const Fibre& fibre) const {
        if (fibre.at == nullptr) return fibre.waits;
        if (fibre.waits == std::string("await")) return "await of signal " + std::to_string(fibre.operand);
        const auto byte = reinterpret_cast<const unsigned char*>(fibre.at) - blocks_[fibre.block].memory;
        return "wait at byte " + std::to_string(byte) + " for parity " + std::to_string(fibre.operand);
    }

    std::string stuck() const {
        struct Place {
            std::string what;
            unsigned threads, first;
        };
        std::vector<Place> places;
        std::size_t waiting = 0;
        for (unsigned number = 0; number < fibres_.size(); ++number) {
            if (fibres_[number].waits == nullptr) continue;
            ++waiting;
            const std::string words = what(fibres_[number]);
            auto found = std::find_if(places.begin(), places.end(), [&](const Place& p) { return p.what == words; });
            if (found == places.end()) found = places.insert(places.end(), {words, 0, number});
            ++found->threads;
        }
        std::string words = "deadlock: nobody can go on and nothing is on its way:";
        for (const Place& p : places) {
            words += " " + std::to_string(p.threads) + " threads in " + p.what + " (first " + place(p.first) + ");";
        }
        return words + " " + std::to_string(fibres_.size() - waiting) + " threads have ended";
    }

    const Launch& launch_;
    const unsigned number_;
    const std::function<void()>& body_;
    std::mt19937_64 random_;
    Order order_ = Order::in_turn;
    Landing landing_ = Landing::at_once;
    unsigned threads_ = 0, current_ = 0;
    bool ended_ = false;
    std::string failure_;
    Context home_;
    std::vector<Block> blocks_;
    std::vector<Fibre> fibres_;
    std::vector<unsigned> ranks_, waiting_;
    std::deque<std::pair<unsigned, unsigned>> runnable_;  // rank and thread; a heap where ranks count
    std::vector<Message> messages_;
    std::uint64_t sent_ = 0;
    Meeting all_;
};

}  // namespace lstm::host

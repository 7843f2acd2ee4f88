#include "layer.h"

#include "jobs.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef LSTM_X86
#include <cpuid.h>
#include <xmmintrin.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <numeric>

namespace lstm::cpu {
namespace {

constexpr Index kPlanesStay = 1 << 18;  // elements of a weight whose planes just stay in the second cache

// Whether products of T have planes in AMX.
template <typename T>
[[maybe_unused]] constexpr bool has_planes = std::is_same_v<T, BFloat16> || std::is_same_v<T, float>;

template <typename Job>
auto kernel_of([[maybe_unused]] InstructionSet set) {
#ifdef LSTM_X86
    if constexpr (std::is_same_v<typename Job::Type, BFloat16>) {
        if (set == InstructionSet::avx512_bf16) return run_pairs<Job>;
    }
    if constexpr (has_planes<typename Job::Type>) {
        if (set == InstructionSet::amx) return run_amx<Job>;
    }
    if constexpr (std::is_same_v<typename Job::Type, float>) {
        if (set == InstructionSet::amx_over_steps) return run_amx_over_steps<Job>;
    }
    if constexpr (std::is_same_v<Job, Forward<float>>) {
        if (set == InstructionSet::amx_digits) return run_amx_digits<Job>;
    }
    if (set >= InstructionSet::avx512) return run_avx512<Job>;
    if (set == InstructionSet::avx2) return run_avx2<Job>;
#endif
    return run_baseline<Job>;
}

// Whether little of so many k is padding.
bool nearly_whole(Index size) { return 4 * size >= 3 * round_up(size, kDeep); }

// Whether a float's three planes, which take half as much again to read and six products, take less time than the
// float in products over all steps, however few rows a step has: for enough rows in all to split operands for. The
// gradients of large projected layers would take more memory so than nn.LSTM's.
template <template <typename> class Job>
bool planes_pay_over_steps(const Shape& s, Index rows) {
    constexpr bool back = std::is_same_v<Job<float>, Backward<float>>;
    const bool large = s.features < s.hidden && is_far(4 * s.hidden * s.features);
    if (back) return !large && s.hidden >= 192 && rows >= s.directions * 64;
    // of small weights, as joins() sees them, one product a step is better for two threads, each of which has its rows
    const bool small = 4 * s.hidden * (s.input + s.features) * static_cast<Index>(sizeof(float)) <= kJoinedBytes;
    const bool joined = small && s.directions * rows > kRows * s.time;
    return !joined && nearly_whole(s.input) && s.input >= 128 && rows >= 64;
}

// The fewest sequences whose steps' products AMX takes. Alone on its core it is faster for fewer, by up to a fifth; but
// where a neighbour has the other half of the core, to load its registers takes more than three times as long, and so
// few rows up to twice as long as with AVX-512, which loses a third.
Index fewest_for_amx(const Shape& s) { return s.hidden < 128 ? 32 : s.hidden < 192 ? 24 : s.hidden < 256 ? 16 : 12; }

// Whether they do in the products of a step too: for enough rows at each, and for more where planes of a weight leave
// the second cache and the weight itself would not. The backward pass stores gates at multiples of H, which planes take
// whole.
template <template <typename> class Job>
bool planes_pay(const Shape& s, Index rows, bool over_steps) {
    constexpr bool back = std::is_same_v<Job<float>, Backward<float>>;
    const bool whole = s.hidden % kDeep == 0 && s.features % kDeep == 0;
    const bool nearly = !back && nearly_whole(s.hidden) && nearly_whole(s.features);
    const Index all = std::max<Index>(48, back ? (1 << 13) / s.hidden : 0), weight = 4 * s.hidden * s.features;
    const Index far = std::min<Index>(3 + 6 * weight / kPlanesStay, over_steps ? 14 : 12);
    const Index sequences = std::max({fewest_for_amx(s), far, whole ? 0 : Index{16}});
    return (whole || nearly) && s.hidden >= (back ? 65 : 64) && rows >= sequences * s.time && rows >= all;
}

// Whether three digits, which are fewer bytes than a float and half as many as planes, take less time: for sums that
// are long enough to pay for their conversion, and enough rows to pay for the registers' and for packing weights.
bool digits_pay(const Shape& s, Index rows) {
    const Index depth = s.input + s.hidden, padded = round_up(s.input, kDigitsDeep) + round_up(s.hidden, kDigitsDeep);
    const bool whole = 4 * depth >= 3 * padded && s.input >= 128 && s.hidden >= 256 && s.features == s.hidden;
    return whole && s.time > 1 && rows >= (s.hidden < 384 ? 12 : 8) * s.time && rows >= 32;
}

// Whether bf16 takes less time as floats than in pairs that are slow: for enough rows a step, more where weights are
// read again and again, as floats are twice the bytes; and to pack for.
bool floats_pay(const Shape& s, Index rows) {
    const Index weight = 4 * s.hidden * s.features, fewest = weight <= 1 << 18 ? 2 : weight <= 1 << 20 ? 4 : 6;
    return rows >= fewest * s.time && rows > kMostFewRows;
}

// The instruction set that serves a call best, of those up to the one that it names.
template <template <typename> class Job, typename T>
InstructionSet serving(const Shape& s, bool digits = true) {
    if (s.instruction_set < InstructionSet::avx512_slow_bf16) return s.instruction_set;
    const Index rows = std::accumulate(s.steps, s.steps + s.time, Index{0});
    if (s.instruction_set == InstructionSet::avx512_slow_bf16) {
        const bool pairs = std::is_same_v<T, BFloat16> && !floats_pay(s, rows);
        return pairs ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
    }
    if (std::is_same_v<T, BFloat16>) return rows > kFewRows / 2 ? InstructionSet::amx : InstructionSet::avx512_bf16;
    if (!std::is_same_v<T, float>) return InstructionSet::avx512;
    if (std::is_same_v<Job<T>, Forward<float>> && digits && digits_pay(s, rows)) return InstructionSet::amx_digits;
    const bool over_steps = planes_pay_over_steps<Job>(s, rows);
    if (planes_pay<Job>(s, rows, over_steps)) return InstructionSet::amx;
    return over_steps ? InstructionSet::amx_over_steps : InstructionSet::avx512;
}

// While it lives, this thread takes what is subnormal for 0, if the CPU knows how: an instruction that meets such a
// number takes a hundred cycles or more.
class SubnormalsFlushed {
#ifdef LSTM_X86
  public:
    SubnormalsFlushed() { _mm_setcsr(before_ | kFlushResults | kFlushOperands); }
    ~SubnormalsFlushed() { _mm_setcsr(before_); }
    SubnormalsFlushed(const SubnormalsFlushed&) = delete;
    SubnormalsFlushed& operator=(const SubnormalsFlushed&) = delete;

  private:
    static constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;
    const unsigned before_ = _mm_getcsr();
#endif
};

// A thread's share. Gradients that fade over many steps end among subnormal numbers; states don't, and stay exact.
template <typename Job>
void run_share(const Job& job, int thread, int threads) {
    const auto kernel = kernel_of<Job>(job.s.instruction_set);
    if constexpr (std::is_same_v<Job, Backward<typename Job::Type>>) {
        [[maybe_unused]] const SubnormalsFlushed flushed;
        kernel(job, thread, threads);
    } else {
        kernel(job, thread, threads);
    }
}

// Whether the call has to be computed anew in less special an instruction set.
template <typename Job, typename Args>
bool run_once(Shape shape, const Args& args) {
    const Index rows = std::accumulate(shape.steps, shape.steps + shape.time, Index{0});
    shape.threads = useful_threads(shape, rows, tiles_of(shape.hidden, Job::units));
    Arena count;
    Job(shape, args, count);
    Arena arena(count.used());
    const Job job(shape, args, arena);
#ifdef _OPENMP
    if (shape.threads > 1 || omp_in_parallel()) {  // a region for one thread takes as long as a small layer
#pragma omp parallel num_threads(shape.threads)
        run_share(job, omp_get_thread_num(), omp_get_num_threads());  // which may be fewer than asked for
    } else {
        run_share(job, 0, 1);
    }
#else
    run_share(job, 0, 1);
#endif
    return job.walk.unfit;
}

// In the instruction set that serves it best, and where something was unfit for its products anew without digits, then
// without planes, at last without fixed point.
template <template <typename> class Job, typename T, typename Args>
void run(const Shape& shape, const Args& args) {
    Shape s = shape;
    s.instruction_set = serving<Job, T>(shape);
    while (run_once<Job<T>>(s, args)) {
        if (s.instruction_set == InstructionSet::amx_digits) {
            s.instruction_set = serving<Job, T>(shape, false);
        } else {
            s.instruction_set =
                s.instruction_set >= InstructionSet::amx ? InstructionSet::avx512 : InstructionSet::avx2;
        }
    }
}

template <template <typename> class Job, typename Args>
void run_dtype(const Shape& shape, const Args& args) {
    switch (shape.dtype) {
        case Dtype::float32:
            return run<Job, float>(shape, args);
        case Dtype::float64:
            return run<Job, double>(shape, args);
        case Dtype::bfloat16:
            return run<Job, BFloat16>(shape, args);
        case Dtype::float16:
            return run<Job, Float16>(shape, args);
    }
}

#ifdef LSTM_X86
// Whether the CPU has AMX, and the system lets this process use its registers.
bool may_use_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0 && (d >> 24 & 3) == 3;
#ifdef __linux__
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return there && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

InstructionSet find_best() {
#ifdef LSTM_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
    if (pairs && may_use_amx()) return InstructionSet::amx;
    if (pairs && __builtin_cpu_is("intel")) return InstructionSet::avx512_slow_bf16;
    if (pairs) return InstructionSet::avx512_bf16;
    if (avx512) return InstructionSet::avx512;
    if (avx2) return InstructionSet::avx2;
#endif
    return InstructionSet::baseline;
}

}  // namespace

InstructionSet best_instruction_set() {
    static const InstructionSet best = find_best();
    return best;
}

void layer_forward(const Shape& shape, const ForwardArgs& args) { run_dtype<Forward>(shape, args); }

void layer_backward(const Shape& shape, const BackwardArgs& args) { run_dtype<Backward>(shape, args); }

}  // namespace lstm::cpu

// Where a fibre, or the thread that runs fibres, goes on.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace lstm::host {

class Context {
  public:
    // The first who leaves for it calls `body` on this stack.
    void begin_with(void (*body)(), void* stack, std::size_t size) {
        getcontext(&start_);
        start_.uc_stack.ss_sp = stack;
        start_.uc_stack.ss_size = size;
        start_.uc_link = nullptr;
        makecontext(&start_, body, 0);
        begins_ = true;
    }

    // Returns when somebody leaves for this one. Not by swapcontext, which saves the signal mask: its system call took
    // two thirds of a run.
    void leave_for(Context& other) {
        if (_setjmp(left_) != 0) return;
        if (!other.begins_) _longjmp(other.left_, 1);
        other.begins_ = false;
        setcontext(&other.start_);
    }

  private:
    ucontext_t start_;
    jmp_buf left_;
    bool begins_ = false;
};

}  // namespace lstm::host

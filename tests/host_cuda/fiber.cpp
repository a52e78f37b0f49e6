#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <new>

#ifdef HOST_CUDA_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace host_cuda {
namespace {

#ifdef HOST_CUDA_SANITIZED
constexpr size_t kStack = 256 * 1024;
// The address sanitizer wants to know which stack is in use.
void leave(void** own, const void* stack, size_t size) { __sanitizer_start_switch_fiber(own, stack, size); }
void arrive(void* own, const void** from, size_t* size) { __sanitizer_finish_switch_fiber(own, from, size); }
void clear(const void* stack) { __asan_unpoison_memory_region(stack, kStack); }
#else
constexpr size_t kStack = 64 * 1024;
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
void clear(const void*) {}
#endif
constexpr size_t kGuard = 4096;  // an overflow of the stack ends here

// The compiler's own jumps. Those of the C library make the address sanitizer call the system, as do jumps in code that
// is sanitized, so this file is not.
using Place = void*[5];
[[noreturn, gnu::noinline]] void jump(Place& place) { __builtin_longjmp(place, 1); }

Place resumer;
void* resumer_sanitizer = nullptr;
const void* resumer_stack = nullptr;
size_t resumer_stack_size = 0;
Fiber* running = nullptr;

}  // namespace

Fiber::Fiber(void (*body)(), size_t number) : body_(body) {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);
  stack_ = static_cast<unsigned char*>(memory) + kGuard;
  // Stacks that all began at the same offset in a page would share few lines of the cache.
  top_ = stack_ + kStack - number * 13 * 64 % 4096;
}

// Contexts only start a fiber: to switch between them takes calls of the system, which jumps do without.
void Fiber::resume() {
  running = this;
  leave(&resumer_sanitizer, stack_, kStack);
  if (__builtin_setjmp(resumer) == 0) {
    if (started_) jump(context_);
    started_ = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack_;
    start.uc_stack.ss_size = static_cast<size_t>(top_ - stack_);
    start.uc_link = nullptr;
    makecontext(&start, &Fiber::enter, 0);
    setcontext(&start);
  }
  arrive(resumer_sanitizer, nullptr, nullptr);
}

void Fiber::suspend() {
  Fiber* self = running;
  leave(&self->sanitizer_, resumer_stack, resumer_stack_size);
  if (__builtin_setjmp(self->context_) == 0) jump(resumer);
  arrive(running->sanitizer_, &resumer_stack, &resumer_stack_size);
}

void Fiber::abandon() {
  started_ = false;
  clear(stack_);
}

void Fiber::enter() {
  arrive(nullptr, &resumer_stack, &resumer_stack_size);
  for (;;) {
    running->body_();
    suspend();
  }
}

}  // namespace host_cuda

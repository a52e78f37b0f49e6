// Stacks to run a function on, stop in its middle and go on later.
#pragma once

#include <cstddef>

namespace host_cuda {

class Fiber {
 public:
  // Each call of resume() of a fiber that is done runs `body` anew. `number` is different for each fiber.
  Fiber(void (*body)(), size_t number);
  Fiber(const Fiber&) = delete;

  // Runs until the body suspends or is done.
  void resume();
  // Back to where this fiber was resumed.
  static void suspend();
  // Forgets what is in progress.
  void abandon();

 private:
  static void enter();

  void (*body_)();
  void* context_[5];
  unsigned char* stack_;
  unsigned char* top_;
  void* sanitizer_ = nullptr;
  bool started_ = false;
};

}  // namespace host_cuda

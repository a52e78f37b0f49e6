// Under which name and for which dispatch key ops are registered. A build for tests sets both, so that the CUDA kernels'
// host build can stand beside this package in one process.
#pragma once

#include <torch/library.h>

#ifndef DEEPCONTROL_LIBRARY
#define DEEPCONTROL_LIBRARY deepcontrol
#endif
#ifndef DEEPCONTROL_CUDA_KEY
#define DEEPCONTROL_CUDA_KEY CUDA
#endif

// TORCH_LIBRARY makes strings of its arguments, so they are expanded once before.
#define DEEPCONTROL_TORCH_LIBRARY(library, m) TORCH_LIBRARY(library, m)
#define DEEPCONTROL_TORCH_LIBRARY_IMPL(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)
#define DEEPCONTROL_TORCH_LIBRARY_FRAGMENT(library, m) TORCH_LIBRARY_FRAGMENT(library, m)
#define DEEPCONTROL_DEFINE(m) DEEPCONTROL_TORCH_LIBRARY(DEEPCONTROL_LIBRARY, m)
#define DEEPCONTROL_REGISTER_CUDA(m) DEEPCONTROL_TORCH_LIBRARY_IMPL(DEEPCONTROL_LIBRARY, DEEPCONTROL_CUDA_KEY, m)
// Ops that one backend has beside those of ops.cpp.
#define DEEPCONTROL_DEFINE_MORE(m) DEEPCONTROL_TORCH_LIBRARY_FRAGMENT(DEEPCONTROL_LIBRARY, m)

// How a direct convolution is cut: what its plan and its kernel have to count alike.
#pragma once

#include "conv_plan.h"

namespace deepcontrol::cuda {

// Filters of a thread: an octet, so that it finishes whole bytes of bits and whole vectors.
constexpr int kFilters = 8;

// Neighbouring pixels of a row of the output, which a thread takes at a time. What it has of their sums are 128 bytes.
constexpr int strip_of(int size_of_sum) { return 16 / size_of_sum; }
constexpr int64_t kStripBytes = 16 * kFilters;

constexpr int64_t strips_of_row(const Windows& windows, int strip) { return ceil_divide(windows.output[2], strip); }
constexpr int64_t strips_of_map(const Windows& windows, int strip) {
  return windows.output[0] * windows.output[1] * strips_of_row(windows, strip);
}

// Two pixels of a strip often see the same number, by taps some columns apart: by the next tap if the stride is the
// dilation, by the next but one if it is twice that. Then all taps of a row are gone through in as many phases, in each
// of which a strip sees a row of numbers that moves along by one from tap to tap. Else each tap is a phase of its own.
constexpr int64_t phases_of(const Windows& w) {
  const int64_t phases = w.stride[2] / w.dilation[2];
  return w.stride[2] % w.dilation[2] == 0 && phases < w.kernel[2] ? phases : w.kernel[2];
}

// Strips that each thread of a block has in turn.
constexpr int64_t steps_of(const ConvPlan& plan, int strip) {
  return ceil_divide(plan.rows, int64_t(strip) * (kThreads >> plan.log_lanes));
}

constexpr int64_t kPlace = 4;

// Where things begin in the block's shared memory, in elements of the accumulation type. Sums that are kept come first;
// those of a thread's last strip stay in its registers.
struct DirectShared {
  int64_t weights;
  int64_t scratch;  // then the totals of the cluster
  int64_t totals;   // of the block
  int64_t shifts;
  int64_t gains;
  int64_t own;     // the sums of each thread
  int64_t seen;    // the channels that filters see, then the block's place
  int64_t end;

  constexpr DirectShared(const ConvPlan& plan, int64_t weights_of_filter, int size_of_sum)
      : weights(plan.held ? (steps_of(plan, strip_of(size_of_sum)) - 1) * kThreads * kStripBytes / size_of_sum : 0),
        scratch(weights + weights_of_filter * plan.columns),
        totals(scratch + scratch_elements(1 << plan.log_lanes, kFilters)),
        shifts(totals + plan.columns),
        gains(shifts + plan.columns),
        own(gains + plan.columns),
        seen(own + kThreads * kFilters),
        end(seen + plan.columns + kPlace) {}
};

}  // namespace deepcontrol::cuda

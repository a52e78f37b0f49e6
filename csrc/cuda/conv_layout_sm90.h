// Shared memory of a block of the sm_90a convolution, in bytes: the kernel lays it out so, and plans count it.
#pragma once

#include <cstdint>

#include "../types.h"

namespace deepcontrol::cuda {

// Whether depth is no dimension of the kernel's own: then it counts as more samples, and tensor maps have one less.
constexpr bool is_flat(const Windows& w) { return w.kernel[0] == 1 && w.stride[0] == 1 && w.padding[0] == 0; }

struct LayoutSm90 {
  static constexpr int kGroupRows = 128;   // of a tile, that one warpgroup of consumers has
  static constexpr int kStepChannels = 64;  // of 16 bits: one row of TMA's widest swizzle
  static constexpr int kStepBytes = 2 * kStepChannels;
  static constexpr int kConsumers = 2, kWarpsOfGroup = 4;
  static constexpr int kMostStages = 8;
  static constexpr int kStageAlignment = 1024;  // eight rows, after which the swizzle repeats
  static constexpr int kBarriers = 2 * kMostStages + 2 * kConsumers;
  static constexpr int kSlabRows = 16, kSlabColumns = 64;  // of a warp: what it turns from columns to rows at a time
  static constexpr int kSlab = kSlabRows * kSlabColumns * 4;
  // Maps that the rows of one group touch at most, if their means are taken.
  static constexpr int kMostMaps = 8;

  int64_t table, slabs, tables, shifts, stages, stage, total;

  // Stages are at the next multiple of their alignment, of which memory as a whole has 16 bytes. All that other blocks of a
  // cluster read lies in front of them, so that it is at the same place in each.
  constexpr LayoutSm90(bool shared_tile, int columns, int number_of_stages, bool held)
      : table(held ? kMostMaps * columns * 4 : 0),
        slabs(8 * kBarriers),
        tables(slabs + kConsumers * kWarpsOfGroup * kSlab),
        shifts(tables + kConsumers * 2 * table),
        stages(shifts + kConsumers * table),
        stage((rows(shared_tile) + columns) * int64_t{kStepBytes}),
        total(stages + kStageAlignment - 16 + number_of_stages * stage) {}

  static constexpr int rows(bool shared_tile) { return shared_tile ? kConsumers * kGroupRows : kGroupRows; }
  // Whether the rows of a group touch no more maps than it has room for.
  static constexpr bool takes_maps_of(int64_t pixels) { return (kGroupRows - 2) / pixels + 2 <= kMostMaps; }
};

}  // namespace deepcontrol::cuda

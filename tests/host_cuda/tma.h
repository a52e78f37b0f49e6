// Tensor maps and the boxes that the tensor memory accelerator (TMA) copies by them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host_cuda {

// What the encoders keep in the opaque bytes of a CUtensorMap. Dimensions are innermost first.
struct TensorMap {
  uint64_t magic;
  // CUTLASS clears a bit of this word for tensors below 128 KiB where the driver is of CUDA 13.1 or older, against a
  // fault of the driver. It may be cleared here too.
  uint64_t spare;
  const unsigned char* address;
  uint64_t strides[4];  // bytes, from the second dimension on
  uint32_t last[5];     // size - 1
  uint16_t box[5];      // of im2col channels and pixels
  int16_t lower[3], upper[3];
  uint8_t steps[5];
  uint8_t rank, element_bytes, swizzle, fill;
  bool im2col;

  int64_t size(int i) const { return int64_t{last[i]} + 1; }
};

// A box, as an instruction asks for it.
struct Box {
  TensorMap map;
  int at[5];
  unsigned ahead[3];

  // Why the instruction must not ask for it, or nothing.
  std::string why_not(int coordinates, int offsets) const;
  size_t bytes() const;
  // All of it, before any swizzle. What is outside of the tensor is zero, or NaN if the map says so.
  void read(unsigned char* to) const;
};

// Whether `opaque` was made by one of the encoders.
bool read_tensor_map(const void* opaque, TensorMap& map);

// Where the TMA puts what without swizzle would be at this address of shared memory, and where wgmma looks for it. Both
// take it from bits of the address, so the pattern starts anew every 1024 bytes (128 bytes of swizzle), 512 or 256.
inline unsigned swizzled(unsigned address, unsigned span) { return address ^ ((address >> 3) & (span - 1) & 0x70); }

}  // namespace host_cuda

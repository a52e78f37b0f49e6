// The driver's encoders of tensor maps, which hold their arguments to every rule of the CUDA driver API's reference
// ("Tensor Map Object Management"), and the copies, by the PTX ISA's chapter on tensors. What is allowed but not
// emulated, as interleaved layouts, is CUDA_ERROR_NOT_SUPPORTED.

#include "tma.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

namespace host_cuda {
namespace {

constexpr uint64_t kMagic = 0x70616d726f736e65u;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// 0: not a type that is emulated.
int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 0;
  }
}

bool is_float(CUtensorMapDataType type) {
  return type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type <= CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ;
}

int span_of(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: return 16;  // which moves nothing
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 128;
    default: return 0;
  }
}

struct Layout {
  CUtensorMapDataType type;
  cuuint32_t rank;
  void* address;
  const cuuint64_t* sizes;
  const cuuint64_t* strides;
  const cuuint32_t* steps;
  CUtensorMapInterleave interleave;
  CUtensorMapSwizzle swizzle;
  CUtensorMapL2promotion promotion;
  CUtensorMapFloatOOBfill fill;
};

// What both encoders have in common. `inner` is how many elements of a row are copied.
CUresult encode(const CUtensorMap* result, const Layout& l, int least_rank, cuuint32_t inner, TensorMap& map) {
  if (!result || reinterpret_cast<uintptr_t>(result) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (l.type > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ || l.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  const int bytes = bytes_of(l.type), span = span_of(l.swizzle), rank = static_cast<int>(l.rank);
  if (bytes == 0 || rank < least_rank || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  if (span == 0) return CUDA_ERROR_NOT_SUPPORTED;
  if (!l.address || reinterpret_cast<uintptr_t>(l.address) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  uint64_t below = static_cast<uint64_t>(bytes);
  for (int i = 0; i < rank; ++i) {
    if (l.sizes[i] == 0 || l.sizes[i] > uint64_t{1} << 32) return CUDA_ERROR_INVALID_VALUE;
    map.last[i] = static_cast<uint32_t>(l.sizes[i] - 1);
    // TMA has no step along the innermost dimension, and the driver does not look at it.
    if (i > 0 && (l.steps[i] == 0 || l.steps[i] > 8)) return CUDA_ERROR_INVALID_VALUE;
    map.steps[i] = i > 0 ? static_cast<uint8_t>(l.steps[i]) : 1;
    if (i + 1 == rank) break;
    // By the reference each stride is one below times size plus padding. Whether drivers ask for that is not known.
    const uint64_t stride = l.strides[i];
    if (stride % 16 != 0 || stride >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    if (stride / below < l.sizes[i] || (i > 0 && stride % below != 0)) return CUDA_ERROR_INVALID_VALUE;
    map.strides[i] = below = stride;
  }
  if (l.promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B) return CUDA_ERROR_INVALID_VALUE;
  if (l.fill > CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA) return CUDA_ERROR_INVALID_VALUE;
  if (l.fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && !is_float(l.type)) return CUDA_ERROR_INVALID_VALUE;
  const uint64_t inner_bytes = uint64_t{inner} * static_cast<uint64_t>(bytes);
  if (inner == 0 || inner > 256 || inner_bytes % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (l.swizzle != CU_TENSOR_MAP_SWIZZLE_NONE) {
    if (inner_bytes > static_cast<uint64_t>(span)) return CUDA_ERROR_INVALID_VALUE;
    // How far apart shorter rows are is not documented.
    if (inner_bytes < static_cast<uint64_t>(span)) return CUDA_ERROR_NOT_SUPPORTED;
  }
  map.magic = kMagic;
  map.address = static_cast<const unsigned char*>(l.address);
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(bytes);
  map.swizzle = static_cast<uint8_t>(span);
  map.fill = l.fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ? 0 : 0xff;
  return CUDA_SUCCESS;
}

void keep(const TensorMap& map, CUtensorMap* result) {
  std::memset(result, 0, sizeof(*result));
  std::memcpy(result, &map, sizeof(map));
}

// Elements of the innermost dimension from at[0] on, at these others.
void read_row(const TensorMap& map, const int64_t* at, unsigned char* to) {
  const int64_t count = map.box[0];
  const unsigned char* row = map.address;
  bool inside = true;
  for (int i = 1; i < map.rank; ++i) {
    inside &= at[i] >= 0 && at[i] < map.size(i);
    row += at[i] * static_cast<int64_t>(map.strides[i - 1]);
  }
  const int64_t begin = std::clamp<int64_t>(-at[0], 0, count);
  const int64_t end = inside ? std::clamp<int64_t>(map.size(0) - at[0], begin, count) : begin;
  const auto bytes = [&](int64_t elements) { return static_cast<size_t>(elements) * map.element_bytes; };
  std::memset(to, map.fill, bytes(begin));
  if (begin < end) std::memcpy(to + bytes(begin), row + (at[0] + begin) * map.element_bytes, bytes(end - begin));
  std::memset(to + bytes(end), map.fill, bytes(count - end));
}

}  // namespace

bool read_tensor_map(const void* opaque, TensorMap& map) {
  std::memcpy(&map, opaque, sizeof(map));
  return map.magic == kMagic;
}

std::string Box::why_not(int coordinates, int offsets) const {
  const auto text = [](int64_t number) { return std::to_string(number); };
  if (map.im2col != (offsets > 0)) return offsets > 0 ? "by a map of tiles" : "by a map of im2col";
  if (map.rank != coordinates) return "of a tensor of " + text(map.rank) + " dimensions";
  if (!map.im2col) return "";
  const unsigned most = coordinates == 5 ? 31 : 255;
  for (int i = 0; i < offsets; ++i) {
    const int64_t last = int64_t{map.last[i + 1]} + map.upper[i];
    if (at[i + 1] < map.lower[i] || at[i + 1] > last) {
      const std::string place = text(at[i + 1]) + " in dimension " + text(i + 1);
      return "from " + place + "; the bounding box is " + text(map.lower[i]) + " to " + text(last);
    }
    if (ahead[i] > most) return text(ahead[i]) + " ahead; the limit is " + text(most);
  }
  return "";
}

size_t Box::bytes() const {
  size_t elements = map.box[0];
  for (int i = 1; i < (map.im2col ? 2 : map.rank); ++i) elements *= map.box[i];
  return elements * map.element_bytes;
}

void Box::read(unsigned char* to) const {
  const size_t row = size_t{map.box[0]} * map.element_bytes;
  const int rank = map.rank;
  int64_t place[5];
  if (map.im2col) {
    // The base goes through the bounding box, then through that of the next sample; what is read is ahead of it.
    int64_t base[5];
    std::copy(at, at + rank, base);
    for (int pixel = 0; pixel < map.box[1]; ++pixel, to += row) {
      std::copy(base, base + rank, place);
      for (int i = 1; i < rank - 1; ++i) place[i] += ahead[i - 1];
      read_row(map, place, to);
      int i = 1;
      for (; i < rank - 1; ++i) {
        base[i] += map.steps[i];
        if (base[i] <= int64_t{map.last[i]} + map.upper[i - 1]) break;
        base[i] = map.lower[i - 1];
      }
      if (i == rank - 1) ++base[i];
    }
    return;
  }
  int done[5] = {};
  for (size_t left = bytes() / row; left > 0; --left, to += row) {
    place[0] = at[0];
    for (int i = 1; i < rank; ++i) place[i] = int64_t{at[i]} + int64_t{done[i]} * map.steps[i];
    read_row(map, place, to);
    for (int i = 1; i < rank && ++done[i] == map.box[i]; ++i) done[i] = 0;
  }
}

}  // namespace host_cuda

extern "C" {

CUresult cuTensorMapEncodeTiled(CUtensorMap* result, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  host_cuda::TensorMap map{};
  const host_cuda::Layout layout{type, rank, address, sizes, strides, steps, interleave, swizzle, promotion, fill};
  const CUresult refused = host_cuda::encode(result, layout, 1, box[0], map);
  if (refused != CUDA_SUCCESS) return refused;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    map.box[i] = static_cast<uint16_t>((box[i] + map.steps[i] - 1) / map.steps[i]);
  }
  host_cuda::keep(map, result);
  return CUDA_SUCCESS;
}

// The reference names the corners {D, H, W}; CUTLASS gives them as everything else, innermost first, and so here.
CUresult cuTensorMapEncodeIm2col(CUtensorMap* result, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  host_cuda::TensorMap map{};
  const host_cuda::Layout layout{type, rank, address, sizes, strides, steps, interleave, swizzle, promotion, fill};
  const CUresult refused = host_cuda::encode(result, layout, 3, channels, map);
  if (refused != CUDA_SUCCESS) return refused;
  if (pixels == 0 || pixels > 1024) return CUDA_ERROR_INVALID_VALUE;
  const int limit = rank == 3 ? 32768 : rank == 4 ? 128 : 16;
  for (cuuint32_t i = 0; i + 2 < rank; ++i) {
    for (const int corner : {lower[i], upper[i]}) {
      if (corner < -limit || corner >= limit) return CUDA_ERROR_INVALID_VALUE;
    }
    if (lower[i] > int64_t{map.last[i + 1]} + upper[i]) return CUDA_ERROR_INVALID_VALUE;
    map.lower[i] = static_cast<int16_t>(lower[i]);
    map.upper[i] = static_cast<int16_t>(upper[i]);
  }
  map.box[0] = static_cast<uint16_t>(channels);
  map.box[1] = static_cast<uint16_t>(pixels);
  map.im2col = true;
  host_cuda::keep(map, result);
  return CUDA_SUCCESS;
}

}  // extern "C"

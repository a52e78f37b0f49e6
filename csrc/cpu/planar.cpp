// The convolution by one tap in contiguous layout: tiles, scratch memory and threads around the kernels of planar_impl.h.

#include <ATen/ops/empty_like.h>

#include "pointwise.h"
#include "workspace.h"

namespace deepcontrol::cpu {

static Tensor product_weight(const Tensor& weight, const Tensor& x) {
  return weight.view({weight.size(0), weight.size(1)}).to(x.scalar_type());
}

// (rows, columns) to (columns, rows) by way of blocks: read down a column, rows at power-of-two strides would fall into few
// of the cache's sets.
template <class Element>
static void transpose(const void* from, int64_t rows, int64_t columns, void* to) {
  constexpr int64_t kBlock = 32;
  for_tasks((columns + kBlock - 1) / kBlock, rows * kBlock, [&](int64_t begin, int64_t end) {
    Element block[kBlock][kBlock + 1];
    for (int64_t c = begin * kBlock; c < std::min(end * kBlock, columns); c += kBlock) {
      const int64_t wide = std::min(kBlock, columns - c);
      for (int64_t r = 0; r < rows; r += kBlock) {
        const int64_t high = std::min(kBlock, rows - r);
        for (int64_t j = 0; j < high; ++j) {
          std::copy_n(static_cast<const Element*>(from) + (r + j) * columns + c, wide, block[j]);
        }
        for (int64_t i = 0; i < wide; ++i) {
          for (int64_t j = 0; j < high; ++j) static_cast<Element*>(to)[(c + i) * rows + r + j] = block[j][i];
        }
      }
    }
  });
}

static Tensor transposed(const Tensor& w) {
  const Tensor result = at::empty({w.size(1), w.size(0)}, w.options());
  const auto as = w.element_size() == 4 ? transpose<uint32_t> : transpose<uint16_t>;
  as(data(w), w.size(0), w.size(1), mutable_data(result));
  return result;
}

static void run(PlanarForward& p) {
  const int64_t threads = at::get_num_threads();
  // A block's filters should be worth what each brings its tile's pixels into order for.
  constexpr int64_t kLeastFilters = 24;
  const int64_t least = (threads + p.tiles.count - 1) / p.tiles.count;
  p.blocks = even_tiles(p.tiles.count, least, p.filters / kLeastFilters, threads);
  const Workspace workspace(threads * p.scratch_bytes());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      PlanarForward own = p;
      own.scratch = static_cast<char*>(workspace.data()) + slot * p.scratch_bytes();
      kernels().planar_forward(own, p.tasks() * slot / threads, p.tasks() * (slot + 1) / threads);
    }
  });
}

Convolved fused_planar(const Tensor& input, const Tensor& weight, at::IntArrayRef stride, const Tensor& gain,
                       const Tensor& mean_scale, double constant, const Tensor& bias, const OptionalTensor& residual,
                       Activation activation, double slope, bool save) {
  constexpr auto format = at::MemoryFormat::Contiguous;
  const Tensor x = met_pixels(input, stride).contiguous();
  const Tensor w = product_weight(weight.contiguous(), x);
  auto shape = x.sizes().vec();
  shape[1] = w.size(0);
  Convolved result;
  result.output = at::empty(shape, x.options().memory_format(format));
  PlanarForward p{dtype_of(x),
                  Activation::identity,
                  slope,
                  constant,
                  PlanarTiles(x.size(0), pixels_of(x), at::get_num_threads()),
                  x.size(1),
                  w.size(0)};
  p.input = data(x);
  p.weight = data(w);
  p.output = mutable_data(result.output);
  const bool is_centred = mean_scale.defined() || constant != 0.0;
  p.knows_means = is_centred && !p.tiles.has_whole_maps();
  if (p.knows_means && weight.size(1) > weight.size(0)) {
    // The means of the output are fewer than those of the input and known only when its maps are whole.
    run(p);
    result.centred =
        center_into(result.output, result.output, format, gain, mean_scale, constant, bias, residual, activation, slope, save);
    if (gain.defined()) result.centred.map_mean.mul_(gain);
    return result;
  }
  const auto vectors = accumulation_options(x);
  result.centred.map_mean = p.knows_means ? mean_of_product(x, weight, format, gain)
                                          : at::empty(is_centred ? std::vector<int64_t>{x.size(0), w.size(0)}
                                                                 : std::vector<int64_t>{0}, vectors);
  result.centred.saved = saved_for(result.output, format, activation, save);
  const Tensor dense_residual = residual_of(residual, result.output, format);
  p.activation = activation;
  p.gain = data(gain);
  p.mean_scale = data(mean_scale);
  p.bias = data(bias);
  p.residual = data(dense_residual);
  if (is_centred) p.map_mean = result.centred.map_mean.mutable_data_ptr<float>();
  if (save && is_piecewise(activation)) p.bits = result.centred.saved.mutable_data_ptr<uint8_t>();
  if (save && is_smooth(activation)) p.pre_activation = mutable_data(result.centred.saved);
  run(p);
  return result;
}

PointwiseGrads fused_planar_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                     at::IntArrayRef stride, const Tensor& scale, const Tensor& mean_scale,
                                     double constant, const Tensor& saved, Activation activation, double slope,
                                     bool wants_input, bool wants_weight, bool wants_residual) {
  constexpr auto format = at::MemoryFormat::Contiguous;
  const Tensor grad = grad_output.contiguous(), x = met_pixels(input, stride).contiguous();
  const int64_t slots = at::get_num_threads(), weights = weight.numel();
  PlanarBackward p{dtype_of(x),
                   activation,
                   slope,
                   constant,
                   mean_scale.defined() || constant != 0.0,
                   PlanarTiles(x.size(0), pixels_of(x), slots),
                   x.size(1),
                   weight.size(0),
                   slots};
  p.knows_sums = !p.tiles.has_whole_maps();
  PointwiseGrads result;
  if (p.knows_sums) {
    result.sums = center_error(grad, {}, {}, {}, 0.0, saved, activation, slope, format, {false, false, true, false}).sums;
  } else {
    check_saved(saved, grad, format, activation);
    result.sums = at::empty({grad.size(0), grad.size(1)}, accumulation_options(grad));
  }
  if (wants_input) result.grad_input = at::empty_like(x);
  if (wants_weight) result.grad_weight = at::empty_like(weight, weight.options().memory_format(format));
  if (wants_residual) result.grad_residual = at::empty_like(grad);
  const Tensor w = wants_input ? transposed(product_weight(weight.contiguous(), x)) : Tensor();
  const int64_t partial_bytes = wants_weight ? slots * weights * int64_t(sizeof(float)) : 0;
  const Workspace workspace(partial_bytes + slots * p.scratch_bytes());
  p.grad_output = data(grad);
  if (is_piecewise(activation)) p.bits = saved.const_data_ptr<uint8_t>();
  if (is_smooth(activation)) p.pre_activation = data(saved);
  p.input = data(x);
  p.weight = data(w);
  p.scale = data(scale);
  p.mean_scale = data(mean_scale);
  p.sums = result.sums.mutable_data_ptr<float>();
  p.grad_input = mutable_data(result.grad_input);
  p.grad_residual = mutable_data(result.grad_residual);
  p.partials = wants_weight ? static_cast<float*>(workspace.data()) : nullptr;
  p.scratch = static_cast<char*>(workspace.data()) + partial_bytes;
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) { kernels().planar_backward(p, begin, end); });
  if (wants_weight) {
    AddPartials add{dtype_of(weight), slots, p.filters, p.channels, p.partials, mutable_data(result.grad_weight)};
    for_tasks(p.filters, slots * p.channels, [&](int64_t begin, int64_t end) { kernels().add_partials(add, begin, end); });
  }
  if (wants_input) result.grad_input = between_zeros(result.grad_input, input, format, stride);
  return result;
}

}  // namespace deepcontrol::cpu

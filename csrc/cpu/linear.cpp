// A linear layer with packed weights; what is computed stands in segvit_kernels/ops/linear.py.
//
// A task is up to 128 rows, 256 with AMX, packed into its scratch memory (at most 1 MB), and all panels of weights,
// or some of them where there would be few tasks; the rows are then packed again for each part. An element of the result is
// computed in the same order whatever the tasks are.
#include "linear.h"

#include "../operators.h"
#include "common.h"

namespace segvit::cpu {

#if defined(SEGVIT_AVX512_FP16)
namespace {

constexpr int64_t kTaskBytes = 1 << 20;
constexpr int64_t kStreamed = 1 << 20;  // bytes of an output that goes past the caches: half a second-level cache

// How a kernel likes its tasks.
struct Granules {
  int64_t rows, most_rows, columns, panels;
};
constexpr Granules kFp16 = {kPackedRows, 128, kPanelColumns, 4}, kAmx = {kTileGroup, 256, kTilePanel, 2};

// The addresses of the caller's tensor in one piece, which must have so many elements of the type.
const char* whole(std::optional<Tensor>& tensor, const Tensor& like, int64_t elements) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == like.scalar_type() && tensor->numel() == elements,
                  "segvit: linear: expected vectors and a residual of the output's dtype and size");
  tensor = torch::stable::contiguous(*tensor);
  return data<char>(*tensor);
}

}  // namespace

Tensor linear(Tensor input, Tensor weight, Optional bias, Optional panels, Optional factors, bool gelu,
              Optional norm_weight, Optional norm_bias, double norm_eps, Optional scale, Optional residual) {
  STD_TORCH_CHECK(panels, "segvit: linear needs packed weights");
  bool int8 = panels->scalar_type() == ScalarType::Char, tiles = int8 || panels->scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(isa() >= (tiles ? Isa::amx : Isa::avx512_fp16), "segvit: linear: weights packed for AMX or "
                  "AVX512-FP16, which the CPU code in use is not for");
  STD_TORCH_CHECK(tiles ? input.scalar_type() == ScalarType::BFloat16 : !norm_weight && !scale && !residual,
                  "segvit: linear: not with weights packed so");
  input = unit_stride(input);
  if (input.dim() > 3) input = torch::stable::contiguous(input);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  int64_t depth = sizes.back(), columns = weight.size(0), dims = input.dim(), rows = 1;
  sizes.back() = columns;
  Tensor output = empty(input, sizes);
  sizes.pop_back();
  for (int64_t size : sizes) rows *= size;
  if (rows == 0 || columns == 0) return output;
  const Granules& granule = tiles ? kAmx : kFp16;
  int64_t padded = round_up(depth, int8 ? 2 * kPackedDepth : kPackedDepth), count = (columns + granule.columns - 1) / granule.columns;
  Tensor packed = torch::stable::contiguous(*panels);
  bool fits = packed.numel() == count * granule.columns * padded && weight.size(1) == depth;
  if (int8 || !tiles) {
    fits = fits && (int8 || packed.scalar_type() == ScalarType::Half) && factors &&
           factors->scalar_type() == ScalarType::Float && factors->numel() == count * granule.columns;
    factors = in_one_piece(factors);
  }
  STD_TORCH_CHECK(fits, "segvit: linear: the packed weights are not those of this layer");
  bool flat = dims == 1 || input.is_contiguous() || dims > 3;
  int64_t inner = dims == 3 && !flat ? input.size(1) : rows;
  Linear args{data<char>(input),
              whole(bias, input, columns),
              dims == 3 && !flat ? input.stride(0) : 0,
              flat ? depth : input.stride(dims - 2),
              inner,
              type_of(input),
              data<uint16_t>(packed),
              data<float>(factors),
              data<char>(output),
              depth,
              columns,
              gelu,
              whole(norm_weight, input, depth),
              whole(norm_bias, input, depth),
              static_cast<float>(norm_eps),
              whole(scale, input, columns),
              whole(residual, input, rows * columns),
              rows * columns * 2 > kStreamed};
  int64_t threads = torch::stable::get_num_threads();
  int64_t most = std::clamp(kTaskBytes / (2 * padded) / granule.rows * granule.rows, granule.rows, granule.most_rows);
  int64_t blocks = (rows + most - 1) / most;
  int64_t block_rows = round_up((rows + blocks - 1) / blocks, granule.rows);
  blocks = (rows + block_rows - 1) / block_rows;
  int64_t parts = threads == 1 ? 1 : ((tiles ? 2 : 4) * threads + blocks - 1) / blocks;
  int64_t part = round_up((count + parts - 1) / parts, std::min(granule.panels, count));
  parts = (count + part - 1) / part;
  int64_t bytes = tiles ? linear_amx_scratch_bytes(block_rows, depth) : linear_scratch_bytes(block_rows, depth);
  auto* kernel = &avx512_fp16::linear;
#if defined(SEGVIT_AMX)
  if (tiles) kernel = int8 ? &amx::linear_int8 : &amx::linear;
#endif
  parallel(blocks * parts, [&](int64_t task) {
    int64_t row = task / parts * block_rows, panel = task % parts * part;
    Scratch scratch(bytes);
    kernel(args, row, std::min(row + block_rows, rows), panel, std::min(panel + part, count), scratch.as<char>());
  });
  return output;
}
#else
Tensor linear(Tensor, Tensor, Optional, Optional, Optional, bool, Optional, Optional, double, Optional, Optional) {
  STD_TORCH_CHECK(false, "segvit: built without AVX512-FP16");
}
#endif

}  // namespace segvit::cpu

// A linear layer with packed weights; what is computed stands in segvit_kernels/ops/linear.py.
//
// A task is up to 128 rows, packed into its scratch memory (at most 1 MB), and all panels of weights, or some of
// them where there would be few tasks; the rows are then packed again for each part. An element of the result is
// computed in the same order whatever the tasks are.
#include "linear.h"

#include "../operators.h"
#include "common.h"

namespace segvit::cpu {

#if defined(SEGVIT_AVX512_FP16)
namespace {

constexpr int64_t kTaskRows = 128, kTaskPanels = 4, kTaskBytes = 1 << 20;

}  // namespace

Tensor linear(Tensor input, Tensor weight, Optional bias, Optional panels, Optional exponents, bool gelu) {
  STD_TORCH_CHECK(isa() == Isa::avx512_fp16, "segvit: linear needs AVX512-FP16");
  STD_TORCH_CHECK(panels && exponents, "segvit: linear needs packed weights");
  input = unit_stride(input);
  if (input.dim() > 3) input = torch::stable::contiguous(input);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  int64_t depth = sizes.back(), columns = weight.size(0), dims = input.dim(), rows = 1;
  sizes.back() = columns;
  Tensor output = empty(input, sizes);
  sizes.pop_back();
  for (int64_t size : sizes) rows *= size;
  if (rows == 0 || columns == 0) return output;
  int64_t pairs = round_up(depth, kPackedDepth) / 2, count = (columns + kPanelColumns - 1) / kPanelColumns;
  Tensor packed = torch::stable::contiguous(*panels), powers = torch::stable::contiguous(*exponents);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Half && powers.scalar_type() == ScalarType::Float &&
                      packed.numel() == count * pairs * 2 * kPanelColumns &&
                      powers.numel() == count * kPanelColumns && weight.size(1) == depth,
                  "segvit: linear: the packed weights are not those of this layer");
  std::optional<Tensor> shift = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  bool flat = dims == 1 || input.is_contiguous() || dims > 3;
  int64_t inner = dims == 3 && !flat ? input.size(1) : rows;
  Linear args{data<char>(input),
              data<char>(shift),
              dims == 3 && !flat ? input.stride(0) : 0,
              flat ? depth : input.stride(dims - 2),
              inner,
              type_of(input),
              data<uint16_t>(packed),
              data<float>(powers),
              data<char>(output),
              depth,
              columns,
              gelu};
  int64_t most = std::clamp(kTaskBytes / (4 * pairs) / kPackedRows * kPackedRows, kPackedRows, kTaskRows);
  int64_t blocks = (rows + most - 1) / most;
  int64_t block_rows = round_up((rows + blocks - 1) / blocks, kPackedRows);
  blocks = (rows + block_rows - 1) / block_rows;
  int64_t threads = torch::stable::get_num_threads(), parts = (4 * threads + blocks - 1) / blocks;
  int64_t part = std::max((count + parts - 1) / parts, std::min(kTaskPanels, count));
  parts = threads == 1 ? 1 : (count + part - 1) / part;
  if (parts == 1) part = count;
  parallel(blocks * parts, [&](int64_t task) {
    int64_t row = task / parts * block_rows, panel = task % parts * part;
    Scratch scratch(linear_scratch_bytes(block_rows, depth));
    avx512_fp16::linear(args, row, std::min(row + block_rows, rows), panel, std::min(panel + part, count),
                        scratch.as<char>());
  });
  return output;
}
#else
Tensor linear(Tensor, Tensor, Optional, Optional, Optional, bool) {
  STD_TORCH_CHECK(false, "segvit: built without AVX512-FP16");
}
#endif

}  // namespace segvit::cpu

// A linear layer with packed weights; what is computed stands in segvit_kernels/ops/linear.py.
//
// A task is up to 128 rows, 256 with AMX or VNNI, packed into its scratch memory (at most 1 MB), and all panels of weights,
// or some of them where there would be few tasks; the rows are then packed again for each part. An element of the result is
// computed in the same order whatever the tasks are.
#include "linear.h"

#include "../../operators.h"
#include "../common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kTaskBytes = 1 << 20;
constexpr int64_t kStreamed = 1 << 20;  // bytes of an output that goes past the caches: half a second-level cache

// A kernel, what it needs of the processor, and how it likes its tasks.
struct Kernel {
  void (*run)(const Linear&, int64_t, int64_t, int64_t, int64_t, char*);
  int64_t (*scratch_bytes)(int64_t rows, int64_t depth);
  int64_t rows, most_rows, columns, panels, depth;
  int64_t element;    // bytes of a packed number
  int64_t tasks;      // a thread, at least
  bool takes_around;  // LayerNorm, scale and residual
};

// The kernel for weights packed so, or one that does not run.
Kernel kernel_for(const Tensor& packed, Type type) {
  ScalarType panels = packed.scalar_type();
#if defined(SEGVIT_X86)
#if defined(SEGVIT_AMX)
  if (isa() >= Isa::amx && panels == ScalarType::BFloat16 && packed.dim() == 5 && type == Type::bf16)
    return {&amx::linear, linear_amx_scratch_bytes, kTileGroup, 256, kTilePanel, 2, kPackedDepth, 2, 2, true};
  if (isa() >= Isa::amx && panels == ScalarType::Char)
    return {&amx::linear_int8, linear_amx_scratch_bytes, kTileGroup, 256, kTilePanel, 2, 64, 1, 2, true};
#endif
  if (isa() >= Isa::avx512 && panels == ScalarType::Char)
    return {&avx512::linear_int8, linear_dots_scratch_bytes, kDotRows, 22 * kDotRows, kTilePanel, 1, 64, 1, 2, true};
#if defined(SEGVIT_AVX512_BF16)
  if (isa() >= Isa::avx512_bf16 && panels == ScalarType::BFloat16 && packed.dim() == 5 && type == Type::bf16)
    return {&avx512_bf16::linear, linear_dots_scratch_bytes, kDotRows, 22 * kDotRows, kTilePanel, 1, kPackedDepth, 2, 2,
            true};
#endif
#if defined(SEGVIT_AVX512_FP16)
  if (isa() >= Isa::avx512_fp16 && panels == ScalarType::Half && packed.dim() == 4 && type != Type::f32)
    return {&avx512_fp16::linear, linear_scratch_bytes, kPackedRows, 128, kPanelColumns, 4, kPackedDepth, 2, 4, false};
#endif
  if (isa() >= Isa::avx2 && panels == ScalarType::Char)
    return {&avx2::linear_int8, linear_int16_scratch_bytes, kFloatRows, 22 * kFloatRows, kTilePanel, 1, 64, 2, 2, true};
  if (isa() >= Isa::avx512 && packed.dim() == 3 && type_of(packed) == type)
    return {&avx512::linear_float, linear_float_scratch_bytes, kFloatRows512, 11 * kFloatRows512, kTilePanel, 1, 1, 4, 2,
            true};
  if (isa() >= Isa::avx2 && packed.dim() == 3 && type_of(packed) == type)
    return {&avx2::linear_float, linear_float_scratch_bytes, kFloatRows, 22 * kFloatRows, kTilePanel, 1, 1, 4, 2, true};
#endif
  return {};
}

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
  Type type = type_of(input);
  Kernel kernel = kernel_for(*panels, type);
  STD_TORCH_CHECK(kernel.run, "segvit: linear: weights are packed for other numbers, or for an instruction set that the "
                  "CPU code in use is not for");
  STD_TORCH_CHECK(kernel.takes_around || (!norm_weight && !scale && !residual),
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
  int64_t padded = round_up(depth, kernel.depth), count = (columns + kernel.columns - 1) / kernel.columns;
  Tensor packed = torch::stable::contiguous(*panels);
  bool fits = packed.numel() == count * kernel.columns * padded && weight.size(1) == depth;
  if (packed.scalar_type() == ScalarType::Char || packed.dim() == 4) {
    fits = fits && factors && factors->scalar_type() == ScalarType::Float &&
           factors->numel() == count * kernel.columns;
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
              type,
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
              rows * columns * size_of(type) > kStreamed};
  int64_t threads = torch::stable::get_num_threads();
  int64_t row_bytes = kernel.element * padded;
  int64_t most = std::clamp(kTaskBytes / row_bytes / kernel.rows * kernel.rows, kernel.rows, kernel.most_rows);
  // As many blocks of rows for each thread, that differ by one granule at most.
  int64_t granules = (rows + kernel.rows - 1) / kernel.rows, blocks = (rows + most - 1) / most;
  if (blocks > threads) blocks = std::min(round_up(blocks, threads), granules);
  auto first_row = [&](int64_t block) { return block * granules / blocks * kernel.rows; };
  int64_t parts = threads == 1 ? 1 : (kernel.tasks * threads + blocks - 1) / blocks;
  int64_t part = round_up((count + parts - 1) / parts, std::min(kernel.panels, count));
  parts = (count + part - 1) / part;
  int64_t bytes = kernel.scratch_bytes((granules + blocks - 1) / blocks * kernel.rows, depth);
  parallel(blocks * parts, [&](int64_t task) {
    int64_t row = first_row(task / parts), row_end = std::min(first_row(task / parts + 1), rows);
    int64_t panel = task % parts * part;
    Scratch scratch(bytes);
    kernel.run(args, row, row_end, panel, std::min(panel + part, count), scratch.as<char>());
  }, 1.0 * rows * columns * depth);
  return output;
}

}  // namespace segvit::cpu

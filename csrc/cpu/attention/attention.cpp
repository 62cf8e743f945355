// Attention, with the mean of the scores over the heads where masks are wanted; what is computed stands in
// segvit_kernels/ops/atm.py.
//
// Forward: a task is a chunk of the queries of one head, or of all heads where there are masks, so that the
// scores of a tile are added up while they are in the cache. Where that makes few tasks the keys are split
// too, and the parts are put together at the end. Backward: a task is some heads and a part of the keys, and
// owns the gradients of these keys and values; the gradients of the queries are added over the parts at the
// end.
//
// All splits follow from the sizes alone: results do not depend on the number of threads, and nothing is
// added atomically. Memory beyond the results: the parts, where there are several (each as large as the
// output or the queries in float32; ade_vit_b has 4), and per thread what attention.h counts, up to 1 MB or
// so.
#include "attention.h"

#include <cmath>

#include "attention_launch.h"
#include "../common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kFwdTasks = 8, kBwdTasks = 16;  // keys are split to have as many, if each has kSplitKeys
constexpr int64_t kSplitKeys = 256;
constexpr int64_t kFwdQueries = 1 << 16, kBwdQueries = 1 << 15;  // elements of the queries that a task takes

// A tensor with unit last stride, or null. The tensor is kept by the caller.
HeadsView heads_of(const Tensor& t, int64_t batch) {
  // One item for the whole batch.
  int64_t batch_stride = t.size(0) < batch ? 0 : t.stride(0);
  return {data<char>(t), batch_stride, t.stride(1), t.stride(2), type_of(t)};
}
MasksView masks_of(const Optional& t) {
  if (!t) return {nullptr, 0, 0, Type::f32};
  return {data<char>(t), t->stride(0), t->stride(1), type_of(*t)};
}

AttentionShape shape_of(const Tensor& query, const Tensor& key, const Optional& seed, double scale,
                        double dropout_p, const Optional& padding) {
  AttentionShape shape{
      query.size(1), key.size(1), query.size(2), query.size(3), static_cast<float>(scale), {}, data<bool>(padding)};
  if (dropout_p > 0 && seed) {
    auto bits = static_cast<uint64_t>(*data<int64_t>(seed));
    auto threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 65536), 65535.0));
    shape.dropout = {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)},
                     threshold,
                     static_cast<float>(65536.0 / (65536.0 - threshold))};
  }
  return shape;
}

// A kernel for bfloat16 and one head with all of its keys, and how many queries it takes together.
struct HalfKernel {
  void (*run)(const AttentionFwd&, int64_t, int64_t, int64_t, int64_t, char*);
  int64_t (*scratch_bytes)(int64_t keys, int64_t dim);
  int64_t queries;
};

HalfKernel half_kernel([[maybe_unused]] int64_t dim) {
#if defined(SEGVIT_AMX)
  if (isa() >= Isa::amx) return {&amx::attention, bf16_scratch_bytes, kBf16Queries};
#endif
#if defined(SEGVIT_AVX512_FP16)
  if (isa() >= Isa::avx512_fp16 && dim <= kFp16MostDim)
    return {&avx512_fp16::attention, fp16_scratch_bytes, kTileQueries};
#endif
#if defined(SEGVIT_AVX512_BF16)
  if (isa() >= Isa::avx512_bf16) return {&avx512_bf16::attention, bf16_scratch_bytes, kBf16Queries};
#endif
  return {};
}

// How many keys a task takes, a multiple of a tile, so that `tasks` times the splits are enough.
int64_t keys_per_split(int64_t keys, int64_t tasks, int64_t enough) {
  int64_t splits = std::min((enough + tasks - 1) / tasks, (keys + kSplitKeys - 1) / kSplitKeys);
  return round_up((keys + splits - 1) / splits, kTileKeys);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& query_in, const Tensor& key_in,
                                                     const Tensor& value_in, const Optional& previous_in,
                                                     const Optional& seed, double scale, double dropout_p,
                                                     bool need_masks, const Optional& padding_in) {
  Tensor query = unit_stride(query_in), key = unit_stride(key_in), value = unit_stride(value_in);
  Optional previous = unit_stride(previous_in), padding = in_one_piece(padding_in);
  STD_TORCH_CHECK(!previous || previous->scalar_type() == query.scalar_type(),
                  "segvit: expected previous_masks in the dtype of query");
  AttentionShape shape = shape_of(query, key, seed, scale, dropout_p, padding);
  int64_t batch = key.size(0), queries = shape.queries, keys = shape.keys;
  int64_t heads = shape.heads, dim = shape.dim;
  Tensor output = empty(query, {batch, queries, heads, dim});
  Optional masks;
  if (need_masks) masks = empty(query, {batch, queries, keys});
  Tensor lse = empty(query, {batch, heads, queries}, ScalarType::Float);
  std::tuple results{output, masks ? *masks : empty(query, {0}), lse};
  if (batch == 0) return results;

  AttentionFwd args{shape,
                    heads_of(query, batch),
                    heads_of(key, batch),
                    heads_of(value, batch),
                    heads_of(output, batch),
                    masks_of(masks),
                    masks_of(previous),
                    data<float>(lse)};
  double work = 1.0 * batch * heads * queries * keys * dim;
  if (args.query.type == Type::bf16 && !need_masks && shape.dropout.threshold == 0) {
    if (HalfKernel kernel = half_kernel(dim); kernel.run) {
      // A task packs keys and values of its head: as few tasks for each head as keep the threads busy.
      int64_t wanted = (4 * torch::stable::get_num_threads() + batch * heads - 1) / (batch * heads);
      int64_t block = round_up((queries + wanted - 1) / wanted, kernel.queries), blocks = (queries + block - 1) / block;
      parallel(batch * heads * blocks, [&](int64_t task) {
        int64_t item = task / blocks, first = task % blocks * block;
        Scratch scratch(kernel.scratch_bytes(keys, dim));
        kernel.run(args, item / heads, item % heads, first, std::min(first + block, queries), scratch.as<char>());
      }, work);
      return results;
    }
  }
  int64_t together = need_masks ? heads : 1, groups = heads / together;
  // Chunks of equal size, small enough that the state of all heads stays in the second-level cache.
  int64_t most =
      std::clamp(kFwdQueries / (together * dim) / kTileQueries, int64_t{1}, int64_t{8}) * kTileQueries;
  int64_t chunks = (queries + most - 1) / most;
  int64_t chunk = round_up((queries + chunks - 1) / chunks);
  chunks = (queries + chunk - 1) / chunk;
  int64_t items = batch * groups * chunks, split = keys_per_split(keys, items, kFwdTasks);
  int64_t splits = (keys + split - 1) / split, state_floats = state_size(together, chunk, dim);

  auto block_of = [&](int64_t item, int64_t part) {
    int64_t b = item / (groups * chunks), group = item / chunks % groups, first = item % chunks * chunk;
    int64_t last = std::min(first + chunk, queries), key = part * split;
    return AttentionBlock{b,    b + 1, group * together,           (group + 1) * together, first,
                          last, key,   std::min(key + split, keys)};
  };
  auto* kernel = SEGVIT_PICK(attention_fwd);
  auto* finish = SEGVIT_PICK(attention_finish);
  int64_t scratch_floats = fwd_scratch_size(together, chunk, dim);
  Scratch states(splits > 1 ? items * splits * state_floats * sizeof(float) : 0);
  // The chunks of one part of the keys are neighbours, while these are in the cache.
  parallel(items * splits, [&](int64_t task) {
    int64_t item = task / (chunks * splits) * chunks + task % chunks, part = task / chunks % splits;
    AttentionBlock block = block_of(item, part);
    Scratch scratch((scratch_floats + (splits > 1 ? 0 : state_floats)) * sizeof(float));
    float* state = splits > 1 ? states.as<float>() + (item * splits + part) * state_floats
                              : scratch.as<float>() + scratch_floats;
    kernel(args, block, state, scratch.as<float>());
    if (splits == 1) finish(args, block, state, 1, 0);
  }, work);
  if (splits > 1)
    parallel(items * together, [&](int64_t task) {
      AttentionBlock block = block_of(task / together, 0);
      int64_t before = task % together;
      block.head += before;
      block.head_end = block.head + 1;
      float* state = states.as<float>() + task / together * splits * state_floats;
      finish(args, block, state + state_size(before, block.query_end - block.query, dim), splits,
             state_floats);
    }, 1.0 * batch * heads * queries * splits * dim);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Optional& grad_output_in,
                                                      const Optional& grad_masks_in, const Tensor& query_in,
                                                      const Tensor& key_in, const Tensor& value_in,
                                                      const Tensor& output_in, const Tensor& lse_in,
                                                      const Optional& seed, double scale, double dropout_p,
                                                      const Optional& padding_in) {
  Tensor query = unit_stride(query_in), key = unit_stride(key_in), value = unit_stride(value_in);
  Tensor output = unit_stride(output_in), lse = torch::stable::contiguous(lse_in);
  Optional grad_output = unit_stride(grad_output_in), grad_masks = unit_stride(grad_masks_in);
  Optional padding = in_one_piece(padding_in);
  AttentionShape shape = shape_of(query, key, seed, scale, dropout_p, padding);
  int64_t batch = key.size(0), queries = shape.queries, keys = shape.keys;
  int64_t heads = shape.heads, dim = shape.dim;
  Tensor grad_query = empty(query, {query.size(0), queries, heads, dim});
  Tensor grad_key = empty(key, {batch, keys, heads, dim});
  Tensor grad_value = empty(value, {batch, keys, heads, dim});
  std::tuple results{grad_query, grad_key, grad_value};
  // Items that share their queries are one task's, which adds their gradients up.
  int64_t items = query.size(0), shared = items < batch || batch == 0 ? batch : 1;
  if (items == 0) return results;

  AttentionBwd args{shape,
                    heads_of(query, batch),
                    heads_of(key, batch),
                    heads_of(value, batch),
                    heads_of(output, batch),
                    grad_output ? heads_of(*grad_output, batch) : HeadsView{},
                    masks_of(grad_masks),
                    data<float>(lse),
                    heads_of(grad_query, items),
                    heads_of(grad_key, batch),
                    heads_of(grad_value, batch)};
  // As many heads at a time as let what is kept of their queries stay in the second-level cache.
  int64_t together = heads;
  while (together > 1 && (heads % together || together * queries * dim > kBwdQueries)) --together;
  int64_t groups = heads / together, blocks = items * groups, split = keys_per_split(keys, blocks, kBwdTasks);
  int64_t splits = (keys + split - 1) / split, part_floats = grad_query_size(together, queries, dim);
  int64_t scratch_floats = bwd_scratch_size(together, queries, dim);
  auto block_of = [&](int64_t item, int64_t part) {
    int64_t b = item / groups, head = item % groups * together, first = part * split;
    int64_t last = std::min(first + split, keys);
    return AttentionBlock{b, b + shared, head, head + together, 0, queries, first, last};
  };
  auto* kernel = SEGVIT_PICK(attention_bwd);
  auto* finish = SEGVIT_PICK(attention_finish_bwd);
  Scratch parts(splits > 1 ? blocks * splits * part_floats * sizeof(float) : 0);
  parallel(blocks * splits, [&](int64_t task) {
    AttentionBlock block = block_of(task / splits, task % splits);
    Scratch scratch((scratch_floats + (splits > 1 ? 0 : part_floats)) * sizeof(float));
    float* part = splits > 1 ? parts.as<float>() + task * part_floats : scratch.as<float>() + scratch_floats;
    kernel(args, block, part, scratch.as<float>());
    if (splits == 1) finish(args, block, part, 1, 0);
  }, 1.0 * batch * heads * queries * keys * dim);
  if (splits > 1)
    parallel(blocks * together, [&](int64_t task) {
      AttentionBlock block = block_of(task / together, 0);
      int64_t before = task % together;
      block.head += before;
      block.head_end = block.head + 1;
      float* part = parts.as<float>() + task / together * splits * part_floats;
      finish(args, block, part + grad_query_size(before, queries, dim), splits, part_floats);
    });
  return results;
}

}  // namespace segvit::cpu

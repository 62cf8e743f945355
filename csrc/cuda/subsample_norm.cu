// LayerNorm of all tokens and of a strided subset; what is computed stands in
// segvit_kernels/ops/subsample_norm.py.
//
// A block has one thread for every 8 channels and holds a row in registers: x is read once, results are
// written once. Where rows are not aligned to 16 bytes, or wider than 8 · 512, a thread has single channels,
// one here and one a block's width further on, and reads again what it does not hold.
//
// Backward: a block walks a run of tokens. Its threads own their channels, so that the gradients of weight
// and bias are sums in registers; each run writes its own, and a second kernel adds the runs in order.
//
// Bytes, for s-byte elements and a quarter of the tokens kept: forward (1 + 1 + ¼ + ¼ + ¼) s per element,
// backward (1 + 1 + 1 + ¼ + ¼) s and 16 bytes per run and channel. sm_80 and sm_90a, no spills: 40 and 84
// registers.
#include "../operators.h"
#include "common.cuh"

namespace segvit::cuda {

namespace {

constexpr int kVector = 8;
constexpr int kMaxThreads = 512;
constexpr int64_t kRuns = 1024, kTokensPerRun = 4;
constexpr int kColumns = 32, kParts = 8;  // of a block that adds runs

// Tokens (batch, prefix + height·width, channels) with unit last stride; strides in elements.
struct Tokens {
  char* data;  // null: there is none
  int64_t batch_stride, token_stride;
  Type type;
};

struct Grid {
  int tokens, kept_tokens, channels, width, kept_width, stride, prefix;
};

struct Forward {
  Grid grid;
  Tokens x, normed, normed_sub, x_sub;
  const float *weight, *bias;  // null: 1 and 0
  float *mean, *rstd;
  float eps;
};

struct Backward {
  Grid grid;
  Tokens grad_normed, grad_normed_sub, grad_x_sub, x, grad_x;
  const float *weight, *mean, *rstd;
  float* sums;  // (runs, 2, channels): gradients of weight and bias; null without a weight
  int64_t total, run;
};

// The index of a token among the kept ones, or -1.
SEGVIT_DEVICE int kept_index(const Grid& grid, int token) {
  if (token < grid.prefix) return token;
  int row = (token - grid.prefix) / grid.width, column = (token - grid.prefix) % grid.width;
  if (row % grid.stride || column % grid.stride) return -1;
  return grid.prefix + row / grid.stride * grid.kept_width + column / grid.stride;
}

template <int V, class T>
SEGVIT_DEVICE void load_as(const char* row, int channel, float (&values)[V]) {
  const T* from = reinterpret_cast<const T*>(row) + channel;
  if constexpr (V == 1) {
    values[0] = to_float(*from);
  } else {
    constexpr int each = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < V; i += each) {
      uint4 words = *reinterpret_cast<const uint4*>(from + i);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(T) == 4) {
          values[i + k] = __uint_as_float(word[k]);
        } else {
          float2 pair = unpack2<T>(word[k]);
          values[i + 2 * k] = pair.x, values[i + 2 * k + 1] = pair.y;
        }
      }
    }
  }
}

template <int V, class T>
SEGVIT_DEVICE void store_as(char* row, int channel, const float (&values)[V]) {
  T* to = reinterpret_cast<T*>(row) + channel;
  if constexpr (V == 1) {
    *to = from_float<T>(values[0]);
  } else {
    constexpr int each = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < V; i += each) {
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(T) == 4)
          word[k] = __float_as_uint(values[i + k]);
        else
          word[k] = pack2<T>(values[i + 2 * k], values[i + 2 * k + 1]);
      }
      *reinterpret_cast<uint4*>(to + i) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

SEGVIT_DEVICE char* row_of(const Tokens& tokens, int64_t image, int token) {
  int64_t offset = image * tokens.batch_stride + token * tokens.token_stride;
  return tokens.data + offset * size_of(tokens.type);
}

// V channels of a row.
template <int V>
SEGVIT_DEVICE void load(Type type, const char* row, int channel, float (&values)[V]) {
  if (type == Type::f32)
    load_as<V, float>(row, channel, values);
  else if (type == Type::f16)
    load_as<V, half>(row, channel, values);
  else
    load_as<V, bf16>(row, channel, values);
}
template <int V>
SEGVIT_DEVICE void store(Type type, char* row, int channel, const float (&values)[V]) {
  if (type == Type::f32)
    store_as<V, float>(row, channel, values);
  else if (type == Type::f16)
    store_as<V, half>(row, channel, values);
  else
    store_as<V, bf16>(row, channel, values);
}

// The sums of a and b over the block. `memory`: two floats for every warp, another piece for every call until
// all threads have met again.
SEGVIT_DEVICE float2 block_sum(float a, float b, float* memory) {
  int warps = static_cast<int>(blockDim.x / 32);
  a = warp_sum(a), b = warp_sum(b);
  if (lane_index() == 0) memory[2 * warp_index()] = a, memory[2 * warp_index() + 1] = b;
  __syncthreads();
  a = b = 0;
  for (int warp = 0; warp < warps; ++warp) a += memory[2 * warp], b += memory[2 * warp + 1];
  return make_float2(a, b);
}

// Calls f(channel, values, held) for the thread's channels: those it holds, then others that `read` fetches.
template <int V, class Read, class F>
SEGVIT_DEVICE void for_channels(int channels, float (&values)[V], const Read& read, const F& f) {
  int channel = static_cast<int>(threadIdx.x) * V;
  if (channel < channels) f(channel, values, std::true_type{});
  if constexpr (V == 1) {
    for (channel += blockDim.x; channel < channels; channel += blockDim.x) {
      float others[V];
      read(channel, others);
      f(channel, others, std::false_type{});
    }
  }
}

// One block per token. V == 8: every thread holds all of its channels.
template <int V>
__global__ void __launch_bounds__(kMaxThreads, 1) subsample_norm_fwd_kernel(Forward args) {
  const Grid& grid = args.grid;
  float* memory = reinterpret_cast<float*>(shared_memory());
  int warps = static_cast<int>(blockDim.x / 32), channels = grid.channels, first = threadIdx.x * V;
  int64_t image = blockIdx.x / grid.tokens;
  int token = static_cast<int>(blockIdx.x % grid.tokens);
  const char* row = row_of(args.x, image, token);
  auto read = [&](int channel, float (&values)[V]) { load(args.x.type, row, channel, values); };
  float x[V];
  if (first < channels) read(first, x);

  float sum = 0;
  for_channels(channels, x, read, [&](int, float (&values)[V], auto) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum += values[i];
  });
  float mean = block_sum(sum, 0, memory).x / channels;
  sum = 0;
  for_channels(channels, x, read, [&](int, float (&values)[V], auto) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum += (values[i] - mean) * (values[i] - mean);
  });
  float variance = block_sum(sum, 0, memory + 2 * warps).x / channels;
  float rstd = variance < INFINITY ? 1 / sqrtf(variance + args.eps) : NAN;  // as the numbers it is of would be
  if (threadIdx.x == 0) args.mean[blockIdx.x] = mean, args.rstd[blockIdx.x] = rstd;

  int kept = kept_index(grid, token);
  for_channels(channels, x, read, [&](int channel, float (&values)[V], auto) {
    if (kept >= 0) store(args.x_sub.type, row_of(args.x_sub, image, kept), channel, values);
    float y[V], parameter[V];
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = (values[i] - mean) * rstd;
    if (args.weight) {
      load_as<V, float>(reinterpret_cast<const char*>(args.weight), channel, parameter);
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] *= parameter[i];
    }
    if (args.bias) {
      load_as<V, float>(reinterpret_cast<const char*>(args.bias), channel, parameter);
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] += parameter[i];
    }
    store(args.normed.type, row_of(args.normed, image, token), channel, y);
    if (kept >= 0) store(args.normed_sub.type, row_of(args.normed_sub, image, kept), channel, y);
  });
}

// One block per run of tokens.
template <int V>
__global__ void __launch_bounds__(kMaxThreads, 1) subsample_norm_bwd_kernel(Backward args) {
  const Grid& grid = args.grid;
  float* memory = reinterpret_cast<float*>(shared_memory());
  int warps = static_cast<int>(blockDim.x / 32), channels = grid.channels, first = threadIdx.x * V;
  float* sums = args.sums ? args.sums + static_cast<int64_t>(blockIdx.x) * 2 * channels : nullptr;
  float weight_sum[V] = {}, bias_sum[V] = {};
  if (sums)  // of the channels that no thread holds
    for (int channel = first + blockDim.x * V; channel < channels; channel += blockDim.x * V)
      for (int i = 0; i < V; ++i) sums[channel + i] = sums[channels + channel + i] = 0;

  int turn = 0;
  int64_t begin = blockIdx.x * args.run, end = begin + args.run < args.total ? begin + args.run : args.total;
  for (int64_t at = begin; at < end; ++at) {
    int64_t image = at / grid.tokens;
    int token = static_cast<int>(at % grid.tokens), kept = kept_index(grid, token);
    char* grad_x = row_of(args.grad_x, image, token);
    const char* x_row = row_of(args.x, image, token);
    const char* all = args.grad_normed.data ? row_of(args.grad_normed, image, token) : nullptr;
    const char *sub = nullptr, *residual = nullptr;
    if (kept >= 0 && args.grad_normed_sub.data) sub = row_of(args.grad_normed_sub, image, kept);
    if (kept >= 0 && args.grad_x_sub.data) residual = row_of(args.grad_x_sub, image, kept);

    // x is replaced by x̂.
    float mean = args.mean[at], rstd = args.rstd[at], x[V], g[V];
    auto read_x = [&](int channel, float (&values)[V]) {
      load(args.x.type, x_row, channel, values);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = (values[i] - mean) * rstd;
    };
    auto read_g = [&](int channel, float (&values)[V]) {
      if (all) {
        load(args.grad_normed.type, all, channel, values);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = 0;
      }
      if (sub) {
        float more[V];
        load(args.grad_normed_sub.type, sub, channel, more);
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] += more[i];
      }
    };
    auto normal_of = [&](int channel, float (&values)[V], auto held) {
      if constexpr (decltype(held)::value) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = x[i];
      } else {
        read_x(channel, values);
      }
    };
    auto weigh = [&](int channel, float (&values)[V]) {
      if (!args.weight) return;
      float weight[V];
      load_as<V, float>(reinterpret_cast<const char*>(args.weight), channel, weight);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] *= weight[i];
    };
    bool any = all || sub;
    float m1 = 0, m2 = 0;  // means of w∘g and w∘g∘x̂
    if (any) {
      if (first < channels) read_x(first, x), read_g(first, g);
      for_channels(channels, g, read_g, [&](int channel, float (&grad)[V], auto held) {
        float normal[V];
        normal_of(channel, normal, held);
        if (sums) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if constexpr (decltype(held)::value) {
              weight_sum[i] += grad[i] * normal[i], bias_sum[i] += grad[i];
            } else {
              sums[channel + i] += grad[i] * normal[i], sums[channels + channel + i] += grad[i];
            }
          }
        }
        weigh(channel, grad);
#pragma unroll
        for (int i = 0; i < V; ++i) m1 += grad[i], m2 += grad[i] * normal[i];
      });
      // Two pieces of memory take turns: one barrier a token.
      float2 total = block_sum(m1, m2, memory + turn * 2 * warps);
      turn ^= 1;
      m1 = total.x / channels, m2 = total.y / channels;
    }
    auto read_weighed = [&](int channel, float (&values)[V]) {
      read_g(channel, values), weigh(channel, values);
    };
    for_channels(channels, g, read_weighed, [&](int channel, float (&grad)[V], auto held) {
      float d[V] = {};
      if (any) {
        float normal[V];
        normal_of(channel, normal, held);
#pragma unroll
        for (int i = 0; i < V; ++i) d[i] = (grad[i] - m1 - normal[i] * m2) * rstd;
      }
      if (residual) {
        float more[V];
        load(args.grad_x_sub.type, residual, channel, more);
#pragma unroll
        for (int i = 0; i < V; ++i) d[i] += more[i];
      }
      store(args.grad_x.type, grad_x, channel, d);
    });
  }
  if (sums && first < channels) {
    store_as<V, float>(reinterpret_cast<char*>(sums), first, weight_sum);
    store_as<V, float>(reinterpret_cast<char*>(sums + channels), first, bias_sum);
  }
}

// out (columns) = Σ over runs of sums (runs, columns): every part of the block adds its runs in order.
__global__ void __launch_bounds__(kColumns* kParts)
    subsample_norm_sum_kernel(const float* sums, float* weight, float* bias, int64_t runs, int channels) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  int lane = threadIdx.x % kColumns, part = threadIdx.x / kColumns, column = blockIdx.x * kColumns + lane;
  float total = 0;
  if (column < 2 * channels)
    for (int64_t run = part; run < runs; run += kParts) total += sums[run * 2 * channels + column];
  memory[threadIdx.x] = total;
  __syncthreads();
  if (part > 0 || column >= 2 * channels) return;
  for (int i = 1; i < kParts; ++i) total += memory[i * kColumns + lane];
  if (column < channels)
    weight[column] = total;
  else
    bias[column - channels] = total;
}

Tokens tokens_of(const Optional& tensor) {
  if (!tensor) return {nullptr, 0, 0, Type::f32};
  return {data<char>(*tensor), tensor->stride(0), tensor->stride(1), type_of(*tensor)};
}

Grid grid_of(const Tensor& x, int64_t height, int64_t width, int64_t stride, int64_t prefix) {
  STD_TORCH_CHECK(x.size(0) * x.size(1) < int64_t{1} << 31 && 2 * x.size(2) < int64_t{1} << 31,
                  "segvit: subsample_norm: at most 2^31 tokens and 2^30 channels");
  int64_t kept_width = (width + stride - 1) / stride,
          kept = prefix + (height + stride - 1) / stride * kept_width;
  auto narrow = [](int64_t n) { return static_cast<int>(n); };
  return {narrow(x.size(1)),  narrow(kept),   narrow(x.size(2)), narrow(width),
          narrow(kept_width), narrow(stride), narrow(prefix)};
}

// Whether every row begins at a multiple of 16 bytes and ends at a whole vector.
bool vectors(const Grid& grid, std::initializer_list<Tokens> all, const float* weight, const float* bias) {
  auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  bool result = grid.channels % kVector == 0 && grid.channels <= kVector * kMaxThreads;
  for (const Tokens& tokens : all)
    result = result && aligned(tokens.data) && tokens.batch_stride % kVector == 0 &&
             tokens.token_stride % kVector == 0;
  return result && aligned(weight) && aligned(bias);
}

int threads_for(const Grid& grid, int vector) {
  return static_cast<int>(
      std::min<int64_t>(kMaxThreads, round_up((grid.channels + vector - 1) / vector, 32)));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> subsample_norm_fwd(Tensor x, Optional weight,
                                                                      Optional bias, int64_t height,
                                                                      int64_t width, int64_t stride,
                                                                      int64_t prefix_tokens, double eps,
                                                                      ScalarType dtype) {
  Device device(x);
  x = unit_stride(x);
  auto w = as_float(weight), b = as_float(bias);
  Grid grid = grid_of(x, height, width, stride, prefix_tokens);
  int64_t batch = x.size(0);
  Tensor normed = empty(x, {batch, grid.tokens, grid.channels}, dtype);
  Tensor normed_sub = empty(x, {batch, grid.kept_tokens, grid.channels}, dtype);
  Tensor x_sub = empty(x, {batch, grid.kept_tokens, grid.channels});
  Tensor mean = empty(x, {batch, grid.tokens}, ScalarType::Float);
  Tensor rstd = empty(x, {batch, grid.tokens}, ScalarType::Float);
  Forward args{
      grid,           tokens_of(x),   tokens_of(normed), tokens_of(normed_sub), tokens_of(x_sub),
      data<float>(w), data<float>(b), data<float>(mean), data<float>(rstd),     static_cast<float>(eps)};
  bool wide = vectors(grid, {args.x, args.normed, args.normed_sub, args.x_sub}, args.weight, args.bias);
  unsigned blocks = static_cast<unsigned>(batch * grid.tokens),
           threads = threads_for(grid, wide ? kVector : 1);
  launch(wide ? subsample_norm_fwd_kernel<kVector> : subsample_norm_fwd_kernel<1>, blocks, threads,
         threads / 32 * 4 * sizeof(float), device.stream, args);
  return {normed, normed_sub, x_sub, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> subsample_norm_bwd(Optional grad_normed, Optional grad_normed_sub,
                                                      Optional grad_x_sub, Tensor x, Optional weight,
                                                      Tensor mean, Tensor rstd, int64_t height, int64_t width,
                                                      int64_t stride, int64_t prefix_tokens) {
  Device device(x);
  x = unit_stride(x);
  grad_normed = unit_stride(grad_normed);
  grad_normed_sub = unit_stride(grad_normed_sub);
  grad_x_sub = unit_stride(grad_x_sub);
  auto w = as_float(weight);
  mean = torch::stable::contiguous(mean);
  rstd = torch::stable::contiguous(rstd);
  Grid grid = grid_of(x, height, width, stride, prefix_tokens);
  int64_t total = x.size(0) * grid.tokens, size = weight ? grid.channels : 0;
  int64_t run = std::max(kTokensPerRun, (total + kRuns - 1) / kRuns), runs = (total + run - 1) / run;
  Tensor grad_x = empty(x, {x.size(0), grid.tokens, grid.channels});
  Tensor grad_weight = empty(mean, {size}), grad_bias = empty(mean, {size});
  Tensor sums = empty(mean, {runs, 2, size});
  Backward args{grid,
                tokens_of(grad_normed),
                tokens_of(grad_normed_sub),
                tokens_of(grad_x_sub),
                tokens_of(x),
                tokens_of(grad_x),
                data<float>(w),
                data<float>(mean),
                data<float>(rstd),
                weight ? data<float>(sums) : nullptr,
                total,
                run};
  bool wide = vectors(grid, {args.grad_normed, args.grad_normed_sub, args.grad_x_sub, args.x, args.grad_x},
                      args.weight, args.sums);
  unsigned threads = threads_for(grid, wide ? kVector : 1);
  launch(wide ? subsample_norm_bwd_kernel<kVector> : subsample_norm_bwd_kernel<1>,
         static_cast<unsigned>(runs), threads, threads / 32 * 4 * sizeof(float), device.stream, args);
  if (weight)
    launch(subsample_norm_sum_kernel, static_cast<unsigned>((2 * size + kColumns - 1) / kColumns),
           kColumns * kParts, kColumns * kParts * sizeof(float), device.stream, data<float>(sums),
           data<float>(grad_weight), data<float>(grad_bias), runs, grid.channels);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace segvit::cuda

// What the CUDA kernels share: element types, launches, warp sums, matrix products on tensor cores,
// asynchronous copies. The same kernels compile for the CPU with -DSEGVIT_EMULATE (emulator.h), for tests.
//
// Kernels are launched by launch(), not by <<<>>>, and take their shared memory from shared_memory().
#pragma once

#include <torch/csrc/stable/library.h>

#include "../cpu/common.h"

#if defined(SEGVIT_EMULATE)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#endif

// Whether the code that is being compiled may use mma of 16 by 8 by 16 and asynchronous copies.
#if defined(SEGVIT_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define SEGVIT_HAS_MMA 1
#else
#define SEGVIT_HAS_MMA 0
#endif

#define SEGVIT_DEVICE __device__ __forceinline__

namespace segvit::cuda {

// -----------------------------------------------------------------------------------------------------------
// Launches

#if defined(SEGVIT_EMULATE)
using Stream = void*;

// Device and stream of a tensor for as long as this lives.
struct Device {
  explicit Device(const Tensor&) {}
  ~Device() { emulator::memory.clear(); }
  // Compute capability times ten; SEGVIT_KERNELS_EMULATED_CAPABILITY chooses another one.
  int capability() const {
    const char* chosen = std::getenv("SEGVIT_KERNELS_EMULATED_CAPABILITY");
    return chosen ? std::atoi(chosen) : 90;
  }
  int multiprocessors() const { return 4; }
  Stream stream = nullptr;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  std::string error = emulator::hook
                          ? emulator::hand_over<Params...>(kernel, grid, block, shared_bytes, args...)
                          : emulator::run([&] { kernel(args...); }, grid, block, shared_bytes);
  STD_TORCH_CHECK(error.empty(), "segvit: emulated kernel: ", error);
}

SEGVIT_DEVICE char* shared_memory() { return emulator::machine.shared; }

// As in cpu/common.h; notes what memory the operator has.
template <class T>
T* data(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  if (tensor.numel()) emulator::memory.push_back({tensor.data_ptr(), (last + 1) * tensor.element_size()});
  return segvit::data<T>(tensor);
}
template <class T>
T* data(const std::optional<Tensor>& tensor) { return tensor ? data<T>(*tensor) : nullptr; }
#else
}  // namespace segvit::cuda

// Only a torch with CUDA has it; the library loads into any.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace segvit::cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "segvit: CUDA: ", cudaGetErrorString(error));
}

// Device and stream of a tensor for as long as this lives.
struct Device {
  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()), index(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "segvit: this torch has no CUDA");
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<Stream>(current);
  }
  // Compute capability times ten.
  int capability() const {
    return attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
  }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index));
    return value;
  }
  torch::stable::accelerator::DeviceGuard guard;
  int32_t index;
  Stream stream = nullptr;
};

// Runs kernel(args...); nothing where the grid is empty.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

SEGVIT_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char segvit_shared_memory[];
  return segvit_shared_memory;
}
#endif

// Number of blocks for n of something, `step` a block.
inline unsigned ceil_div(int64_t n, int64_t step) { return static_cast<unsigned>((n + step - 1) / step); }

// -----------------------------------------------------------------------------------------------------------
// Elements

struct half {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

SEGVIT_DEVICE float to_float(float x) { return x; }
SEGVIT_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
template <class T>
SEGVIT_DEVICE T from_float(float x);
template <>
SEGVIT_DEVICE float from_float<float>(float x) {
  return x;
}

#if defined(SEGVIT_EMULATE)
inline float to_float(half x) {
  uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u << 13) return __uint_as_float(sign | magnitude | 0x7f800000u);  // infinity or NaN
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}
template <>
inline half from_float<half>(float x) {
  uint32_t bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u)  // subnormal
    return {static_cast<uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_rcp(float x) { return 1 / x; }
#else
SEGVIT_DEVICE float to_float(half x) { return __half2float(__ushort_as_half(x.bits)); }
template <>
SEGVIT_DEVICE half from_float<half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
SEGVIT_DEVICE bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
// One instruction each, to about two units in the last place; subnormals count as zero.
SEGVIT_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEGVIT_DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEGVIT_DEVICE float fast_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// Elements of a type that is known when the kernel runs.
SEGVIT_DEVICE float read(const char* data, int64_t index, Type type) {
  if (type == Type::f32) return reinterpret_cast<const float*>(data)[index];
  if (type == Type::f16) return to_float(reinterpret_cast<const half*>(data)[index]);
  return to_float(reinterpret_cast<const bf16*>(data)[index]);
}
SEGVIT_DEVICE void write(char* data, int64_t index, Type type, float value) {
  if (type == Type::f32)
    reinterpret_cast<float*>(data)[index] = value;
  else if (type == Type::f16)
    reinterpret_cast<half*>(data)[index] = from_float<half>(value);
  else
    reinterpret_cast<bf16*>(data)[index] = from_float<bf16>(value);
}

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

SEGVIT_DEVICE float fast_exp(float x) { return fast_exp2(x * kLog2e); }
SEGVIT_DEVICE float fast_log(float x) { return fast_log2(x) * kLn2; }

// Two elements in a word, the first one in its low half.
template <class T>
SEGVIT_DEVICE uint32_t pack2(float low, float high) {
#if defined(SEGVIT_EMULATE)
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  if constexpr (std::is_same_v<T, half>) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  }
#endif
}
template <class T>
SEGVIT_DEVICE float2 unpack2(uint32_t word) {
  return make_float2(to_float(T{static_cast<uint16_t>(word)}),
                     to_float(T{static_cast<uint16_t>(word >> 16)}));
}

// -----------------------------------------------------------------------------------------------------------
// Warps

constexpr unsigned kAllLanes = 0xffffffffu;

SEGVIT_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
SEGVIT_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }

// Over `lanes` neighbouring lanes, a power of two; every one of them gets the result.
template <int lanes = 32>
SEGVIT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int bits = lanes / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}
template <int lanes = 32>
SEGVIT_DEVICE float warp_max(float x) {
#pragma unroll
  for (int bits = lanes / 2; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// -----------------------------------------------------------------------------------------------------------
// Tensor cores and copies. Fragments lie over the lanes as the PTX manual draws them for mma.m16n8k16: with
// g = lane / 4 and t = lane % 4, an accumulator holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).

#if defined(SEGVIT_EMULATE)
// d = a b + c; a 16 by 16, row after row; b 16 by 8, column after column.
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                         T) {
  int g = lane_index() / 4, t = lane_index() % 4 * 2;
  const auto& e = emulator::collective(
      "mma_m16n8k16", kAllLanes,
      [&](emulator::Exchange& x) {
        for (int i = 0; i < 4; ++i) {
          float2 pair = unpack2<T>(a[i]);
          float* to = &x.mma.a[g + i % 2 * 8][t + i / 2 * 8];
          to[0] = pair.x, to[1] = pair.y;
        }
        for (int i = 0; i < 2; ++i) {
          float2 pair = unpack2<T>(b[i]);
          x.mma.b[t + i * 8][g] = pair.x, x.mma.b[t + i * 8 + 1][g] = pair.y;
        }
      },
      [](emulator::Exchange& x) {
        typedef float Row __attribute__((vector_size(32), aligned(4)));
        for (int i = 0; i < 16; ++i) {
          Row sum = {};
          for (int k = 0; k < 16; ++k) sum += x.mma.a[i][k] * *reinterpret_cast<const Row*>(x.mma.b[k]);
          *reinterpret_cast<Row*>(x.mma.d[i]) = sum;
        }
      });
  for (int i = 0; i < 4; ++i) d[i] = c[i] + e.mma.d[g + i / 2 * 8][t + i % 2];
}

// Four 8 by 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
template <bool transposed>
inline void emulated_ldmatrix(uint32_t (&r)[4], const void* row) {
  const char* first = shared_memory();
  const char* address = static_cast<const char*>(row);
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: a row is not aligned to 16 bytes");
  if (address < first || address + 16 > first + emulator::machine.shared_bytes)
    emulator::fail("ldmatrix: a row lies outside shared memory");
  int lane = lane_index();
  const auto& e = emulator::collective(
      transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", kAllLanes,
      [&](emulator::Exchange& x) { std::memcpy(x.matrices[lane / 8][lane % 8], row, 16); }, [](auto&) {});
  for (int i = 0; i < 4; ++i) {
    if (transposed) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k)
        pair[k] = reinterpret_cast<const uint16_t (*)[8]>(e.matrices[i])[lane % 4 * 2 + k][lane / 4];
      r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    } else {
      r[i] = e.matrices[i][lane / 4][lane % 4];
    }
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<true>(r, row); }
#else  // only where SEGVIT_HAS_MMA
SEGVIT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const float (&c)[4], half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}
SEGVIT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const float (&c)[4], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}
SEGVIT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
SEGVIT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
#endif

// 16 bytes from global to shared memory, both aligned to 16; zeros where not `valid`, and then nothing is
// read. Asynchronous where there is hardware for it: a group of copies ends with copy_commit, and
// copy_wait<n> returns when all groups but the last n of this thread have arrived.
#if defined(SEGVIT_EMULATE)
inline void copy_async16(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, valid ? global : nullptr);
}
inline void copy_commit() { ++emulator::machine.fibers[emulator::machine.current].groups; }
template <int pending = 0>
inline void copy_wait() { emulator::copy_wait(pending); }
#else
SEGVIT_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
#if SEGVIT_HAS_MMA
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  uint4 words = make_uint4(0, 0, 0, 0);
  if (valid) words = *static_cast<const uint4*>(global);
  *static_cast<uint4*>(shared) = words;
#endif
}
SEGVIT_DEVICE void copy_commit() {
#if SEGVIT_HAS_MMA
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int pending = 0>
SEGVIT_DEVICE void copy_wait() {
#if SEGVIT_HAS_MMA
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}
#endif

}  // namespace segvit::cuda

// What the launchers share: element types, a parallel loop, and views of tensors without their type.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "resize.h"

namespace segvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, "segvit: expected float32, float16 or bfloat16");
  }
}
constexpr int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }
inline Type type_of(const Tensor& tensor) { return type_of(tensor.scalar_type()); }

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, std::optional<ScalarType> type = {}) {
  return torch::stable::new_empty(like, sizes, type);
}

// The address of the first element, or null where there is no tensor.
template <class T>
T* data(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }
template <class T>
T* data(const std::optional<Tensor>& tensor) { return tensor ? data<T>(*tensor) : nullptr; }

// The tensor, or a copy of it where neighbours along the last axis are not neighbours in memory.
inline Tensor unit_stride(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> unit_stride(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(unit_stride(*tensor)) : std::nullopt;
}

inline std::optional<Tensor> in_one_piece(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// Parameters in float32 and one piece.
inline std::optional<Tensor> as_float(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Float));
}

constexpr int64_t round_up(int64_t n, int64_t step = 16) { return (n + step - 1) / step * step; }

// Memory of one task: aligned to a cache line, without a destructor call per element.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(static_cast<char*>(::operator new(bytes + 64, std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const { return reinterpret_cast<T*>(memory_); }

 private:
  char* memory_;
};

// A mean of the last values, in seconds; threads may lose each other's.
class Recent {
 public:
  float mean() const { return mean_.load(std::memory_order_relaxed); }
  void add(float value, float share) { mean_.store(mean() + (value - mean()) * share, std::memory_order_relaxed); }

 private:
  std::atomic<float> mean_{0};
};

// How long callers of parallel() waited for threads that had nothing to do: on a busy machine they come a time slice late.
inline Recent lateness;

// Calls f(task, memory) for every task, on torch's threads, each with so many bytes and taking the next task when it is
// done; on the caller's alone where sharing would save less time than threads were late for. Units of work are in
// proportion to the time of all tasks at this place; tasks that are alike need none.
template <class F>
void parallel(int64_t tasks, size_t bytes, const F& f, double units = 0) {
  using Clock = std::chrono::steady_clock;
  static Recent pace;  // of a unit in one thread
  auto since = [](Clock::time_point begin) { return std::chrono::duration<float>(Clock::now() - begin).count(); };
  auto learn = [&](float seconds) { pace.add(seconds, pace.mean() > 0 ? 0.25f : 1); };
  float all = static_cast<float>(units > 0 ? units : tasks), alone = pace.mean() * all;
  int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads()), own = 0;
  std::atomic<int64_t> next{0};
  auto work = [&](bool caller) {
    std::optional<Scratch> memory;
    if (bytes) memory.emplace(bytes);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      f(task, bytes ? memory->as<char>() : nullptr);
      if (caller) ++own;
    }
  };
  auto begin = Clock::now(), end = begin;
  if (threads <= 1 || (alone > 0 && alone - alone / threads < lateness.mean())) {
    work(true);
    if (threads > 1) learn(since(begin) / all), lateness.add(0, 1 / 32.0f);
    return;
  }
  float mine = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t last) {
    bool caller = thread == 0;
    for (; thread < last; ++thread) work(caller);
    if (caller) mine = since(begin), end = Clock::now();
  });
  float waited = since(end), task = own ? mine / own : 0;  // for one that is not over one may wait
  if (own) learn(task * tasks / all);
  lateness.add(std::max(0.0f, waited - task), 0.125f);
}
template <class F>
void parallel(int64_t tasks, const F& f, double units = 0) {
  parallel(tasks, 0, [&](int64_t task, char*) { f(task); }, units);
}

// Lays arrays one after the other, each on a cache line of its own; without memory it only counts.
struct Layout {
  char* memory;
  size_t bytes = 0;
  template <class T>
  void take(T*& array, int64_t elements) {
    if (memory) array = reinterpret_cast<T*>(memory + bytes);
    bytes += round_up(elements * sizeof(T), 64);
  }
};

// A ResizeAxis in memory: in float32 and without fused products, as F.interpolate finds its places.
struct AxisTable {
  std::vector<int32_t> cells;
  std::vector<float> shares;

  AxisTable(int64_t size, int64_t count) {
    int64_t padded = size + 16;
    cells.resize(padded), shares.resize(padded);
    float step = static_cast<float>(count) / static_cast<float>(size);
    for (int64_t i = 0; i < padded; ++i) {
      volatile float product = (static_cast<float>(std::min(i, size - 1)) + 0.5f) * step;
      float place = std::clamp(product - 0.5f, 0.0f, static_cast<float>(count - 1));
      cells[i] = static_cast<int32_t>(place);
      shares[i] = place - static_cast<float>(cells[i]);
    }
  }
  ResizeAxis view() const { return {cells.data(), shares.data()}; }
};

}  // namespace segvit

// Runs CUDA kernels on the CPU, for tests: every thread of a block is a fiber, all of them on one OS thread.
//
// A fiber runs until it waits, at a barrier of the block or in a collective of its warp; then the next fiber
// that can go on does. So a thread is as far ahead of its neighbours as the barriers allow, and a missing one
// shows. An asynchronous copy arrives when its thread waits for it, and not before. Errors: threads that wait for
// others that never come (divergence), lanes of a warp in different collectives, a matrix load or a copy off its
// alignment, a copy that nobody waited for, a write past the end of shared memory. Shared memory is NaN before
// every block. Blocks run one after another, in order. GCC only.
//
// A hook takes launches away from the fibers: so tests/ptx_native.py runs what nvcc made of the same kernels.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::segvit::emulator::machine.thread)
#define blockIdx (::segvit::emulator::machine.block)
#define blockDim (::segvit::emulator::machine.block_size)
#define gridDim (::segvit::emulator::machine.grid_size)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace segvit::emulator {

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

// What the lanes of a warp exchange. Two of them take turns, so that a lane may be one collective ahead.
union Exchange {
  uint32_t words[32];
  uint32_t matrices[4][8][4];
  struct {
    float a[16][16], b[16][8], d[16][8];
  } mma;
};

struct Warp {
  Barrier barrier;
  const char* collective = nullptr;
  Exchange exchange[2];
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  uint64_t group;
};

struct Fiber {
  std::vector<Copy> copies;  // on their way
  uint64_t groups = 0;       // of copies, that have been committed
  void* registers[5];
  ucontext_t start;
  bool started = false, done = true;
  const Barrier* waits_at = nullptr;
  uint64_t generation = 0;
  dim3 thread;
};

struct Machine {
  dim3 thread, block, block_size, grid_size;
  std::deque<Fiber> fibers;  // a context points into itself: it must not move
  std::vector<Warp> warps;
  Fiber main;
  Barrier barrier;
  int threads = 0, current = 0, finished = 0;
  std::function<void()> body;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::string error;
  std::mutex mutex;
};
inline Machine machine;

constexpr size_t kStackBytes = 256 << 10, kSharedBytes = 227 << 10, kGuardBytes = 4 << 10;

[[noreturn]] __attribute__((noinline, noipa)) inline void jump(void** registers) {
  __builtin_longjmp(registers, 1);
}
__attribute__((noinline, noipa)) inline void resume(Fiber& from, Fiber& to) {
  machine.thread = to.thread;
  if (__builtin_setjmp(from.registers) == 0) {
    if (!to.started) {
      to.started = true;
      setcontext(&to.start);
    }
    jump(to.registers);
  }
}

[[noreturn]] inline void fail(const std::string& why) {
  machine.error = why;
  jump(machine.main.registers);
}

// Lets another fiber run: the next one in order that can.
inline void yield() {
  Machine& m = machine;
  int from = m.current;
  for (int step = 1; step <= m.threads; ++step) {
    int next = from + step < m.threads ? from + step : from + step - m.threads;
    Fiber& fiber = m.fibers[next];
    if (fiber.done || (fiber.waits_at && fiber.waits_at->generation == fiber.generation)) continue;
    m.current = next;
    if (next != from) resume(m.fibers[from], fiber);
    return;
  }
  if (m.finished == m.threads)
    resume(m.fibers[from], m.main);
  else
    fail("threads of the block wait for others that have ended or wait elsewhere");
}

// The last of `expected` threads to come does not wait.
template <class F>
inline void wait(Barrier& barrier, int expected, const F& complete) {
  if (++barrier.arrived == expected) {
    complete();
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  int self = machine.current;
  machine.fibers[self].waits_at = &barrier;
  machine.fibers[self].generation = barrier.generation;
  yield();
  machine.fibers[self].waits_at = nullptr;
}

inline void fiber_main() {
  for (;;) {
    machine.body();
    machine.fibers[machine.current].done = true;
    ++machine.finished;
    yield();
  }
}

inline int lane() { return machine.current & 31; }

// A collective of a warp: every lane deposits, the last one completes, then every lane reads what is
// returned.
template <class Deposit, class Complete>
inline const Exchange& collective(const char* name, unsigned mask, const Deposit& deposit,
                                  const Complete& complete) {
  if (mask != 0xffffffffu) fail(std::string(name) + ": only whole warps are emulated");
  Warp& warp = machine.warps[machine.current / 32];
  if (warp.barrier.arrived && warp.collective != name)
    fail(std::string("lanes of a warp are in ") + warp.collective + " and " + name);
  warp.collective = name;
  Exchange& exchange = warp.exchange[warp.barrier.generation & 1];
  deposit(exchange);
  wait(warp.barrier, 32, [&] { complete(exchange); });
  return exchange;
}

template <class T>
inline T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4);
  const Exchange& e = collective(
      name, mask, [&](Exchange& x) { std::memcpy(&x.words[lane()], &value, 4); }, [](Exchange&) {});
  std::memcpy(&value, &e.words[source], 4);
  return value;
}

inline void copy_async(void* to, const void* from) {
  Machine& m = machine;
  char* place = static_cast<char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("copy_async16: not aligned to 16 bytes");
  if (place < m.shared || place + 16 > m.shared + m.shared_bytes) fail("copy_async16: outside shared memory");
  std::memset(to, 0xff, 16);
  m.fibers[m.current].copies.push_back({to, from, m.fibers[m.current].groups});
}

// All groups but the last `pending` ones arrive.
inline void copy_wait(uint64_t pending) {
  Fiber& fiber = machine.fibers[machine.current];
  std::erase_if(fiber.copies, [&](const Copy& copy) {
    if (copy.group + pending >= fiber.groups) return false;
    copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    return true;
  });
}

inline void prepare(int threads) {
  Machine& m = machine;
  if (!m.shared) m.shared = static_cast<char*>(std::aligned_alloc(1024, kSharedBytes + kGuardBytes));
  while (static_cast<int>(m.fibers.size()) < threads) {
    Fiber& fiber = m.fibers.emplace_back();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack;
    fiber.start.uc_stack.ss_size = kStackBytes;
  }
  for (Fiber& fiber : m.fibers)
    if (!fiber.started) makecontext(&fiber.start, fiber_main, 0);
  m.warps.resize(threads / 32);
  m.main.started = true;
}

inline void run_block(int threads, size_t shared_bytes) {
  Machine& m = machine;
  std::memset(m.shared, 0xff, shared_bytes + kGuardBytes);
  m.barrier.arrived = 0;
  for (Warp& warp : m.warps) warp.barrier.arrived = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.done = false;
    fiber.waits_at = nullptr;
    fiber.copies.clear();
    fiber.thread =
        dim3(i % m.block_size.x, i / m.block_size.x % m.block_size.y, i / (m.block_size.x * m.block_size.y));
  }
  m.current = m.finished = 0;
  resume(m.main, m.fibers[0]);
  for (int i = 0; m.error.empty() && i < threads; ++i)
    if (!m.fibers[i].copies.empty()) m.error = "an asynchronous copy that nobody waited for";
  for (size_t i = shared_bytes; m.error.empty() && i < shared_bytes + kGuardBytes; ++i)
    if (m.shared[i] != '\xff') m.error = "a write past the end of shared memory";
}

// Runs the kernel; gives what went wrong, or nothing.
template <class F>
std::string run(const F& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  Machine& m = machine;
  std::lock_guard<std::mutex> lock(m.mutex);
  unsigned threads = block.x * block.y * block.z;
  if (threads % 32 || threads == 0 || threads > 1024) return "expected whole warps, at most 1024 threads";
  if (shared_bytes > kSharedBytes) return "more shared memory than a multiprocessor has";
  if (grid.y > 65535 || grid.z > 65535) return "the grid's second and third sizes may be 65535 at most";
  m.threads = static_cast<int>(threads);
  m.shared_bytes = shared_bytes;
  m.block_size = block;
  m.grid_size = grid;
  m.body = kernel;
  m.error.clear();
  prepare(m.threads);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block = dim3(x, y, z);
        run_block(m.threads, shared_bytes);
        if (!m.error.empty()) {
          for (Fiber& fiber : m.fibers) fiber.started = false;  // their stacks stand anywhere
          return m.error + " (block " + std::to_string(x) + ", " + std::to_string(y) + ", " +
                 std::to_string(z) + ")";
        }
      }
  return {};
}

// What a hook is told of a launch, and of the tensors that the operator has looked at. It returns what went
// wrong, or null.
struct Memory {
  const void* address;
  int64_t bytes;
};
struct Launch {
  const void* kernel;
  unsigned grid[3], block[3];
  uint64_t shared_bytes;
  const void* const* parameters;
  const uint64_t* sizes;
  uint64_t parameter_count;
  const Memory* memory;
  uint64_t memory_count;
};
using Hook = const char* (*)(const Launch*);
inline Hook hook = nullptr;
inline thread_local std::vector<Memory> memory;

template <class... Params>
std::string hand_over(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                      const Params&... values) {
  std::vector<const void*> parameters{&values...};
  std::vector<uint64_t> sizes{sizeof(values)...};
  Launch launch{reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                shared_bytes, parameters.data(), sizes.data(), sizes.size(), memory.data(), memory.size()};
  const char* error = hook(&launch);
  return error ? error : "";
}

}  // namespace segvit::emulator

extern "C" __attribute__((visibility("default"), used)) inline void segvit_emulator_hook(
    segvit::emulator::Hook hook) {
  segvit::emulator::hook = hook;
}

inline void __syncthreads() {
  auto& m = segvit::emulator::machine;
  segvit::emulator::wait(m.barrier, m.threads, [] {});
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  segvit::emulator::collective("__syncwarp", mask, [](auto&) {}, [](auto&) {});
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  int lane = segvit::emulator::lane();
  return segvit::emulator::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int lane = segvit::emulator::lane(), source = lane ^ bits;
  return segvit::emulator::shuffle("__shfl_xor_sync", mask, value,
                                   source < (lane & -width) + width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace segvit::emulator;
  const Exchange& e = collective(
      "__ballot_sync", mask, [&](Exchange& x) { x.words[lane()] = predicate != 0; }, [](Exchange&) {});
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= e.words[i] << i;
  return bits;
}
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

// One fiber runs at a time: nothing to guard against.
inline int atomicAdd(int* address, int value) {
  int old = *address;
  *address = old + value;
  return old;
}

inline float __fmul_rn(float a, float b) { return a * b; }
using std::max;
using std::min;
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

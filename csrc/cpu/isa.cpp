#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#ifdef SEGVIT_X86
#include <cpuid.h>
#endif
#ifdef SEGVIT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace segvit {

namespace {

#ifdef SEGVIT_X86
// What Clang's __builtin_cpu_supports does not know before version 19: F16C, AVX512-BF16, AVX512-FP16.
enum class Feature { f16c, avx512_bf16, avx512_fp16 };

bool supports(Feature feature) {
  unsigned a, b, c, d;
  switch (feature) {
    case Feature::f16c: return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
    case Feature::avx512_bf16: return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
    default: return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 23 & 1;
  }
}
#endif

#ifdef SEGVIT_AMX
// Whether the processor has tiles of bfloat16 and int8, and Linux lets this process use them.
bool tiles() {
#ifdef SEGVIT_EMULATE_TILES
  return true;
#endif
  unsigned a, b, c, d;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa detect() {
  Isa best = Isa::portable;
#ifdef SEGVIT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports(Feature::f16c))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    best = Isa::avx512;
#ifdef SEGVIT_AVX512_BF16
  if (best == Isa::avx512 && supports(Feature::avx512_bf16)) best = Isa::avx512_bf16;
#endif
#ifdef SEGVIT_AVX512_FP16
  if (best == Isa::avx512_bf16 && supports(Feature::avx512_fp16)) best = Isa::avx512_fp16;
#endif
#ifdef SEGVIT_AMX
  if (best == Isa::avx512_fp16 && tiles()) best = Isa::amx;
#endif
#endif
  return best;
}

constexpr Isa kIsas[] = {Isa::portable,    Isa::avx2,        Isa::avx512,
                         Isa::avx512_bf16, Isa::avx512_fp16, Isa::amx};

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
    Isa best = detect();
    if (const char* wanted = std::getenv("SEGVIT_KERNELS_ISA"))
      for (Isa less : kIsas)
        if (less < best && !std::strcmp(wanted, isa_name(less))) best = less;
    return best;
  }();
  return chosen;
}

const char* isa_names() {
  static const std::string names = [] {
    std::string found;
    for (Isa one : kIsas)
      if (one <= detect()) found += (found.empty() ? "" : " ") + std::string(isa_name(one));
    return found;
  }();
  return names.c_str();
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512_fp16: return "avx512_fp16";
    case Isa::amx: return "amx";
    default: return "portable";
  }
}

}  // namespace segvit

// Which instruction sets the CPU kernels are compiled for, and which of them this machine runs.
//
// Files named *_kernels.cpp are compiled once per instruction set, each time in a namespace of that name. They
// include nothing of torch or the standard library that defines functions: an inline function compiled with
// AVX-512 could otherwise be the copy that the linker keeps for everyone.
#pragma once

#include <cstdint>

namespace segvit {

// Element types of tensors; the kernels compute in float32.
enum class Type : int32_t { f32, f16, bf16 };

enum class Isa : int32_t { portable, avx2, avx512, avx512_bf16, avx512_fp16, amx };

// The best one that this machine runs, or the lesser one that SEGVIT_KERNELS_ISA names.
Isa isa();
const char* isa_name(Isa isa);
// The names of those that this machine runs, a space between.
const char* isa_names();

}  // namespace segvit

#if defined(__x86_64__) || defined(_M_X64)
#define SEGVIT_X86 1
// Declares a kernel `void name(arguments)` for every instruction set.
#define SEGVIT_KERNEL(name, ...)                                    \
  namespace segvit::portable { void name(__VA_ARGS__); }            \
  namespace segvit::avx2 { void name(__VA_ARGS__); }                \
  namespace segvit::avx512 { void name(__VA_ARGS__); }
// The kernel of that name for this machine. AVX512-BF16, AVX512-FP16 and AMX are for the sources that build.py names alone,
// which declare their kernels themselves.
#define SEGVIT_PICK(name)                                           \
  (::segvit::isa() >= ::segvit::Isa::avx512 ? &::segvit::avx512::name \
   : ::segvit::isa() == ::segvit::Isa::avx2 ? &::segvit::avx2::name   \
                                            : &::segvit::portable::name)
#else
#define SEGVIT_KERNEL(name, ...) \
  namespace segvit::portable { void name(__VA_ARGS__); }
#define SEGVIT_PICK(name) (&::segvit::portable::name)
#endif

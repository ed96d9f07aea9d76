#include "common/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attn {

// ATTN_LIMIT_ISA (0 or 1) builds a library that takes no better one, to test those kernels.
Isa best_isa() {
#if defined(ATTN_LIMIT_ISA)
  return static_cast<Isa>(ATTN_LIMIT_ISA);
#elif defined(__x86_64__)
  static const Isa chosen =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? Isa::avx512
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2
                                                                        : Isa::baseline;
  return chosen;
#else
  return Isa::baseline;
#endif
}

// gcc 12 does not know the name of AMX-BF16.
bool has_bfloat16_products() {
#if defined(__x86_64__)
  unsigned int a, b, c, d;
  if (!__builtin_cpu_supports("avx512bw")) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) != 0) return true;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
#else
  return false;
#endif
}

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    constexpr unsigned int kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
    unsigned int a, b, c, d;
    if (best_isa() != Isa::avx512) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kAvx512Bf16) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace attn

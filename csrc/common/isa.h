// Which of the instruction sets that kernels are compiled for serves on this machine.
#pragma once

namespace attn {

enum class Isa { baseline, avx2, avx512 };

Isa best_isa();

// AMX-BF16 or AVX512-BF16: matrix instructions for bfloat16.
bool has_bfloat16_products();

// AMX-BF16 beside avx512, and the leave of the operating system to use its registers.
bool has_amx();

}  // namespace attn

// Compiles what follows for ATTN_ISA (baseline, avx2, avx512 or amx). Include it after every system
// header, so that no inline function of those is compiled for a machine that may not be there, and
// close it with isa_end.h. No include guard: one pair per translation unit.
#if ATTN_ISA_LEVEL == 0
#define ATTN_ISA baseline
#define ATTN_VECTOR_BYTES 16
#define ATTN_TILE_ROWS 6
#elif ATTN_ISA_LEVEL == 1
#define ATTN_ISA avx2
#define ATTN_VECTOR_BYTES 32
#define ATTN_TILE_ROWS 6
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#elif ATTN_ISA_LEVEL == 2
#define ATTN_ISA avx512
#define ATTN_VECTOR_BYTES 64
#define ATTN_TILE_ROWS 8
#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#elif ATTN_ISA_LEVEL == 3
#define ATTN_ISA amx
#define ATTN_VECTOR_BYTES 64
#define ATTN_TILE_ROWS 8
#ifdef __clang__
#pragma clang attribute push(                                                            \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16," \
                          "amx-tile,amx-bf16"))),                                        \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#pragma GCC target("avx512bf16,amx-tile,amx-bf16")
#endif
#endif

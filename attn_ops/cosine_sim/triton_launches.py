"""Block sizes of the core kernels by bytes per element and padded head width."""

from __future__ import annotations

from attn_ops._triton.launch import Launch, Table

# Bytes of an element of float32 as three bfloat16. Of 128 elements the backward's fit nowhere.
SPLIT = 6
# rows, columns, warps, stages. First where a program may use 227 KB of shared memory and scores are
# plain products; second, within 99 KB, elsewhere; third as the first, with a bias that comes in
# tiles, where the second does not serve it. Checked by tests/triton/test_compile.py.
FORWARD: Table = {
    2: {
        64: [Launch(64, 64, 4, 3, 128), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2, 128)],
        128: [Launch(64, 64, 4, 3), Launch(128, 32, 8, 2), Launch(64, 64, 4, 3)],
        256: [Launch(128, 32, 8, 3), Launch(64, 32, 8, 1)],
    },
    4: {
        64: [Launch(128, 64, 8, 2), Launch(64, 32, 4, 1)],
        128: [Launch(128, 64, 8, 1), Launch(32, 32, 4, 1)],
        256: [Launch(32, 32, 8, 2), Launch(32, 16, 8, 1)],
    },
    SPLIT: {
        64: [Launch(64, 32, 4, 2)] * 2,
        128: [Launch(64, 32, 4, 2)] * 2,
    },
}
# Of few queries: columns are keys, and rows the most there are.
DECODE: Table = {
    2: {
        64: [Launch(64, 128, 4, 3), Launch(64, 64, 4, 2)],
        128: [Launch(64, 64, 4, 3), Launch(64, 32, 4, 2)],
        256: [Launch(64, 32, 8, 3), Launch(64, 32, 8, 2)],
    },
    4: {
        64: [Launch(32, 64, 8, 2), Launch(32, 32, 8, 1)],
        128: [Launch(32, 32, 8, 2), Launch(32, 32, 8, 1)],
        256: [Launch(32, 16, 8, 2), Launch(32, 16, 8, 1)],
    },
}
# rows are queries
GRAD_QUERY: Table = {
    2: {
        64: [Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 3)],
        128: [Launch(128, 64, 8, 3), Launch(64, 32, 4, 2), Launch(64, 64, 4, 2)],
        256: [Launch(128, 32, 8, 1), Launch(32, 32, 4, 2)],
    },
    4: {
        64: [Launch(128, 32, 8, 1), Launch(64, 32, 8, 1)],
        128: [Launch(128, 32, 8, 1), Launch(32, 32, 8, 1)],
        256: [Launch(32, 16, 4, 1), Launch(32, 16, 8, 1)],
    },
    SPLIT: {
        64: [Launch(128, 64, 8, 2)] * 2,
    },
}
# rows are keys
GRAD_KEY_VALUE: Table = {
    2: {
        64: [Launch(64, 64, 4, 3, 168), Launch(128, 32, 8, 2), Launch(64, 64, 4, 3)],
        128: [Launch(64, 64, 4, 2), Launch(64, 32, 8, 2), Launch(64, 64, 4, 2)],
        256: [Launch(64, 32, 8, 3), Launch(32, 32, 8, 2)],
    },
    4: {
        64: [Launch(64, 32, 4, 1), Launch(32, 32, 4, 1)],
        128: [Launch(128, 32, 8, 1), Launch(32, 32, 8, 1)],
        256: [Launch(32, 16, 8, 1), Launch(16, 16, 4, 1)],
    },
    SPLIT: {
        64: [Launch(128, 64, 8, 2)] * 2,
    },
}
# rows are queries, columns keys
GRAD_BIAS: Table = {
    2: {
        64: [*[Launch(64, 32, 4, 1)] * 2, Launch(128, 64, 8, 2, 128)],
        128: [*[Launch(64, 32, 8, 1)] * 2, Launch(128, 64, 8, 2)],
        256: [Launch(32, 16, 4, 1)] * 2,
    },
    4: {
        64: [Launch(32, 32, 4, 1)] * 2,
        128: [Launch(16, 16, 4, 1)] * 2,
        256: [Launch(16, 16, 4, 1)] * 2,
    },
}
# the same, of both batches where two share a bias
GRAD_QUERY_BIAS: Table = {
    2: {
        64: [*[Launch(64, 32, 4, 2)] * 2, Launch(64, 64, 4, 2)],
        128: [*[Launch(64, 32, 4, 1)] * 2, Launch(64, 32, 4, 2)],
    },
}
# square; first where a program may use 227 KB, whatever the scores
GRAD_RELATIVE_BIAS: Table = {
    2: {
        64: [Launch(64, 64, 4, 2), Launch(64, 64, 4, 1)],
        128: [Launch(64, 64, 8, 2), Launch(32, 32, 8, 1)],
        256: [Launch(64, 64, 8, 1), Launch(32, 32, 8, 1)],
    },
    4: {
        64: [Launch(32, 32, 8, 1)] * 2,
        128: [Launch(16, 16, 4, 1)] * 2,
        256: [Launch(16, 16, 4, 1)] * 2,
    },
}
# rows are queries. The parts of wider rows of float32 fit nowhere.
JVP: Table = {
    2: {
        64: [Launch(128, 64, 8, 2), Launch(64, 32, 4, 2)],
        128: [Launch(128, 64, 8, 2), Launch(64, 32, 8, 1)],
        256: [Launch(128, 32, 8, 1), Launch(32, 16, 8, 1)],
    },
    4: {
        64: [Launch(128, 64, 8, 1), Launch(32, 32, 4, 1)],
        128: [Launch(128, 32, 8, 1), Launch(16, 16, 8, 1)],
    },
}

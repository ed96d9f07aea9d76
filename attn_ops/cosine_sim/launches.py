"""Block sizes of the core kernels by bytes per element and padded head width."""

from __future__ import annotations

from attn_ops._triton.launch import Launch

Table = dict[int, dict[int, list[Launch]]]

# rows, columns, warps, stages: for 227 KB of shared memory, and for 99 KB
FORWARD: Table = {
    2: {
        64: [Launch(128, 64, 4, 3)],
        128: [Launch(128, 64, 8, 3), Launch(128, 32, 4, 2)],
        256: [Launch(128, 64, 8, 2), Launch(64, 32, 4, 2)],
    },
    4: {
        64: [Launch(64, 32, 4, 2)],
        128: [Launch(64, 32, 8, 2), Launch(32, 32, 4, 2)],
        256: [Launch(32, 32, 8, 2), Launch(32, 16, 4, 1)],
    },
}
# rows are queries
GRAD_QUERY: Table = {
    2: {
        64: [Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)],
        128: [Launch(128, 64, 8, 2), Launch(64, 32, 4, 2)],
        256: [Launch(64, 64, 8, 1), Launch(32, 32, 4, 1)],
    },
    4: {
        64: [Launch(32, 32, 4, 2)],
        128: [Launch(32, 32, 4, 2), Launch(32, 32, 4, 1)],
        256: [Launch(32, 16, 4, 1), Launch(16, 16, 4, 1)],
    },
}
# rows are keys
GRAD_KEY_VALUE: Table = {
    2: {
        64: [Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)],
        128: [Launch(128, 64, 8, 2), Launch(64, 32, 4, 2)],
        256: [Launch(64, 64, 8, 1), Launch(32, 32, 4, 1)],
    },
    4: {
        64: [Launch(32, 32, 4, 2)],
        128: [Launch(32, 32, 4, 2), Launch(32, 32, 4, 1)],
        256: [Launch(32, 16, 4, 1), Launch(16, 16, 4, 1)],
    },
}
# rows are queries, columns keys or diagonals
BIAS: Table = {
    2: {
        64: [Launch(64, 64, 4, 1)],
        128: [Launch(64, 64, 8, 1), Launch(32, 32, 4, 1)],
        256: [Launch(64, 64, 8, 1), Launch(32, 32, 4, 1)],
    },
    4: {
        64: [Launch(32, 32, 4, 1)],
        128: [Launch(32, 32, 4, 1)],
        256: [Launch(16, 16, 4, 1)],
    },
}

"""What `masks` folds for the kernels is the visibility that the specification states."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from attn_ops import masks
from tests.softmax import sees

LENGTHS = st.integers(0, 12)
WINDOWS = st.one_of(st.none(), st.integers(1, 14), st.just(1 << 40))
SEQUENCES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5)
CPU = torch.device("cpu")


@given(LENGTHS, LENGTHS, st.booleans(), WINDOWS)
@example(1, 12, True, 1)
@example(12, 1, True, None)
def test_band_is_the_literal_visibility(
    queries: int, keys: int, causal: bool, window: int | None
) -> None:
    window = window if causal else None
    left, right = masks.band(causal, window)
    folded = masks.visible(queries, keys, None, None, None, left, right, CPU)
    assert torch.equal(folded[0, 0], sees(queries, keys, causal, window))


@given(
    SEQUENCES,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.booleans(),
    WINDOWS,
    st.sampled_from((torch.int32, torch.int64)),
)
@example([(3, 0), (0, 3), (4, 4)], (2, 1), True, 2, torch.int32)
def test_packed_intervals_are_the_literal_visibility(
    sequences: list[tuple[int, int]],
    left_over: tuple[int, int],
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    window = window if causal else None
    offsets = [
        torch.tensor([0, *(pair[i] for pair in sequences)]).cumsum(0).to(dtype) for i in (0, 1)
    ]
    queries, keys = (int(x[-1]) + spare for x, spare in zip(offsets, left_over))
    start, stop = masks.packed_intervals(queries, keys, causal, window, *offsets)
    assert start.shape == stop.shape == (1, queries)
    assert start.dtype == stop.dtype == torch.int32
    folded = masks.visible(queries, keys, None, start, stop, masks.UNBOUNDED, masks.UNBOUNDED, CPU)
    lists = [x.tolist() for x in offsets]
    assert torch.equal(folded[0, 0], sees(queries, keys, causal, window, *lists))
    # What lets a kernel read the interval of a block off its first and last row.
    for bound in (start, stop):
        assert (bound.diff() >= 0).all()
        assert ((bound >= 0) & (bound <= keys)).all()


@given(LENGTHS, LENGTHS, st.booleans(), st.integers(0, 99))
def test_a_mask_meets_the_band_and_the_intervals(
    queries: int, keys: int, causal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 3, queries, keys, generator=generator) < 0.5
    start = torch.randint(0, keys + 1, (2, queries), generator=generator).sort().values
    stop = torch.randint(0, keys + 1, (2, queries), generator=generator).sort().values
    seen = masks.visible(queries, keys, mask, start, stop, *masks.band(causal, None), CPU)
    for batch in range(2):
        for m in range(queries):
            for n in range(keys):
                in_interval = bool(start[batch, m] <= n < stop[batch, m])
                in_band = not causal or n <= m + (keys - queries)
                expected = mask[batch, :, m, n] & in_interval & in_band
                assert torch.equal(seen[batch, :, m, n], expected)


def test_offsets_beyond_the_length_see_what_is_there() -> None:
    """Wrong offsets are not read on the host; they must not lead a kernel out of bounds."""
    offsets = torch.tensor([0, 4, 99])
    start, stop = masks.packed_intervals(6, 5, False, None, offsets, offsets)
    assert start.tolist() == [[0, 0, 0, 0, 4, 4]]
    assert stop.tolist() == [[4, 4, 4, 4, 5, 5]]

"""Sharing out what a provider counted for many prompts at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.jobs import Usage
from promptfleet_workers.providers.shares import allocate, allocate_usage

counts = st.integers(min_value=0, max_value=10**9)
usages = st.builds(Usage, input=counts, output=counts)


@given(total=counts, weights=st.lists(counts, min_size=1, max_size=50))
def test_shares_sum_up_and_are_proportional(total: int, weights: list[int]) -> None:
    shares = allocate(total, weights)

    assert sum(shares) == total
    whole = sum(weights)
    exact = [total * w / whole if whole else total / len(weights) for w in weights]
    assert all(abs(share - e) < 1 + e * 1e-9 for share, e in zip(shares, exact, strict=True))


def test_the_largest_remainders_get_what_is_left() -> None:
    assert allocate(10, [5, 3, 3]) == [4, 3, 3]
    assert allocate(3, [0, 0]) == [2, 1]
    assert allocate(0, [1, 2]) == [0, 0]


@given(
    total=st.builds(Usage, input=counts, cached=counts, output=counts, reasoning=counts),
    estimates=st.lists(usages, min_size=1, max_size=20),
)
def test_a_share_is_never_part_of_less_than_itself(total: Usage, estimates: list[Usage]) -> None:
    shares = allocate_usage(total, estimates)

    assert all(share.cached <= share.input and share.reasoning <= share.output for share in shares)
    if shares != estimates:
        whole = sum(shares, Usage())
        assert (whole.input, whole.output) == (total.input, total.output)


def test_details_are_shared_out_too() -> None:
    total = Usage(input=300, cached=90, output=30, reasoning=10)

    shares = allocate_usage(total, [Usage(input=50, output=10), Usage(input=100, output=5)])

    assert shares == [
        Usage(input=100, cached=30, output=20, reasoning=7),
        Usage(input=200, cached=60, output=10, reasoning=3),
    ]


@given(estimate=st.integers(5, 1000), number=st.integers(2, 200), percent=st.integers(75, 130))
def test_a_count_of_all_and_a_count_of_one_are_told_apart(
    estimate: int, number: int, percent: int
) -> None:
    """Even where our estimates are a quarter off, all in the same direction."""
    estimates = [Usage(input=estimate, output=estimate)] * number
    real = -(-estimate * percent // 100)

    of_all = Usage(input=real * number, output=real * number)
    of_one = Usage(input=real, output=real)

    assert allocate_usage(of_one, estimates) == estimates
    assert allocate_usage(of_all, estimates) == [Usage(input=real, output=real)] * number

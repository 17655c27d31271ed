"""How sure a share or a mean is: intervals, the rule by which they decide, and how many clips would."""

import numpy as np
from scipy.stats import binomtest, norm

# How sure

CLEAR, CLEAR_LOW = 0.9, 0.8  # a share is clear from .9 on, when its lower bound is .8 or more; below when its upper is below .9
MOST_NEEDED = 10_000  # sentences; a share so near to the bound that it takes more is not decided by counting


def share_interval(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share, `right` of `count` sentences; (nan, nan) of none.

    Unlike a bootstrap it does not shrink to a point where all are right: 16 of 16 is .81 to 1. Count sentences, never
    several takes of one. Raises ValueError for counts that are no share.
    """
    if count == 0:
        return float("nan"), float("nan")
    interval = binomtest(int(right), int(count)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def decide_share(right: int, count: int) -> str:
    """Return "clear" (share of .9 or more, lower bound .8 or more), "below" (upper bound below .9), or "unclear"."""
    low, high = share_interval(right, count)
    if count and 10 * right >= 9 * count and low >= CLEAR_LOW:
        return "clear"
    return "below" if high < CLEAR else "unclear"


def count_needed(right: int, count: int) -> int | None:
    """Return how many sentences would decide if their share were the one seen; None if 10,000 do not (it is at the bound).

    Wilson's interval of a share s ends at p where (s - p)^2 = z^2 p (1 - p) / n; that is solved for n.
    """
    if count == 0 or decide_share(right, count) != "unclear":
        return count or None
    bound, share = CLEAR_LOW if 10 * right >= 9 * count else CLEAR, right / count
    needed = int(np.ceil(norm.ppf(0.975) ** 2 * bound * (1 - bound) / (share - bound) ** 2))
    return needed if needed <= MOST_NEEDED else None


def count_needed_mean(figure: float, low: float, high: float, count: int, limit: float) -> int | None:
    """Return how many clips would tell `figure` from `limit` if it stayed as it is; None if 10,000 do not.

    An interval narrows by the root of the number of clips.
    """
    edge = low if figure > limit else high
    if not count or figure == limit or not np.isfinite([figure, edge]).all():
        return None
    needed = max(count, int(np.ceil(count * ((figure - edge) / (figure - limit)) ** 2)))
    return needed if needed <= MOST_NEEDED else None


def write_share(right: int, count: int) -> str:
    """Return "38 of 40, 95 % (83 to 99 %)"; "none of 0" for no sentence."""
    if count == 0:
        return "none of 0"
    low, high = share_interval(right, count)
    return f"{right} of {count}, {100 * right / count:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def write_needed(needed: int | None, what: str = "sentences") -> str:
    """Return in words how many would decide (count_needed)."""
    return f"some {needed} {what} would decide" if needed else f"at the bound: {MOST_NEEDED:,} {what} would not decide"


def bootstrap_interval(values, statistic=np.mean, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic` over clips (Efron 1979); NaN are left out.

    (nan, nan) of fewer than two values: one says nothing of its spread. scipy.stats.bootstrap draws the same clips and
    rounds the last digit of the result otherwise, so that figures of runs would no longer be the same.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    figures = np.apply_along_axis(statistic, 1, values[picks])
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""A histogram of durations with bounded memory and about 5% resolution."""

import math

_GROWTH = 1.05
_SMALLEST_S = 1e-5
_LOG_GROWTH = math.log(_GROWTH)
# Up to about 20 minutes; anything longer counts in the last bucket.
_BUCKETS = int(math.log(1200 / _SMALLEST_S) / _LOG_GROWTH) + 2


class LatencyHistogram:
    """Durations in seconds, counted in buckets that grow by 5%; many devices may share one."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.longest_s = 0.0

    def record(self, seconds: float) -> None:
        """Count one duration."""
        bucket = 0 if seconds <= _SMALLEST_S else int(math.log(seconds / _SMALLEST_S) / _LOG_GROWTH) + 1
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self.count += 1
        self.longest_s = max(self.longest_s, seconds)

    def percentile(self, percent: float) -> float:
        """The duration in seconds that `percent` of the counted ones do not exceed; NaN when there are none."""
        if not self.count:
            return math.nan
        wanted = max(1, math.ceil(self.count * percent / 100))
        seen = 0
        bucket = -1
        while seen < wanted:
            bucket += 1
            seen += self._counts[bucket]
        return min(_SMALLEST_S * _GROWTH**bucket, self.longest_s)

"""The witness: what a probe wrote and when it was acked, held against what answers say and claim. Pure.

The probe numbers its readings by writing them one after the other; the value of a reading is its own timestamp, its
*stamp*. An answer shows the first so many of them; which is as many as it must show follows from what it claims:

1. An answer that is older than its tier allows says so.
2. A CRITICAL answer shows everything acked before it was asked.
3. An answer shows everything that was committed before its as_of.
4. An answer shows nothing that was not written, nothing twice, and nothing after a gap.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from atlasco.telemetry.v1 import query_pb2

from storage.times import MINUTE_US

_Reasons = query_pb2.Degradation
# What an answer that says so may lack.
_EXCUSED = frozenset({_Reasons.REASON_INCOMPLETE, _Reasons.REASON_RANGE_CUT})


@dataclass(frozen=True, slots=True)
class Shown:
    """What an answer holds of the stamps from `since_us` on: how many, and the newest (0: none)."""

    newest_us: int
    # None: the question was only about the newest.
    count: int | None = None
    since_us: int = 0


class Witness:
    """The stamps of one probe. Times are microseconds."""

    def __init__(self) -> None:
        self._stamps: list[int] = []
        # For each stamp acked, up to the last one or the one before, the latest that its commit can have been.
        self._committed_by: list[int] = []
        self._acked = 0

    @property
    def acked(self) -> int:
        """How many stamps were acked; they are the first ones."""
        return self._acked

    def next_stamp(self, now_us: int) -> int:
        """The stamp to write next, above all before it, whatever the clock does."""
        stamp = max(now_us, self._stamps[-1] + 1) if self._stamps else now_us
        self._stamps.append(stamp)
        return stamp

    def note_acked(self) -> None:
        """The stamp given out last was acked, perhaps not for the first time."""
        self._acked = len(self._stamps)

    def note_committed(self, committed_by_us: int) -> None:
        """The stamp given out last, now acked, was committed before that time on the primary's clock."""
        # The measured clock may be corrected backwards by its uncertainty; commits came in order all the same.
        self._committed_by.append(max(committed_by_us, self._committed_by[-1] if self._committed_by else 0))

    def since(self, most: int) -> int:
        """The beginning of the minute of the `most`-newest stamp: where a bounded question may begin."""
        return self._stamps[max(0, len(self._stamps) - most)] // MINUTE_US * MINUTE_US

    def judge(self, bound_us: int, provenance: query_pb2.Provenance, shown: Shown, acked_before: int) -> str:
        """What is wrong with an answer; empty: nothing. `acked_before`: `acked` when the question was sent."""
        reasons = {one.reason for one in provenance.degraded}
        if provenance.staleness_us > bound_us and _Reasons.REASON_STALE not in reasons:
            return f"{provenance.staleness_us} us old, {bound_us} us are allowed"
        seen = bisect_right(self._stamps, shown.newest_us)
        if shown.newest_us and (seen == 0 or self._stamps[seen - 1] != shown.newest_us):
            return f"shows {shown.newest_us}, which was never written"
        if reasons & _EXCUSED:
            return ""
        if shown.count is not None:
            expected = max(0, seen - bisect_left(self._stamps, shown.since_us))
            if shown.count != expected:
                return f"shows {shown.count} stamps up to the newest it has, {expected} were written"
        if bound_us == 0 and seen < acked_before:
            return f"shows {seen} stamps, {acked_before} had been acked before it was asked"
        committed = bisect_left(self._committed_by, provenance.as_of_us)
        if seen < committed:
            return f"shows {seen} stamps, {committed} were committed before its as_of {provenance.as_of_us}"
        return ""

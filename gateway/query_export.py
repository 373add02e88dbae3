"""An export: pages of series, one after the other, as one stream.

Each page is a read of its own, so that no connection and no snapshot is held while the client takes its time, and
memory holds one page, however many readings there are. The next page is read only when the client has taken the last
one: the transport's flow control reaches to the database.

A client that leaves a message unread for too long loses its export (slow_reader.py).

The provenance of the whole is that of its weakest page. Each page is proven to be as fresh as was asked when the export
arrived, and no older than the first.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from atlasco.telemetry.v1 import query_pb2

from gateway.query_freshness import provenance
from gateway.query_messages import series_message
from router.outcome import Routed
from router.questions import SeriesRange
from storage.reads.model import SeriesPage, SeriesQuestion


async def export_series(
    read: Callable[[SeriesRange], Awaitable[Routed[SeriesPage]]], question: SeriesQuestion, chunk: int
) -> AsyncIterator[query_pb2.ExportSeriesResponse]:
    """The messages of an export; see ExportSeriesResponse. `read` reads one page.

    Raises:
        StorageError: as `read`; what was sent before is then incomplete.
    """
    after = None
    readings = 0
    whole: Routed[Any] | None = None
    while True:
        routed = await read(SeriesRange(question, chunk, after))
        if whole is None:
            yield query_pb2.ExportSeriesResponse(provenance=provenance(routed))
        whole = _weakest(whole, routed)
        parts, after = routed.answer.parts, routed.answer.last
        readings += sum(len(part.times_us) for part in parts)
        message = query_pb2.ExportSeriesResponse(series=[series_message(part) for part in parts])
        # The client may take its time to read: until then only the message stays in memory.
        del routed, parts
        if message.series:
            yield message
        if after is None:
            break
    summary = query_pb2.ExportSummary(readings=readings, provenance=provenance(whole))
    yield query_pb2.ExportSeriesResponse(summary=summary)


def _weakest(whole: Routed[Any] | None, page: Routed[Any]) -> Routed[Any]:
    """What holds for both: the older as_of, the later complete_from, every degradation once."""
    if whole is None:
        return replace(page, answer=None)
    older = min(whole, page, key=lambda routed: routed.proof.as_of_us)
    starts = [r.proof.complete_from_us for r in (whole, page) if r.proof.complete_from_us is not None]
    degraded = {d.reason: d for d in (*page.proof.degraded, *whole.proof.degraded)}
    proof = replace(older.proof, complete_from_us=max(starts, default=None), degraded=tuple(degraded.values()))
    return replace(older, answer=None, proof=proof)

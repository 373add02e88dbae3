"""Errors of reading, as the refusals that query.proto lists: the one place that says which is which."""

from typing import Final

from gateway.status import (
    Reason,
    Refusal,
    attribute_not_found,
    entity_not_found,
    entity_replaced,
    field_invalid,
    latest_not_kept,
)
from router.outcome import FallbackBusy, NoSource, RangeRetired
from router.tiers import TokenUnknown
from storage.aggregate.buckets import TimeZoneUnknown, TooManyPoints
from storage.aggregate.model import AggregateTypeMismatch, SelectionTooLarge
from storage.aggregate.text_bound import TooMuchText
from storage.filter.syntax import FilterInvalid
from storage.reads.model import AnswerTooLarge, AttributeNotFound, EntityNotFound, EntityReplaced, LatestNotKept

# In seconds: by then some of the queries that fill the fallback will have ended.
_FALLBACK_RETRY_S: Final = 0.2


def refusal_of_query(error: Exception, *, filter_field: str = "filter") -> Exception:
    """The refusal that an error of a query stands for; an error that is not about the query is returned unchanged.

    `filter_field` is the path of the request's filter: a filter can turn out to be invalid as late as in the database,
    where nobody knows what the request calls it.
    """
    match error:
        case EntityNotFound():
            return entity_not_found(error.name)
        case AttributeNotFound():
            return attribute_not_found(error.name)
        case EntityReplaced():
            return entity_replaced(error.name)
        case LatestNotKept():
            return latest_not_kept(error.name)
        case FilterInvalid():
            metadata = {"position": str(error.position), "expected": error.expected}
            return Refusal(Reason.FILTER_INVALID, str(error), metadata=metadata, field=filter_field)
        case TimeZoneUnknown():
            metadata = {"time_zone": error.name}
            return Refusal(Reason.TIME_ZONE_UNKNOWN, str(error), metadata=metadata, field="bucket.time_zone")
        case AggregateTypeMismatch():
            metadata = {"attribute": error.attribute, "function": error.function}
            return Refusal(Reason.AGGREGATE_TYPE, str(error), metadata=metadata)
        case TooManyPoints():
            metadata = {"points": str(error.points), "limit": str(error.limit)}
            return Refusal(Reason.TOO_MANY_POINTS, str(error), metadata=metadata)
        case TooMuchText():
            return Refusal(Reason.TOO_MUCH_TEXT, str(error), metadata={"limit": str(error.limit)})
        case SelectionTooLarge():
            return field_invalid(filter_field, f"selects too much: {error}")
        case AnswerTooLarge():
            return field_invalid("attributes", f"lead to an answer that is too large: {error}")
        case _:
            return _refusal_of_route(error) or error


def _refusal_of_route(error: Exception) -> Refusal | None:
    """The refusal that an error of the router stands for; None: it is not one of the router's."""
    match error:
        case NoSource():
            return Refusal(Reason.FRESHNESS_UNMET, f"no source is fresh enough: {error}", metadata=dict(error.reasons))
        case TokenUnknown():
            return Refusal(Reason.READ_TOKEN_UNKNOWN, str(error), field="freshness.read_token")
        case RangeRetired():
            metadata = {"complete_from_us": str(error.complete_from_us)}
            return Refusal(Reason.RANGE_RETIRED, str(error), metadata=metadata)
        case FallbackBusy():
            return Refusal(
                Reason.FALLBACK_CONCURRENCY,
                str(error),
                metadata={"limit": str(error.limit)},
                retry_after_s=_FALLBACK_RETRY_S,
            )
        case _:
            return None

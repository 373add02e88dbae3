"""What a query may ask: requests checked field by field, before any I/O.

Every function raises `Refusal` with the reasons that query.proto lists; `filter_text` alone raises FilterInvalid.
A parameter `field` is the path that the refusal names, such as selection.labels.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from atlasco.telemetry.v1 import query_pb2

from gateway.auth import Identity, IdentityKind, name_problem
from gateway.status import Reason, Refusal, device_mismatch, field_invalid
from storage.filter.syntax import parse
from storage.reads.model import SeriesQuestion

MAX_ENTITIES: Final = 1_000
MAX_SERIES_ATTRIBUTES: Final = 1_000
# A tenant's default quota: a longer list must repeat a name.
MAX_LATEST_ATTRIBUTES: Final = 10_000
MAX_LABELS: Final = 64
MAX_LABEL_BYTES: Final = 1_024

SERIES_PAGE: Final = (1_000, 50_000)
"""Default and maximum of readings per page."""

EXPORT_CHUNK: Final = (10_000, 50_000)
"""Default and maximum of readings per message of an export."""

MAX_LIMIT_PER_SERIES: Final = 1_000_000

LIST_PAGE: Final = (100, 1_000)
"""Default and maximum of devices, attributes or operations per page."""


def page_size(asked: int, bounds: tuple[int, int], field: str = "page_size") -> int:
    """The size of a page, by AIP-158: 0 means the default, and more than the maximum means the maximum."""
    if asked < 0:
        raise field_invalid(field, "must not be negative")
    default, most = bounds
    return min(asked or default, most)


def entity_names(identity: Identity, names: Sequence[str], field: str = "entities") -> Sequence[str]:
    """1 to 1,000 distinct names of devices that the caller may read."""
    _check_names(names, field, most=MAX_ENTITIES)
    if not names:
        raise field_invalid(field, "must name at least one device")
    for name in names:
        if not identity.may_name(name):
            raise device_mismatch(name)
    return names


def one_entity(identity: Identity, name: str) -> str:
    """The name of one device that the caller may read."""
    problem = name_problem(name)
    if problem is not None:
        raise field_invalid("entity", problem)
    if not identity.may_name(name):
        raise device_mismatch(name)
    return name


def filter_text(text: str) -> str:
    """A filter whose syntax is right; whether it fits the tenant's attributes, the read finds out.

    Raises:
        FilterInvalid: it is too long, or does not parse.
    """
    parse(text)
    return text


def attribute_names(names: Sequence[str]) -> Sequence[str]:
    """Distinct names of attributes, at most 10,000; an empty list passes."""
    _check_names(names, "attributes", most=MAX_LATEST_ATTRIBUTES)
    return names


def series_question(
    identity: Identity, request: query_pb2.ReadSeriesRequest | query_pb2.ExportSeriesRequest
) -> SeriesQuestion:
    """The series asked for."""
    entities = entity_names(identity, request.entities)
    _check_names(request.attributes, "attributes", most=MAX_SERIES_ATTRIBUTES)
    if not request.attributes:
        raise field_invalid("attributes", "must name at least one attribute")
    start_us, end_us = time_range(request.start_time_us, request.end_time_us)
    limit = request.limit_per_series
    if not 0 <= limit <= MAX_LIMIT_PER_SERIES:
        raise field_invalid("limit_per_series", f"must be 0 to {MAX_LIMIT_PER_SERIES}")
    return SeriesQuestion(list(entities), list(request.attributes), start_us, end_us, request.descending, limit)


def time_range(start_us: int, end_us: int) -> tuple[int, int]:
    """A range [start, end) of reading time."""
    for field, time_us in (("start_time_us", start_us), ("end_time_us", end_us)):
        if time_us == 0:
            raise field_invalid(field, "must be set; 0 is not a valid time of a reading", Reason.RANGE_UNBOUNDED)
        if time_us < 0:
            raise field_invalid(field, "must not be negative")
    if start_us >= end_us:
        raise Refusal(Reason.RANGE_INVERTED, f"start_time_us {start_us} must be before end_time_us {end_us}")
    return start_us, end_us


def entity_type(text: str, field: str = "entity_type") -> str:
    """A device type to match; empty matches any."""
    if text:
        _check_text(text, field)
    return text


def labels(asked: Mapping[str, str], field: str = "labels") -> dict[str, str]:
    """Labels to match."""
    if len(asked) > MAX_LABELS:
        raise field_invalid(field, f"has {len(asked)} entries, more than {MAX_LABELS}")
    for key, value in asked.items():
        if not key:
            raise field_invalid(field, "has an empty key")
        _check_text(key, field)
        _check_text(value, field)
    return dict(asked)


def visible_entity(identity: Identity) -> str | None:
    """The only device that the caller may see; None: it may see all of its tenant's."""
    return identity.name if identity.kind is IdentityKind.DEVICE else None


def _check_names(names: Sequence[str], field: str, *, most: int) -> None:
    if len(names) > most:
        raise field_invalid(field, f"has {len(names)} names, more than {most}")
    for place, problem in _problems(names):
        raise field_invalid(f"{field}[{place}]", problem)


def _problems(names: Sequence[str]) -> Iterable[tuple[int, str]]:
    seen: set[str] = set()
    for place, name in enumerate(names):
        problem = name_problem(name)
        if problem is not None:
            yield place, problem
        if name in seen:
            yield place, f"repeats {name!r}"
        seen.add(name)


def _check_text(text: str, field: str) -> None:
    # PostgreSQL stores no NUL, and would fail with what looks like an error of the gateway.
    if "\0" in text:
        raise field_invalid(field, "holds a NUL character")
    if len(text.encode()) > MAX_LABEL_BYTES:
        raise field_invalid(field, f"is longer than {MAX_LABEL_BYTES} bytes")

"""What there is to say of a metric."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

MetricKind = Literal["counter", "gauge", "histogram"]

LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds. From below one commit to beyond any client's patience."""


@dataclass(frozen=True)
class MetricDefinition:
    """What a metric is."""

    kind: MetricKind
    unit: str
    """UCUM: "s", "By", or what is counted in braces."""
    meaning: str
    remedy: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label names, each with its values; an empty tuple where the values are bounded but not listed here.
    A counter whose values are listed starts at 0 for each, so that the first event already shows as an
    increase."""
    buckets: tuple[float, ...] = ()
    """Upper bounds, for histograms."""


def counter(
    unit: str, meaning: str, remedy: str, labels: Mapping[str, tuple[str, ...]] | None = None
) -> MetricDefinition:
    """What only grows."""
    return MetricDefinition("counter", unit, meaning, remedy, labels or {})


def gauge(
    unit: str, meaning: str, remedy: str, labels: Mapping[str, tuple[str, ...]] | None = None
) -> MetricDefinition:
    """What goes up and down."""
    return MetricDefinition("gauge", unit, meaning, remedy, labels or {})


def histogram(
    unit: str,
    meaning: str,
    remedy: str,
    buckets: tuple[float, ...],
    labels: Mapping[str, tuple[str, ...]] | None = None,
) -> MetricDefinition:
    """What is counted by size."""
    return MetricDefinition("histogram", unit, meaning, remedy, labels or {}, buckets)

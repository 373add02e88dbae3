"""What a process does whatever it is for: who it lets in, its certificates, its event loop."""

from collections.abc import Mapping
from typing import Final

from runtime.metric_definitions.model import LATENCY_BUCKETS, MetricDefinition, counter, gauge, histogram
from runtime.metric_definitions.names import MetricName

PROCESS: Final[Mapping[MetricName, MetricDefinition]] = {
    "atlasco_authentication_failures": counter(
        "{request}",
        "Calls whose peer had no valid identity, by reason.",
        "After a rotation: devices with certificates of the old authority. Otherwise: probing.",
        {"reason": ()},
    ),
    "atlasco_tls_reloads": counter(
        "{reload}",
        "Changes of the certificate files that were noticed, and whether the new ones are served.",
        "failed: the old certificate is still served and will expire; the log says what is wrong.",
        {"result": ("loaded", "failed")},
    ),
    "atlasco_tls_certificate_remaining_seconds": gauge(
        "s",
        "Time until the certificate that is served expires.",
        "Below a few days: the rotation does not work; see TLS reloads.",
    ),
    "atlasco_event_loop_lag_seconds": histogram(
        "s",
        "How late a timer of the event loop fires: time in which nothing else could run.",
        "Above 50 ms: something computes or blocks on the loop; everything waits for it, acks included.",
        LATENCY_BUCKETS,
    ),
}

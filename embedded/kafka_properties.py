"""The configuration of the embedded broker: what is ours, what a caller may choose."""

from __future__ import annotations

import re
from collections.abc import Mapping

from embedded.ports import LOOPBACK

DEFAULTS: Mapping[str, str] = {
    # A topic nobody created is a mistake in a name, not a wish.
    "auto.create.topics.enable": "false",
    # There is one broker to hold a replica.
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # 50 by default: 50 directories to make at the first consumer and to load at each start.
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.num.partitions": "4",
    # Consumers that start one after the other are not kept waiting for company.
    "group.initial.rebalance.delay.ms": "0",
    # 128 MB of heap by default, a third of all there is here.
    "log.cleaner.dedupe.buffer.size": "16777216",
    # After a crash the broker is let back in when its former life's session has run out: 9 s by default.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "num.recovery.threads.per.data.dir": "2",
    "log.retention.hours": "168",
}
"""Broker properties unless `properties` say otherwise."""

_OURS = frozenset(
    {
        "process.roles",
        "node.id",
        "listeners",
        "advertised.listeners",
        "listener.security.protocol.map",
        "inter.broker.listener.name",
        "controller.listener.names",
        "controller.quorum.voters",
        "log.dirs",
    }
)


def with_defaults(properties: Mapping[str, str]) -> dict[str, str]:
    """Return `DEFAULTS` overlaid by `properties`. Errors: ValueError for a name that cannot be given."""
    for name, value in properties.items():
        if not re.fullmatch(r"[\w.-]+", name) or name in _OURS or "\n" in value:
            raise ValueError(f"{name!r} is not a property that can be given here")
    return {**DEFAULTS, **properties}


def render(properties: Mapping[str, str], ports: tuple[int, int]) -> str:
    """Return the text of server.properties; `ports` are the broker's and its controller's."""
    broker, controller = (f"{LOOPBACK}:{port}" for port in ports)
    complete = {
        **properties,
        "process.roles": "broker,controller",
        "node.id": "1",
        "listeners": f"BROKER://{broker},CONTROLLER://{controller}",
        "advertised.listeners": f"BROKER://{broker}",
        "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "BROKER",
        "controller.listener.names": "CONTROLLER",
        # Given here and not recorded in the storage, so that the controller's port can change.
        "controller.quorum.voters": f"1@{controller}",
        # Relative to the data directory, where the broker runs: a comma in a full path would make two of it.
        "log.dirs": "data",
    }
    lines = ["# Written at each start: changes made here are lost."]
    lines += [f"{name}={_escaped(value)}" for name, value in complete.items()]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    # Java reads the file as Latin-1: everything else is written as UTF-16 escapes.
    plain = value.replace("\\", "\\\\")
    units = plain.encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2)]
    return "".join(chr(code) if code < 0x7F else f"\\u{code:04x}" for code in codes)

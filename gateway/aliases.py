"""What a stream's aliases mean: definitions checked, registered, and laid out for lookup by array."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
from atlasco.telemetry.v1 import common_pb2, ingest_pb2
from numpy.typing import NDArray

from gateway import auth
from storage.model import Attribute, Reason, ValueType
from storage.registry import AttributeWanted, Registry, Tenant

_T = TypeVar("_T", bound=np.generic)

# Two bytes on the wire; bounds the lookup arrays.
MAX_ALIAS = 16_383
MAX_UNIT_BYTES = 32
# What a person is told about one reading or alias; the protocol promises the bound to firmware with fixed buffers.
MAX_TEXT_BYTES = 200

# Value types as small numbers, for arrays.
KINDS: Mapping[ValueType, int] = {
    ValueType.DOUBLE: 1,
    ValueType.BIGINT: 2,
    ValueType.BOOLEAN: 3,
    ValueType.TEXT: 4,
}
_VALUE_TYPES: Mapping[int, ValueType] = {
    common_pb2.ATTRIBUTE_TYPE_DOUBLE: ValueType.DOUBLE,
    common_pb2.ATTRIBUTE_TYPE_INT64: ValueType.BIGINT,
    common_pb2.ATTRIBUTE_TYPE_BOOL: ValueType.BOOLEAN,
    common_pb2.ATTRIBUTE_TYPE_STRING: ValueType.TEXT,
}


@dataclass(frozen=True, slots=True)
class AliasProblem:
    """Why an alias cannot be used."""

    alias: int
    reason: Reason
    text: str

    def to_wire(self) -> ingest_pb2.AliasError:
        """As the device is told."""
        reason = cast("ingest_pb2.RejectionReason.ValueType", int(self.reason))
        return ingest_pb2.AliasError(alias=self.alias, reason=reason, text=brief(self.text))


@dataclass(frozen=True, slots=True)
class AliasTable:
    """The aliases of a stream at one moment. Never changed: adding aliases makes a new table, so that a message
    waiting for its lane keeps the table it was received under.

    The arrays are indexed by alias; the last element stands for every alias beyond them.
    """

    # What was defined, by alias: name and type as the client sent them.
    definitions: Mapping[int, tuple[str, ValueType]] = field(default_factory=dict)
    problems: Mapping[int, AliasProblem] = field(default_factory=dict)
    attribute: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1, np.int32))
    # The registered type as in KINDS.
    kind: NDArray[np.int8] = field(default_factory=lambda: np.zeros(1, np.int8))
    # 0 where the alias can be used, else the Reason.
    reason: NDArray[np.int16] = field(default_factory=lambda: np.full(1, Reason.UNKNOWN_ALIAS, np.int16))
    keeps_latest: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1, bool))

    def with_aliases(
        self,
        definitions: Mapping[int, tuple[str, ValueType]],
        resolved: Mapping[int, Attribute],
        problems: Mapping[int, AliasProblem],
    ) -> "AliasTable":
        """This table and more aliases; an alias it has keeps its meaning."""
        highest = max((*definitions, *(p for p in problems if 0 < p <= MAX_ALIAS), len(self.attribute) - 2))
        size = highest + 2
        attribute = _grown(self.attribute, size, 0)
        kind = _grown(self.kind, size, 0)
        reason = _grown(self.reason, size, Reason.UNKNOWN_ALIAS)
        keeps_latest = _grown(self.keeps_latest, size, False)
        for alias, registered in resolved.items():
            attribute[alias] = registered.attribute_id
            kind[alias] = KINDS[registered.type]
            reason[alias] = 0
            keeps_latest[alias] = registered.keeps_latest
        for alias, problem in problems.items():
            if 0 < alias <= MAX_ALIAS and alias not in resolved and alias not in self.definitions:
                reason[alias] = problem.reason
        # What stands, and one of each alias that there can be: a client may define others without end.
        standing = {
            alias: problem
            for alias, problem in (*problems.items(), *self.problems.items())
            if 0 < alias <= MAX_ALIAS and reason[alias] == problem.reason
        }
        return AliasTable(
            definitions={**self.definitions, **definitions},
            problems=standing,
            attribute=attribute,
            kind=kind,
            reason=reason,
            keeps_latest=keeps_latest,
        )


def _grown(array: NDArray[_T], size: int, fill: int) -> NDArray[_T]:
    grown = np.full(size, fill, array.dtype)
    # The last element is the stand-in for what lies beyond, not an alias.
    grown[: len(array) - 1] = array[:-1]
    return grown


def name_problem(name: str) -> str | None:
    """What is wrong with a name, as a sentence for the device; None when nothing is."""
    problem = auth.name_problem(name)
    return None if problem is None else f"the name {problem}"


def brief(text: str) -> str:
    """At most MAX_TEXT_BYTES bytes of a text."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MAX_TEXT_BYTES:
        return text
    return encoded[: MAX_TEXT_BYTES - 3].decode("utf-8", "ignore") + "…"


def _holds_control(text: str) -> bool:
    # Those above U+007F too: the database refuses them, and with them everything that is registered beside them.
    return not text.isprintable() and any(unicodedata.category(character) == "Cc" for character in text)


def check(
    table: AliasTable, definitions: Sequence[ingest_pb2.AliasDefinition], *, most_aliases: int
) -> tuple[dict[int, AttributeWanted], list[AliasProblem]]:
    """The definitions that are new and well-formed, by alias, and the problems of the others. Pure."""
    wanted: dict[int, AttributeWanted] = {}
    problems: list[AliasProblem] = []
    for definition in definitions:
        alias = definition.alias
        value_type = _VALUE_TYPES.get(definition.type)
        if not 0 < alias <= MAX_ALIAS:
            text = f"alias {alias} is not within 1 to {MAX_ALIAS}"
            problems.append(AliasProblem(alias, Reason.ALIAS_OUT_OF_RANGE, text))
        elif (wrong := name_problem(definition.name)) is not None:
            problems.append(AliasProblem(alias, Reason.ATTRIBUTE_NAME_INVALID, wrong))
        elif value_type is None:
            text = f"{definition.type} is not an attribute type"
            problems.append(AliasProblem(alias, Reason.ATTRIBUTE_DEFINITION_INVALID, text))
        elif len(definition.unit.encode()) > MAX_UNIT_BYTES or _holds_control(definition.unit):
            text = f"the unit has more than {MAX_UNIT_BYTES} bytes, or holds a control character"
            problems.append(AliasProblem(alias, Reason.ATTRIBUTE_DEFINITION_INVALID, text))
        else:
            new = (definition.name, value_type)
            held = table.definitions.get(alias)
            if held is None and alias in wanted:
                held = (wanted[alias].name, wanted[alias].type)
            if held is None and len(table.definitions) + len(wanted) >= most_aliases:
                text = f"the stream has {most_aliases} aliases, which is the most it may have"
                problems.append(AliasProblem(alias, Reason.ATTRIBUTE_QUOTA_EXCEEDED, text))
            elif held is None:
                wanted[alias] = AttributeWanted(definition.name, value_type, definition.unit)
            elif held != new:
                text = f"alias {alias} means {held[0]!r} ({held[1]}) on this stream and keeps that meaning"
                problems.append(AliasProblem(alias, Reason.ALIAS_REDEFINED, text))
            elif alias in table.problems:
                # Defined before, and it could not be used then: it still cannot.
                problems.append(table.problems[alias])
    return wanted, problems


async def define(
    registry: Registry,
    tenant: Tenant,
    table: AliasTable,
    definitions: Sequence[ingest_pb2.AliasDefinition],
    *,
    most_aliases: int,
) -> tuple[AliasTable, list[AliasProblem]]:
    """Add aliases to a table, registering attributes on first sight; the problems are those of `definitions`.

    Raises:
        StorageError: the registry could not be asked.
    """
    wanted, problems = check(table, definitions, most_aliases=most_aliases)
    found = await registry.attributes(tenant, list(wanted.values()))
    resolved: dict[int, Attribute] = {}
    for alias, asked in wanted.items():
        registered = found[asked.name]
        if registered == "quota":
            text = f"the tenant has as many attributes as it may have; {asked.name!r} is not registered"
            problems.append(AliasProblem(alias, Reason.ATTRIBUTE_QUOTA_EXCEEDED, text))
        elif isinstance(registered, str):
            text = f"{asked.name!r} is not registered, and the tenant does not register attributes on first sight"
            problems.append(AliasProblem(alias, Reason.ATTRIBUTE_UNKNOWN, text))
        elif registered.type is not asked.type and (registered.type, asked.type) != (
            ValueType.DOUBLE,
            ValueType.BIGINT,
        ):
            text = f"{asked.name!r} is registered as {registered.type}, not as {asked.type}"
            problems.append(AliasProblem(alias, Reason.TYPE_MISMATCH, text))
        else:
            resolved[alias] = registered
    definitions_added = {alias: (asked.name, asked.type) for alias, asked in wanted.items()}
    # ALIAS_REDEFINED is said, but the alias goes on working with its first meaning.
    unusable = {p.alias: p for p in problems if p.reason is not Reason.ALIAS_REDEFINED}
    return table.with_aliases(definitions_added, resolved, unusable), problems

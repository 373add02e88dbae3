"""The aliases a device uses: small integers that stand for an attribute's name, type and unit on the wire."""

import enum
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from atlasco.telemetry.v1 import common_pb2, ingest_pb2

from device.errors import AttributeRedefinedError, UndefinedAttributeError

MAX_ALIAS = 16383
DICTIONARY_ID_BYTES = 16


class ValueType(enum.IntEnum):
    """The type of an attribute's values; the numbers are those of the protocol's AttributeType."""

    DOUBLE = common_pb2.ATTRIBUTE_TYPE_DOUBLE
    INT64 = common_pb2.ATTRIBUTE_TYPE_INT64
    BOOL = common_pb2.ATTRIBUTE_TYPE_BOOL
    STRING = common_pb2.ATTRIBUTE_TYPE_STRING


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute as the device declares it: name (1 to 128 bytes), type, UCUM unit (at most 32 bytes)."""

    name: str
    type: ValueType
    unit: str = ""


class Dictionary:
    """An append-only list of aliases.

    Append-only, because a message that waits to be sent again refers to its attributes by alias: an alias that
    changed its meaning would move old readings to another attribute.
    """

    def __init__(self, attributes: Iterable[Attribute] = ()) -> None:
        self._definitions: list[ingest_pb2.AliasDefinition] = []
        self._by_name: dict[str, tuple[int, Attribute]] = {}
        self._by_alias: dict[int, Attribute] = {}
        self._id = b""
        for attribute in attributes:
            self.define(attribute)

    def __len__(self) -> int:
        return len(self._definitions)

    def __iter__(self) -> Iterator[tuple[int, Attribute]]:
        return iter(self._by_alias.items())

    def define(self, attribute: Attribute) -> int:
        """The alias of `attribute`, a new one (counted from 1) at first sight.

        Raises AttributeRedefinedError when the name is known with another type or unit.
        """
        known = self._by_name.get(attribute.name)
        if known is not None:
            alias, earlier = known
            if earlier != attribute:
                raise AttributeRedefinedError(f"{attribute.name!r} is already defined as {earlier}")
            return alias
        alias = len(self._definitions) + 1
        if alias > MAX_ALIAS:
            raise AttributeRedefinedError(f"a device has at most {MAX_ALIAS} aliases")
        self._definitions.append(
            ingest_pb2.AliasDefinition(
                alias=alias,
                name=attribute.name,
                type=common_pb2.AttributeType.ValueType(attribute.type),
                unit=attribute.unit,
            )
        )
        self._by_name[attribute.name] = (alias, attribute)
        self._by_alias[alias] = attribute
        self._id = b""
        return alias

    def alias(self, name: str) -> int:
        """The alias of a defined attribute. Raises UndefinedAttributeError."""
        return self.lookup(name)[0]

    def lookup(self, name: str) -> tuple[int, Attribute]:
        """Alias and declaration of a defined attribute. Raises UndefinedAttributeError."""
        try:
            return self._by_name[name]
        except KeyError:
            raise UndefinedAttributeError(f"attribute {name!r} is not defined") from None

    def attribute(self, alias: int) -> Attribute | None:
        """The attribute behind an alias; None for an alias that is not defined."""
        return self._by_alias.get(alias)

    def definitions(self, start: int = 0) -> list[ingest_pb2.AliasDefinition]:
        """The definitions from position `start` on, in the order they were made."""
        return self._definitions[start:]

    @property
    def id(self) -> bytes:
        """16 bytes that name exactly this list: a hash, so that equal devices share one stored dictionary."""
        if not self._id:
            digest = hashlib.sha256()
            for definition in self._definitions:
                encoded = definition.SerializeToString(deterministic=True)
                digest.update(len(encoded).to_bytes(4, "big") + encoded)
            self._id = digest.digest()[:DICTIONARY_ID_BYTES]
        return self._id

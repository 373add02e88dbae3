"""A typed tree as a SQL condition. Literals become parameters, always; names become quoted identifiers made by us.

SQL's NULL is kept from changing what a filter means: negations are pushed down to the comparisons, and a negated one
reads `(…) IS NOT TRUE`, so that NULL (no value) counts as false under AND and OR and as true under NOT. Comparisons
themselves stay bare, for only then can an index serve them.
"""

from dataclasses import dataclass, field
from typing import Any, LiteralString, Protocol

from psycopg import sql
from psycopg.types.json import Jsonb

from storage.filter.bind import Bound, BoundAll, BoundAny, BoundNot, Comparison
from storage.filter.syntax import FieldKind, Operator
from storage.model import Attribute, ValueType

INDEXED_CHARACTERS = 64
"""Characters of a text that a projection's index holds."""

_CASTS: dict[ValueType, LiteralString] = {
    ValueType.DOUBLE: "double precision",
    ValueType.BIGINT: "bigint",
    ValueType.BOOLEAN: "boolean",
    ValueType.TEXT: "text",
}
_OPERATORS: dict[Operator, LiteralString] = {
    Operator.EQUAL: "=",
    Operator.UNEQUAL: "<>",
    Operator.LESS: "<",
    Operator.AT_MOST: "<=",
    Operator.GREATER: ">",
    Operator.AT_LEAST: ">=",
}


class Columns(Protocol):
    """Where a filter's fields are in a statement."""

    @property
    def name(self) -> sql.Composable:
        """The device's name."""
        ...

    @property
    def entity_type(self) -> sql.Composable:
        """Its type."""
        ...

    @property
    def labels(self) -> sql.Composable:
        """Its labels, jsonb."""
        ...

    def value(self, attribute: Attribute) -> sql.Composable:
        """An attribute's value, of its type; NULL: the device has none."""
        ...

    def shown(self, attribute: Attribute) -> sql.Composable | None:
        """What must hold besides for the value to count; None: nothing."""
        ...

    @property
    def prefix_indexed(self) -> bool:
        """Whether there are indexes on the first INDEXED_CHARACTERS characters of text attributes."""
        ...


@dataclass(frozen=True, slots=True)
class Compiled:
    """A condition and its parameters."""

    condition: sql.Composable
    parameters: dict[str, Any]


def compile_filter(bound: Bound, columns: Columns) -> Compiled:
    """The condition that holds for the devices that `matches` is true for."""
    compiler = _Compiler(columns)
    condition = compiler.condition(bound, negated=False)
    return Compiled(condition, compiler.parameters)


@dataclass(slots=True)
class _Compiler:
    columns: Columns
    parameters: dict[str, Any] = field(default_factory=dict)

    def condition(self, bound: Bound, *, negated: bool) -> sql.Composable:
        match bound:
            case BoundAll(parts) | BoundAny(parts):
                is_all = isinstance(bound, BoundAll) is not negated
                if not parts:
                    return sql.SQL("true" if is_all else "false")
                found = [self.condition(part, negated=negated) for part in parts]
                return sql.SQL("({})").format(sql.SQL(" AND " if is_all else " OR ").join(found))
            case BoundNot(part):
                return self.condition(part, negated=not negated)
            case Comparison():
                leaf = self._leaf(bound)
                return sql.SQL("({}) IS NOT TRUE" if negated else "({})").format(leaf)

    def _leaf(self, comparison: Comparison) -> sql.Composable:
        attribute = comparison.attribute
        if attribute is None:
            return self._own(comparison)
        found = self._compared(comparison, self.columns.value(attribute), attribute.type, indexed=True)
        shown = self.columns.shown(attribute)
        return found if shown is None else sql.SQL("{} AND {}").format(found, shown)

    def _own(self, comparison: Comparison) -> sql.Composable:
        """A comparison of what belongs to the device itself."""
        match comparison.kind:
            case FieldKind.TYPE:
                if comparison.operator is Operator.HAS:
                    return sql.SQL("{} <> ''").format(self.columns.entity_type)
                return self._compared(comparison, self.columns.entity_type, ValueType.TEXT)
            case FieldKind.NAME:
                return self._compared(comparison, self.columns.name, ValueType.TEXT)
            case _:
                labels = self.columns.labels
                if comparison.operator is Operator.EQUAL and not comparison.open_ended:
                    # Containment is what the index on labels answers.
                    wanted = self._parameter(Jsonb({comparison.key: comparison.value}), "jsonb")
                    return sql.SQL("{} @> {}").format(labels, wanted)
                label = sql.SQL("({} ->> {})").format(labels, self._parameter(comparison.key, "text"))
                return self._compared(comparison, label, ValueType.TEXT)

    def _compared(
        self, comparison: Comparison, value: sql.Composable, value_type: ValueType, *, indexed: bool = False
    ) -> sql.Composable:
        operator = comparison.operator
        if operator is Operator.HAS:
            return sql.SQL("{} IS NOT NULL").format(value)
        wanted = self._parameter(comparison.value, _CASTS[value_type])
        if value_type is ValueType.TEXT:
            return self._text(comparison, value, wanted, indexed=indexed and self.columns.prefix_indexed)
        found = sql.SQL("{} {} {}").format(value, sql.SQL(_OPERATORS[operator]), wanted)
        if value_type is ValueType.DOUBLE and operator in (Operator.GREATER, Operator.AT_LEAST):
            # The server orders NaN above all numbers; here it is not greater than any.
            return sql.SQL("{} AND {} < 'NaN'").format(found, value)
        return found

    def _text(
        self, comparison: Comparison, value: sql.Composable, wanted: sql.Composable, *, indexed: bool
    ) -> sql.Composable:
        begins = comparison.operator is Operator.STARTS_WITH or comparison.open_ended
        text = str(comparison.value)
        if not begins:
            # Byte order, which for UTF-8 is that of code points, whatever the server's locale.
            by_bytes = sql.SQL("" if comparison.operator in (Operator.EQUAL, Operator.UNEQUAL) else ' COLLATE "C"')
            found = sql.SQL("{}{} {} {}").format(value, by_bytes, sql.SQL(_OPERATORS[comparison.operator]), wanted)
            if indexed and comparison.operator is Operator.EQUAL:
                head = self._parameter(text[:INDEXED_CHARACTERS], "text")
                begins_so = sql.SQL("left({}, {}) = {}").format(value, sql.Literal(INDEXED_CHARACTERS), head)
                # A shorter head is the whole text. Saying so a second time would change nothing but the planner's
                # guess: it takes the two for independent, and a condition for far rarer than it is.
                return begins_so if len(text) < INDEXED_CHARACTERS else sql.SQL("{} AND {}").format(begins_so, found)
            return found
        if comparison.operator is Operator.UNEQUAL:
            return sql.SQL("NOT starts_with({}, {})").format(value, wanted)
        found = sql.SQL("starts_with({}, {})").format(value, wanted)
        prefix = text[:INDEXED_CHARACTERS]
        end = _after_prefix(prefix)
        if indexed and end is not None:
            in_range = sql.SQL("left({0}, {1}) >= {2} AND left({0}, {1}) < {3}").format(
                value, sql.Literal(INDEXED_CHARACTERS), self._parameter(prefix, "text"), self._parameter(end, "text")
            )
            # As above: what lies between a prefix and the next one of its length begins with it.
            is_exact = prefix == text and len(end) == len(prefix)
            return in_range if is_exact else sql.SQL("{} AND {}").format(in_range, found)
        return found

    def _parameter(self, value: Any, cast: LiteralString) -> sql.Composable:
        name = f"filter_{len(self.parameters)}"
        self.parameters[name] = value
        return sql.SQL("{}::{}").format(sql.Placeholder(name), sql.SQL(cast))


def _after_prefix(prefix: str) -> str | None:
    """The first text, by code points, behind all that begin with `prefix`; None: there is none."""
    while prefix:
        following = ord(prefix[-1]) + 1
        if following == 0xD800:
            # Surrogates are no characters.
            following = 0xE000
        if following <= 0x10FFFF:
            return prefix[:-1] + chr(following)
        prefix = prefix[:-1]
    return None

"""Text to tree: a recursive-descent parser that knows at every place what could stand there.

Whatever the text, parsing ends in a tree or in FilterInvalid; its cost is linear in the length, which is bounded, as
are the number of conditions and the depth.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from storage.errors import StorageError

MAX_BYTES: Final = 4_096
MAX_CONDITIONS: Final = 64
MAX_DEPTH: Final = 32


class FilterInvalid(StorageError):
    """The filter cannot be understood. `position` counts bytes of UTF-8 from the start; `expected` is what could have
    stood there.
    """

    def __init__(self, problem: str, position: int, expected: str) -> None:
        super().__init__(f"{problem} at byte {position}; expected {expected}")
        self.position = position
        self.expected = expected


class Operator(Enum):
    """How a condition compares; values as they are written."""

    EQUAL = "="
    UNEQUAL = "!="
    LESS = "<"
    AT_MOST = "<="
    GREATER = ">"
    AT_LEAST = ">="
    HAS = ":"
    STARTS_WITH = "starts with"


class FieldKind(Enum):
    """What a field names."""

    TYPE = "type"
    NAME = "name"
    LABEL = "label"
    ATTRIBUTE = "attribute"


@dataclass(frozen=True, slots=True)
class Field:
    """A field as written; `key` is the label's key or the attribute's name."""

    kind: FieldKind
    key: str
    position: int


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A quoted text; with `open_ended`, a final * was taken off it that stands for any ending."""

    text: str
    open_ended: bool


@dataclass(frozen=True, slots=True)
class Anything:
    """The * behind a colon."""


Literal: TypeAlias = Number | Text | bool | Anything


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison; positions in bytes."""

    field: Field
    operator: Operator
    operator_position: int
    literal: Literal
    literal_position: int


@dataclass(frozen=True, slots=True)
class All:
    """Every part holds; without parts it is true."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Any:
    """At least one part holds."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold."""

    part: "Expression"


Expression: TypeAlias = All | Any | Not | Condition

_SPACE = re.compile(r"[ \t\r\n]*")
_WORD = re.compile(r"[^\W\d_][\w\-./]*")
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])", re.ASCII)
# Any case of ASCII: otherwise a long s would be taken for an s, and no operator is written with one.
_OPERATOR = re.compile(r"!=|<=|>=|=|<|>|:|(?ai:starts[ \t\r\n]+with)(?![\w\-./])")
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)
_KEYWORDS = frozenset({"and", "or", "not"})

_CONDITION = 'a condition such as temperature > 80, NOT, "-" or "("'
_FIELD = "a field: type, name, labels.<key> or an attribute, in quotes when its name is no plain word"
_OPERATORS = "an operator: = != < <= > >= : or `starts with`"
_VALUE = "a value: a number, true, false or a text in quotes"


def parse(text: str) -> Expression:
    """The tree of a filter; an empty one is true.

    Raises:
        FilterInvalid: with the first place at which it stops making sense.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise FilterInvalid("not valid Unicode", 0, "text that UTF-8 can hold") from None
    if size > MAX_BYTES:
        raise FilterInvalid(f"{size} bytes", MAX_BYTES, f"at most {MAX_BYTES} bytes")
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._conditions = 0
        self._skip()

    def whole(self) -> Expression:
        if self._at == len(self._text):
            return All(())
        found = self._expression(0)
        if self._at < len(self._text):
            raise self._wrong("AND, OR or the end")
        return found

    def _expression(self, depth: int) -> Expression:
        parts = [self._conjunct(depth)]
        while self._keyword("or"):
            parts.append(self._conjunct(depth))
        return parts[0] if len(parts) == 1 else Any(tuple(parts))

    def _conjunct(self, depth: int) -> Expression:
        parts = [self._factor(depth)]
        while self._keyword("and") or self._begins_factor():
            parts.append(self._factor(depth))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _begins_factor(self) -> bool:
        return self._at < len(self._text) and self._text[self._at] != ")" and self._peek() != "or"

    def _factor(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise self._wrong(f"at most {MAX_DEPTH} levels of parentheses and negations")
        if self._keyword("not") or self._character("-"):
            return Not(self._factor(depth + 1))
        if self._character("("):
            found = self._expression(depth + 1)
            if not self._character(")"):
                raise self._wrong('AND, OR or ")"')
            return found
        return self._condition()

    def _condition(self) -> Condition:
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise self._wrong(f"at most {MAX_CONDITIONS} conditions")
        field = self._field()
        operator_at = self._position()
        matched = _OPERATOR.match(self._text, self._at)
        if matched is None:
            raise self._wrong(_OPERATORS)
        operator = Operator(" ".join(matched[0].lower().split()))
        self._at = matched.end()
        self._skip()
        literal_at = self._position()
        return Condition(field, operator, operator_at, self._literal(operator), literal_at)

    def _field(self) -> Field:
        position = self._position()
        quoted = self._quoted()
        if quoted is not None:
            return Field(FieldKind.ATTRIBUTE, self._named(quoted[0], position), position)
        word = self._peek()
        if not word or word in _KEYWORDS:
            raise self._wrong(_CONDITION if not self._conditions or not word else _FIELD)
        matched = _WORD.match(self._text, self._at)
        assert matched is not None
        name = matched[0]
        self._at = matched.end()
        for prefix, kind in (("labels.", FieldKind.LABEL), ("attributes.", FieldKind.ATTRIBUTE)):
            if name.startswith(prefix):
                key = name.removeprefix(prefix)
                if not key:
                    found = self._quoted()
                    if found is None:
                        raise self._wrong(f"a name after {prefix}")
                    key = found[0]
                self._skip()
                return Field(kind, self._named(key, position), position)
        self._skip()
        if name in ("type", "name"):
            return Field(FieldKind(name), name, position)
        return Field(FieldKind.ATTRIBUTE, name, position)

    def _named(self, name: str, position: int) -> str:
        if not name:
            raise FilterInvalid("an empty name", position, _FIELD)
        return name

    def _literal(self, operator: Operator) -> Literal:
        if operator is Operator.HAS:
            if not self._character("*"):
                raise self._wrong("* (whether there is a value)")
            return Anything()
        quoted = self._quoted()
        if quoted is not None:
            return Text(*quoted)
        number = _NUMBER.match(self._text, self._at)
        if number is not None:
            self._at = number.end()
            self._skip()
            return Number(number[0])
        for word, value in (("true", True), ("false", False)):
            if self._keyword(word):
                return value
        raise self._wrong(_VALUE)

    def _quoted(self) -> tuple[str, bool] | None:
        """A quoted text without its escapes, and whether it ends in a * that was not escaped."""
        if self._text[self._at : self._at + 1] not in ("'", '"'):
            return None
        matched = _QUOTED.match(self._text, self._at)
        if matched is None:
            raise FilterInvalid("a text without an end", self._position(), "a closing quote")
        if "\0" in matched[0]:
            raise FilterInvalid("a NUL character", self._position(), "text without NUL")
        parts = re.findall(r"\\.|[^\\]", matched[0][1:-1], re.DOTALL)
        self._at = matched.end()
        self._skip()
        open_ended = bool(parts) and parts[-1] == "*"
        return "".join(part[-1] for part in parts), open_ended

    def _peek(self) -> str:
        """The word that stands here, in lower case; empty if none does."""
        matched = _WORD.match(self._text, self._at)
        return matched[0].lower() if matched else ""

    def _keyword(self, word: str) -> bool:
        if self._peek() != word:
            return False
        self._at += len(word)
        self._skip()
        return True

    def _character(self, character: str) -> bool:
        if not self._text.startswith(character, self._at):
            return False
        self._at += 1
        self._skip()
        return True

    def _skip(self) -> None:
        matched = _SPACE.match(self._text, self._at)
        assert matched is not None
        self._at = matched.end()

    def _position(self) -> int:
        return len(self._text[: self._at].encode())

    def _wrong(self, expected: str) -> FilterInvalid:
        found = self._text[self._at : self._at + 20]
        problem = f"{found!r}" if found else "the end"
        return FilterInvalid(problem, self._position(), expected)

"""Random filters, for property tests: well formed and well typed, over the attributes of a fleet."""

import math

from hypothesis import strategies as st

from storage.model import Attribute, ValueType
from tests.search.fleet import DOUBLES, INTS, TEXTS

_ORDER = st.sampled_from(["=", "!=", "<", "<=", ">", ">="])


def _quoted(text: str, ending: str = "") -> str:
    escaped = "".join("\\" + c if c in '"\\*' else c for c in text)
    return f'"{escaped}{ending}"'


_TEXT = st.sampled_from((*TEXTS, "s0", "s1", "pump", "device-0001", "gerät 7", "x*y")).flatmap(
    lambda text: st.integers(0, len(text)).map(lambda n: text[:n]) | st.just(text)
)
_TEXT_TEST = st.one_of(
    st.builds(lambda op, text: f"{op} {_quoted(text)}", _ORDER, _TEXT),
    st.builds(lambda op, text: f"{op} {_quoted(text, '*')}", st.sampled_from(["=", "!="]), _TEXT),
    st.builds(lambda text: f"starts with {_quoted(text)}", _TEXT),
    st.just(":*"),
)
_NUMBER = st.one_of(
    st.sampled_from([repr(d) for d in DOUBLES if math.isfinite(d)]),
    st.sampled_from([str(i) for i in INTS] + ["9223372036854775808", "-1e25", "80.5", "1e-50"]),
    st.floats(70, 90).map(repr),
)
_TESTS = {
    ValueType.DOUBLE: st.builds(lambda op, n: f"{op} {n}", _ORDER, _NUMBER) | st.just(":*"),
    ValueType.BIGINT: st.builds(lambda op, n: f"{op} {n}", _ORDER, _NUMBER) | st.just(":*"),
    ValueType.BOOLEAN: st.sampled_from(["= true", "!= true", "= false", ":*"]),
    ValueType.TEXT: _TEXT_TEST,
}


def filters(attributes: list[Attribute]) -> st.SearchStrategy[str]:
    conditions = [
        st.builds(lambda name, test: f'attributes."{name}" {test}', st.just(a.name), _TESTS[a.type])
        for a in attributes
        if a.keeps_latest
    ]
    own = st.sampled_from(["type", "name", "labels.site", 'labels."line number"', "labels.none"])
    leaf = st.one_of(*conditions, st.builds(lambda field, test: f"{field} {test}", own, _TEXT_TEST))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(lambda p: "(" + " AND ".join(p) + ")"),
            st.lists(inner, min_size=2, max_size=3).map(lambda p: "(" + " or ".join(p) + ")"),
            inner.map(lambda p: f"not ({p})"),
        ),
        max_leaves=6,
    )

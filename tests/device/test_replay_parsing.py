import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.dictionary import ValueType
from device.replay.cells import ColumnSurvey, NullMarkers, converter
from device.replay.errors import ReplayError, RowError
from device.replay.layout import Layout, ReplayOptions, due_records, read_row, survey
from device.replay.table import records, sniff_separator, split
from device.replay.times import parse_period, parse_time, time_from_columns, time_from_cycle


@pytest.mark.parametrize(
    ("sample", "separator"),
    [
        pytest.param(["a,b,c", "1,2,3"], ",", id="comma"),
        pytest.param(["a;b", "1,5;2,5"], ";", id="semicolon and decimal comma"),
        pytest.param(["1,5;2,5", "1,6;2,6"], ";", id="no header, decimal comma"),
        pytest.param(["a\tb", "1 x\t2"], "\t", id="tab"),
        pytest.param(["1 2   3  ", "4 5 6"], " ", id="whitespace"),
        pytest.param(["time,v", "2026-01-01 00:00:00,5"], ",", id="blanks in values"),
        pytest.param(["a,b", '"x,y",2', '"z",3'], ",", id="quotes"),
        pytest.param(["a,b,c", "1,2,3", "1,2", "4,5,6"], ",", id="a short row among few"),
        pytest.param(["single", "1"], ",", id="one column"),
    ],
)
def test_the_separator_is_sniffed(sample, separator):
    assert sniff_separator(sample) == separator


def test_records_keep_their_lines_and_offsets(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n\r\n1,"x\ny"\r\n2,3')
    found = list(records(path))
    assert [(record.line, record.text) for record in found] == [(1, "a,b"), (3, '1,"x\ny"'), (5, "2,3")]
    content = path.read_bytes()
    assert [content[record.offset : record.offset + 1] for record in found] == [b"a", b"1", b"2"]
    assert split(found[1].text, ",") == ["1", "x\ny"]


def test_a_stray_quote_costs_one_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,2\n3,"4\n' + "".join(f"{i},0\n" for i in range(200)))
    found = list(records(path))
    assert [record.line for record in found if record.problem] == [3]
    assert [record.line for record in found] == list(range(1, 204))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters='"\r\n'), min_size=1), max_size=30))
def test_every_line_is_a_record(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("table") / "t"
    path.write_bytes("\n".join(lines).encode())
    assert [(record.line, record.text) for record in records(path)] == [
        (number, line) for number, line in enumerate(lines, 1) if line.encode().strip()
    ]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        pytest.param(["1", "-2", "+3"], ValueType.INT64, id="integers"),
        pytest.param(["100.0", "100.0"], ValueType.DOUBLE, id="fractions that are always zero"),
        pytest.param(["1", "2.5"], ValueType.DOUBLE, id="mixed numbers"),
        pytest.param(["1e3", ".5", "5."], ValueType.DOUBLE, id="all ways to write a double"),
        pytest.param(["NAN", "-inf", "1"], ValueType.DOUBLE, id="nan and inf"),
        pytest.param(["9223372036854775807", "-9223372036854775808"], ValueType.INT64, id="64 bits"),
        pytest.param(["9223372036854775808", "1"], ValueType.DOUBLE, id="beyond 64 bits"),
        pytest.param(["true", "FALSE"], ValueType.BOOL, id="flags"),
        pytest.param(["0", "1"], ValueType.INT64, id="zeros and ones"),
        pytest.param(["ok", "1"], ValueType.STRING, id="text"),
        pytest.param(["1", "2", "oops"], ValueType.INT64, id="one bad cell"),
        pytest.param(["1_000", "٣", "0x10"], ValueType.STRING, id="only Python would read these"),
        pytest.param([], None, id="nothing"),
    ],
)
def test_types_are_inferred(cells, expected):
    column = ColumnSurvey()
    for cell in cells:
        column.note(cell)
    assert column.type() is expected


def test_doubtful_types_come_with_a_warning():
    large, comma, plain = ColumnSurvey(), ColumnSurvey(), ColumnSurvey()
    large.note("9223372036854775808")
    comma.note("2,5")
    plain.note("2.5")
    assert "64 bits" in large.warning()
    assert "--decimal" in comma.warning()
    assert plain.warning() == ""
    assert ColumnSurvey().warning()


def test_null_markers_compare_as_numbers():
    markers = NullMarkers(["-200", "NA"])
    assert all(cell in markers for cell in ("", "-200", "-200.0", "-2e2", "NA"))
    assert not any(cell in markers for cell in ("200", "-200.5", "na", "x", "nan"))
    assert "-200,0" in NullMarkers(["-200"], decimal=",")
    assert "NaN" in NullMarkers(["nan"])
    assert "0" not in NullMarkers()


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers_convert_exactly(number):
    assert converter(ValueType.INT64)(str(number)) == number


@given(st.floats())
def test_doubles_convert_exactly(number):
    converted = converter(ValueType.DOUBLE)(repr(number))
    assert converted == number or (math.isnan(converted) and math.isnan(number))


@pytest.mark.parametrize(
    ("kind", "cell", "reason"),
    [
        (ValueType.INT64, "1.0", "VALUE_UNPARSABLE"),
        (ValueType.INT64, "9223372036854775808", "VALUE_OUT_OF_RANGE"),
        (ValueType.DOUBLE, "1_0", "VALUE_UNPARSABLE"),
        (ValueType.DOUBLE, "1e999", "VALUE_OUT_OF_RANGE"),
        (ValueType.BOOL, "maybe", "VALUE_UNPARSABLE"),
    ],
)
def test_cells_that_do_not_fit(kind, cell, reason):
    with pytest.raises(RowError) as caught:
        converter(kind)(cell)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1700000000", 1_700_000_000_000_000),
        ("1700000000.123456", 1_700_000_000_123_456),
        ("1700000000123", 1_700_000_000_123_000),
        ("1700000000123456", 1_700_000_000_123_456),
        ("1700000000123456789", 1_700_000_000_123_456),
        ("2023-11-14T22:13:20Z", 1_700_000_000_000_000),
        ("2023-11-14 22:13:20", 1_700_000_000_000_000),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000_500_000),
    ],
)
def test_times(text, expected):
    assert parse_time(text) == expected


def test_times_that_are_none():
    for text in ("", "yesterday", "nan", "2023-13-01"):
        with pytest.raises(RowError):
            parse_time(text)


def test_a_time_in_two_columns():
    of = time_from_columns([0, 1], "%d/%m/%Y %H.%M.%S")
    assert of(["10/03/2004", "18.00.00"]) == 1_078_941_600_000_000
    with pytest.raises(RowError):
        of(["2004-03-10", "18.00.00"])
    assert time_from_columns([0, 1], None)(["2004-03-10", "18:00"]) == 1_078_941_600_000_000


def test_a_time_from_a_cycle():
    of = time_from_cycle(1, 1000, 10)
    assert of(["x", "5"]) == 1050
    assert of(["x", "0.5"]) == 1005
    for cell in ("", "nan", "five"):
        with pytest.raises(RowError):
            of(["x", cell])


@pytest.mark.parametrize(
    ("text", "us"), [("1h", 3600 * 10**6), ("250ms", 250_000), ("0.5 s", 500_000), ("90", 90 * 10**6)]
)
def test_periods(text, us):
    assert parse_period(text) == us


@pytest.mark.parametrize("text", ["", "0s", "-1h", "1 fortnight"])
def test_periods_that_are_none(text):
    with pytest.raises(ReplayError):
        parse_period(text)


def write(path, text):
    path.write_text(text)
    return path


def test_a_file_with_everything(tmp_path):
    path = write(
        tmp_path / "t.csv",
        "id;when;temp;count;ok;note;;\n"
        "a;2026-01-01T00:00:00Z;1,5;1;true;x;;\n"
        "b;2026-01-01T00:00:01Z;-200;oops;false;;;\n"
        "a;2026-01-01T00:00:02Z;2,5;3\n"
        ";2026-01-01T00:00:02Z;2,5;3;true;y;;\n"
        "a;soon;2,5;3;true;y;;\n"
        ";;;;;;;\n"
        "a;2026-01-01T00:00:03Z;2;4;true;z;;\n",
    )
    layout = Layout(ReplayOptions(path, device_column="1", time_columns=["when"], nulls=["-200"], decimal=","))
    found = survey(layout, paced=False)
    assert {column.name: column.type for column in found.columns} == {
        "temp": ValueType.DOUBLE,
        "count": ValueType.INT64,
        "ok": ValueType.BOOL,
        "note": ValueType.STRING,
    }
    outcomes = []
    for record in layout.data_records():
        try:
            row = read_row(layout, found.columns, record)
        except RowError as error:
            outcomes.append((record.line, error.reason))
        else:
            outcomes.append(
                row and (row.line, row.device, [value for _, value in row.values], row.nulls, len(row.problems))
            )
    assert outcomes == [
        (2, "a", [1.5, 1, True, b"x"], 0, 0),
        (3, "b", [False], 2, 1),
        (4, "ROW_FIELD_COUNT"),
        (5, "ROW_DEVICE"),
        (6, "ROW_TIME"),
        None,
        (8, "a", [2.0, 4, True, b"z"], 0, 0),
    ]


def test_a_paced_replay_merges_devices_and_keeps_their_order(tmp_path):
    path = write(
        tmp_path / "t.csv",
        "id,t,v\na,1700000000,1\na,1700000010,2\na,1700000005,3\nb,1700000002,4\nb,1700000012,5\n",
    )
    layout = Layout(ReplayOptions(path, device_column="id", time_columns=["t"]))
    found = survey(layout, paced=True)
    order = [read_row(layout, found.columns, record).values[0][1] for _, record in due_records(layout, found)]
    assert order == [1, 4, 2, 3, 5]


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        pytest.param("1,2,3\n", {}, "--columns", id="no header"),
        pytest.param("a,b\n1,2\n", {"device_column": "c"}, "no such column", id="unknown column"),
        pytest.param("a,b\n1,2\n", {"device": "x"}, "--device-column", id="two devices"),
        pytest.param("a,b\n1,2\n", {"time_columns": []}, "--time-column", id="no time"),
        pytest.param("a,a\n1,2\n", {}, "two columns", id="equal names"),
        pytest.param("a,b\n1,2\n", {"columns": ["a"]}, "names", id="too few names"),
        pytest.param("a,b\n1,2\n", {}, "no column is left", id="nothing to send"),
        pytest.param("", {}, "empty", id="empty"),
        pytest.param("a,b\n", {"time_columns": [], "cycle_column": "b"}, "--period", id="half a cycle"),
    ],
)
def test_misunderstandings_are_told_before_anything_is_sent(tmp_path, text, changes, message):
    path = write(tmp_path / "t.csv", text)
    options = {"device_column": "1", "time_columns": ["2"], **changes}
    with pytest.raises(ReplayError, match=message):
        Layout(ReplayOptions(path, **options))

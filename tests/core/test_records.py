"""One form of JSON file: what it writes it reads, and each fault is named with the file and what to do."""

import json

import pytest

from hf_camphive.core.errors import ConfigError, OutputError, PlanError
from hf_camphive.core.records import RecordFormat

FORMAT = RecordFormat("notes.json", OutputError, schema=2, remedy="write it again")


def build(values: dict) -> tuple[int, str]:
    if values.get("a") == 13:
        raise ConfigError("13 is refused")
    return values["a"] + 1, values["b"].upper()


def test_what_is_written_is_read():
    text = FORMAT.write({"a": 1, "b": "x"})
    assert text == '{\n "schema": 2,\n "a": 1,\n "b": "x"\n}\n'
    assert FORMAT.read(text, build) == FORMAT.read(text.encode(), build) == (2, "X")
    assert FORMAT.restore(json.loads(text), build) == (2, "X")
    assert RecordFormat("wide.json", PlanError, indent=2).write({}) == '{\n  "schema": 1\n}\n'


def test_numbers_that_json_does_not_have_are_not_written():
    with pytest.raises(ValueError, match="JSON compliant"):
        FORMAT.write({"a": float("nan")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"notes.json is not valid JSON \(.*\); write it again$"),
        (b"\xff", r"notes.json is not valid JSON \(.*\); write it again$"),
        ("[1]", r"notes.json holds a value of type list, not a table of keys and values; write it again$"),
        ("{}", "notes.json has no schema, so that hf_camphive did not write it; write it again$"),
        ('{"schema": 1}', "notes.json has schema 1, not 2; install the version of hf_camphive that wrote it$"),
        ('{"schema": 2, "a": 1}', r"notes.json is damaged \(it lacks 'b'\); write it again$"),
        ('{"schema": 2, "a": "1", "b": "x"}', r"notes.json is damaged \(TypeError: .*\); write it again$"),
        ('{"schema": 2, "a": 1, "b": 2}', r"notes.json is damaged \(AttributeError: .*\); write it again$"),
    ],
)
def test_faults(text, message):
    with pytest.raises(OutputError, match="^" + message):
        FORMAT.read(text, build)
    with pytest.raises(OutputError, match="^there/" + message):
        FORMAT.read(text, build, "there/notes.json")


def test_errors_of_the_record_itself_pass():
    with pytest.raises(ConfigError, match=r"^13 is refused$"):
        FORMAT.read('{"schema": 2, "a": 13}', build)


def test_a_schema_may_be_left_out_where_the_format_says_so():
    lenient = RecordFormat("notes.json", OutputError, schema=2, schema_required=False)
    assert lenient.read('{"a": 1, "b": "x"}', build) == (2, "X")
    with pytest.raises(OutputError, match="has schema 3, not 2"):
        lenient.read('{"schema": 3, "a": 1, "b": "x"}', build)

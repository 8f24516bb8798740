"""Files that somebody gave us: what they may be, and that whatever else they are is said in a sentence."""

import json
import os
import random
import string

import pytest
from exported import record
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from secateur.metrics_dsl.errors import SecateurError
from secateur.results.export.candidate_json import read_json as read_candidate
from secateur.results.export.candidate_json import to_json
from secateur.results.export.candidate_record import ExportError
from secateur.results.export.evopress import read_levels
from secateur.results.export.masks_file import read_masks
from secateur.results.export.pruner_zero import read_pruner_zero
from secateur.results.export.rule_source import RuleError, read_ratios
from secateur.search.core import reading
from secateur.search.core.reading import Given, parse_json, read_json, read_text, read_toml
from secateur.search.settings import SearchSettings
from secateur.workers.calibrate.folder import Calibration, CalibrationError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


class WrongError(SecateurError):
    pass


def a_section(path):
    return read_toml(path, "search", WrongError)


READERS = {  # what reads a file that somebody gave us -> the name that the file has
    read_json: "a.json", read_text: "a.txt", a_section: "a.toml", SearchSettings.load: "run.toml",
    read_candidate: "c.json", read_ratios: "r.json", read_levels: "levels.txt",
    read_pruner_zero: "tree.json", read_masks: "m.safetensors",
}  # fmt: skip


def called(reader, path):
    return reader(path, "what is wanted") if reader in (read_json, read_text) else reader(path)


def is_count(value):
    return type(value) is int and value >= 0


def is_number(value):
    return type(value) in (int, float) and abs(value) <= 1.7976931348623157e308


# Accessor -> whether it takes a value, word for word.
TAKES = {
    "members": lambda v: type(v) is dict, "entries": lambda v: type(v) is list,
    "text": lambda v: type(v) is str, "flag": lambda v: type(v) is bool, "count": is_count,
    "number": is_number, "ratio": lambda v: is_number(v) and 0 <= v < 1,
}  # fmt: skip


@given(VALUES)
def test_json_comes_back_as_it_is(value):
    assert parse_json(json.dumps(value), "a.json").value == value
    assert parse_json(json.dumps(value, indent=1, ensure_ascii=False), "a.json").value == value


@pytest.mark.parametrize("name", TAKES)
@given(value=VALUES)
def test_a_value_of_another_type_is_named_with_its_place(name, value):
    held = Given({"layers": [0, {"x": value}]}, "c.json", WrongError)
    given_value = held.field("layers").entries()[1].field("x")
    assert given_value.place == "layers[1].x"
    if TAKES[name](value):
        found = getattr(given_value, name)()
        if name == "members":
            found = {key: each.value for key, each in found.items()}
        assert ([each.value for each in found] if name == "entries" else found) == value
        return
    with pytest.raises(WrongError) as caught:
        getattr(given_value, name)()
    text = str(caught.value)
    assert text.startswith("expected ")
    assert text.endswith(" at layers[1].x in c.json")
    assert len(text) < 200


@given(st.text(), st.text())
def test_names_and_values_of_a_file_are_shown_in_one_line(name, value):
    with pytest.raises(WrongError) as caught:
        Given({name: value}, "c.json", WrongError).members()[name].number()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@given(st.integers(), st.integers(), st.integers())
def test_whole_numbers_are_held_within_bounds(value, least, most):
    held = Given({"x": value}, "c.json", WrongError).field("x")
    if least <= value <= most:
        assert held.count(least, most) == value
        return
    with pytest.raises(
        WrongError, match=r"^expected a whole number of at (least|most) -?[\d,]+, got -?\d+ at x in"
    ):
        held.count(least, most)


def test_values_are_counted_before_there_is_memory_for_them(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + "[]," * (1 << 22) + "[]]")
    with pytest.raises(
        WrongError, match=r"a\.json cannot be read as JSON: there are more than 4,194,304 values$"
    ):
        read_json(path, error=WrongError)
    path.write_text("[search]\n" + "a = 1\n" * 200_000)
    with pytest.raises(WrongError, match="a TOML file of at most 1 MB"):
        read_toml(path, "search", WrongError)


def test_what_is_missing_is_named_and_may_have_a_default():
    held = Given({"layers": [{}]}, "c.json", WrongError)
    (layer,) = held.field("layers").entries()
    with pytest.raises(WrongError, match=r"^'ratio' is missing at layers\[0\] in c\.json$"):
        layer.field("ratio")
    with pytest.raises(WrongError, match=r"^'metric' is missing in c\.json$"):
        held.field("metric")
    assert layer.field("tokens", None).value is None
    with pytest.raises(WrongError, match=r"^expected a text, got 3 at layers\[0\]\.kind in c\.json$"):
        layer.field("kind", 3).text()
    with pytest.raises(WrongError, match=r"^expected an object, got a list of 1 at layers in c\.json$"):
        held.field("layers").field("ratio")


@given(VALUES, st.randoms(use_true_random=False))
def test_json_that_breaks_off_says_in_which_line(value, rng):
    text = json.dumps({"a": value, "b": [1, "x"]}, indent=1)
    cut = text[: rng.randrange(len(text))]
    with pytest.raises(WrongError) as caught:
        parse_json(cut, "a.json", WrongError)
    where = str(caught.value).removeprefix("a.json cannot be read as JSON: ")
    line, column = map(int, where.rpartition(" in line ")[2].split(", column "))
    lines = cut.split("\n")
    assert 1 <= line <= len(lines)
    assert 1 <= column <= len(lines[line - 1]) + 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expecting value in line 1, column 1"),
        ('{"a": 1,\n "a": 2}', "the name 'a' stands twice"),
        (r'{"a": "\ud83d"}', "half of a character"),
        ("1" * 5000, "limit"),
        ("[" * 102 + "]" * 102, "nested more than 100 deep"),
        ('{"a":' * 101 + "0" + "}" * 101, "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_json_that_is_strange_is_refused(text, says):
    with pytest.raises(WrongError, match=says) as caught:
        parse_json(text, "a.json", WrongError)
    assert "\n" not in str(caught.value)


def test_json_at_its_limits_is_read(tmp_path, monkeypatch):
    deep = "[" * 100 + "0" + "]" * 100
    parse_json(deep, "a.json")
    assert parse_json(r'"\ud83d\ude00"', "a.json").value == "\N{GRINNING FACE}"
    monkeypatch.setattr(reading, "_MOST_BYTES", 1 << 20)
    (tmp_path / "a.json").write_text(json.dumps("x" * ((1 << 20) - 2)))
    assert len(read_json(tmp_path / "a.json").value) == (1 << 20) - 2
    (tmp_path / "a.json").write_text(json.dumps("x" * ((1 << 20) - 1)))
    with pytest.raises(WrongError, match=r"expected a list of at most 1 MB, got .* with more"):
        read_json(tmp_path / "a.json", "a list", WrongError)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_files_are_utf8_with_or_without_a_mark(start, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(start + '{"ä": "\N{GRINNING FACE}"}'.encode())
    assert read_json(path).value == {"ä": "\N{GRINNING FACE}"}
    path.write_bytes(
        start + '[search]\nä = "\N{GRINNING FACE}"'.encode().replace("ä".encode(), b'"\xc3\xa4"')
    )
    assert a_section(path) == {"ä": "\N{GRINNING FACE}"}
    for other in ("latin-1", "utf-16"):
        path.write_bytes('[search]\na = "ä"\n'.encode(other))
        with pytest.raises(WrongError, match=r"in UTF-8, got .* with other bytes in line [12]; iconv"):
            a_section(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[search\n", r"is not valid TOML: .*line 1, column 8"),
        ("[search]\na = 1\na = 2\n", "is not valid TOML: .*line 3"),
        ("[other]\n", r"expected a section \[search\] in .*, got \['other'\]"),
        ("search = 3\n", r"expected a section \[search\]"),
        ("[search]\na = " + "[" * 5000 + "]" * 5000, "nested more than 100 deep"),
        ("[search]\na = " + "[" * 150 + "]" * 150, "nested more than 100 deep"),
        (f"[search]\n{'a.' * 2000}a = 1\n", "nested more than 100 deep"),
        (f"[search]\na = {'9' * 5000}\n", "limit"),
    ],
)
def test_toml_that_cannot_serve_is_refused(text, says, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(WrongError, match=says) as caught:
        a_section(tmp_path / "a.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__qualname__)
class TestEveryReader:
    """A mistake is a sentence with the file's name, whatever is there."""

    def refused(self, reader, path):
        with pytest.raises(SecateurError) as caught:
            called(reader, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_refuses_what_is_no_file_at_once(self, reader, tmp_path):
        path = tmp_path / READERS[reader]
        assert "no such file" in self.refused(reader, path)
        os.mkfifo(path)  # nobody will ever write to it
        assert "which is no file" in self.refused(reader, path)
        path.unlink()
        path.symlink_to("/dev/zero")
        assert "which is no file" in self.refused(reader, path)
        path.unlink()
        path.symlink_to(path.name)
        self.refused(reader, path)
        if reader is not read_levels:  # which takes a folder
            path.unlink()
            path.mkdir()
            assert "got the folder" in self.refused(reader, path)

    @settings(max_examples=40)
    @given(content=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
    def test_reads_or_refuses_any_bytes(self, reader, content, tmp_path_factory):
        path = tmp_path_factory.mktemp("any") / READERS[reader]
        path.write_bytes(content)
        try:
            called(reader, path)
        except SecateurError as error:
            assert "\n" not in str(error)  # noqa: PT017


def changed(rng, value):
    """A value of JSON with one part replaced or dropped, and the path to it."""
    parts = []

    def collect(inside):
        for key in inside if isinstance(inside, dict) else range(len(inside)):
            parts.append((inside, key))
            if isinstance(inside[key], dict | list):
                collect(inside[key])

    value = json.loads(json.dumps(value))
    collect(value)
    inside, key = rng.choice(parts)
    if rng.random() < 0.2:
        del inside[key]
    else:
        strange = [None, True, -1, 0.5, 2, 1e999, float("nan"), "", "x", "2:4", [], {}, [1], 10**400]
        inside[key] = rng.choice([*strange, "".join(rng.choices(string.printable, k=5))])
    return value


@pytest.mark.parametrize("seed", range(200))
def test_a_candidate_that_was_tampered_with_is_read_or_refused(seed, tmp_path):
    good = to_json(record("abs(W) * X", figures={"kl": 0.1}, provenance={"run": "a"}))
    path = tmp_path / "c.json"
    path.write_text(json.dumps(changed(random.Random(seed), good)))
    for reader, error in ((read_candidate, ExportError), (read_ratios, RuleError)):
        try:
            found = reader(path)
        except error as refusal:
            assert str(path) in str(refusal)  # noqa: PT017
        else:
            ratios = found.candidate.ratios if reader is read_candidate else found.values()
            assert all(type(ratio) is float and 0 <= ratio < 1 for ratio in ratios)


@pytest.mark.parametrize("seed", range(100))
def test_a_manifest_that_was_tampered_with_is_read_or_refused(seed, tiny_calibration, tmp_path):
    good = json.loads((tiny_calibration.folder / "manifest.json").read_text())
    good["format"] = 4 - seed % 2  # the older one has no hash of itself: every field is on its own
    for path in tiny_calibration.folder.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "manifest.json").write_text(json.dumps(changed(random.Random(seed), good)))
    try:
        found = Calibration(tmp_path)
    except CalibrationError as refusal:
        assert str(tmp_path) in str(refusal)  # noqa: PT017
        assert str(refusal).endswith("calibrate again")  # noqa: PT017
    else:
        assert found.leaves
        assert found.inputs
        assert found.model_source
        assert all(found.shape(part) for part in ("statistics", "selection", "holdout"))


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ("[]", "expected an object, got a list of 0 in metadata of"),
        ('{"format": "secateur.masks", "version": 2}', "version 1, got"),
        ('{"format": "secateur.masks", "version": 1}', "'columns' is missing in metadata of"),
        ('{"format": "secateur.masks", "version": 1, "columns": {"a": "8"}}', 'got "8" at columns.a in'),
        (
            '{"format": "secateur.masks", "version": 1, "columns": {"a": 99}}',
            "expected bits of 99 columns for a",
        ),
        ('{"format": "secateur.masks", "version": 1, "columns": {"b": 8}}', "cannot be read as masks"),
        ("{", "metadata of .* cannot be read as JSON"),
    ],
)
def test_masks_with_other_metadata_are_refused(about, says, tmp_path):
    import numpy as np

    save_file({"a": np.ones((2, 1), np.uint8)}, tmp_path / "m.safetensors", {"secateur": about})
    with pytest.raises(ExportError, match=says):
        read_masks(tmp_path / "m.safetensors")


def test_levels_and_what_they_mean_are_checked(tmp_path):
    (tmp_path / "levels.txt").write_text("a: 1\n")
    for meaning, says in (
        ("[]", "expected an object"), ('{"sparsity": 1}', r"expected ratios in \[0, 1\), got 1 at sparsity"),
        ('{"sparsity": 0.5, "weights_diff": "many"}', "expected a number, got \"many\" at weights_diff"),
        ('{"sparsity": 0.5, "metric": 3}', "expected a text, got 3 at metric"),
    ):  # fmt: skip
        (tmp_path / "levels.json").write_text(meaning)
        with pytest.raises(ExportError, match=says):
            read_levels(tmp_path)
    (tmp_path / "levels.json").write_text('{"sparsity": 0.5}')
    assert read_levels(tmp_path).weights_diff == 1_000_000
    (tmp_path / "levels.txt").write_text(f"a: {'9' * 5000}\n")
    with pytest.raises(ExportError, match="in line 1"):
        read_levels(tmp_path)


def test_ratios_of_one_layer_twice_are_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"a": 0.5, "b": 0.5, "a": 0.9}')
    with pytest.raises(RuleError, match="the name 'a' stands twice"):
        read_ratios(path)
    path.write_text('{"layers": [{"name": "a", "ratio": 0.5}, {"name": "a", "ratio": 0.9}]}')
    with pytest.raises(RuleError, match="got two for one of them"):
        read_ratios(path)
    path.write_text("[0.5]")
    with pytest.raises(RuleError, match=r"expected a candidate or an object such as .*, got a list of 1 in"):
        read_ratios(path)

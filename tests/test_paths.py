"""Paths that somebody gave us: wherever one is asked for, one that leads nowhere is a sentence."""

import os
from pathlib import Path

import pytest
from exported import make_run
from secateur.metrics_dsl.errors import SecateurError
from secateur.metrics_dsl.plugins import PluginError, read_plugin
from secateur.results.archive.run_folder import RunFolder
from secateur.search.core.files import Output, check_place, expanded, whole
from secateur.search.settings import SearchSettings
from support import in_process

NOBODY = "~nosuchuser/x"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    make_run(folder)
    return folder


def test_home_folders_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a"
    assert expanded("a/~b") == Path("a/~b")


@pytest.mark.parametrize("path", [NOBODY, Path(NOBODY), "~nosuchuser", "a\0b"])
def test_one_that_nobody_knows_is_refused(path):
    with pytest.raises(SecateurError, match=r"^expected a path, got "):
        expanded(path)


@pytest.mark.parametrize(
    "command",
    [
        ("calibrate", NOBODY, "--out", "c"),
        ("calibrate", "MODEL", "--text", f"{NOBODY}.txt", "--out", "c"),
        ("plan", NOBODY),
        ("evaluate", NOBODY, "--text", "TEXT"),
        ("evaluate", "MODEL", "--text", f"{NOBODY}.txt"),
        ("prune", "MODEL", "--text", "TEXT", "-o", NOBODY),
        ("prune", "MODEL", "--text", "TEXT", "-o", "p", "--candidate", f"{NOBODY}.json"),
        ("prune", "MODEL", "--text", "TEXT", "-o", "p", "--candidate", f"{NOBODY}:best"),
        ("prune", "MODEL", "--text", "TEXT", "-o", "p", "--ratios", f"{NOBODY}.json"),
        ("prune", "MODEL", "--text", "TEXT", "-o", "p", "--candidate", "~W"),
        ("search", NOBODY, "--out", "r"),
        ("search", "CAL", "--out", "r", "--model", NOBODY),
        ("search", "CAL", "--out", "r", "--start-from", NOBODY),
        ("search", "CAL", "--out", "r", "--plugin", f"{NOBODY}.py"),
        ("measure", "CAL", "wanda", "--model", NOBODY),
        ("measure", NOBODY, "wanda"),
        ("front", NOBODY),
        ("report", "RUN", "-o", f"{NOBODY}.html"),
        ("plot", "RUN", "-o", f"{NOBODY}.svg"),
        ("snapshot", "RUN", "-o", f"{NOBODY}.parquet"),
        ("export", "RUN", "best", "--to", "json", "-o", f"{NOBODY}.json"),
        ("calibrate", "MODEL", "--text", "TEXT", "--out", NOBODY),
        ("search", "CAL", "--out", NOBODY, "--objectives", "kl"),
    ],
)
def test_every_command_says_so(command, made, tiny_model, tiny_calibration, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": tiny_model, "CAL": tiny_calibration.folder, "TEXT": text_file, "RUN": made}
    done = in_process(*(places.get(word, word) for word in command))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("secateur: ")
    assert len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [("front", "run"), ("metrics",), ("plan", "model"), ("search", "cal", "--out", "r")]
)
def test_a_folder_to_work_in_that_is_gone_or_no_text_is_a_sentence(command, tmp_path, monkeypatch):
    for name in ("gone", os.fsdecode(b"other\xff")):
        here = tmp_path / name
        here.mkdir()
        monkeypatch.chdir(here)
        if name == "gone":
            here.rmdir()
        done = in_process(*command)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("secateur: expected ")
        assert len(done.stderr.splitlines()) == 1


def test_no_name_that_is_no_text_is_read_or_written(tmp_path):
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    with pytest.raises(SecateurError, match="is not in UTF-8"):
        RunFolder(odd)
    with pytest.raises(SecateurError, match="is not in UTF-8"), whole(odd / "a.html", Output()):
        pass
    assert not any(odd.iterdir())


def test_a_pipe_behind_a_link_is_no_place_for_a_file(tmp_path):
    reading, writing = os.pipe()
    for place in (f"/dev/fd/{writing}", "/dev/null"):
        with pytest.raises(SecateurError, match=rf"got {place}, which is none; name another"):
            check_place(place, Output("a file", replaces=lambda file: True))
    os.close(reading)
    os.close(writing)


def test_settings_and_plugins_say_so():
    with pytest.raises(SecateurError, match="whose home folder nobody knows"):
        SearchSettings(calibration=NOBODY)
    with pytest.raises(PluginError, match="expected a plugin as a Python file"):
        read_plugin(f"{NOBODY}.py")

"""Files that are not ours: none is replaced, written through a link, left behind, or believed."""

import contextlib
import fcntl
import hashlib
import math
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
from functools import partial

import pytest
import secateur
from exported import make_run
from secateur.metrics_dsl.errors import SecateurError
from secateur.results.archive.archive import Archive
from secateur.results.archive.database import ArchiveError, lock
from secateur.results.archive.run_folder import RunFolder
from secateur.results.archive.snapshot import snapshot
from secateur.results.archive.stored import blob, floats
from secateur.results.export.exporters import EXPORTERS
from secateur.results.report.plot import PICTURES, write_plot
from secateur.results.report.report import write_report
from secateur.service.run import Run
from secateur.service.run_claim import removed_if_it_fails
from support import in_process

NAMES = ("archive.sqlite", "archive.sqlite-wal", "archive.sqlite-shm", "archive.sqlite-journal")
# What replaces an earlier output of its kind: how it is written, and what a file of it is called.
REPLACING = {
    "report": (("report",), "a.html"),
    "snapshot": (("snapshot",), "a.parquet"),
    **{f"plot{end}": (("plot", "--kind", "history"), f"a{end}") for end in PICTURES},
}
EXPORTED = {
    name: (("export", "--to", name, *([] if e.subject == "run" else ["best"])), f"a{e.suffix}")
    for name, e in EXPORTERS.items()
    if name != "masks"  # which need a model
}
OUTPUTS = REPLACING | EXPORTED


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_run(folder / "run")
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def outputs(made):
    """One output of each kind, by name."""
    found = {}
    for name, (words, file) in OUTPUTS.items():
        found[name] = made / f"{name}-{file}"
        assert in_process(words[0], made / "run", *words[1:], "-o", found[name]).returncode == 0
    return found


def state(folder):
    """All that is in a folder: names, links, contents, and of what kind the rest is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = (
                hashlib.sha256(path.read_bytes()).digest() if path.is_file() else path.stat().st_mode
            )
    return found


def foreign(suffix):
    """Files of others that have a name such as ours, and begin as ours do."""
    import pandas as pd

    yield "text", lambda p: p.write_text("my thesis")
    yield "a package", lambda p: p.write_text('{"name": "mine", "version": 1}')
    yield (
        "a page",
        lambda p: p.write_text(
            '<!DOCTYPE html><html lang="en"><head><title><meta name="generator" content="secateur">'
        ),
    )
    yield (
        "a quote",
        lambda p: p.write_text(
            'my notes on <!DOCTYPE html>\n<html lang="en"><head><meta name="generator" content="secateur">'
        ),
    )
    yield (
        "a drawing",
        lambda p: p.write_text(
            "<?xml version='1.0'?><svg><metadata><dc:creator>me</dc:creator></metadata></svg>"
        ),
    )
    yield "another picture", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
    yield (
        "a paper",
        lambda p: p.write_bytes(
            b"%PDF-1.4\n1 0 obj\n<</Creator (secateur plot)>>\ntrailer\n<< /Info 2 0 R >>\n"
        ),
    )
    yield "another table", lambda p: pd.DataFrame({"a": [1]}).to_parquet(p)
    yield "torn", lambda p: p.write_bytes(b"PAR1" + b"\xff" * 50 + b"PAR1")
    yield "a folder", lambda p: (p.mkdir(), (p / "mine").write_text("precious"))
    yield "a pipe", os.mkfifo


@pytest.mark.parametrize("name", OUTPUTS)
class TestOutputs:
    def write(self, name, run, place, *more):
        words = OUTPUTS[name][0]
        return in_process(words[0], run, *words[1:], "-o", place, *more)

    def test_no_foreign_file_gives_way(self, name, run, tmp_path):
        suffix = os.path.splitext(OUTPUTS[name][1])[1]
        for what, lay in foreign(suffix):
            place = tmp_path / f"{what}{suffix}"
            lay(place)
            before = state(tmp_path)
            done = self.write(name, run, place)
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), (what, done.stderr)
            assert done.stderr.startswith("secateur: expected "), done.stderr
            assert state(tmp_path) == before, what

    def test_an_output_of_another_kind_does_not_give_way(self, name, run, outputs, tmp_path):
        for other, file in outputs.items():
            if other == name and name in REPLACING:
                continue
            place = tmp_path / f"{other}{os.path.splitext(OUTPUTS[name][1])[1]}"
            (shutil.copytree if file.is_dir() else shutil.copy)(file, place)
            before = state(tmp_path)
            assert self.write(name, run, place).returncode == 2, other
            assert state(tmp_path) == before, other

    def test_an_earlier_one_gives_way(self, name, run, outputs, tmp_path):
        if name not in REPLACING:
            pytest.skip("nothing is replaced by it unless it is asked to")
        place = tmp_path / OUTPUTS[name][1]
        shutil.copy(outputs[name], place)
        was = place.stat().st_ino
        assert self.write(name, run, place).returncode == 0
        assert place.stat().st_ino != was

    def test_with_force_a_file_gives_way_but_no_folder_and_none_of_a_run(self, name, run, tmp_path):
        place = tmp_path / OUTPUTS[name][1]
        place.write_text("whatever")
        done = self.write(name, run, place, "--force")
        is_file = name in REPLACING or bool(EXPORTERS[name].suffix)
        assert done.returncode == (0 if is_file else 2), done.stderr
        assert (place.read_bytes() != b"whatever") == is_file
        calibration = tmp_path / "cal"
        calibration.mkdir()
        for file in ("manifest.json", "tokens.safetensors", f"block{place.suffix}"):
            (calibration / file).write_text("measured")
        (run / "deep").mkdir()
        (run / "deep" / f"a{place.suffix}").write_text("log of the job")
        (tmp_path / f"link{place.suffix}").symlink_to(run / "run.toml")
        (tmp_path / f"new{place.suffix}").symlink_to(run / "archive.sqlite-wal")
        os.link(run / "archive.sqlite", tmp_path / f"hard{place.suffix}")
        (run / "run.toml").touch()
        (tmp_path / "folder").mkdir()
        ours = (calibration, run)
        before = [state(folder) for folder in ours]
        for target in (
            *(run / n for n in NAMES), run / "run.toml", run / "writer.lock", *calibration.iterdir(),
            calibration / f"new{place.suffix}", run / "deep" / f"a{place.suffix}",
            tmp_path / f"link{place.suffix}", tmp_path / f"new{place.suffix}", tmp_path / "folder",
        ):  # fmt: skip
            done = self.write(name, run, target, "--force")
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), (target, done.stderr)
        self.write(name, run, tmp_path / f"hard{place.suffix}", "--force")  # its other name is the run's
        assert [state(folder) for folder in ours] == before

    def test_a_place_that_cannot_be_written_is_one_sentence(self, name, run, tmp_path):
        before = state(tmp_path)
        (tmp_path / "loop").symlink_to("loop")
        before = state(tmp_path)
        for place in (
            "/dev/full", "/dev/null", "/proc/none/a", tmp_path / "loop", tmp_path / ("a" * 300),
            run / "archive.sqlite" / "a", tmp_path / "loop" / "a",
        ):  # fmt: skip
            done = self.write(name, run, place)
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), (place, done.stderr)
        assert state(tmp_path) == before


NEW = {  # what is never written over anything, but for an empty folder where it is one
    "calibrate": ("calibrate", "MODEL", "--text", "TEXT", "--out"),
    "prune": ("prune", "MODEL", "--text", "TEXT", "-o"),
    "search": ("search", "CAL", "--sparsity", 0.5, "--budget", 14, "--out"),
    "import": ("import", "LEVELS", "--layers", "RUN", "--sparsity", 0.5, "-o"),
    "masks": ("export", "RUN", "best", "--to", "masks", "-o"),
}


@pytest.mark.parametrize("name", NEW)
def test_what_is_new_takes_nobodys_place(
    name, run, outputs, tiny_model, tiny_calibration, text_file, tmp_path
):
    levels = next(outputs["evopress"].rglob("*.txt"))
    places = {"MODEL": tiny_model, "CAL": tiny_calibration.folder, "TEXT": text_file, "RUN": run,
              "LEVELS": levels}  # fmt: skip
    words = [places.get(word, word) for word in NEW[name]]
    there = tmp_path / "there"
    there.mkdir()
    for what, lay in foreign(""):
        lay(there / what)
    (there / "a link").symlink_to(there / "text")
    shutil.copytree(run, there / "a run")
    before = state(there)
    for target in (*there.iterdir(), there / "a run" / "archive.sqlite", there / "a run" / "writer.lock"):
        done = in_process(*words, target)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), (target, done.stderr)
        assert "there/" in done.stderr, done.stderr
        assert state(there) == before, target


@pytest.mark.parametrize("suffix", PICTURES)
def test_pictures_bear_their_mark_and_stay_the_same(suffix, run, tmp_path):
    with Archive(run) as archive:
        first = write_plot(archive, "front", tmp_path / f"a{suffix}").read_bytes()
        assert write_plot(archive, "front", tmp_path / f"a{suffix}").read_bytes() == first
    assert b"secateur plot" in first


@pytest.mark.parametrize("write", [write_report, snapshot])
def test_python_refuses_as_the_command_line_does(write, run, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    with Archive(run) as archive:
        with pytest.raises(SecateurError, match="--force"):
            write(archive, mine)
        with pytest.raises(SecateurError, match="character of the code 0"):
            write(archive, f"{mine}\0")
        write(archive, mine, force=True)
    assert mine.read_bytes() != b"precious"


# Run folders -----------------------------------------------------------------------------------


def spoil(place, how, victim):
    """Put something else into the place of a run's file."""
    place.unlink(missing_ok=True)
    match how:
        case "link":
            place.symlink_to(victim)
        case "hard link":
            os.link(victim, place)
        case "folder":
            place.mkdir()
        case "pipe":
            os.mkfifo(place)
        case "loop":
            place.symlink_to(place.name)


@pytest.mark.parametrize("how", ["link", "hard link", "folder", "pipe", "loop"])
@pytest.mark.parametrize("name", [*NAMES, "writer.lock"])
def test_no_file_of_a_run_is_written_where_another_stands(name, how, run, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious\n" * 10)
    spoil(run / name, how, victim)
    before = state(tmp_path)
    with pytest.raises((SecateurError, OSError), match="expected"):
        Archive(run, write=True)
    assert state(tmp_path) == before


@pytest.mark.parametrize("how", ["folder", "pipe", "loop"])
@pytest.mark.parametrize("command", ["front", "report", "watch"])
@pytest.mark.parametrize("name", ["archive.sqlite", "run.toml", "writer.lock"])
def test_reading_waits_for_no_pipe_and_leaves_all_as_it_is(name, how, command, run, tmp_path):
    spoil(run / name, how, tmp_path)
    before = state(run)
    done = in_process(command, run, *(["-o", tmp_path / "a.html"] if command == "report" else []))
    assert done.returncode in (0, 2)
    assert state(run) == before


def test_a_lock_of_ours_is_taken_over_and_any_other_stays(run):
    lock = run / "writer.lock"
    lock.write_text("my own notes")
    with pytest.raises(ArchiveError, match="holds something else; move it away"):
        Archive(run, write=True)
    assert lock.read_text() == "my own notes"
    lock.write_text("process 1 on elsewhere")
    Archive(run, write=True).close()


def test_reading_beside_who_has_only_just_begun_leaves_nothing(run, tiny_calibration):
    with lock(run / "writer.lock"):
        before = state(run)
        with Archive(run) as archive:
            assert len(archive.frame())
        done = in_process("search", tiny_calibration.folder, "--budget", 2, "--out", run)
        assert done.returncode == 2
        assert state(run) == before


def test_a_folder_of_a_seed_that_is_a_link_is_not_written(run, tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "seed-0").symlink_to(run)
    before = state(tmp_path)
    with pytest.raises(ArchiveError, match="which is a link; remove it"):
        secateur.resume(tmp_path / "many")
    assert state(tmp_path) == before


@pytest.mark.parametrize("write", [True, False])
def test_another_programs_database_stays_as_it_is(write, tmp_path):
    for version in (0, 5):
        folder = tmp_path / f"{version}-{write}"
        folder.mkdir()
        db = sqlite3.connect(folder / "archive.sqlite")
        db.executescript(
            f"PRAGMA journal_mode = WAL; PRAGMA user_version = {version}; CREATE TABLE mine (a);"
        )
        db.close()
        before = state(folder)
        with pytest.raises(ArchiveError, match="a database of another program"):
            Archive(folder, write=write)
        assert state(folder) == before


# Reading ---------------------------------------------------------------------------------------


def read_all(run, tmp_path):
    """Read a run in every way."""
    with Archive(run) as archive:
        archive.frame(), archive.front(), archive.trials(), archive.layers(), archive.history()
        archive.holdout_parts(), archive.check()
        snapshot(archive, tmp_path / "all.parquet")
        write_report(archive, tmp_path / "all.html")
    secateur.open(run).frame()
    for command in ("front", "watch", "compare"):
        assert in_process(command, run).returncode in (0, 2)


def killed(folder, commits=True):
    """A run whose writer was killed: what it wrote last stands beside the archive alone."""
    code = (
        "import os, sys\nfrom secateur.results.archive.archive import Archive\n"
        "archive = Archive(sys.argv[1], write=True)\n"
        f"{'archive.keep(pattern=chr(50) + chr(58) + chr(52))' if commits else ''}\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=False)


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("is_read_only", [False, True])
def test_reading_leaves_nothing_behind(is_killed, is_read_only, run, tmp_path):
    if is_killed:
        killed(run)
        assert (run / "archive.sqlite-wal").stat().st_size
        (run / "archive.sqlite-shm").unlink()
    before = state(run)
    if is_read_only:
        run.chmod(0o555)
    try:
        read_all(run, tmp_path)
        with Archive(run) as archive:
            assert archive.fact("pattern") == ("2:4" if is_killed else "unstructured")
    finally:
        run.chmod(0o755)
    assert state(run) == before


def test_what_is_written_later_is_seen_by_who_has_it_open(run, monkeypatch):
    from secateur.results.archive import database

    for most in (database._MOST_BYTES, 0):  # read into memory, and where it lies
        monkeypatch.setattr(database, "_MOST_BYTES", most or database._MOST_BYTES)
        with Archive(run) as reader:
            for i in range(3):
                with Archive(run, write=True) as writer:
                    writer.keep(pattern=f"{i + 1}:8")
                    assert reader.fact("pattern") == f"{i + 1}:8"
                assert reader.fact("pattern") == f"{i + 1}:8"
                killed(run)
                assert reader.fact("pattern") == "2:4"


def test_a_run_without_its_measurements_is_called_what_it_is(tmp_path):
    killed(tmp_path / "run", commits=False)
    (tmp_path / "run" / "run.toml").write_text("[search]\n")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("-wal", "-shm"):
        (tmp_path / "copy" / f"archive.sqlite{name}").unlink()
    for run in (tmp_path / "copy",):
        done = in_process("front", run)
        assert done.returncode == 2
        assert "nobody writes it" in done.stderr
        assert "copied without archive.sqlite-wal" in done.stderr
        with (run / "writer.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert "is just beginning" in in_process("front", run).stderr


# Damage ----------------------------------------------------------------------------------------

CELLS = (
    "NULL", "''", "'x'", "x'010203'", "x'ff'", "CAST(x'ff' AS TEXT)", "-1", "9e999", "-9e999", "1.5",
    "'1e400'", "'[1]'", "'{\"kl\": \"low\"}'", "'{\"kl\": 1e999}'", "9223372036854775807", "zeroblob(8000)",
    "'[' || hex(zeroblob(99)) || ']'", "replace(hex(zeroblob(3000)), '0', '[')", "'null'",
    "x'000000000000f87f000000000000f87f'",
)  # fmt: skip


READS = (
    Archive.frame, Archive.front, Archive.trials, Archive.layers, Archive.history, Archive.check,
    lambda archive: Run(archive.folder).candidate(),
)  # fmt: skip


def read_or_refuse(run, tmp_path):
    """Read it in each way by itself, for what refuses a cell hides it from what comes after."""
    for read in READS:
        with contextlib.suppress(SecateurError, sqlite3.OperationalError), Archive(run) as archive:
            read(archive)
    for command, *more in (("report", "-o", tmp_path / "b.html"), ("watch",)):
        done = in_process(command, run, *more)
        assert done.returncode in (0, 2), done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_whatever_stands_in_a_cell_is_read_or_refused_in_a_sentence(made, tmp_path):
    draw = random.Random(0)
    with sqlite3.connect(made / "run" / "archive.sqlite") as db:
        tables = {t: [row[1] for row in db.execute(f"PRAGMA table_info({t})")]
                  for t in ("facts", "trials", "measurements", "by_layer")}  # fmt: skip
        facts = [name for (name,) in db.execute("SELECT name FROM facts")]
    places = [(t, c) for t, columns in tables.items() for c in columns if (t, c) != ("facts", "value")]
    cases = [(t, c, draw.choice(CELLS), "1") for t, c in places]
    cases += [("facts", "value", draw.choice(CELLS), f"name = '{name}'") for name in facts]
    for number, (table, column, cell, where) in enumerate(cases):
        run = shutil.copytree(made / "run", tmp_path / f"run{number}")
        db = sqlite3.connect(run / "archive.sqlite")
        try:
            with db:
                db.execute(f'UPDATE {table} SET "{column}" = {cell} WHERE {where}')
        except sqlite3.Error:
            continue  # SQLite itself does not hold it
        finally:
            db.close()
        before = state(run)
        read_or_refuse(run, tmp_path)
        assert state(run) == before, (table, column, cell)
        shutil.rmtree(run)


def test_what_is_refused_once_is_refused_again(run):
    with sqlite3.connect(run / "archive.sqlite") as db:
        db.execute("UPDATE trials SET metric = x'00' WHERE number = 1")
    with Archive(run) as archive:
        for _ in range(2):
            with pytest.raises(ArchiveError, match='the column "metric"'):
                archive.frame()


def test_bytes_that_changed_are_read_or_refused_in_a_sentence(made, tmp_path):
    draw = random.Random(0)
    for number in range(25):
        run = shutil.copytree(made / "run", tmp_path / f"run{number}")
        content = bytearray((run / "archive.sqlite").read_bytes())
        for _ in range(draw.choice([1, 20, 400])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (run / "archive.sqlite").write_bytes(
            content[: draw.choice([len(content), draw.randrange(len(content))])]
        )
        before = state(run)
        read_or_refuse(run, tmp_path)
        with contextlib.suppress(SecateurError):
            Archive.check_folder(run)
        assert state(run) == before
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE trials RENAME TO t2; CREATE VIEW trials AS SELECT * FROM t2",
     "CREATE TRIGGER mine AFTER INSERT ON facts BEGIN DELETE FROM trials; END",
     "CREATE INDEX mine ON trials (hex(metric))", "DROP TABLE facts", "ALTER TABLE facts ADD COLUMN b",
     "ALTER TABLE by_layer RENAME COLUMN parts TO p"],
)  # fmt: skip
def test_tables_that_are_not_ours_are_not_read(change, run):
    db = sqlite3.connect(run / "archive.sqlite")
    db.executescript(change)
    db.close()
    before = state(run)
    for write in (True, False):
        with pytest.raises(ArchiveError, match="expected the tables of an archive"):
            Archive(run, write=write)
    assert state(run) == before


@pytest.mark.parametrize("mode", ["delete", "wal", "killed"])
@pytest.mark.parametrize("begins", [b"precious", b"", b"/nosuch\0"])
def test_no_journal_has_another_file_removed(mode, begins, run, tmp_path):
    """SQLite removes the file that a journal of several databases names, whatever it is."""
    archive, mine = run / "archive.sqlite", tmp_path / "thesis.txt"
    mine.write_bytes(begins)
    db = sqlite3.connect(archive)
    db.execute(f"PRAGMA journal_mode = {'delete' if mode == 'delete' else 'wal'}")
    if mode == "killed":  # some of it stands in the file beside
        with db:
            db.execute("UPDATE trials SET attempts = 2")
        copies = {place: place.read_bytes() for place in run.glob("archive.sqlite*")}
    db.close()
    if mode == "killed":
        for place, content in copies.items():
            place.write_bytes(content)
    magic, name = bytes.fromhex("d9d505f920a163d7"), os.fsencode(mine)
    head = magic + struct.pack(">5I", 0, 1, archive.stat().st_size // 4096, 512, 4096)
    tail = struct.pack(">I", 2**30 // 4096 + 1) + name + struct.pack(">2I", len(name), sum(name)) + magic
    (run / "archive.sqlite-journal").write_bytes(head.ljust(512, b"\0") + tail)
    before = state(run)
    refused = 0
    for write in (False, True):
        try:
            with Archive(run, write=write) as opened:
                opened.frame()
        except ArchiveError as error:
            assert "which names a file that would be removed" in str(error)  # noqa: PT017 (or it is read)
            refused += 1
    assert refused == (1 if mode == "wal" else 2)
    assert mine.read_bytes() == begins
    assert state(run) == before


def test_what_has_no_room_is_not_begun_to_be_copied(run, tmp_path):
    db = sqlite3.connect(run / "archive.sqlite")
    assert db.execute("PRAGMA journal_mode = wal").fetchall() == [("wal",)]
    db.close()
    (run / "archive.sqlite-wal").touch()
    os.truncate(run / "archive.sqlite-wal", 1 << 43)
    done = in_process("front", run)
    assert done.returncode == 2
    assert "no space left on device; choose another place or make room" in done.stderr


def test_a_candidate_that_was_changed_is_not_exported(run, tmp_path):
    db = sqlite3.connect(run / "archive.sqlite")
    with db:
        db.execute("UPDATE trials SET metric = 'abs(W)'")
    db.close()
    done = in_process("export", run, "best", "--to", "json", "-o", tmp_path / "a.json")
    assert done.returncode == 2
    assert "as its key says" in done.stderr
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("to", [name for name, e in EXPORTERS.items() if e.subject != "masks"])
def test_no_export_has_ratios_that_were_changed(to, run, tmp_path):
    db = sqlite3.connect(run / "archive.sqlite")
    with db:
        db.execute("UPDATE by_layer SET ratios = zeroblob(8)")
    db.close()
    key = () if EXPORTERS[to].subject == "run" else ("best",)
    done = in_process("export", run, *key, "--to", to, "-o", tmp_path / "out")
    if to == "csv":  # has none
        assert done.returncode == 0
    else:
        assert "as its key says" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_neither_kept_nor_read(number, run):
    db = sqlite3.connect(run / "archive.sqlite")
    with db:
        for column in ("layer_errors", "parts", "sensitivities"):
            for table in ("measurements", "by_layer"):
                db.execute(f"UPDATE {table} SET {column} = ?", (struct.pack("<3d", 0.5, number, 1.0),))
    db.close()
    with Archive(run) as archive:
        for read in (archive.check, archive.trials):
            with pytest.raises(ArchiveError, match="expected finite numbers for "):
                read()
    with pytest.raises(ArchiveError, match="expected finite numbers from an evaluator"):
        blob([0.5, number])
    assert floats(blob([1e308, 1e308]), "large ones") == (1e308, 1e308)


@pytest.mark.parametrize(
    "where",
    ["@__import__('os').system('touch pwned')", "kl.__class__.__mro__", "@pd.io", "kl.to_csv('pwned')",
     "kl <", "metric.str.__class__", "nosuch > 1", "kl + 1", 3, "(" * 5000 + "kl" + ")" * 5000,
     "kl.map(print)"],
)  # fmt: skip
def test_a_condition_runs_no_code(where, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Archive(run) as archive, pytest.raises(SecateurError, match="expected a condition"):
        archive.frame(where)
    assert not (tmp_path / "pwned").exists()
    with Archive(run) as archive:
        assert len(archive.frame("metric.str.contains('W')")) == len(archive.frame())


# Starts that fail ------------------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_folder_but_those_of_others(tiny_calibration, tmp_path, monkeypatch):
    from secateur.service import search_run

    def fail(*_arguments):
        raise SecateurError("nothing works today")

    monkeypatch.setattr(search_run, "claim", fail)
    (tmp_path / "mine").mkdir()
    several = partial(secateur.run_seeds, seeds=2)
    for start in (secateur.run_search, several):
        for out in (tmp_path / "mine", tmp_path / "new" / "deep" / "run"):
            with pytest.raises(SecateurError, match="nothing works today"):
                start(tiny_calibration, out, budget=12, stage="screen", objectives="layer_error,size")
    assert list((tmp_path / "mine").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_a_start_beside_one_that_runs_takes_nothing_from_it(tmp_path):
    run, others = RunFolder(tmp_path / "run"), []

    def start():
        with removed_if_it_fails([run]):
            run.path.mkdir()  # by another process, which came first
            run.settings_file.write_text("[search]")
            run.archive_file.touch()
            others.append(lock(run.lock_file))
            lock(run.lock_file)

    with pytest.raises(SecateurError, match="is being written"):
        start()
    assert [p.name for p in sorted(run.path.iterdir())] == ["archive.sqlite", "run.toml", "writer.lock"]
    others[0].close()


def test_only_our_names_go_when_a_run_that_measured_nothing_is_begun_anew(tiny_calibration, tmp_path):
    options = {"stage": "screen", "objectives": "layer_error,size"}
    out = tmp_path / "run"
    secateur.run_search(tiny_calibration, out, budget=12, **options)
    (out / "archive.sqlite").rename(out / "archive.sqlite.bak")
    Archive(out, write=True).close()
    secateur.run_search(tiny_calibration, out, budget=12, sparsity=0.4, **options)
    assert (out / "archive.sqlite.bak").exists()

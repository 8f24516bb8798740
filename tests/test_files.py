"""Files and folders appear whole or not at all, and what was there before stays unless it may go."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.metrics_dsl.errors import SecateurError
from secateur.search.core import files
from secateur.search.core.files import Output, check_place, is_partial, left_behind, named, whole
from support import in_process

OURS = b"ours: an older one"


class OutputError(SecateurError):
    pass


class GivesUpError(Exception):
    pass


def lay(place, before):
    """Put into a place what may be there before."""
    other = place.with_name("other")
    if before.startswith("link"):
        lay(other, before.removeprefix("link to "))
        place.symlink_to(other.name)
    elif before == "pipe":
        os.mkfifo(place)
    elif before.endswith("folder"):
        place.mkdir()
        if before == "a folder":
            (place / "thesis.tex").write_text("precious")
    elif before != "nothing":
        place.write_bytes({"ours": OURS, "theirs": b"precious", "an empty file": b""}[before])


def tree(folder):
    """All that is in a folder: names, where links lead, contents and rights."""
    found = {}
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = what, stat.S_IMODE(path.lstat().st_mode)
    return found


def write(path, form):
    """Write as some libraries do: files that their owner alone may read."""
    if form == "folder":
        path.mkdir()
        (path / "deep").mkdir()
        (path / "deep" / "a").write_bytes(b"new")
        path = path / "b"
    path.write_bytes(b"new")
    path.chmod(0o600)


THERE = ("nothing", "ours", "theirs", "an empty file", "a folder", "an empty folder", "pipe")
BEFORE = st.sampled_from([*THERE, *(f"link to {there}" for there in THERE)])


@settings(max_examples=300)
@given(
    before=BEFORE, form=st.sampled_from(["file", "folder"]), fails=st.sampled_from(["", "at once", "midway"]),
    replaces=st.booleans(), over_empty=st.booleans(), is_lasting=st.booleans(), makes_parents=st.booleans(),
    depth=st.integers(0, 2), umask=st.sampled_from([0o022, 0o077, 0o002]),
)  # fmt: skip
def test_a_place_has_all_of_it_or_is_as_before(
    before, form, fails, replaces, over_empty, is_lasting, makes_parents, depth, umask
):
    output = Output(
        "a place", (lambda file: file.read(4) == b"ours") if replaces else None, over_empty=over_empty,
        makes_parents=makes_parents, is_lasting=is_lasting, error=OutputError,
    )  # fmt: skip
    there = before.removeprefix("link to ")
    may_go = (
        before == "nothing"
        or (there == "nothing" and (replaces or over_empty))
        or (there in ("ours", "an empty file") and replaces)
        or (there == "an empty folder" and over_empty)
    )
    before_umask = os.umask(umask)
    try:
        with tempfile.TemporaryDirectory() as name:
            top = Path(name)
            target = top.joinpath(*"ab"[:depth], "out")
            if before != "nothing":
                target.parent.mkdir(parents=True, exist_ok=True)
                lay(target, before)
            elif depth:
                may_go = may_go and makes_parents
            fits = not (form == "folder" and there in ("ours", "an empty file"))
            fits = fits and not (form == "file" and there == "an empty folder")
            was, place = tree(top), Path(os.path.realpath(target))
            try:
                with whole(target, output) as path:
                    assert may_go
                    assert path.parent == place.parent
                    assert list(top.rglob("*.partial")) == []
                    if fails == "at once":
                        raise GivesUpError
                    write(path, form)
                    assert is_partial(path)
                    assert left_behind(place) == [path]
                    if fails:
                        raise GivesUpError
            except OutputError as error:
                assert not may_go
                assert str(error).startswith("expected a place")  # noqa: PT017
                assert tree(top) == was
            except (GivesUpError, OSError) as error:
                assert fails or not fits, error  # noqa: PT017
                assert tree(top) == was
            else:
                assert may_go
                assert not fails
                now = tree(top)
                new = [p for p in (place, *place.rglob("*")) if p.is_file()]
                assert {p.read_bytes() for p in new} == {b"new"}
                assert len(new) == (2 if form == "folder" else 1)
                assert {stat.S_IMODE(p.stat().st_mode) for p in new} == {0o666 & ~umask}
                assert not [n for n in now if n.endswith(".partial")]
                kept = {n: v for n, v in was.items() if top / n != place}
                assert kept.items() <= now.items()
    finally:
        os.umask(before_umask)


def test_a_disk_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    def full(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "to_disk", full)
    with (
        pytest.raises(OSError, match="No space"),
        whole(tmp_path / "a" / "b", Output(is_lasting=True)) as path,
    ):
        write(path, "folder")
    assert list(tmp_path.iterdir()) == []


def test_who_may_not_write_there_hears_of_it_before_there_is_work_to_lose(tmp_path):
    for place in ("/proc/nothing/can/be/written/here", tmp_path / "file" / "out"):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"proc|file"), whole(place, Output()):
            pytest.fail("the work begins")


def test_what_came_meanwhile_stays(tmp_path):
    def write_late(out):
        with whole(out, Output()) as path:
            path.write_text("late")
            out.write_text("first")

    with pytest.raises(SecateurError, match="which exists"):
        write_late(tmp_path / "out")
    assert tree(tmp_path).keys() == {"out"}
    assert (tmp_path / "out").read_text() == "first"


def test_a_killed_writer_leaves_what_can_be_told_apart(tmp_path):
    code = (
        "import os, sys\nfrom secateur.search.core.files import Output, whole\n"
        "with whole(sys.argv[1], Output()) as path:\n"
        "    path.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "my.out"], check=False)
    (left,) = tmp_path.iterdir()
    assert is_partial(left)
    assert named(str(left)) == str(tmp_path / "my.out")
    assert left_behind(tmp_path / "my.out") == [left]
    assert left_behind(tmp_path / "out") == left_behind(tmp_path / "none" / "out") == []
    with whole(tmp_path / "my.out", Output()) as path:
        path.write_text("all")
    assert sorted(p.name for p in tmp_path.iterdir()) == [left.name, "my.out"]


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SecateurError, match="expected"):
        check_place(tmp_path / "loop", Output(replaces=lambda _file: True))


class TestRunFolders:
    """A run folder may come from someone else: no link leads out of it, and its archive is no output."""

    @pytest.fixture
    def run(self, tmp_path):
        from exported import make_run

        make_run(tmp_path / "run")
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("command", "name"),
        [(("report",), "a.html"), (("plot", "--kind", "history"), "a.svg"), (("snapshot",), "a.parquet")],
    )
    def test_no_output_goes_through_their_links(self, run, tmp_path, command, name):
        first = in_process(command[0], run, *command[1:], "-o", tmp_path / name)
        assert first.returncode == 0
        assert first.stderr.startswith("next: secateur ")
        was = (tmp_path / name).read_bytes()
        (run / name).symlink_to(tmp_path / name)
        (run / "deep").symlink_to(tmp_path)
        for place in (run / name, run / "deep" / name, tmp_path / "run" / ".." / "run" / name):
            done = in_process(command[0], run, *command[1:], "-o", place)
            assert done.returncode == 2
            assert "leads out of the run folder" in done.stderr
        assert (tmp_path / name).read_bytes() == was

    @pytest.mark.parametrize("command", ["report", "snapshot", "plot"])
    def test_what_is_no_earlier_output_of_that_kind_stays(self, run, tmp_path, command):
        mine = tmp_path / "mine.svg"
        mine.write_text("<html><title>my own page")
        for place in (run / "archive.sqlite", mine):
            was = place.read_bytes()
            done = in_process(command, run, "-o", place)
            assert done.returncode == 2
            assert len(done.stderr.splitlines()) == 1
            assert ("expected a file" in done.stderr) or place.suffix not in (".svg", ".html")
            assert place.read_bytes() == was

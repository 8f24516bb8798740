"""Jobs on a real job server: submit, follow, stop, submit again, and one line for every mistake."""

import contextlib
import http.server
import inspect
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import secateur
from secateur.cli.search import search
from secateur.results.archive.archive import Archive
from secateur.search.settings import SearchSettings
from secateur.service.submission import BESIDE, FOLDERS, ON_CLUSTER, Submission
from support import ROOT, in_process
from support import secateur as secateur_process

SETTINGS = {"sparsity": 0.5, "budget": 200, "batch": 8, "seed": 7, "threads": 1}
WORKERS = ("--workers", "1")
MARK = "SECATEUR_TEST_CLUSTER"  # a variable that every process of the cluster inherits
# What may differ between two runs of one search.
OF_MACHINES = ["seconds", "worker", "attempts"]


def write_config(path, **settings):
    lines = (f"{name} = {json.dumps(str(v) if isinstance(v, Path) else v)}" for name, v in settings.items())
    path.write_text("\n".join(["[search]", *lines]))
    return path


def refused(*arguments):
    """Run a command that has to fail in one line on standard error; return the line."""
    done = in_process(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


# A cluster of one machine -----------------------------------------------------------------------


@dataclass
class Head:
    """A head node that is being started."""

    address: str
    process: subprocess.Popen
    log: Path

    def wait(self):
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/api/jobs/", timeout=5):
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


def free_ports(count):
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def processes_of(mark):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def starting():
    """A head of its own: own home, own folder, every socket on the loopback."""
    folder = Path(tempfile.mkdtemp(prefix="sj", dir="/tmp"))  # short: sockets have paths of 107 bytes
    (folder / "home").mkdir()
    binaries = Path(sys.executable).parent
    own = {
        MARK: str(folder), "HOME": str(folder / "home"), "PATH": f"{binaries}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }  # fmt: skip
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("RAY_") and n != "PYTHONPATH"}
    head, dashboard, agent, agent_grpc, client = free_ports(5)
    command = [
        str(binaries / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0",
        "--object-store-memory=80000000", f"--temp-dir={folder / 'ray'}", f"--port={head}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of the client, before it imports Ray
        process = subprocess.Popen(
            command, env=inherited | own, stdout=log, stderr=log, start_new_session=True
        )
        yield Head(f"http://127.0.0.1:{dashboard}", process, folder / "log")
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    left = psutil.wait_procs(processes_of(str(folder)), timeout=10)[1]
    for each in left:
        each.kill()
    shutil.rmtree(folder)
    assert not left, [each.cmdline() for each in left]


@pytest.fixture(scope="module")
def config(tiny_calibration, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "search.toml"
    return write_config(path, calibration=tiny_calibration.folder, **SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(config, starting, tmp_path_factory):
    """The same search on this machine alone, while the cluster starts."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "secateur", "search", "--config", str(config), "--out", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def cluster(starting, undisturbed):
    starting.wait()
    return "--address", starting.address


@pytest.fixture(scope="module")
def story(cluster, config, tmp_path_factory):
    """A job that is stopped in the middle, beside one that cannot succeed."""
    folder = tmp_path_factory.mktemp("jobs")
    wrong = write_config(folder / "wrong.toml", calibration=folder / "nowhere", **SETTINGS)
    run = folder / "my runs" / "a"
    said = SimpleNamespace(run=run, folder=folder)
    said.submitted = in_process("submit", config, "--out", run, *WORKERS, *cluster, "--id", "first")
    said.watched = in_process("watch", run, "--once", "--json", *cluster)  # it may be pending yet
    deadline = time.monotonic() + 120
    while count(run) < 20:
        assert time.monotonic() < deadline, in_process("logs", "first", *cluster).stdout
        time.sleep(0.02)
    said.running = in_process("status", "first", *cluster, "--json")
    said.listed = json.loads(in_process("list", *cluster, "--json").stdout)
    said.by_id = in_process("watch", "first", "--once", *cluster)
    said.taken = refused("submit", config, "--out", folder / "b", *cluster, "--id", "first")
    said.in_use = refused("submit", config, "--out", run, *cluster)
    said.stopped = in_process("stop", "first", *cluster)
    said.trials = len(Archive(run).trials())
    said.log = in_process("logs", "first", *cluster).stdout
    said.broken = in_process("submit", wrong, "--out", folder / "c", *cluster, "--json")
    return said


@pytest.fixture(scope="module")
def again(story, cluster, config):
    """The stopped job, submitted again and followed to its end."""
    done = in_process("submit", config, "--out", story.run, *WORKERS, *cluster)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        id=done.stdout.strip(), followed=in_process("logs", done.stdout.strip(), "--follow", *cluster)
    )


def count(run):
    """Measurements of a run while it is written."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{run}/archive.sqlite?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM measurements").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


class TestAJob:
    def test_is_submitted_under_its_id(self, story):
        assert story.submitted.returncode == 0, story.submitted.stderr
        assert story.submitted.stdout == "first\n"
        assert "secateur logs first --follow" in story.submitted.stderr

    def test_has_a_status_while_it_runs(self, story):
        job = json.loads(story.running.stdout)
        assert job["id"] == "first"
        assert job["state"] == "running"
        assert job["run"] == str(story.run)
        assert job["seconds"] > 0

    def test_is_watched_from_the_moment_it_is_submitted(self, story):
        assert story.watched.returncode == 0, story.watched.stderr
        assert json.loads(story.watched.stdout)["state"] in ("pending", "beginning", "running")
        assert str(story.run) in story.by_id.stdout

    def test_is_listed_with_how_far_it_is(self, story):
        (job,) = story.listed
        assert re.fullmatch(r"\d+/\d+ candidates", job["progress"])
        assert job["best"] is None or re.fullmatch(r"kl [\d.e+-]+", job["best"])
        assert job["left"] is None or job["left"] >= 0

    def test_is_not_submitted_under_an_id_that_is_taken(self, story):
        assert "got 'first'; choose another --id" in story.taken

    def test_is_not_submitted_for_a_run_that_another_writes(self, story):
        assert f"{story.run} is being written by the job first" in story.in_use

    def test_that_is_stopped_ends_in_order(self, story):
        assert story.stopped.returncode == 0, story.stopped.stderr
        assert story.stopped.stdout.startswith("first  stopped after ")
        assert "what was measured is kept" in story.log
        assert "Traceback" not in story.log

    def test_that_is_stopped_leaves_a_whole_archive(self, story, undisturbed, again):
        whole = Archive(undisturbed).trials()
        assert 0 < story.trials < len(whole)

    def test_cannot_be_stopped_twice(self, story, cluster):
        assert "there is nothing to stop: the job first has already been stopped" in refused(
            "stop", "first", *cluster
        )

    def test_that_is_submitted_again_goes_on_to_the_end(self, again):
        assert again.followed.returncode == 0, again.followed.stderr
        assert again.id.startswith("secateur-a-")
        assert "front of" in again.followed.stdout
        assert f"{again.id}  succeeded after" in again.followed.stderr

    def test_that_was_stopped_equals_the_undisturbed_run(self, again, story, undisturbed):
        with Archive(story.run) as mine, Archive(undisturbed) as other:
            assert mine.fact("has_ended")
            assert mine.rows("PRAGMA integrity_check") == [("ok",)]
            assert mine.frame()["worker"].notna().any()
            assert other.frame()["worker"].isna().all()
            pd.testing.assert_frame_equal(
                mine.frame().drop(columns=OF_MACHINES), other.frame().drop(columns=OF_MACHINES)
            )
            by_layer = "SELECT * FROM by_layer ORDER BY key"
            assert mine.rows(by_layer) == other.rows(by_layer)

    def test_that_fails_says_why(self, story, again, cluster):
        name = json.loads(story.broken.stdout)["id"]
        followed = in_process("logs", name, "-f", *cluster)
        assert followed.returncode == 1
        done = in_process("status", name, *cluster)
        assert f"{name}  failed after" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("secateur: expected")
        assert str(story.folder / "nowhere") in done.stdout

    def test_is_listed_the_latest_first(self, story, again, cluster):
        jobs = json.loads(in_process("list", "--json", *cluster).stdout)
        broken = json.loads(story.broken.stdout)["id"]
        assert [job["id"] for job in jobs] == [again.id, broken, "first"]
        assert jobs[0]["state"] == "succeeded"
        assert jobs[0]["progress"].startswith(f"{SETTINGS['budget']}/")
        assert jobs[0]["best"].startswith("kl ")
        assert jobs[1]["progress"] is None  # it never began
        lines = in_process("list", *cluster).stdout.splitlines()
        assert [line.split()[0] for line in lines] == [again.id, broken, "first"]

    def test_takes_its_plugins_along(self, again, cluster, config, tmp_path):
        shutil.copy(ROOT / "examples" / "plugin.py", tmp_path)
        options = {"plugins": [str(tmp_path / "plugin.py")], "searcher": "climber", "budget": 14,
                   "objectives": ["kl", "worst_layer"], "start_from": ["cbrt(abs(W)) * K"]}  # fmt: skip
        wanted = {**tomllib.loads(config.read_text())["search"], **options}
        own = write_config(tmp_path / "own.toml", **wanted)
        # In a process of its own: what a plugin adds stays there.
        done = secateur_process("submit", own, "--out", tmp_path / "run", *WORKERS, *cluster)
        assert done.returncode == 0, done.stderr
        (tmp_path / "plugin.py").unlink()  # the job has a copy
        followed = in_process("logs", done.stdout.strip(), "--follow", *cluster)
        assert followed.returncode == 0, followed.stdout
        assert "worst layer" in followed.stdout
        with sqlite3.connect(f"file:{tmp_path / 'run' / 'archive.sqlite'}?mode=ro", uri=True) as db:
            found = db.execute("SELECT status FROM trials WHERE metric = 'cbrt(abs(W)) * K'").fetchall()
        assert found == [("measured",)]

    def test_is_submitted_by_an_installed_wheel(self, again, cluster, config, installed, tmp_path):
        done = installed(
            "submit", config, "--out", tmp_path / "run", *WORKERS, *cluster, "--id", "of-a-wheel"
        )
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 120
        while count(tmp_path / "run") < 5:
            assert time.monotonic() < deadline, installed("logs", "of-a-wheel", *cluster).stdout
            time.sleep(0.1)
        done = installed("stop", "of-a-wheel", *cluster)
        assert done.stdout.startswith(("of-a-wheel  stopped after", "of-a-wheel  succeeded after")), done

    @pytest.mark.parametrize("command", ["status", "logs", "stop"])
    def test_that_nobody_knows_is_one_line(self, story, cluster, command):
        assert "got 'frist'; did you mean 'first'?" in refused(command, "frist", *cluster)

    def test_has_an_id_that_fits_into_an_address(self, cluster, config):
        assert "expected an id of letters" in refused(
            "submit", config, "--out", "/shared/a", "--id", "a/b", *cluster
        )


class TestAnAddress:
    """What answers, or does not, where a cluster should be."""

    @pytest.fixture
    def answering(self):
        @contextlib.contextmanager
        def start(status, body):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *_):
                    pass

            with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
                threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
                yield f"http://127.0.0.1:{server.server_port}"
                server.shutdown()

        return start

    def test_without_a_cluster(self):
        (port,) = free_ports(1)
        line = refused("list", "--address", f"127.0.0.1:{port}")
        assert f"no cluster answers at http://127.0.0.1:{port} (Connection refused)" in line

    def test_from_the_environment(self, monkeypatch):
        (port,) = free_ports(1)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}/")
        assert f"no cluster answers at http://127.0.0.1:{port} (" in refused("list")

    @pytest.mark.parametrize(
        "address",
        ["auto", "ray://127.0.0.1:10001", "http://", "file:///etc/passwd", "http://127.0.0.1:x", "http://[::1",
         "http://127.0.0.1:99999999", "http://user:word@127.0.0.1:1", "http://127.0.0.1:1/\r\nX: y",
         f"http://{'a' * 70}.x", "http://\u2100.com", "http://127.0.0.1:\u0661"],
    )  # fmt: skip
    def test_that_is_none(self, address):
        assert "expected the http address of a job server" in refused("list", "--address", address)

    @pytest.mark.parametrize(
        ("status", "body"),
        [(404, b"no"), (200, b"<html>"), (200, b"[]"), (200, b"[" * 100_000), (200, b"1" * (2 << 20))],
    )
    def test_of_something_else(self, answering, status, body):
        with answering(status, body) as address:
            assert "expected the job server of a Ray cluster" in refused("list", "--address", address)

    @pytest.mark.parametrize("words", [("list",), ("status", "x"), ("logs", "../../x"), ("stop", "x")])
    def test_that_answers_all_alike(self, answering, words):
        with answering(200, b'{"ray_version": "2.60.0", "version": "4"}') as address:
            assert address in refused(*words, "--address", address)

    @pytest.mark.parametrize("status", [401, 403])
    def test_that_wants_a_token(self, answering, status, starting):
        with answering(status, b"Unauthorized") as address:
            line = refused("list", "--address", address)
        assert "wants a token, or another one; export RAY_AUTH_MODE=token" in line

    def test_without_rays_client(self, answering, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray.job_submission", None)
        with answering(200, b'{"ray_version": "2.60.0"}') as address:
            assert "pip install 'secateur[cluster]'" in refused("list", "--address", address)


class TestASubmission:
    def test_names_places_that_a_cluster_sees(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = write_config(tmp_path / "s.toml", calibration="/shared/cal")
        assert "expected an absolute path for --out, got runs/a" in refused(
            "submit", config, "--out", "runs/a"
        )
        assert "expected a run folder: give --out" in refused("submit", config)
        config = write_config(tmp_path / "s.toml", calibration="cal", out="/shared/a")
        assert "expected an absolute path for calibration, got cal" in refused("submit", config)
        assert "choose --workers 2" in refused("submit", config, "--workers", 3, "--shards", 2)
        assert "expected at least 1 shard, got 0" in refused("submit", config, "--shards", 0)
        config = write_config(tmp_path / "s.toml", sparsity=0.6)
        assert "expected the setting calibration" in refused("submit", config, "--out", "/shared/a")
        (tmp_path / "model").mkdir()
        config = write_config(tmp_path / "s.toml", calibration="/shared/cal", out="/shared/a", model="model")
        assert "expected an absolute path for model, got model" in refused("submit", config)

    def test_is_checked_before_it_is_sent(self, tmp_path):
        config = write_config(tmp_path / "s.toml", calibration="/shared/cal", out="/shared/a", sparsty=0.6)
        assert "unknown setting 'sparsty'; did you mean 'sparsity'?" in refused("submit", config)
        assert "expected a TOML file" in refused("submit", tmp_path / "none.toml")
        places = {"calibration": "/shared/cal", "out": "/shared/a"}
        config = write_config(tmp_path / "s.toml", **places, workers=3, shards=2)
        assert "choose --workers 2" in refused("submit", config)
        for name, value, says in (
            ("shards", "two", "expected a whole number for shards, got 'two'"),
            ("shards", 2.5, "expected a whole number for shards, got 2.5"),
            ("timeout", "long", "expected a number for timeout, got 'long'"),
            ("workers", [2], "expected a whole number or auto for workers, got [2]"),
        ):
            config = write_config(tmp_path / "s.toml", **places, **{name: value})
            assert says in refused("submit", config)

    def test_of_the_documentation_can_be_sent(self, tmp_path):
        (text,) = re.findall(r"```toml\n(.+?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
        (tmp_path / "search.toml").write_text(text)
        assert Submission.read(tmp_path / "search.toml", Path("/shared/runs/a")).out == Path("/shared/runs/a")

    def test_takes_all_settings_of_a_search(self):
        known = set(inspect.signature(search).parameters) - {"config", "as_json", "trust_remote_code"}
        assert set(BESIDE) == known - set(SearchSettings.model_fields)

    def test_takes_the_config_to_the_cluster(self, tmp_path):
        config = write_config(tmp_path / "my search.toml", calibration="/shared/cal", out="/shared/my runs/a")
        submission = Submission.read(config, options=["--workers", "8"])
        assert submission.entrypoint.startswith("exec python -m secateur search --config 'my search.toml'")
        assert "--out '/shared/my runs/a'" in submission.entrypoint
        assert submission.entrypoint.endswith(" ".join([*ON_CLUSTER, "--workers 8"]))

    def test_holds_the_package_and_nothing_else(self, tmp_path):
        config = write_config(tmp_path / "s.toml", calibration="/shared/cal", out="/shared/a")
        Submission.read(config).stage(tmp_path / "stage")
        tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
        assert set(FOLDERS) == {name.split(".")[1] for name in tools["packages"] if "." in name}
        places = {name: ROOT.joinpath(*name.split(".")[1:]) for name in tools["packages"]}
        packaged = {path for place in places.values() for path in place.glob("*.py")}
        packaged |= {places[name] / file for name, files in tools["package-data"].items() for file in files}
        assert len(packaged) > 130
        staged = {p.relative_to(tmp_path / "stage") for p in (tmp_path / "stage").rglob("*") if p.is_file()}
        about = Path(f"secateur-{secateur.__version__}.dist-info/METADATA")
        assert staged == {Path("s.toml"), about, *("secateur" / path.relative_to(ROOT) for path in packaged)}

    def test_runs_where_it_is_staged(self, tmp_path):
        config = write_config(tmp_path / "s.toml", calibration="/shared/cal", out="/shared/a")
        (tmp_path / "stage").mkdir()
        Submission.read(config).stage(tmp_path / "stage")
        code = (
            "import secateur.cli.main, importlib.metadata as m; print(secateur.__file__); "
            "print(m.version('secateur')); print(m.distribution('secateur').locate_file('').absolute())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path / "stage", capture_output=True, text=True, check=True
        )
        file, version, place = done.stdout.split()
        assert Path(file).parent == tmp_path / "stage" / "secateur"
        assert version == secateur.__version__
        assert Path(place) == tmp_path / "stage"

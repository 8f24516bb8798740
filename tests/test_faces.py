"""Whatever is typed, configured or archived: one sentence and exit code 2, or a result; never a traceback."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from secateur.cli import terminal
from secateur.metrics_dsl.printable import one_line, printable
from support import ROOT, in_process, save_model, tiny_config, wait_for

NOWHERE = "/nowhere/at-all"
ADDRESS = ("--address", "http://127.0.0.1:1")
# What a command needs before an option is looked at; the model and folders are nowhere, so that none runs.
COMMANDS = {
    "plan": (NOWHERE,), "calibrate": (NOWHERE, "--out", "OUT"), "measure": (NOWHERE, "wanda"),
    "search": (NOWHERE, "--out", "OUT"), "resume": (NOWHERE,), "front": (NOWHERE,), "watch": (NOWHERE,),
    "compare": (NOWHERE,), "metrics": (), "report": (NOWHERE,), "plot": (NOWHERE, "-o", "OUT"),
    "evaluate": (NOWHERE,), "snapshot": (NOWHERE, "-o", "OUT"), "prune": (NOWHERE, "-o", "OUT"),
    "export": (NOWHERE, "best", "--to", "json", "-o", "OUT"), "import": (NOWHERE,),
    "submit": ("CONFIG", "--out", "/r", *ADDRESS), "list": ADDRESS, "status": ("x", *ADDRESS),
    "logs": ("x", *ADDRESS), "stop": ("x", *ADDRESS),
}  # fmt: skip
HOSTILE = (
    "", "-1", "1e400", "nan", "9" * 5000, "\u0664", "\x1b[31m\x07\n", "\udce9", "\u202e/x", "~nosuchuser/x",
    "(" * 3000, "x" * 100_000,
)  # fmt: skip
VALUES = (
    "true", "nan", "9" * 4000, "1979-05-27", "{ a = [1] }", '[["a"], 2]', '"\\u0000"', "[" * 90 + "]" * 90,
)  # fmt: skip
DARK = re.compile(r"[^\n\t -~\xa0-\uffff\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def options_of(command):
    from secateur.cli.main import app
    from typer.main import get_command

    found = get_command(app).commands[command].params
    return [p for p in found if p.param_type_name == "option" and not getattr(p, "is_flag", False)]


def is_a_sentence(done, *words):
    """Check that a command ended with a result or with one line, which a terminal shows and does not obey."""
    assert done.returncode in (0, 2), (words, done.stderr[-2000:])
    assert "Traceback" not in done.stderr, (words, done.stderr[-2000:])
    assert not DARK.search(done.stdout + done.stderr), words
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1, (words, done.stderr)
        assert len(done.stderr) < 3000, words


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "c.toml").write_text('[search]\ncalibration = "/c"\n')
    return tmp_path


def typed(words, place):
    return [{"OUT": place / "out", "CONFIG": place / "c.toml"}.get(word, word) for word in words]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_takes_any_text_or_says_what_it_expects(place, command):
    for turn, option in enumerate(options_of(command)):
        for value in HOSTILE[turn % 3 :: 3]:  # each kind for each command, in turn
            is_a_sentence(in_process(command, *typed(COMMANDS[command], place), option.opts[0], value), value)
    for number, word in enumerate(COMMANDS[command]):
        if word == NOWHERE:
            for value in HOSTILE:
                words = [*COMMANDS[command][:number], value, *COMMANDS[command][number + 1 :]]
                is_a_sentence(in_process(command, *typed(words, place)), words)
    assert sorted(p.name for p in place.iterdir()) == ["c.toml"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if any(o.name == "config" for o in options_of(c))])
def test_every_setting_of_a_file_takes_any_value_or_says_what_it_expects(place, command):
    for turn, option in enumerate(options_of(command)):
        for value in VALUES[turn % 2 :: 2]:
            (place / "c.toml").write_text(f"[{command}]\n{option.name} = {value}\n")
            words = (*typed(COMMANDS[command], place), "--config", place / "c.toml")
            is_a_sentence(in_process(command, *words), option.name, value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("measure", "CAL", "wanda", "--device", "meta"), "expected the device auto, cpu, cuda, cuda:N"),
        (("measure", "CAL", "wanda", "--device", "cuda:99"), "expected"),
        (("measure", "CAL", "wanda", "--pattern", "\u0662:\u0664"), "expected the pattern unstructured"),
        (("measure", "CAL", "0x1F*W"), "column 1: expected a number such as 0.5"),
        (("measure", "CAL", "W*1_0"), "column 3: expected a number such as 0.5"),
        (("measure", "CAL", "W*1e300*1e300"), "finite"),
        (("search", "CAL", "--out", "OUT", "--batch", 10**12), "batch: input should be less than"),
        (("search", "CAL", "--out", "OUT", "--seeds", 10**9), "expected at least 1 seed and at most 10,000"),
        (("search", "CAL", "--out", "OUT", "--rungs", "inf"), "growing numbers of at least 8 tokens"),
        (("search", "CAL", "--out", "OUT", "--ray", "local", "--shards", 10**9), "1 shard and at most"),
        (("calibrate", "MODEL", "--out", "OUT", "--tokens", 10**12), "at most 100,000,000"),
        (("prune", "MODEL", "--out", "OUT", "--tokens", 10**12), "at most 100,000,000"),
        (("prune", "MODEL", "--out", "OUT", "--dtype", "int4"), "expected the type float32 or bfloat16"),
        (("plan", "MODEL", "--gpu-memory", "9" * 400 + "TiB"), "expected a size of memory"),
        (("plan", "MODEL", "--gpu-memory", "."), "expected a size of memory"),
        (("plan", "MODEL", "--budget", 10**30), "expected a budget of at least 1 candidate and at most"),
        (("plan", "MODEL", "--gpus", 0, "--threads", 10**9), "at most 1,024"),
    ],
)  # fmt: skip
def test_what_nobody_means_is_refused_before_memory_is_taken(
    tiny_calibration, tiny_model, tmp_path, words, sentence
):
    places = {"CAL": tiny_calibration.folder, "MODEL": tiny_model, "OUT": tmp_path / "out"}
    began = time.monotonic()
    done = in_process(*(places.get(word, word) for word in words))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []


# What a terminal obeys -----------------------------------------------------------------------------

EVIL = "a\x1b]0;title\x07\x9b31m\u202eb\u2066\r\nc\u2028"


def test_what_is_printed_is_shown_and_not_obeyed():
    assert printable("W\x1b[31m\x9b\u202e\udce9") == r"W\x1b[31m\x9b\u202e\udce9"
    assert printable("é ü 中 🎉\n\tx") == "é ü 中 🎉\n\tx"
    assert one_line("a\nb") == r"a\nb"
    assert len(one_line("\x1b" * 10**6)) < 2100


def test_no_text_of_an_archive_reaches_the_terminal_raw(tiny_calibration, tmp_path):
    run = tmp_path / "run"
    words = ("--budget", 12, "--stage", "screen", "--objectives", "layer_error,size", "--out", run)
    assert in_process("search", tiny_calibration.folder, *words).returncode == 0
    with contextlib.closing(sqlite3.connect(run / "archive.sqlite")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        each = {table: db.execute(f"PRAGMA table_info({table})").fetchall() for table in tables}
    columns = [(table, c[1]) for table, found in each.items() for c in found if c[2] == "TEXT"]
    assert ("measurements", "worker") in columns
    for number, (table, column) in enumerate(columns):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(run, copy)
        with contextlib.closing(sqlite3.connect(copy / "archive.sqlite")) as db, db:
            try:
                db.execute(f'UPDATE OR IGNORE {table} SET "{column}" = "{column}" || ?', (EVIL,))
            except sqlite3.OperationalError:  # it holds JSON: into its texts, none of which is true or null
                db.execute(f"""UPDATE {table} SET "{column}" = replace("{column}", 'w', 'w\\u001b[1m')""")
        for command in (("front", copy), ("watch", copy, "--once"), ("compare", run, copy), ("resume", copy),
                        ("front", copy, "--json")):  # fmt: skip
            done = in_process(*command)
            assert "Traceback" not in done.stderr, (table, column, command, done.stderr[-1500:])
            assert not DARK.search(done.stdout + done.stderr), (table, column, command)


def test_commands_print_in_one_way():
    for path in (ROOT / "cli").glob("*.py"):
        assert not re.search(r"\becho\(|(?<![\w_])print\(", path.read_text(encoding="utf-8")), path


def test_a_live_view_escapes_too(capsys):
    from pathlib import Path

    from rich.console import Console
    from secateur.results.terminal.watch import Look
    from secateur.results.terminal.watch_text import _rendered

    Console().print(_rendered(Look(Path(f"/{EVIL}"), "running")))
    assert not DARK.search(capsys.readouterr().out)


# The process ---------------------------------------------------------------------------------------


def command(*words, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "secateur", *map(str, words)],
        capture_output=True, text=True, timeout=60, env=environment, errors="surrogateescape", **options,
    )  # fmt: skip


def test_an_ascii_locale_never_crashes():
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    is_a_sentence(command("front", "\u00e9t\u00e9", env=plain))
    assert command("metrics", env=plain).returncode == 0
    done = command("metrics", "--allocations", env=plain, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_output_that_cannot_be_written_is_a_sentence_or_nothing():
    shell = ["sh", "-c", f"{sys.executable} -m secateur metrics --language >/dev/full"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected room for what is printed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "secateur", "metrics"], stdout=closed, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.parametrize("redirection", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(redirection):
    shell = f"{sys.executable} -m secateur front {NOWHERE} {redirection}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_nothing_is_read_from_standard_input(tmp_path):
    from secateur.service.submission import FOLDERS

    words = re.compile(r"(?<![\w.])input\(|\.prompt\(|\.confirm\(|sys\.stdin\.read|getpass")
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        assert not words.search(path.read_text(encoding="utf-8")), path
    code = "import os\nfrom secateur.cli import terminal\nterminal.begin()\nprint(os.read(0, 9), input())"
    done = subprocess.run([sys.executable, "-c", code], input="yes\n", capture_output=True, text=True)
    assert "EOFError" in done.stderr  # a question has no answer
    assert "yes" not in done.stdout


def test_a_refused_command_says_one_line_however_far_it_was(tmp_path, text_file):
    """Lines on progress wait until it is clear that they are not all there is to say."""
    model = save_model(tiny_config(), tmp_path / "model")
    options = ("--text", text_file, "--tokens", 64, "--sequence-length", 64, "-o", tmp_path / "p")
    words = ("prune", model, *options)
    refused = in_process(*words, "--pattern", "3:7")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    done = in_process(*words)
    assert done.returncode == 0
    assert "pruned 3 of 3 blocks" in done.stderr


def test_lines_on_progress_do_not_wait_for_long(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "HOLD", 0.05)
    monkeypatch.setattr(terminal, "_held", terminal._Held())
    terminal.report_step("loading")
    assert capsys.readouterr().err == ""
    time.sleep(0.5)
    terminal.report_step("reading")
    assert capsys.readouterr().err == "loading\nreading\n"


# Signals -------------------------------------------------------------------------------------------

SEARCH = ("--sparsity", "0.5", "--budget", "200", "--batch", "8", "--seed", "7")


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGHUP,), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT,) * 5],
)
def test_signals_in_quick_succession_end_a_search_in_order(tiny_calibration, tmp_path, numbers):
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "secateur", "search", tiny_calibration.folder, *SEARCH, "--out", folder]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: process.poll() is None, folder, 10)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.01)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"secateur resume {folder}" in errors.splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", ["calibrate", "prune"])
def test_a_signal_ends_what_writes_a_folder_and_leaves_none(command, tiny_model, text_file, tmp_path):
    out = {"calibrate": "--out", "prune": "-o"}[command]
    words = [sys.executable, "-m", "secateur", command, tiny_model, "--text", text_file, "--tokens", "8192",
             "--sequence-length", "64", out, tmp_path / "new"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "secateur: interrupted"
    assert list(tmp_path.iterdir()) == []


def wait_until_it_listens(process):
    """Wait for the first lines of the program: before them, a signal is Python's."""
    while True:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        (caught,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
        if caught & (1 << (signal.SIGHUP - 1)):
            return
        time.sleep(0.005)


@pytest.mark.parametrize("seconds", [0, 0.3, 1.5])
def test_a_signal_while_libraries_are_imported_is_one_line(tiny_calibration, tmp_path, seconds):
    words = [sys.executable, "-m", "secateur", "search", tiny_calibration.folder, *SEARCH, "--out",
             tmp_path / "run"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_it_listens(process)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors.splitlines()[-1]


STUCK = """
import sys, time
from secateur.cli import main, terminal
def stuck():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally: time.sleep(60)
main._command = stuck
main.main()
"""


def test_a_second_signal_a_second_later_ends_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(terminal.GRACE + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "secateur: ended at once\n"


def test_nohup_is_heard():
    code = "import signal as s\nfrom secateur.cli import terminal\nterminal.begin()\nprint([s.getsignal(1)])"
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "SIG_IGN" in done.stdout


def test_an_interrupt_that_a_destructor_swallows_comes_again():
    code = (
        "import os, signal, time\nfrom secateur.cli import terminal\nterminal.begin()\n"
        "class Odd:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)\n"
        "try:\n    Odd()\n    time.sleep(5)\nexcept KeyboardInterrupt:\n    print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("ended\n", "")


# Temporary folders ---------------------------------------------------------------------------------

LEFT = """
import os, sys
from secateur.search.core.scratch import scratch
with scratch(sys.argv[1]) as folder:
    (folder / "large").write_bytes(bytes(1000))
    print(folder, flush=True)
    os.kill(os.getpid(), 9) if sys.argv[2] == "dies" else sys.stdin.read()
"""


def test_temporary_folders_of_the_dead_are_swept_and_no_others(tmp_path):
    from secateur.search.core.scratch import scratch

    words = [sys.executable, "-c", LEFT, tmp_path]
    lives = subprocess.Popen([*words, "lives"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    living = lives.stdout.readline().strip()
    dead = subprocess.run([*words, "dies"], capture_output=True, text=True).stdout.strip()
    others = ["secateur-notes", "secateur-12345678", "other-12345678", "secateur-abcdefgh"]
    for name in others:  # of another prefix, or without a lock of ours
        (tmp_path / name).mkdir()
    (tmp_path / "secateur-abcdefgh" / "owner.lock").symlink_to(tmp_path / "secateur-notes")
    (tmp_path / "secateur-zzzzzzzz").symlink_to(tmp_path / "secateur-notes")
    assert os.path.isdir(dead)
    with scratch(tmp_path) as mine:
        assert mine.stat().st_mode & 0o077 == 0
        assert not os.path.exists(dead)
        assert os.path.isfile(f"{living}/large")
    lives.communicate("")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "secateur-zzzzzzzz"])


def test_what_a_dead_owner_left_running_in_its_folder_is_ended_and_who_reads_there_is_not(tmp_path):
    from secateur.search.core.scratch import sweep

    words = [sys.executable, "-c", LEFT, tmp_path, "dies"]
    dead = Path(subprocess.run(words, capture_output=True, text=True).stdout.strip())
    code = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, dead / "large", how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for how in ("a", "r")
    ]
    for process in both:
        process.stdout.readline()
    sweep(tmp_path)
    assert not dead.exists()
    assert both[0].wait(10) == -signal.SIGKILL
    assert both[1].poll() is None
    for process in both:
        process.communicate()


def test_a_temporary_folder_whose_owner_died_while_it_was_made_is_swept_a_minute_later(tmp_path):
    from secateur.search.core.scratch import sweep

    for name in ("secateur-aaaaaaaa", "secateur-bbbbbbbb", "secateur-cccccccc", "secateur-dddddddd"):
        (tmp_path / name).mkdir()
    (tmp_path / "secateur-bbbbbbbb" / ".owner.lock").touch()
    (tmp_path / "secateur-cccccccc" / "notes").write_text("mine")
    for name in ("secateur-aaaaaaaa", "secateur-bbbbbbbb", "secateur-cccccccc"):
        os.utime(tmp_path / name, (0, time.time() - 120))
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["secateur-cccccccc", "secateur-dddddddd"]
    assert (tmp_path / "secateur-cccccccc" / "notes").exists()

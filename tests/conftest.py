"""Fixtures: a tiny model for behaviour, the real one for figures."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# On tiny matrices two threads wait for each other far longer than one computes, in processes of tests too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import secateur
import torch
from hypothesis import settings
from secateur.workers.calibrate.calibration import CalibrationRequest, calibrate
from secateur.workers.calibrate.folder import Calibration
from secateur.workers.measure.local_evaluator import LocalEvaluator
from support import ROOT, save_model, small_request, tiny_config

# Two runs of one commit draw the same examples and say the same; --hypothesis-profile=many looks further.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("many", max_examples=5000, deadline=None)
settings.load_profile("same")

GGUF = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items):
    """Have tests of the real model, which take longest, come first."""
    items.sort(key=lambda item: item.get_closest_marker("model") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Give tests of the real model the cores that no other test runs on, and the others one."""
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = max(1, len(os.sched_getaffinity(0)) // beside)
    torch.set_num_threads(cores if item.get_closest_marker("model") else 1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """The project's own prose, some thousand words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "LICENSE").read_text() * 2)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_model(tiny_config(), tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_calibration(tiny_model, text_file, tmp_path_factory) -> Calibration:
    return calibrate(small_request(tiny_model, text_file), tmp_path_factory.mktemp("tiny") / "calibration")


@pytest.fixture(scope="session")
def tiny_evaluator(tiny_calibration):
    evaluator = LocalEvaluator(tiny_calibration)
    yield evaluator
    evaluator.close()


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct; fails if it cannot be had, unless SECATEUR_OFFLINE=1 is set."""
    if not GGUF.is_file():
        if os.environ.get("SECATEUR_OFFLINE") == "1":
            pytest.skip("SECATEUR_OFFLINE=1, and `make model` has not fetched the model")
        subprocess.run(["make", "-C", str(ROOT), "model"], check=True)
    return GGUF


@pytest.fixture(scope="session")
def real_calibration(real_model, tmp_path_factory) -> Calibration:
    """The real model on text of its own, with fewer tokens than the demonstration."""
    request = CalibrationRequest(
        str(real_model),
        tokens=1024,
        selection_tokens=512,
        holdout_tokens=512,
        sequence_length=128,
        device="cpu",
    )
    return calibrate(request, tmp_path_factory.mktemp("real") / "calibration")


@pytest.fixture(scope="session")
def real_evaluator(real_calibration):
    evaluator = LocalEvaluator(real_calibration)
    yield evaluator
    evaluator.close()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A wheel of the files that git knows, so that nothing of this checkout slips in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", out, source], check=True)
    (path,) = out.glob("secateur-*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Runs the wheel's command in a fresh environment that borrows our libraries, but not our package."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, wheel], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # A folder in a .pth file is searched, but not its own .pth files, such as that of our editable install.
    (Path(site.stdout.strip()) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments, module="secateur"):
        command = [python, *(["-m", module] if module else []), *map(str, arguments)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)

    place = run("-c", "import secateur; print(secateur.__file__)", module="")
    assert str(folder) in place.stdout, place.stderr
    return run


@pytest.fixture
def own_tables():
    """Leave the tables as they were: in one process a name that was added stays."""
    from secateur.metrics_dsl import canonical, order, plugins

    for name in filter(str.isupper, secateur.__all__):  # all tables are made, and Ray is not imported
        getattr(secateur, name)
    before = [(table.rows, dict(table.rows)) for table in plugins._tables]
    yield
    for rows, kept in before:
        rows.clear()
        rows.update(kept)
    for state in (plugins._used, plugins._origins, plugins._filled):
        state.clear()
    for cached in (canonical.canonical, canonical.factors_of, canonical.terms_of, order.order_form):
        cached.cache_clear()

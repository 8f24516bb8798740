"""The connection to a Ray cluster, and what is checked before anything starts there."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...metrics_dsl.printable import one_line
from ...search.core.scratch import scratch
from ..calibrate.folder import Calibration, CalibrationError
from ..measure.worker import WorkerError
from .actor import look_around
from .dispatch import reason_of
from .settings import Cluster

_LONGEST_PLACE = 25  # characters
_STORE_BYTES = 1 << 29  # of shared memory on one machine, for the hidden states between shards
_LOOK_SECONDS = 120.0
_REACH_SECONDS = 5.0
_END_SECONDS = 10.0
_TOKEN_HINT = (
    "if the cluster wants a token, export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to a cluster, which ends with the connection if it was started for it.

    Args:
        address: ``local`` starts Ray on this machine, ``auto`` joins the cluster this machine belongs to,
            anything else is a cluster's address. A connection that there is already is used.

    Raises:
        WorkerError: When there is no such cluster.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    _be_quiet()
    _check_there(address)
    folder: Path | None = None
    with ExitStack() as opened:
        if address == "local":
            # Of this user alone, and short: the names of Ray's sockets have room for no more.
            place = tempfile.gettempdir()
            folder = opened.enter_context(scratch(place if len(place) <= _LONGEST_PLACE else "/tmp"))
            # Ray opens its own folder to everybody: it gets one inside.
            options |= {
                "include_dashboard": False,
                "_temp_dir": f"{folder}/r",
                "object_store_memory": _STORE_BYTES,
            }
        opened.callback(_end, folder)
        try:
            with _own_signals():
                ray.init(**options)
        except Exception as error:  # Ray raises Exception itself where it cannot start in time
            reason = " ".join(str(error).split())[:300]
            raise WorkerError(_no_cluster(address, reason)) from None
        yield


def _no_cluster(address: str, reason: str) -> str:
    if address == "local":
        return (
            f"Ray did not start on this machine: {reason}; try again when the machine has less to do, or "
            "leave --ray out"
        )
    return f"there is no Ray cluster at {address!r}: {reason}; {_TOKEN_HINT}"


def _end(folder: Path | None) -> None:
    """End the connection, and what was started for it in a folder: Ray forgets what did not start whole."""
    # What has lost its parent is nobody's any more: looked up first.
    left = set() if folder is None else _started(folder)
    ray.shutdown()
    deadline = time.monotonic() + _END_SECONDS
    while (left := set(filter(_is_alive, left))) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def _started(folder: Path) -> set[int]:
    """Return the processes that this one has started in a folder, and those that they have."""
    found = {p for p in _children(os.getpid()) if str(folder).encode() in _told(p, "cmdline")}
    parents = found
    while parents:
        parents = {child for parent in parents for child in _children(parent)} - found
        found = found | parents
    return found


def _children(process: int) -> set[int]:
    tasks = Path(f"/proc/{process}/task").glob("*")  # none where the system does not tell
    return {int(child) for task in tasks for child in _told(process, f"task/{task.name}/children").split()}


def _is_alive(process: int) -> bool:
    """Whether a process has not ended; one that has and that nobody has asked for is a zombie."""
    return _told(process, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"], [b"X"])


def _told(process: int, what: str) -> bytes:
    """Return what the system tells of a process; nothing where it is gone."""
    try:
        return Path(f"/proc/{process}/{what}").read_bytes()
    except OSError:
        return b""


def _check_there(address: str) -> None:
    """Check that something listens where a cluster should be: Ray would try for minutes."""
    if address == "auto":  # as Ray finds it
        file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        address = os.environ.get("RAY_ADDRESS") or (
            file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last for what can be no name of a machine
        reason = "no machine has such a name" if isinstance(error, UnicodeError) else error.args[-1]
        raise WorkerError(
            f"there is no Ray cluster at {one_line(address, 200)}: {reason}; start one with "
            "`ray start --head`, or use --ray local"
        ) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals that Ray would put its own in the place of."""
    if threading.current_thread() is not threading.main_thread():  # Ray leaves them alone there
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _be_quiet() -> None:
    """Keep Ray from printing on standard output, where results stand, that a worker died: we say so."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_args, **_kwargs: None


def choose_workers(cluster: Cluster, device: str) -> tuple[int, float]:
    """Return how many workers to start, and how many GPUs each has.

    Raises:
        WorkerError: When this machine has not the room for them.
    """
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = cluster.gpus
    if gpus is None:
        gpus = 1.0 if there.get("GPU") and device != "cpu" else 0.0
    if device.startswith("cuda") and not gpus:
        raise WorkerError(
            "expected GPUs for the device cuda, got a cluster without, or workers without; use --device auto "
            "or --gpus-per-worker 1"
        )
    if device.startswith("cuda:"):
        raise WorkerError(f"expected the device cuda, for Ray chooses which, got {device}")
    if device == "cpu" and gpus:
        raise WorkerError(f"expected no GPUs for the device cpu, got {gpus:g} a worker; use --device auto")
    if gpus > 1 and gpus != int(gpus):
        raise WorkerError(f"expected a part of one GPU or whole ones a worker, got {gpus:g}")
    room = sum(_room(node["Resources"], cluster.cpus, gpus) for node in _nodes())
    workers = cluster.workers or room // cluster.shards * cluster.shards
    if not workers or (workers > room and cluster.address == "local"):
        raise WorkerError(
            f"expected a cluster with room for {workers or cluster.shards} workers of {cluster.cpus:g} CPUs "
            f"and {gpus:g} GPUs, got {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, room for "
            f"{room}; choose other --workers, --cpus-per-worker or --gpus-per-worker"
        )
    return workers, gpus


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _room(there: dict[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers a node has room for; a worker's part of a GPU is of one of them."""
    slack = 1e-9  # 0.1 goes into 1 ten times
    room = int(there.get("CPU", 0) / cpus + slack)
    if gpus >= 1:
        room = min(room, int(there.get("GPU", 0) // gpus))
    elif gpus:
        room = min(room, int(there.get("GPU", 0)) * int(1 / gpus + slack))
    return room


def accelerators() -> str:
    """Return the kinds of accelerator that a cluster has, as Ray names them; empty for none."""
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    prefix = "accelerator_type:"
    return ", ".join(sorted(name.removeprefix(prefix) for name in there if name.startswith(prefix)))


def check_nodes(
    calibration: Calibration, model: str, cpus: float, gpus: float, report: Callable[[str], None]
) -> None:
    """Check that every node where workers may run sees the calibration and the model, under their paths.

    Raises:
        CalibrationError: When one does not.
        WorkerError: When secateur is not installed on one.
    """
    folder = str(calibration.folder.absolute())
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in _nodes()
        if _room(node["Resources"], cpus, gpus)
    }
    look = ray.remote(look_around)
    asked = {
        node_id: look.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(folder, model)
        for node_id in nodes
    }
    expected, sees_model, mine = look_around(folder, model)
    for node_id, reference in asked.items():
        address = nodes[node_id]
        try:
            found, has_model, versions = ray.get(reference, timeout=_LOOK_SECONDS)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise WorkerError(
                f"expected secateur on the node {address}, got {reason_of(error)}; install the same release "
                "there, or use `secateur submit`, which brings it"
            ) from None
        if found != expected:
            raise CalibrationError(
                f"expected the calibration {folder} on every node, got "
                f"{'another one' if found else 'none'} on {address}; put it where all nodes see it under the "
                "same path"
            )
        if sees_model and not has_model:
            raise CalibrationError(
                f"expected the model {model} on every node, got none on {address}; put it where all nodes "
                "see it under the same path"
            )
        if other := [f"{name} {theirs}" for name, theirs in versions.items() if theirs != mine.get(name)]:
            report(f"the node {address} has {', '.join(other)}: its figures may differ in the last digits")

"""Jobs: searches that run on a Ray cluster, submitted from anywhere that reaches its job server.

Ray is imported when a cluster is asked, for it takes a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.parser import did_you_mean
from ..results.archive.run_folder import RunFolder
from ..search.core.requests import shown
from ..search.core.scratch import scratch
from .submission import Submission

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
STOP_SECONDS = 60  # Ray kills a stopped job after 3 otherwise, in the middle of its last measurement
_PATIENCE = 10.0  # seconds that a cluster may take to answer at first
_ANSWER_SECONDS = 120.0  # and later; Ray's own client waits for ever
_MOST_BYTES = 1 << 20  # of the first answer


class JobError(SecateurError):
    """What a cluster cannot do, in a sentence."""


@dataclass(frozen=True)
class Job:
    """A job as its cluster knows it.

    Attributes:
        id: Its name on the cluster.
        state: pending, running, stopped, succeeded or failed.
        run: The run folder; empty for jobs that are not ours.
        seconds: How long it has run, or ran.
        message: What it said last, if it failed.
    """

    id: str
    state: str
    run: str
    seconds: float
    message: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("stopped", "succeeded", "failed")

    @classmethod
    def of(cls, found: JobDetails) -> Job:
        """Return what Ray says about a job, in our words."""
        state = found.status.value.lower()
        end = found.end_time or time.time() * 1000
        lines = (found.message or "").strip().splitlines() if state == "failed" else []
        return cls(
            id=found.submission_id or found.job_id or "",
            state=state,
            run=str((found.metadata or {}).get("run", "")),
            seconds=max(0.0, (end - (found.start_time or end)) / 1000),
            message=lines[-1] if lines else "",
        )


class JobServer:
    """The job server of a Ray cluster.

    Args:
        address: Its http(s) address; from RAY_API_SERVER_ADDRESS, else this machine's, if left out.

    Raises:
        JobError: When it cannot be reached, or Ray's part for jobs is not installed here.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = _http(address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS)
        _knock(self.address)
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise JobError(_NOT_INSTALLED) from None
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # its client tells of uploads and closed connections
        with (
            self._asking(),
            _variable(ADDRESS_VARIABLE, self.address),
        ):  # which Ray prefers to what it is told
            self._client = _patient(JobSubmissionClient)(self.address)

    def jobs(self) -> list[Job]:
        """Return the jobs that were submitted to the cluster, the latest first."""
        with self._asking():
            found = [job for job in self._client.list_jobs() if job.submission_id]
            return [Job.of(job) for job in sorted(found, key=lambda job: -(job.start_time or 0))]

    def job(self, name: str) -> Job:
        """Return a job.

        Raises:
            JobError: When there is none of this name.
        """
        jobs = {job.id: job for job in self.jobs()}
        if name not in jobs:
            known = did_you_mean(name, list(jobs)[:5]) if jobs else "; it has none"
            raise JobError(f"expected a job of {self.address}, got {shown(name)}{known}")
        return jobs[name]

    def submit(self, submission: Submission, name: str | None = None) -> Job:
        """Submit a search; one whose run folder exists is continued.

        Args:
            submission: What to run.
            name: The job's id; made from the run folder's name if left out.

        Raises:
            JobError: For an id that is taken or cannot be one, or a run that another job is writing.
        """
        if name is not None and not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise JobError(f"expected an id of letters, digits and . _ - alone, got {name!r}")
        jobs = self.jobs()
        if any(job.id == name for job in jobs):
            raise JobError(
                f"expected an id that no job of {self.address} has had, got {name!r}; choose another --id or "
                "leave it out"
            )
        for job in jobs:
            if job.run == str(submission.out) and not job.has_ended:
                raise JobError(
                    f"{submission.out} is being written by the job {job.id}; wait for it, stop it, or choose "
                    "another --out"
                )
        with scratch() as folder, self._asking():
            submission.stage(folder / "job")
            found = self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=name or submission.new_id(),
                # Its folder comes first on the path of the driver and of every worker.
                runtime_env={
                    "working_dir": str(folder / "job"),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
                metadata={"run": str(submission.out), "secateur": __version__},
            )
        return self.job(found)

    def logs(self, name: str) -> str:
        """Return what a job has printed so far."""
        self.job(name)
        with self._asking():
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, write: Callable[[str], Any]) -> Job:
        """Hand on what a job prints until it ends; return the ended job."""

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(name):
                write(lines)

        self.job(name)
        with self._asking():
            asyncio.run(tail())
        return self._ended(name)

    def stop(self, name: str) -> Job:
        """Ask a job to end in order, and wait until it has.

        Raises:
            JobError: When it has ended already.
        """
        job = self.job(name)
        if job.has_ended:
            raise JobError(f"there is nothing to stop: the job {name} has already {_ENDED[job.state]}")
        with self._asking():
            self._client.stop_job(name)
        return self._ended(name)

    def _ended(self, name: str) -> Job:
        """Wait for the end that is due, but not for ever; return the job as it then is."""
        deadline = time.monotonic() + STOP_SECONDS + _PATIENCE
        while not (job := self.job(name)).has_ended and time.monotonic() < deadline:
            time.sleep(0.3)
        return job

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Say in a sentence why the cluster did not do what it was asked."""
        try:
            yield
        except SecateurError:
            raise
        except Exception as error:  # Ray's own, aiohttp's and those of requests, imported by Ray alone
            kind, text = type(error).__name__, " ".join(str(error).split())
            if kind == "AuthenticationError" or getattr(error, "status", 0) in (401, 403):
                raise JobError(f"{self.address} {_WANTS_TOKEN}") from None
            if "ray[default]" in text:
                raise JobError(_NOT_INSTALLED) from None
            if isinstance(error, OSError):
                raise JobError(f"{self.address} does not answer any more ({kind}); try again") from None
            if isinstance(error, RuntimeError) or kind.endswith("Error"):
                raise JobError(f"{self.address} refused: {text[:300]}") from None
            raise


def submit(
    config: str | Path,
    out: str | Path | None = None,
    *,
    address: str | None = None,
    job_id: str | None = None,
    options: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
) -> Job:
    """Run a search on a Ray cluster; submitted again with the same run folder, it goes on.

    Args:
        config: A TOML file whose section [search] says what to search.
        out: The run folder, an absolute path on the cluster; the config's if left out.
        address: The job server's http address; as ``JobServer`` has it if left out.
        job_id: The job's id; made from the run folder's name if left out.
        options: Words that follow on the command line of the search.
        plugins: Files of plugins, which are sent along; the config's if left out.

    Raises:
        SettingsError: For settings that a search would refuse, or places that a job would not find.
        JobError: When the cluster cannot be reached or does not take the job.
    """
    submission = Submission.read(Path(config), None if out is None else Path(out), options, plugins)
    return JobServer(address).submit(submission, job_id)


def wait_for_run(
    run: Path, address: str | None, report: Callable[[str], None] | None
) -> tuple[Path, Job | None]:
    """Return a run's folder, once a job that is to write it has begun.

    Args:
        run: A run folder, or the id of a job.
        address: The job server's address; asked where the folder does not exist.
        report: Told once that the job is waited for; None does not wait.

    Returns:
        The run folder, and the job where it is pending and not waited for.

    Raises:
        JobError: When the job has ended, or runs, without a run folder that is seen from here.
    """
    if _is_there(run):
        return run, None
    try:
        server = JobServer(address)
    except JobError:
        if address is not None:
            raise
        return run, None  # no cluster to ask: what is wrong with the folder is said by who reads it
    named = [
        j for j in server.jobs() if j.run and (str(run) in (j.id, j.run) or j.run == str(run.absolute()))
    ]
    if not named:
        return run, None
    job, folder = named[0], Path(named[0].run)
    while not _is_there(folder):
        if job.state != "pending" and not _is_there(folder, seconds=_PATIENCE):
            state = f"has {_ENDED[job.state]}" if job.has_ended else "runs"
            raise JobError(
                f"the job {job.id} {state}, but its run folder {folder} is not seen from here"
                f"{f': {job.message}' if job.message else ''}; look at it with `secateur logs {job.id}`"
            )
        if report is None:
            return folder, job
        report(f"waiting for the job {job.id}, which is {job.state}")
        report = _silent
        time.sleep(1.0)
        job = server.job(job.id)
    return folder, None


def _is_there(folder: Path, seconds: float = 0.0) -> bool:
    """Whether a folder holds a run, or does within some seconds: a job begins before its run does."""
    deadline = time.monotonic() + seconds
    while not (found := RunFolder(folder).is_run or bool(RunFolder(folder).seeds)):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    return found


def _patient(client: type[JobSubmissionClient]) -> type[JobSubmissionClient]:
    """Return Ray's client with an end to its patience."""

    class Patient(client):  # type: ignore[misc, valid-type]
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": _ANSWER_SECONDS, **options})

    return Patient


def _silent(_text: str) -> None:
    """Say nothing more."""


_NOT_INSTALLED = (
    "expected Ray with its part for jobs, which is not installed here; do pip install 'secateur[cluster]' "
    "(it brings ray[default])"
)
_WANTS_TOKEN = (
    "wants a token, or another one; export RAY_AUTH_MODE=token and the cluster's token as RAY_AUTH_TOKEN, "
    "or its file as RAY_AUTH_TOKEN_PATH"
)
_ENDED = {"stopped": "been stopped", "succeeded": "succeeded", "failed": "failed"}


# A name or number, no more: a password would be shown in messages, and is none that Ray takes.
_ADDRESS = re.compile(
    r"https?://([A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?|\[[0-9a-fA-F:.]{2,45}\])"
    r"(:(?P<port>[0-9]{1,5}))?(/[!-~]*)?"
)


def _http(address: str) -> str:
    """Return an address with its scheme and without a slash at its end."""
    full = address if "://" in address else f"http://{address}"
    found = _ADDRESS.fullmatch(full)
    if not found or address == "auto" or not 0 < int(found["port"] or 80) < 65536:
        raise JobError(
            f"expected the http address of a job server such as {DEFAULT_ADDRESS}, got {shown(address)}; it "
            "is the dashboard's"
        )
    return full.rstrip("/")


def _knock(address: str) -> None:
    """Check within seconds that a job server is there; Ray's own client waits for minutes.

    Raises:
        JobError: When there is none.
    """
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=_PATIENCE) as answer:
            _ = json.loads(answer.read(_MOST_BYTES))["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return  # Ray's client has the token, if there is one
        raise JobError(
            f"expected the job server of a Ray cluster at {address}, got an answer with status {error.code}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException):
        raise JobError(f"expected the job server of a Ray cluster at {address}, got another answer") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise JobError(
            f"no cluster answers at {address} ({getattr(reason, 'strerror', None) or reason}); start one "
            f"with `ray start --head`, or give --address or {ADDRESS_VARIABLE}"
        ) from None


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a moment."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before

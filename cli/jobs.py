"""Commands for jobs on a Ray cluster: submit a search, see how it goes, stop it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    CODE,
    CPUS_PER_WORKER,
    GPUS_PER_WORKER,
    JSON,
    PLUGINS,
    SHARDS,
    TIMEOUT,
    WORKERS,
    command,
    next_step,
    print_json,
    read_cluster,
)
from .sections import JOBS, USUAL
from .terminal import interrupted, say, show

if TYPE_CHECKING:
    from ..service.jobs import Job

ADDRESS = typer.Option(
    help="The job server's http address; RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265, if left out.",
    rich_help_panel=USUAL,
)
ID = typer.Argument(help="The job's id, as `secateur list` prints it.", show_default=False)


@command(
    JOBS,
    example="secateur submit search.toml --address http://head:8265 --out /shared/runs/a --workers 8",
)
def submit(
    config: Annotated[
        Path,
        typer.Argument(help="A TOML file whose section [search] says what to search.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder, an absolute path on the cluster; the config's if left out.",
            rich_help_panel=USUAL,
        ),
    ] = None,
    address: Annotated[str | None, ADDRESS] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--id", help="The job's id; made from the run folder's name if left out.", rich_help_panel=USUAL
        ),
    ] = None,
    workers: Annotated[str | None, WORKERS] = None,
    shards: Annotated[int | None, SHARDS] = None,
    gpus_per_worker: Annotated[float | None, GPUS_PER_WORKER] = None,
    cpus_per_worker: Annotated[float | None, CPUS_PER_WORKER] = None,
    timeout: Annotated[float | None, TIMEOUT] = None,
    trust_remote_code: Annotated[bool, CODE] = False,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Run a search as a job of a Ray cluster.

    Submitted again with the same run folder, it goes on.
    """
    from ..search.toml import read_section
    from ..service.jobs import submit as send

    given = {
        "workers": workers, "shards": shards, "gpus_per_worker": gpus_per_worker,
        "cpus_per_worker": cpus_per_worker, "timeout": timeout,
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    read_cluster("auto", read_section(config, "search") | chosen)  # mistakes are not left to the job to say
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--trust-remote-code"] * trust_remote_code
    job = send(config, out, address=address, job_id=name, options=words, plugins=plugins or ())
    if as_json:
        print_json(asdict(job))
        return
    show(job.id)
    next_step("logs", job.id, "--follow", *_at(address))
    next_step("watch", job.run, *_at(address))


@command(JOBS, "list", example="secateur list --address http://head:8265")
def list_jobs(
    address: Annotated[str | None, ADDRESS] = None,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """List a cluster's searches and how far they are."""
    from ..results.terminal.watch import standing
    from ..service.jobs import JobServer

    jobs = [job for job in JobServer(address).jobs() if job.run]
    rows = [asdict(job) | standing(job.run, is_over=job.has_ended) for job in jobs]
    if as_json:
        print_json(rows)
        return
    lines = [
        [
            job.id,
            _state(job),
            str(row["progress"] or "-"),
            str(row["best"] or "-"),
            _left(row["left"]),
            job.run,
        ]
        for job, row in zip(jobs, rows, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        show("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    if not jobs:
        say("no searches were submitted to this cluster")
        next_step("submit", "CONFIG.toml", *_at(address))
        return
    next_step("watch", jobs[0].run, *_at(address))


@command(JOBS, example="secateur status secateur-a-3f9c2d")
def status(
    name: Annotated[str, ID],
    address: Annotated[str | None, ADDRESS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print how a job stands, and why it failed."""
    from ..service.jobs import JobServer

    _print(JobServer(address).job(name), address, as_json)


@command(JOBS, example="secateur logs secateur-a-3f9c2d --follow")
def logs(
    name: Annotated[str, ID],
    address: Annotated[str | None, ADDRESS] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            "-f",
            help="Go on until the job ends; exit code 1 unless it succeeds.",
            rich_help_panel=USUAL,
        ),
    ] = False,
) -> None:
    """Print what a job has printed."""
    from ..service.jobs import JobServer

    server = JobServer(address)
    if not follow:
        _write(server.logs(name))
        next_step("status", name, *_at(address))
        return
    try:
        job = server.follow(name, _write)
    except KeyboardInterrupt:
        code = interrupted("the job goes on")
        next_step("stop", name, *_at(address))
        raise typer.Exit(code) from None
    say(f"{job.id}  {_state(job)}")
    if job.run and job.state == "succeeded":
        next_step("front", job.run)
    raise typer.Exit(0 if job.state == "succeeded" else 1)


@command(JOBS, example="secateur stop secateur-a-3f9c2d")
def stop(
    name: Annotated[str, ID],
    address: Annotated[str | None, ADDRESS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """End a job in order; submitted again it goes on."""
    from ..service.jobs import JobServer

    _print(JobServer(address).stop(name), address, as_json)


def _print(job: Job, address: str | None, as_json: bool) -> None:
    if as_json:
        print_json(asdict(job))
        return
    show(f"{job.id}  {_state(job)}  {job.run}".rstrip())
    if job.message:
        show(job.message)
    if job.state == "failed":
        next_step("logs", job.id, *_at(address))
    elif job.run and job.state == "succeeded":
        next_step("front", job.run)
    elif job.run and job.state == "stopped":
        next_step("submit", "CONFIG.toml", "--out", job.run, *_at(address))
    elif job.run:
        next_step("watch", job.run, *_at(address))


def _at(address: str | None) -> tuple[str, ...]:
    return ("--address", address) if address else ()


def _left(seconds: float | None) -> str:
    from ..results.terminal.progress import duration

    return "-" if seconds is None else f"left {duration(seconds)}"


def _state(job: Job) -> str:
    from ..results.terminal.progress import duration

    return (
        f"{job.state} after {duration(job.seconds)}"
        if job.has_ended
        else f"{job.state} for {duration(job.seconds)}"
    )


def _write(text: str) -> None:
    show(text.replace("\r\n", "\n"), end="")

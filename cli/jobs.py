"""Commands for jobs on a Ray cluster: submit a search, see how it goes, stop it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    CPUS_PER_WORKER,
    GPUS_PER_WORKER,
    JSON,
    SHARDS,
    TIMEOUT,
    WORKER_OPTIONS,
    WORKERS,
    app,
    note,
    print_json,
    read_cluster,
)

if TYPE_CHECKING:
    from ..service.jobs import Job

ADDRESS = typer.Option(
    help="The job server's http address; RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265, if left out."
)
ID = typer.Argument(help="The job's id, as `secateur list` prints it.", show_default=False)


@app.command(
    epilog="Example: secateur submit search.toml --address http://head:8265 --out /shared/runs/a --workers 8"
)
def submit(
    config: Annotated[
        Path,
        typer.Argument(help="A TOML file whose section [search] says what to search.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder, an absolute path on the cluster; the config's if left out."),
    ] = None,
    address: Annotated[str | None, ADDRESS] = None,
    name: Annotated[
        str | None, typer.Option("--id", help="The job's id; made from the run folder's name if left out.")
    ] = None,
    workers: Annotated[str | None, WORKERS] = None,
    shards: Annotated[int | None, SHARDS] = None,
    gpus_per_worker: Annotated[float | None, GPUS_PER_WORKER] = None,
    cpus_per_worker: Annotated[float | None, CPUS_PER_WORKER] = None,
    timeout: Annotated[float | None, TIMEOUT] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Run a search on a Ray cluster; submitted again with the same run folder, it goes on."""
    given = dict(locals())
    from ..search.toml import read_section
    from ..service.jobs import JobServer
    from ..service.submission import Submission

    chosen = {name: given[name] for name in WORKER_OPTIONS if given[name] is not None}
    read_cluster("auto", read_section(config, "search") | chosen)  # mistakes are not left to the job to say
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    submission = Submission.read(config, out, words)
    server = JobServer(address)
    job = server.submit(submission, name)
    if as_json:
        print_json(asdict(job))
        return
    typer.echo(job.id)
    note(f"follow it with: secateur logs {job.id} --follow --address {server.address}")


@app.command("list", epilog="Example: secateur list --address http://head:8265")
def list_jobs(
    address: Annotated[str | None, ADDRESS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """List the searches that were submitted to a cluster, the latest first."""
    from ..service.jobs import JobServer

    jobs = [job for job in JobServer(address).jobs() if job.run]
    if as_json:
        print_json([asdict(job) for job in jobs])
        return
    width = max((len(job.id) for job in jobs), default=0)
    for job in jobs:
        typer.echo(f"{job.id:{width}}  {_state(job)}  {job.run}")
    if not jobs:
        note("no searches were submitted to this cluster")


@app.command(epilog="Example: secateur status secateur-a-3f9c2d")
def status(
    name: Annotated[str, ID],
    address: Annotated[str | None, ADDRESS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print whether a job is pending, running, stopped, succeeded or failed, and why."""
    from ..service.jobs import JobServer

    _print(JobServer(address).job(name), as_json)


@app.command(epilog="Example: secateur logs secateur-a-3f9c2d --follow")
def logs(
    name: Annotated[str, ID],
    address: Annotated[str | None, ADDRESS] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends; exit code 1 unless it succeeds.")
    ] = False,
) -> None:
    """Print what a job has printed; --follow goes on until it ends."""
    from ..service.jobs import JobServer

    server = JobServer(address)
    if not follow:
        typer.echo(server.logs(name), nl=False)
        return
    try:
        job = server.follow(name, _write)
    except KeyboardInterrupt:
        note(f"the job goes on; end it with: secateur stop {name}")
        raise typer.Exit(130) from None
    note(f"{job.id}  {_state(job)}")
    raise typer.Exit(0 if job.state == "succeeded" else 1)


@app.command(epilog="Example: secateur stop secateur-a-3f9c2d")
def stop(
    name: Annotated[str, ID],
    address: Annotated[str | None, ADDRESS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """End a job in order; what it has measured stays in its run folder, and submitting it again goes on."""
    from ..service.jobs import JobServer

    _print(JobServer(address).stop(name), as_json)


def _print(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(asdict(job))
        return
    typer.echo(f"{job.id}  {_state(job)}  {job.run}".rstrip())
    if job.message:
        typer.echo(job.message)


def _state(job: Job) -> str:
    from ..results.terminal.progress import duration

    return (
        f"{job.state} after {duration(job.seconds)}"
        if job.has_ended
        else f"{job.state} for {duration(job.seconds)}"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

"""A search whose driver lives on the head of a cluster, and the front of its study read from anywhere."""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from search.clusters.addresses import Address, ClusterError
from search.clusters.jobs import Jobs, check_no_login, command
from search.config import SearchConfig
from search.studies.database import StudyError, check_kind
from tracking.address import Address as Place
from tracking.address import AddressError, shown

# A driver that is told to stop writes the end of its study; Ray's own patience is 3 s.
STOP_S = 120
# How long a front may take: the head unpacks the code, reads the study and draws the report.
FRONT_S = 180.0
# How long a job that is stopped may take to end, so that it can be taken off the list: Ray kills it after 3 s.
_END_S = 10.0
# Ray looks after its jobs every second, and lists one anew, as failed, that it finds gone when it sees its end.
_SETTLE_S = 3.0
# How long a search that was handed over is watched: what is wrong with it is told before its driver joins the cluster.
WATCH_S = 30.0
_LOOK_S = 0.5
_OUTPUT, _ERRORS = "ccdist: output follows", "ccdist: errors follow, exit code "


def detach(
    config: SearchConfig, space: Path, arguments: Sequence[str], variables: Mapping[str, str], address: str | None
) -> None:
    """Hand a search over to the head of a cluster, say how to watch and stop it, and watch how it begins.

    Args:
        space: its space file, which goes with it.
        arguments: those of search.run beside the space file.
        variables: of the environment, for the driver.

    Raises:
        ClusterError: no cluster takes it, it runs already, or it ends at once with an error.
    """
    check_no_login(arguments)
    study, place = config.study_name, _place_there(config, arguments)
    jobs = Jobs(Address.of(address))
    running = jobs.running(study)
    if running is not None:
        raise ClusterError(
            f"study {study} has a driver already, job {running} on {jobs.url}; wait for it, or stop it with: "
            f"ray job stop {running} --address {jobs.url}"
        )
    entrypoint = command("search.run", [str(space), *arguments], space)
    job = jobs.submit(study, entrypoint, space, {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **variables})
    front = shlex.join(["python", "-m", "search.front", study, "--address", jobs.url, *place])
    print(
        f"study {study}: job {job} on {jobs.url}; its paths are the head's, relative ones in the home folder there\n"
        f"  log:   ray job logs --follow {job} --address {jobs.url}\n"
        f"  front: {front}\n"
        f"  stop:  ray job stop {job} --address {jobs.url}",
        flush=True,
    )
    why = None
    try:
        why = _failed_start(jobs, job, study)
    except ClusterError as error:
        print(f"warning: whether job {job} has begun is not known ({error}); its log says it", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"not watched any longer; job {job} goes on", file=sys.stderr)
    if why is not None:
        raise ClusterError(f"{why} (job {job} on {jobs.url})")


def _failed_start(jobs: Jobs, job: str, study: str) -> str | None:
    """Watch a job until its driver is at work, or for some seconds; returns why it has ended without success.

    Raises:
        ClusterError: the cluster does not answer any more.
    """
    until = time.monotonic() + WATCH_S
    while time.monotonic() < until:
        has_ended, log = jobs.has_ended(job), jobs.logs(job)  # in this order: the log of an ended job is whole
        if has_ended:
            failure = jobs.failure(job)
            return None if failure is None else _last_word(log, failure)
        # As a search begins. Its errors speak of the study, too, and stand there before their job counts as ended.
        if any(line.startswith(f"study {study}: ") for line in log.splitlines()):
            return None
        time.sleep(_LOOK_S)
    return None


def _last_word(log: str, failure: str) -> str:
    """What an ended job's log says last, its errors before all; where it says nothing, what Ray says."""
    lines = [line for line in log.splitlines() if line.strip()] or failure.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"the search has ended at once: {lines[-1].strip()[-500:]}"


def _place_there(config: SearchConfig, arguments: Sequence[str]) -> list[str]:
    """How search.front finds the study on the head: an option, without a password."""
    if "--storage" in arguments:
        return ["--storage", arguments[arguments.index("--storage") + 1]]
    url = config.storage.study
    if url is None:
        return []
    check_kind(url)
    try:
        return ["--study-url", Place.of(url).open]
    except AddressError as error:
        raise StudyError(f"study database {shown(url)} {error}") from None


def front_there(args: argparse.Namespace) -> int:
    """search.front on the head, its output here; returns its exit code.

    Raises:
        ClusterError: no cluster takes it, or it takes too long.
    """
    space = Path(args.study)
    file = space if space.suffix in (".yaml", ".yml") and space.is_file() else None
    arguments = [args.study, *_front_options(args)]
    check_no_login(arguments)
    jobs = Jobs(Address.of(args.address))
    inner = command("search.front", arguments, file)
    job = jobs.start(_apart(f"export COLUMNS={shutil.get_terminal_size().columns}; {inner}"), file)
    with _forgotten(jobs, job):
        if not _has_ended_within(jobs, job, FRONT_S):
            raise ClusterError(f"job {job} on {jobs.url} has not shown the front within {FRONT_S:g} s; it was stopped")
        return _shown(jobs.logs(job), jobs.url, args.json)


@contextmanager
def _forgotten(jobs: Jobs, job: str) -> Iterator[None]:
    """Nothing of the job stays on the cluster, however the context ends."""
    try:
        yield
    finally:
        with suppress(ClusterError):
            if not jobs.has_ended(job):
                jobs.stop(job)
                _has_ended_within(jobs, job, _END_S)
            time.sleep(_SETTLE_S)
            jobs.forget(job)


def _has_ended_within(jobs: Jobs, job: str, limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    while not jobs.has_ended(job):
        if time.monotonic() >= until:
            return False
        time.sleep(_LOOK_S)
    return True


def _apart(line: str) -> str:
    """A shell's line whose two streams can be told apart in a job's log, which is one, with a line of Ray's in it.

    They are kept until the end: Ray writes its line at some moment after the job has begun.
    """
    return (
        f"output=$(mktemp); errors=$(mktemp); ({line}) > $output 2> $errors; code=$?; "
        f"echo {shlex.quote(_OUTPUT)}; cat $output; echo; echo {shlex.quote(_ERRORS)}$code; cat $errors; "
        "rm $output $errors; exit $code"
    )


def _shown(log: str, url: str, as_json: bool) -> int:
    _, began, rest = log.rpartition(f"{_OUTPUT}\n")
    output, ended, rest = rest.rpartition(f"\n{_ERRORS}")
    code, _, errors = rest.partition("\n")
    if not began or not ended or not code.isdigit():
        raise ClusterError(f"the front could not be read on {url} ({' '.join(log.split())[-500:]})")
    print(output, end="", flush=True)
    if output.strip() and not as_json:
        print(f"read on the head of {url}; the report is a file there", flush=True)
    print(errors, end="", file=sys.stderr)
    return int(code)


def _front_options(args: argparse.Namespace) -> list[str]:
    values = {"--storage": args.storage, "--study-url": args.study_url, "--artifacts": args.artifacts}
    flags = {"--json": args.json, "--all": args.all, "--from-verdicts": args.from_verdicts}
    options = [word for name, value in values.items() if value for word in (name, value)]
    return options + [name for name, is_set in flags.items() if is_set]

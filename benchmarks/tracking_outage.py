"""python -m benchmarks.tracking_outage [--n 3]: what a search notices of trouble with its tracking server.

    fine      the server answers
    stopped   SIGSTOP in mid-search: it accepts connections and answers nothing for 30 s, then goes on
    gone      SIGKILL in mid-search, for good
    slow      every answer comes after 2 s

Each search of n is a study of its own with 4 trials of the digits. Milliseconds, median and worst over all searches of
a case: `journal` is a worker's call that writes a row, `step` the time from one training step to the next (an epoch's
last one includes what is told of the epoch: journal, report to the driver), `loop` the same of the driver's loop, and
`end` the seconds from the last trial's end to the driver's. `left` are the rows that tracking.replay has sent
afterwards; `lost` those that MLflow lacks then.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import tracking_probe as probe
from benchmarks.kills import study_faults, tracking_faults
from benchmarks.live_search import ROOT, LiveSearch, Server, wait_for
from benchmarks.machine import machine_lines
from benchmarks.tracking_proxy import Proxy
from search.study import load_record
from tracking.journal import EndRow, MetricsRow, read_rows
from tracking.sender import Delivery
from tracking.tracker import NullTracker

CASES = ("fine", "stopped", "gone", "slow")
STOPPED_S, SLOW_S = 30.0, 2.0
TRIALS = 4
SETTINGS = ("student.epochs=5", "teacher.epochs=3")
GOAL_MS = 50


@dataclass
class Seen:
    """What one search showed. Seconds."""

    case: str
    code: int
    output: str
    seconds: float
    end_s: float
    journal: list[float]
    step: list[float]
    loop: list[float]
    left: int = 0
    faults: list[str] = field(default_factory=list)


def run_case(folder: Path, server: Server, case: str, name: str, trials: int = TRIALS) -> Seen:
    """One search under one kind of trouble, then a replay, then the search's rows against MLflow's.

    The server answers when this begins, and when it ends.

    Raises:
        RuntimeError: the search did not even start.
    """
    wait_for(server.answers, "the tracking server answers")
    timed = folder / f"{name}-times"
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(server.url, delay_s=SLOW_S))
        url = proxy.url if case == "slow" else server.url
        ray_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        settings = [*SETTINGS, f"name={name}", f"tracking.uri={url}"]
        environment = probe.environment(timed, ROOT)
        search = LiveSearch("digits", folder / name, Path(ray_folder), settings, environment)
        stack.callback(search.clean_up)
        output = folder / f"{name}.log"
        started = time.monotonic()
        with output.open("w") as log:
            driver = search.start(trials, log)
            _disturb(server, case, driver, timed)
            code = driver.wait()
        if not (search.storage / "study.db").exists():
            raise RuntimeError(f"the search did not start: {output.read_text()}")
        ended, seconds = time.time(), time.monotonic() - started
        if case == "gone":
            server.start()
            wait_for(server.answers, "the tracking server answers")
        record = load_record(f"sqlite:///{search.storage / 'study.db'}", name)
        last = max((trial.finished_at for trial in record.trials if trial.finished_at is not None), default=ended)
        journal, training = probe.calls(timed, probe.JOURNAL), probe.calls(timed, probe.TRAINING)
        workers = {call.process for call in training}
        journals = search.storage / "artifacts" / name / "journal"
        seen = Seen(
            case,
            code,
            output.read_text(),
            seconds,
            ended - last,
            [call.seconds for call in journal if call.process in workers],
            probe.gaps(probe.calls(timed, probe.STEP), training),
            probe.gaps(probe.calls(timed, probe.LOOP)),
            rows_left(journals),
        )
        seen.faults += study_faults(record, trials) + replay_faults(search.storage, server.url)
        seen.faults += tracking_faults(record, server.url) + lost_rows(journals, contents(server.url))
    return seen


def _disturb(server: Server, case: str, driver: subprocess.Popen[str], timed: Path) -> None:
    """The trouble, once a worker trains."""
    if case not in ("stopped", "gone"):
        return
    wait_for(lambda: driver.poll() is not None or bool(probe.calls(timed, probe.STEP)), "a trial trains")
    if case == "gone":
        server.kill()
        return
    server.stop()
    time.sleep(STOPPED_S)
    server.go_on()


def rows_left(journals: Path) -> int:
    return Delivery(journals, NullTracker()).rows_left()


def replay_faults(storage: Path, url: str) -> list[str]:
    """Send what is left, as a user does."""
    command = [sys.executable, "-m", "tracking.replay", str(storage), "--tracking-uri", url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return [] if done.returncode == 0 else [f"tracking.replay: {done.stdout.strip()} {done.stderr.strip()}"]


def lost_rows(journals: Path, kept: dict[str, Any]) -> list[str]:
    """Values of the trials' journals that no run has in its history."""
    faults = []
    for path in sorted(journals.glob("*.jsonl")):
        history = next((run["history"] for run in kept["runs"].values() if run["name"] == path.stem), {})
        for row in (line.row for line in read_rows(path)[0]):
            if not isinstance(row, MetricsRow | EndRow):
                continue
            for name, value in row.values.items():
                if value is not None and (row.time_ms, row.step, value) not in history.get(name, ()):
                    faults.append(f"{path.name}: {name} of step {row.step} is not in MLflow")
    return faults


def contents(url: str) -> dict[str, Any]:
    """Everything that MLflow holds: runs with their params, tags, histories and files, models, the registry."""
    from tracking.mlflow_tracker import open_client

    client = open_client(url)
    experiments = [each for each in client.search_experiments() if each.name != "Default"]
    ids = [each.experiment_id for each in experiments]
    runs = {}
    for run in client.search_runs(ids, max_results=5000) if ids else ():
        names = sorted(run.data.metrics)
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        runs[run.info.run_id] = {
            "name": run.data.tags["mlflow.runName"],
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": run.data.tags,
            "history": {
                name: sorted((each.timestamp, each.step, each.value) for each in found)
                for name, found in histories.items()
            },
            "files": sorted(_files(lambda path, run=run: client.list_artifacts(run.info.run_id, path))),
        }
    models = client.search_logged_models(ids) if ids else ()
    return {
        "experiments": {each.name: each.tags for each in experiments},
        "runs": runs,
        "models": {
            each.model_id: (
                each.name,
                str(each.status),
                each.tags,
                each.params,
                sorted((m.key, m.timestamp, m.step, m.value, str(m.dataset_digest)) for m in each.metrics or ()),
            )
            for each in models
        },
        "registry": {
            each.name: (dict(each.aliases), each.tags, each.description) for each in client.search_registered_models()
        },
    }


def _files(listed: Callable[[str | None], Sequence[Any]], folder: str | None = None) -> Iterator[tuple[str, int]]:
    for entry in listed(folder):
        if entry.is_dir:
            yield from _files(listed, entry.path)
        else:
            yield entry.path, entry.file_size


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    server = Server(folder / "server", folder / "server.log")
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _spread(seconds: Sequence[float]) -> str:
    """Median and worst, milliseconds."""
    return f"{1e3 * statistics.median(seconds):.1f} / {1e3 * max(seconds):.1f}" if seconds else "-"


def tell(case: str, all_seen: Sequence[Seen]) -> None:
    journal, step, loop = (
        [value for seen in all_seen for value in getattr(seen, name)] for name in ("journal", "step", "loop")
    )
    ends = [seen.end_s for seen in all_seen]
    slow = sum(1e3 * value > GOAL_MS for value in journal)
    print(
        f"{case:>8}: journal {_spread(journal)} ms (n = {len(journal)}, {slow} above {GOAL_MS}); step {_spread(step)} "
        f"(n = {len(step)}); loop {_spread(loop)} (n = {len(loop)}); end {statistics.median(ends):.1f} s, at most "
        f"{max(ends):.1f}; left {[seen.left for seen in all_seen]}; lost {sum(len(seen.faults) for seen in all_seen)}; "
        f"exit codes {[seen.code for seen in all_seen]}",
        flush=True,
    )
    for fault in (fault for seen in all_seen for fault in seen.faults):
        print(f"          {fault}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3, help="searches of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--json", type=Path, help="write every call there")
    options = parser.parse_args(arguments)
    print("\n".join(machine_lines()))
    print(f"{options.trials} trials a search, n = {options.n} searches; median / worst", flush=True)
    stored, failed = {}, False
    with tempfile.TemporaryDirectory(prefix="outage-") as name, running_server(Path(name)) as server:
        for case in options.cases:
            seen = [run_case(Path(name), server, case, f"{case}-{i}", options.trials) for i in range(options.n)]
            tell(case, seen)
            failed |= any(each.faults or each.code for each in seen)
            stored[case] = [{"journal": each.journal, "step": each.step, "loop": each.loop} for each in seen]
    if options.json:
        options.json.write_text(json.dumps(stored))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

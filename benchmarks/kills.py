"""python -m benchmarks.kills --n 200 --out DIR: random SIGKILLs over driver, workers and tracking server.

A round is one study: its search is started, disturbed by so many kills at random moments, started again whenever its
driver was killed, and left to finish. Then everything that a search promises is checked. Rounds alternate between
`independent` (suggestions depend on the trial's number only: the front must equal the undisturbed one's) and `tpe`
(five stored results must equal a re-run of their parameters). A finished round is one file under DIR: the same command
goes on. The seed of a round is printed with it and makes its targets and delays.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.live_search import SMALL_TRIALS, LiveSearch, Server, wait_for
from ccdist.config import fingerprint
from search.pareto import front
from search.studies.records import StudyRecord
from search.study import load_record

KINDS = ("independent", "tpe")
TARGETS = ("driver", "worker", "worker", "server")
TRIALS, KILLS_A_ROUND = 8, 25
LONGEST_DELAY_S, LONGEST_START_S = 4.0, 30.0
RERUNS_A_ROUND = 5
SETTINGS = ("resources.concurrency=2", *SMALL_TRIALS)
OF_KIND = {
    "independent": ("search.sampler=random", "stopping={training: off, verification: true}"),
    "tpe": ("search.sampler={kind: tpe, startup_trials: 4}",),
}


@dataclass
class Round:
    """What happened to one study."""

    kind: str
    seed: int
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("driver", "worker", "server"), 0))
    trials: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())


def disturb(
    search: LiveSearch, server: Server, plan: Round, targets: Sequence[str], longest_delay_s: float, log: Path
) -> None:
    """Run a search to its end with these kills on the way; more trials are asked for while kills are left."""
    rng, started = random.Random(plan.seed), time.monotonic()
    kills, trials = len(targets), TRIALS
    while True:
        with log.open("a") as output:
            driver = search.start(trials, output)
            while plan.num_kills < kills and driver.poll() is None:
                target = targets[plan.num_kills]
                _wait(driver, search, rng, longest_delay_s, for_a_worker=target == "worker")
                _kill(target, search, server, driver, plan, rng)
            code = driver.wait()
        if plan.num_kills >= kills and code != -signal.SIGKILL:
            break
        if code not in (0, -signal.SIGKILL):
            plan.faults.append(f"the driver ended with exit code {code}; see {log}")
            break
        if code == 0:
            trials += 2  # it was faster than the kills
    plan.trials, plan.seconds = trials, time.monotonic() - started
    if code != 0:
        plan.faults.append(f"the last driver ended with exit code {code}")


def _wait(
    driver: subprocess.Popen[str], search: LiveSearch, rng: random.Random, longest_s: float, *, for_a_worker: bool
) -> None:
    """A random time, or until the driver has ended; half of the times from when there is a worker on."""
    if for_a_worker or rng.random() < 0.5:
        deadline = time.monotonic() + LONGEST_START_S
        while driver.poll() is None and not search.workers() and time.monotonic() < deadline:
            time.sleep(0.05)
    try:
        driver.wait(rng.uniform(0, longest_s))
    except subprocess.TimeoutExpired:
        return


def _kill(
    target: str, search: LiveSearch, server: Server, driver: subprocess.Popen[str], plan: Round, rng: random.Random
) -> None:
    if driver.poll() is not None:
        return
    if target == "worker":
        workers = search.workers()
        if not workers:
            target = "driver" if rng.random() < 0.5 else "server"
        else:
            os.kill(rng.choice(workers).pid, signal.SIGKILL)
    if target == "server":
        server.kill()
        server.start()
    if target == "driver":
        driver.kill()
    plan.kills[target] += 1


def check(search: LiveSearch, server: Server, plan: Round, reference: StudyRecord | None) -> None:
    """Everything that must hold once a disturbed search is over; what does not is added to the faults."""
    name = "digits" if plan.seed == 0 else f"digits-seed{plan.seed}"
    record = load_record(f"sqlite:///{search.storage / 'study.db'}", name)
    try:
        wait_for(lambda: not search.workers(), "the workers are gone", 60)
    except TimeoutError as error:
        plan.faults.append(str(error))
    plan.faults += study_faults(record, plan.trials)
    if plan.kind == "independent" and reference is not None:
        plan.faults += front_faults(record, reference)
    if plan.kind == "tpe":
        plan.faults += rerun_faults(search, record)
    wait_for(server.answers, "the tracking server answers")
    replay = [sys.executable, "-m", "tracking.replay", str(search.storage)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.url}
    done = subprocess.run(replay, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        plan.faults.append(f"tracking.replay: {done.stderr.strip()}")
    plan.faults += tracking_faults(record, server.url)


def study_faults(record: StudyRecord, trials: int) -> list[str]:
    """Lost, doubled or zombie trials."""
    faults = []
    if len(record.done) != trials:
        faults.append(f"{len(record.done)} trials are done, {trials} were asked for")
    keys = [trial.key for trial in record.trials]
    if len(set(keys)) != len(keys) or [trial.number for trial in record.trials] != list(range(len(keys))):
        faults.append(f"keys are doubled or missing: {keys}")
    faults += [f"{trial.key} is left {trial.state}" for trial in record.trials if trial.state in ("RUNNING", "WAITING")]
    faults += [
        f"{trial.key} failed: {trial.reason}"
        for trial in record.trials
        if trial.state == "FAILED" and "worker died" not in (trial.reason or "")
    ]
    suggestions = [fingerprint(trial.params) for trial in record.trials]
    if len(set(suggestions)) != len(suggestions):
        faults.append("a suggestion was repeated")
    return faults


def front_faults(record: StudyRecord, reference: StudyRecord) -> list[str]:
    """The front of the same trials must be that of the undisturbed search; results must be those of the same number.

    A trial whose worker was killed too often is FAILED here; both fronts are then those of the other trials.
    """
    faults = []
    for trial in record.complete:
        if trial.number >= len(reference.trials):
            continue
        twin = reference.trials[trial.number]
        if trial.params != twin.params:
            faults.append(f"{trial.key} has other parameters than the undisturbed search")
        elif "finished" == trial.verification_state == twin.verification_state and trial.objectives != twin.objectives:
            faults.append(f"{trial.key} has {trial.objectives}, undisturbed {twin.objectives}")
    numbers = {trial.number for trial in record.complete} & {trial.number for trial in reference.complete}
    if not faults and front_points(record, numbers) != front_points(reference, numbers):
        faults.append("the front differs from the undisturbed one")
    return faults


def front_points(record: StudyRecord, numbers: Collection[int]) -> set[tuple[float, float]]:
    points = [trial.objectives for trial in record.complete if trial.number in numbers and trial.objectives]
    return {points[index] for index in front(points)}


def rerun_faults(search: LiveSearch, record: StudyRecord) -> list[str]:
    """Stored results must be what their parameters give once more; some trials are drawn, since each takes seconds."""
    faults = []
    complete = list(record.complete)
    random.Random(record.name).shuffle(complete)
    for trial in complete[:RERUNS_A_ROUND]:
        command = [sys.executable, "-m", "search.rerun", record.name, str(trial.number), "--storage"]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [*command, str(search.storage), "--out", folder], capture_output=True, text=True, check=False
            )
        if done.returncode != 0:
            faults.append(f"re-run of {trial.key}: {(done.stdout + done.stderr).strip()[-300:]}")
    return faults


def tracking_faults(record: StudyRecord, url: str) -> list[str]:
    """One ended MLflow run for each trial, with its numbers."""
    from tracking.mlflow_tracker import MlflowTracker

    client = MlflowTracker(url, None)._client
    experiments = [each.experiment_id for each in client.search_experiments() if each.name != "Default"]
    runs: dict[str, list[Any]] = {}
    for run in client.search_runs(experiments, "tags.`cert.kind` = 'trial'", max_results=5000):
        runs.setdefault(run.data.tags["mlflow.runName"], []).append(run)
    faults = []
    for trial in record.trials:
        mine = runs.get(trial.key, [])
        if len(mine) != 1:
            faults.append(f"MLflow has {len(mine)} runs for {trial.key}")
            continue
        if mine[0].info.status == "RUNNING":
            faults.append(f"MLflow shows {trial.key} as RUNNING, the study {trial.state}")
        metrics = mine[0].data.metrics
        for name in ("standard_accuracy", "certified_accuracy", "certified_upper"):
            value = getattr(trial, name)
            if value is not None and abs(metrics.get(name, -1.0) - value) > 1e-9:
                faults.append(f"MLflow has {name} {metrics.get(name)} for {trial.key}, the study {value}")
    return faults


def run_round(
    folder: Path,
    server: Server,
    kind: str,
    seed: int,
    targets: Sequence[str],
    reference: StudyRecord | None,
    *,
    longest_delay_s: float = LONGEST_DELAY_S,
) -> Round:
    """One study, disturbed by kills of these targets in turn, and checked."""
    plan = Round(kind, seed)
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
        search = live_search(folder / f"{kind}-{seed}", Path(ray_folder), server.url, kind, seed)
        try:
            disturb(search, server, plan, targets, longest_delay_s, folder / f"{kind}-{seed}.log")
            check(search, server, plan, reference)
        except (TimeoutError, OSError) as error:
            plan.faults.append(f"{type(error).__name__}: {error}")
        finally:
            search.clean_up()
    return plan


def live_search(storage: Path, ray_folder: Path, url: str, kind: str, seed: int) -> LiveSearch:
    settings = [*SETTINGS, *OF_KIND[kind], f"search.seed={seed}", f"tracking.uri={url}"]
    return LiveSearch("digits", storage, ray_folder, settings)


def undisturbed(folder: Path, server: Server, seed: int) -> StudyRecord:
    """The independent search of a seed without any kill, and with a few trials to spare."""
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
        search = live_search(folder / f"undisturbed-{seed}", Path(ray_folder), server.url, "independent", seed)
        search.settings = [*search.settings, "tracking.enabled=false"]  # nobody looks at its runs
        with (folder / f"undisturbed-{seed}.log").open("a") as output:
            code = search.start(TRIALS, output).wait()
        search.clean_up()
    if code != 0:
        raise SystemExit(f"the undisturbed search ended with exit code {code}; see {folder}")
    name = "digits" if seed == 0 else f"digits-seed{seed}"
    return load_record(f"sqlite:///{folder / f'undisturbed-{seed}' / 'study.db'}", name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="kills in all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; each further round has the next one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    server = Server(options.out / "server", options.out / "server.log")
    server.start()
    wait_for(server.answers, "the tracking server answers")
    rounds: list[Round] = []
    try:
        while sum(each.num_kills for each in rounds) < options.n:
            seed = options.seed + len(rounds)
            rounds.append(_round(options.out, server, seed, options.n - sum(each.num_kills for each in rounds)))
            _show(rounds)
    finally:
        server.kill()
    return 1 if any(each.faults for each in rounds) else 0


def _round(folder: Path, server: Server, seed: int, left: int) -> Round:
    """A round from its file, or run now."""
    kind = KINDS[seed % len(KINDS)]
    path = folder / f"round-{seed}.json"
    if path.exists():
        return Round(**json.loads(path.read_text()))
    reference = undisturbed(folder, server, seed) if kind == "independent" else None
    targets = random.Random(seed).choices(TARGETS, k=min(KILLS_A_ROUND, left))
    done = run_round(folder, server, kind, seed, targets, reference)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(done)))
    os.replace(unfinished, path)
    return done


def _show(rounds: Sequence[Round]) -> None:
    last = rounds[-1]
    kills = {target: sum(each.kills[target] for each in rounds) for target in ("driver", "worker", "server")}
    print(
        f"seed {last.seed} {last.kind}: {last.kills}, {last.trials} trials, {last.seconds:.0f} s; so far "
        f"{sum(kills.values())} kills {kills}, {sum(len(each.faults) for each in rounds)} faults",
        flush=True,
    )
    for fault in last.faults:
        print(f"  {fault}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""docs/TRACKING.md names what runs have: no more and no less than what trials and drivers write."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import config_of, open_study

from ccdist.data import load_dataset
from ccdist.training import TrainingResult, train_student
from search.artifacts.places import TrialPlaces
from search.config import SearchConfig
from search.space import Space
from search.storage import Storage
from search.studies.records import RungValues, TrialResult
from search.study import Study
from search.tracked.bookkeeping import close_study, study_info, tracked
from search.tracked.front_log import FrontLog
from search.tracked.redrawing import Redrawing
from search.tracked.run_names import accuracies
from search.trial import TrialTask, resume_verification, run_trial
from search.trials.endings import conclude_training_stopped
from tracking import mlflow_tracker, tracker
from tracking.journal import STUDY_JOURNAL, ArtifactRow, EndRow, Journal, MetricsRow, StartRow, StudyRow, read_rows

DOCUMENT = Path(__file__).parent.parent / "docs" / "TRACKING.md"
CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(60)  # the first import of verifier and figures

# What a tracker writes itself, so that no journal has it.
TRACKER_TAGS = {
    "study": {tracker.TAG_KIND, tracker.TAG_STUDY, tracker.TAG_STUDY_ID, tracker.TAG_SPLIT, mlflow_tracker._NOTE_TAG},
    "trial": {
        tracker.TAG_KIND,
        tracker.TAG_STUDY,
        tracker.TAG_TRIAL,
        tracker.TAG_SPLIT,
        tracker.TAG_FRONT,
        mlflow_tracker._PARENT_TAG,
    },
}
# Of trials on a GPU, which are none here.
GPU_TAGS = {"cert.peak_gpu_memory_mb"}


@dataclass
class Names:
    metrics: set[str] = field(default_factory=set)
    tags: set[str] = field(default_factory=set)
    artifacts: set[str] = field(default_factory=set)


class Silent:
    def advanced(self, phase: str, done: int, of: int) -> None: ...
    def rung(self, name: str, values: RungValues) -> None: ...
    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None: ...


def names_in(journal: Path) -> Names:
    """All names in one journal."""
    names = Names()
    for line in read_rows(journal)[0]:
        row: Any = line.row
        if isinstance(row, StartRow | EndRow | StudyRow):
            names.tags |= row.tags.keys()
        if isinstance(row, MetricsRow | EndRow | StudyRow):
            names.metrics |= row.values.keys()
        if isinstance(row, StudyRow):
            names.artifacts |= row.artifacts.keys()
        if isinstance(row, ArtifactRow):
            path = (journal.parent / row.path).resolve()
            files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
            base = path.parent if path.is_file() else path
            names.artifacts |= {f"{row.folder}/{file.relative_to(base).as_posix()}" for file in files}
    return names


def diverge(*arguments: Any, **more: Any) -> TrainingResult:
    raise RuntimeError("the loss is not finite")


def run(config: SearchConfig, storage: Storage, study: Study) -> None:
    """Trials that end in every way, one of them resumed, and the driver beside them."""
    dataset = load_dataset(config.data)
    journal = storage.journals(config.study_name) / STUDY_JOURNAL

    def task_of(**changes: Any) -> TrialTask:
        assignment = study.ask()
        recipe = Space(config).recipe(assignment.params, assignment.number)
        places = TrialPlaces.of(storage.artifacts, config.study_name, assignment.key)
        return TrialTask(
            assignment.key, recipe, assignment.params, places, config.stopping, assignment.configuration, **changes
        )

    def trial(task: TrialTask, train: Callable[..., TrainingResult] = train_student) -> TrialResult:
        return run_trial(task, dataset, device=CPU, reports=Silent(), train_student_fn=train)

    with FrontLog(journal, study, Redrawing(lambda record: {}), lambda: True) as log:
        complete, failed, stopped = task_of(deaths="1 node lost; 40 s lost"), task_of(), task_of()
        result = trial(complete)
        complete.places.model.mkdir()
        (complete.places.model / "model.json").write_text(json.dumps({"failure": "no operator", "metadata": {}}))
        result = resume_verification(complete, dataset, device=CPU, timeout_factor=4.0, reports=Silent())
        study.tell(0, result)
        log.finished(complete.key, result)
        with pytest.raises(RuntimeError):
            trial(failed, diverge)
        study.tell_failed(1, "the loss is not finite")
        log.failed(failed.key, "the loss is not finite")
        with Journal(stopped.places.journal) as written:
            written.start(stopped.key, stopped.params, {})
        conclude_training_stopped(stopped.places, "dominated")
        study.tell_stopped(2, "dominated", 1.0)
        log.stopped(stopped.key, "dominated")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Names]:
    folder = tmp_path_factory.mktemp("names")
    config = config_of(
        folder,
        data__train_images=128,
        data__validation_images=32,
        stopping={"training": "fractions"},
        student__epochs=3,
        tracking={"enabled": False},
    )
    storage = Storage.of(config, str(folder / "storage"))
    storage.prepare()
    study = open_study(config, folder / "study.db")
    with tracked(config, storage, live_keys=set()):
        run(config, storage, study)
        close_study(study.record(), storage, "FINISHED")
    found = {"study": names_in(storage.journals("tiny") / STUDY_JOURNAL), "trial": Names()}
    found["study"].tags |= study_info(config, storage).tags.keys()
    for path in storage.journals("tiny").glob("tiny-*.jsonl"):
        names = names_in(path)
        for kind in ("metrics", "tags", "artifacts"):
            getattr(found["trial"], kind).update(getattr(names, kind))
    found["trial"].tags |= GPU_TAGS
    for where, tags in TRACKER_TAGS.items():
        found[where].tags |= tags
    (result,) = study.record().complete
    stored = TrialPlaces.of(storage.artifacts, "tiny", result.key).result
    model = accuracies(TrialResult(**json.loads(stored.read_text())))
    return found | {"model": Names(metrics=set(model), tags={tracker.TAG_TRIAL})}


def documented(heading: str, where: str) -> set[str]:
    """Names in the document's table under a heading that runs of this kind have."""
    section = DOCUMENT.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", section, flags=re.MULTILINE)
    names = [name for name, places in rows if where in re.split(r",\s*", places.strip())]
    assert len(set(names)) == len(names), "a name stands there twice"
    return set(names)


def matches(documented: str, name: str) -> bool:
    """Whether a name is meant, where <something> stands for one part of it."""
    pattern = "[^/]+".join(map(re.escape, re.split(r"<\w+>", documented)))
    return re.fullmatch(pattern, name) is not None


def differences(documented: Iterable[str], written: Iterable[str]) -> tuple[set[str], set[str]]:
    """Names that are not documented, and documented ones that nobody writes."""
    documented, written = set(documented), set(written)
    return (
        {name for name in written if not any(matches(each, name) for each in documented)},
        {each for each in documented if not any(matches(each, name) for name in written)},
    )


@pytest.mark.parametrize("where", ["study", "trial", "model"])
@pytest.mark.parametrize("kind", ["metrics", "tags", "artifacts"])
def test_every_name_is_documented_and_every_documented_name_is_written(
    written: dict[str, Names], where: str, kind: str
) -> None:
    names = getattr(written[where], kind)
    assert differences(documented(kind.capitalize(), where), names) == (set(), set())
    assert names or (where, kind) == ("model", "artifacts")


def test_the_comparison_sees_what_is_missing_on_either_side() -> None:
    assert differences({"a", "<phase>/loss", "gone"}, {"a", "student/loss", "b"}) == ({"b"}, {"gone"})
    assert not matches("<phase>/loss", "student/deep/loss")

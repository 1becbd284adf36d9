"""What MLflow's pages show of a study without any help by its user: saved views, links, and the colours of the front.

All of it is a courtesy: where a server refuses, one warning says so, and tracking goes on.
"""

import hashlib
import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracking.tracker import KIND_TRIAL, TAG_FRONT, TAG_KIND, TAG_SPLIT, TAG_STUDY, StudyInfo, StudyKind
from tracking.view_state import State, all_trials, decoded, encoded, front_members, fronts_side_by_side

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

# Where `python -m tracking.ui` shows a store that has no server of its own.
LOCAL_SERVER = "http://127.0.0.1:5000"

WORKFLOW = "workflowType=machine_learning"  # without it a page opens on the trace dashboard
_VIEW_TAG = "mlflow.sharedViewState."
_NOTE_TAG = "mlflow.note.content"
_COLOR_TAG = "mlflow.runColor"
# Colours that remain distinct for the colour-blind (Okabe and Ito), the dark ones first; a study keeps its own.
_STUDY_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_OFF_FRONT_COLOR = "#B8BEC6"
NEW_TRIAL_TAGS: Mapping[str, str] = {_COLOR_TAG: _OFF_FRONT_COLOR}
_NOTE_START = "**Fronts:**"
_LINKED_STUDIES = 10
_WITH_TRIALS: tuple[StudyKind, ...] = ("study", "confirmation")


def save_views(client: "MlflowClient", experiment_id: str, study: StudyInfo) -> None:
    """Write the saved views of a study into its experiment, their links into its note, and give the study a colour."""
    if not has_trials(study):
        return
    with _courtesy(f"saved views of study {study.name}"):
        tags = client.get_experiment(experiment_id).tags
        views = {
            _key("trials", study.name): (f"{study.name}: all trials", all_trials(study)),
            _key("front", study.name): (f"{study.name}: front", front_members(study)),
            _key("fronts", study.split): (f"all fronts ({study.split} images)", fronts_side_by_side(study.split)),
        }
        for key, (name, state) in views.items():
            if not _holds(tags.get(_VIEW_TAG + key), name, state):
                client.set_experiment_tag(experiment_id, _VIEW_TAG + key, encoded(name, state, _now_ms()))
        parents = [run for run in _parents(client, experiment_id) if run.data.tags[TAG_KIND] in _WITH_TRIALS]
        _give_color(client, study.name, parents)
        note = _note(tags.get(_NOTE_TAG, ""), experiment_id, study, parents)
        if note != tags.get(_NOTE_TAG):
            client.set_experiment_tag(experiment_id, _NOTE_TAG, note)


def mark_front(client: "MlflowClient", experiment_id: str, study: StudyInfo, run_ids: Collection[str]) -> None:
    """Tag and colour the runs that are on a study's front now, and those that were before."""
    from mlflow.entities import RunTag

    query = (
        f"tags.`{TAG_KIND}` = '{KIND_TRIAL}' and tags.`{TAG_STUDY}` = '{study.name}' and tags.`{TAG_FRONT}` = 'true'"
    )
    marked = {run.info.run_id for run in _search(client, experiment_id, query)}
    new, former = set(run_ids) - marked, marked - set(run_ids)
    if not new and not former:
        return
    color = _colors(_parents(client, experiment_id)).get(study.name, _STUDY_COLORS[0])
    for run_id in sorted(new):
        client.log_batch(run_id, tags=[RunTag(TAG_FRONT, "true"), RunTag(_COLOR_TAG, color)])
    for run_id in sorted(former):
        client.log_batch(run_id, tags=[RunTag(TAG_FRONT, "false"), RunTag(_COLOR_TAG, _OFF_FRONT_COLOR)])


def has_trials(study: StudyInfo) -> bool:
    """Whether there is a front to look at; a comparison's page is that of its run."""
    return study.kind in _WITH_TRIALS


def run_page(experiment_id: str, run_id: str) -> str:
    """The page of one run, relative to the server's address."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{WORKFLOW}"


def front_page(experiment_id: str, study: str) -> str:
    """The page of the view of all trials, relative to the server's address."""
    return _page(experiment_id, _key("trials", study))


def links(experiment_id: str, study: StudyInfo) -> str:
    """One line of Markdown with the study's views; empty where it has none."""
    if not has_trials(study):
        return ""
    pages = {
        "all trials": front_page(experiment_id, study.name),
        "members of the front": _page(experiment_id, _key("front", study.name)),
        "fronts of all studies": _page(experiment_id, _key("fronts", study.split)),
    }
    return "**Views:** " + " · ".join(f"[{text}]({page})" for text, page in pages.items())


@dataclass(frozen=True)
class StudyPage:
    """Where to look at a study. changed_ms: when it ended, or started if it has not; page: relative to the server."""

    name: str
    kind: str
    experiment: str
    changed_ms: int
    page: str


def study_pages(client: "MlflowClient") -> list[StudyPage]:
    """The pages of all studies of a store, the one that changed last first."""
    pages = []
    for experiment in client.search_experiments():
        for run in _parents(client, experiment.experiment_id):
            name, kind = run.data.tags[TAG_STUDY], run.data.tags[TAG_KIND]
            page = run_page(experiment.experiment_id, run.info.run_id)
            if _VIEW_TAG + _key("trials", name) in experiment.tags and kind in _WITH_TRIALS:
                page = front_page(experiment.experiment_id, name)
            changed = run.info.end_time or run.info.start_time
            pages.append(StudyPage(name, kind, experiment.name, changed, page))
    return sorted(pages, key=lambda each: each.changed_ms, reverse=True)


@contextmanager
def _courtesy(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the pages are a convenience, and any server may refuse in any way
        text = " ".join(str(error).split())[:300]
        log.warning("MLflow shows no %s (%s: %s); everything else is tracked", what, type(error).__name__, text)


def _page(experiment_id: str, key: str) -> str:
    return f"#/experiments/{experiment_id}/runs?{WORKFLOW}&compareRunsMode=CHART&viewStateShareKey={key}"


def _key(kind: str, name: str) -> str:
    """The key of a view: part of a tag's name and of an address, so not every sign of a study's name may be in it."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return f"{kind}-{plain}" if plain == name else f"{kind}-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _holds(tag: str | None, name: str, state: State) -> bool:
    try:
        return tag is not None and decoded(tag) == (name, state)
    except (ValueError, KeyError):  # whatever stood there
        return False


def _search(client: "MlflowClient", experiment_id: str, query: str) -> "list[Run]":
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _parents(client: "MlflowClient", experiment_id: str) -> "list[Run]":
    """The runs of an experiment that stand for studies, the newest first."""
    found = _search(client, experiment_id, f"tags.`{TAG_KIND}` != '{KIND_TRIAL}' and tags.`{TAG_STUDY}` LIKE '%'")
    return sorted(found, key=lambda run: run.info.start_time, reverse=True)


def _colors(parents: "list[Run]") -> dict[str, str]:
    return {run.data.tags[TAG_STUDY]: run.data.tags[_COLOR_TAG] for run in parents if _COLOR_TAG in run.data.tags}


def _give_color(client: "MlflowClient", study: str, parents: "list[Run]") -> None:
    used = _colors(parents)
    if study in used:
        return
    free = [color for color in _STUDY_COLORS if color not in used.values()]
    color = free[0] if free else _STUDY_COLORS[len(used) % len(_STUDY_COLORS)]
    for run in parents:
        if run.data.tags[TAG_STUDY] == study:
            client.set_tag(run.info.run_id, _COLOR_TAG, color)


def _note(present: str, experiment_id: str, study: StudyInfo, parents: "list[Run]") -> str:
    """The experiment's note with its first line brought up to date; what its users wrote below stays."""
    names = list(dict.fromkeys([study.name, *(run.data.tags[TAG_STUDY] for run in parents)]))
    splits = sorted({study.split, *(run.data.tags.get(TAG_SPLIT, study.split) for run in parents)})
    pages = [
        *((name, front_page(experiment_id, name)) for name in names[:_LINKED_STUDIES]),
        *((f"all ({split} images)", _page(experiment_id, _key("fronts", split))) for split in splits),
    ]
    line = f"{_NOTE_START} " + " · ".join(f"[{text}]({page})" for text, page in pages)
    first, _, rest = present.partition("\n")
    if first.startswith(_NOTE_START):
        return f"{line}\n{rest}" if rest else line
    return f"{line}\n\n{present}" if present else line


def _now_ms() -> int:
    return round(time.time() * 1000)

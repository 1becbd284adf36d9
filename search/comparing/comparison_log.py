"""What MLflow is told of a comparison: one run in the experiment of its studies, through a journal as studies are.

The run is found by the comparison's name, so that the same comparison again replaces what is there. A server that is
away costs nothing: the journal stays, `python -m tracking.replay` sends it.
"""

from collections.abc import Mapping
from pathlib import Path

from ccdist import atomic_files
from search.comparing.comparison import Comparison, Method
from search.comparing.comparison_text import Rows, notes, reach_rows, results_rows, setting
from search.config import SearchConfig
from search.storage import Storage
from search.tracked.bookkeeping import open_tracker, study_info, where_to_look
from search.tracked.run_names import REFERENCE
from tracking.journal import STUDY_JOURNAL, Journal, save_study_info
from tracking.sender import Delivery, why
from tracking.tracker import LoginError, StudyInfo


def tracked_config(comparison: Comparison) -> SearchConfig | None:
    """The first study's space file that is tracked at all; None: none is, and neither is the comparison."""
    configs = [study.stored.config for study in comparison.studies]
    return next((config for config in configs if config.tracking.enabled), None)


def record(comparison: Comparison, config: SearchConfig, storage: Storage, files: Mapping[str, Path]) -> Path:
    """Write the comparison's journal; returns its folder.

    Args:
        config: of one of its studies, which says where that is tracked.
        storage: where the comparison belongs.
        files: name of an artifact -> file.
    """
    journals = storage.artifacts / "comparisons" / comparison.name / "journal"
    save_study_info(journals, _info(comparison, config, storage))
    num_trials = sum(len(study.record.done) for study in comparison.studies)
    with Journal(journals / STUDY_JOURNAL) as journal:
        metrics = {name: value for method in comparison.methods for name, value in _metrics(comparison, method).items()}
        # The step grows with the studies: MLflow shows the values of the highest one.
        journal.study(metrics, {}, _kept(files, journals.parent), step=num_trials)
        journal.close_study("FINISHED")
    return journals


def _kept(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The files in the comparison's own folder, copied there from elsewhere: no other is sent."""
    kept = {name: folder / name for name in files}
    for name, file in files.items():
        if file.resolve() != kept[name].resolve():
            atomic_files.write_bytes(kept[name], file.read_bytes())
    return kept


def deliver(config: SearchConfig, storage: Storage, journals: Path) -> str:
    """Send the journal now; returns the line that says where to look, or how to send it later."""
    try:
        tracker = open_tracker(config, storage)
        Delivery(journals, tracker, resume=False).send()
    except Exception as error:  # whatever the server's trouble is, the journal stays
        name = f"{journals.parents[1].name}/{journals.parent.name}"
        return (
            f"MLflow was not reached ({error if isinstance(error, LoginError) else why(error)}); "
            f"python -m tracking.replay {storage.folder} --study {name} sends the comparison later"
        )
    return where_to_look(tracker, storage) or ""


def _info(comparison: Comparison, config: SearchConfig, storage: Storage) -> StudyInfo:
    studies = comparison.studies
    return StudyInfo(
        name=comparison.name,
        experiment=study_info(config, storage).experiment,
        tags={
            REFERENCE: ", ".join(f"{value:g}" for value in comparison.reference),
            "cert.studies": ", ".join(study.record.name for study in studies),
            "cert.methods": ", ".join(method.label for method in comparison.methods),
        },
        description=_description(comparison),
        tracking_uri=storage.tracking_uri or "",
        kind="comparison",
        split=studies[0].record.split,
    )


def _metrics(comparison: Comparison, method: Method) -> dict[str, float]:
    return {
        f"hypervolume/{method.slug}": method.hypervolume,
        f"hypervolume_at_common_hours/{method.slug}": comparison.at_common_hours(method),
        f"accelerator_hours/{method.slug}": method.hours,
    }


def _description(comparison: Comparison) -> str:
    labels = " and ".join(method.label for method in comparison.methods)
    parts = [
        f"Comparison of {labels}: open [compare.html](artifact:compare.html) among the artifacts.",
        _markdown(results_rows(comparison)),
        "Accelerator-hours until the mean hypervolume reached another's final one:",
        _markdown(reach_rows(comparison)),
        " ".join([setting(comparison), *notes(comparison)]),
    ]
    return "\n\n".join(parts)


def _markdown(rows: Rows) -> str:
    marks = ["---"] + ["---:"] * (len(rows.heads) - 1)
    lines = [rows.heads, marks, *rows.cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)

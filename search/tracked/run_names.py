"""The names under which runs of a search are found: tags, metrics of results and of the study, artifacts.

docs/TRACKING.md explains each. Those that a tracker gives itself stand in `tracking.tracker`; the metrics of an epoch
are called as the training calls them.
"""

from collections.abc import Mapping
from typing import Final, Literal

from search.recipe import Recipe
from search.studies.records import TrialResult, TrialState

# ---- Tags ----------------------------------------------------------------------------------------------------------

STATE: Final = "cert.state"
REASON: Final = "cert.reason"
VERIFICATION: Final = "cert.verification"
RECIPE: Final = "cert.recipe"
METHOD: Final = "cert.method"
SEED: Final = "cert.seed"
CONFIGURATION: Final = "cert.configuration"
REFERENCE: Final = "cert.reference"
SPACE: Final = "cert.space"
SAMPLER: Final = "cert.sampler"
DEATHS: Final = "cert.deaths"  # what became of attempts that ended without a result
MODEL_FAILURE: Final = "cert.model_failure"  # why a trial has no logged model

# ---- Artifacts -----------------------------------------------------------------------------------------------------

FRONT_PAGE, FRONT_PICTURE = "front.html", "front.png"
HYPERVOLUME_PAGE = "hypervolume.html"
REPORT = "report.html"
TRIALS, TRIALS_SHOWN = "trials.parquet", "trials.json"
SPACE_FILE, ENVIRONMENT = "space.yaml", "environment.json"
STUDENT_FOLDER, VERIFICATION_FOLDER = "student", "verification"

# ---- Metrics -------------------------------------------------------------------------------------------------------

HYPERVOLUME, HYPERVOLUME_UPPER = "hypervolume", "hypervolume_upper"
ENDS: tuple[TrialState, ...] = ("COMPLETE", "STOPPED", "FAILED")  # each with a number of its own: num_complete, ...


def start_tags(recipe: Recipe, configuration: str, deaths: str = "") -> dict[str, str]:
    """What a trial is from its start on.

    Args:
        configuration: hash of its parameters; empty where it belongs to no study.
        deaths: of its attempts before, in a line.
    """
    tags = {
        STATE: "RUNNING",
        METHOD: recipe.student.loss.kind,
        SEED: str(recipe.student.seed),
        RECIPE: recipe.model_dump_json(exclude={"data": {"path"}}),
    }
    return tags | {name: value for name, value in ((CONFIGURATION, configuration), (DEATHS, deaths)) if value}


def end_tags(state: Literal["COMPLETE", "STOPPED", "FAILED"], reason: str | None = None) -> dict[str, str]:
    """How a trial ended, and why there."""
    return {STATE: state} if reason is None else {STATE: state, REASON: reason}


def result_metrics(result: TrialResult, further_seconds: Mapping[str, float]) -> dict[str, float]:
    """The objectives with both ends of the certified interval, and the cost by part.

    Args:
        further_seconds: what else the trial spent its time on, by name.
    """
    return {
        **accuracies(result),
        "seconds": result.seconds,
        **{f"cost/{name}_seconds": value for name, value in (*further_seconds.items(), *result.costs.items())},
    }


def accuracies(result: TrialResult) -> dict[str, float]:
    """What was measured on the images, of a trial's run and of its model."""
    return {
        "standard_accuracy": result.standard_accuracy,
        "adversarial_accuracy": result.adversarial_accuracy,
        "certified_accuracy": result.certified_accuracy,
        "certified_upper": result.certified_upper,
    }


def study_metrics(hypervolume: tuple[float, float], ended: Mapping[TrialState, int]) -> dict[str, float]:
    """What is told of the study itself after each trial that ended.

    Args:
        hypervolume: of the lower ends and of the upper ends of certified accuracy.
        ended: how many trials have come to each state.
    """
    numbers = {f"num_{state.lower()}": float(ended.get(state, 0)) for state in ENDS}
    return {HYPERVOLUME: hypervolume[0], HYPERVOLUME_UPPER: hypervolume[1], **numbers}

"""Confirmations without Ray: what runs, on which images, with which seeds, and what is refused."""

import hashlib
import json
import re
import shlex
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from optuna.storages import InMemoryStorage
from studies import closed_form, config_of, empty_database, open_study, result

from ccdist.config import NetworkConfig
from ccdist.data import Dataset, ImageSet, final_dataset, load_dataset, load_test_set
from search import confirm
from search.artifacts.places import TrialPlaces
from search.config import SearchConfig, SpaceFileError, StoppingConfig
from search.confirming.confirm_close import Closing, aliases, registered
from search.confirming.confirmation import (
    SEED,
    ConfirmationSpace,
    ConfirmationStudy,
    Member,
    Pair,
    chosen_members,
    derived_seeds,
    members_of,
    planned,
    runs_left,
    with_target,
)
from search.confirming.confirmation_config import LADDER, ConfirmationConfig, ConfirmError, confirmation_config
from search.confirming.confirmation_config import config_of as read
from search.confirming.confirmed import result_of
from search.results.configurations import study_front
from search.space import Space
from search.storage import Storage
from search.studies.database import StudyError, open_storage
from search.studies.records import RungValues, StudyRecord, TrialResult
from search.studies.study_record import stored_config, study_record, verifier_text
from search.study import Study, load_record
from search.trial import TrialTask, run_trial
from tracking.journal import RegisterRow, read_rows

N_STUDY = 4
FEW = {"data__train_images": 150, "data__validation_images": 50}


class Silent:
    def advanced(self, phase: str, done: int, of: int) -> None: ...
    def rung(self, name: str, values: RungValues) -> None: ...
    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None: ...


def searched_study(folder: Path, trials: int = N_STUDY, **changes: Any) -> tuple[SearchConfig, Study]:
    """A finished search in `folder/study.db`, with the fingerprint of the real digits."""
    config = config_of(folder, **changes)
    study = open_study(config, folder / "study.db", load_dataset(config.data).fingerprint)
    for _ in range(trials):
        assignment = study.ask()
        told = closed_form(assignment.params)
        is_last = assignment.number == N_STUDY - 1  # a member of no front
        study.tell(assignment.number, result(0.3, 0.02) if is_last else told)
    return config, study


def confirmation_of(config: SearchConfig, **options: Any) -> ConfirmationConfig:
    return confirmation_config(config, **{"name": None, "test_images": None, "timeout_s": 20.0} | options)


# ---- Which images ----------------------------------------------------------------------------------------------


def marked(first: int, count: int) -> ImageSet:
    """Images that are their own number, in two pixels; the label is its last digit."""
    numbers = torch.arange(first, first + count)
    pixels = torch.stack([numbers // 256, numbers % 256], dim=1).to(torch.uint8)
    return ImageSet(pixels.reshape(count, 1, 1, 2), numbers % 10)


def numbers_of(images: ImageSet) -> list[int]:
    pixels = images.images.reshape(len(images), 2).long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def test_the_final_data_set_is_train_and_validation_and_the_test_set_apart() -> None:
    searched = Dataset("marked", marked(0, 300), marked(300, 80), 10, (0.0,), (1.0,), True, 2, "searched")
    final = final_dataset(searched, marked(380, 50))
    assert sorted(numbers_of(final.train)) == list(range(380))
    assert numbers_of(final.validation) == list(range(380, 430))
    assert final.train.labels.tolist() == [number % 10 for number in numbers_of(final.train)]
    assert (final.split, searched.split) == ("test", "validation")
    assert (final.flip, final.crop_padding, final.num_classes) == (True, 2, 10)
    fewer = final_dataset(searched, marked(380, 49))
    assert len({searched.fingerprint, final.fingerprint, fewer.fingerprint}) == 3


def test_of_the_digits_every_image_is_used_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    searched = load_dataset(config.data)
    final = final_dataset(searched, load_test_set(config.data))

    def hashes(*parts: ImageSet) -> Counter[str]:
        return Counter(hashlib.sha256(image.numpy().tobytes()).hexdigest() for part in parts for image in part.images)

    everything = load_dataset(config.data.model_copy(update={"validation": 0.0})).train
    assert hashes(final.train) == hashes(everything) == hashes(searched.train, searched.validation)
    assert (len(final.train), len(final.validation)) == (1527, 270)
    first = load_test_set(config.data, 7)
    assert torch.equal(first.images, final.validation.images[:7])
    with pytest.raises(ValueError, match="has 270 test images; 271 were asked for"):
        load_test_set(config.data, 271)


@pytest.mark.timeout(30)
def test_training_never_looks_at_the_test_set(tmp_path: Path) -> None:
    """Another test set, wrong labels included: the same student to the bit, and no curve over its images."""
    config = confirmation_of(config_of(tmp_path, **FEW), test_images=20)
    params = next(iter(Space(config_of(tmp_path, **FEW)).points())) | {SEED: 0}
    recipe = ConfirmationSpace(config).recipe(params, 0)
    recipe = recipe.model_copy(update={"verification": recipe.verification.model_copy(update={"rungs": ("ibp",)})})
    searched, test = load_dataset(config.data), load_test_set(config.data, 20)
    others = ImageSet(255 - test.images, (test.labels + 1) % 10)
    weights = []
    for name, images in [("right", test), ("wrong", others)]:
        places = TrialPlaces.of(tmp_path / name, "tiny-confirm", "tiny-confirm-0000")
        task = TrialTask("tiny-confirm-0000", recipe, params, places, config.stopping)
        told = run_trial(task, final_dataset(searched, images), device=torch.device("cpu"), reports=Silent())
        assert told.num_images == 20
        weights.append((places.student / "weights.safetensors").read_bytes())
        assert "validation/" not in places.journal.read_text()
        assert "student/epoch_seconds" in places.journal.read_text()
    assert weights[0] == weights[1]


def test_a_search_still_has_its_curve_over_validation_images(tmp_path: Path) -> None:
    """What the test before would not notice if the journal's names changed."""
    config = config_of(tmp_path, **FEW)
    params = Space(config).points()[1]
    recipe = Space(config).recipe(params, 0)
    places = TrialPlaces.of(tmp_path, "tiny", "tiny-0000")
    task = TrialTask("tiny-0000", recipe, params, places, StoppingConfig(training="off"))
    run_trial(task, load_dataset(config.data), device=torch.device("cpu"), reports=Silent())
    assert "validation/standard_accuracy" in places.journal.read_text()


# ---- What a run computes from ----------------------------------------------------------------------------------


def test_seeds_of_a_confirmation_are_no_seeds_of_the_search(tmp_path: Path) -> None:
    for seed in (0, 7):
        config = config_of(tmp_path, search__seed=seed)
        space, params = Space(config), Space(config).points()[0]
        recipes = [space.recipe(params, number) for number in range(300)]
        of_search = {recipe.student.seed for recipe in recipes} | {recipes[0].teacher.seed}
        own = [derived_seeds(seed, index) for index in range(300)]
        assert not of_search & {value for seeds in own for value in seeds.values()}
        assert len({value for seeds in own for value in seeds.values()}) == 600


def test_a_seed_index_gives_all_members_the_same_teacher(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    space = ConfirmationSpace(confirmation_of(config))
    first, second = Space(config).points()
    recipes = {
        (name, k): space.recipe(params | {SEED: k}, 99)
        for name, params in (("a", first), ("b", second))
        for k in (0, 1)
    }
    assert recipes["a", 0].teacher == recipes["b", 0].teacher
    assert recipes["a", 0].teacher.seed != recipes["a", 1].teacher.seed
    assert recipes["a", 0].student.seed != recipes["a", 1].student.seed
    assert recipes["a", 0] == space.recipe(first | {SEED: 0}, 3), "the trial's number is no part of a recipe"
    assert space.configuration(first | {SEED: 0}) == space.configuration(first | {SEED: 1})
    assert space.configuration(first | {SEED: 0}) == Space(config).configuration(first)


def test_a_recipe_is_the_search_s_but_for_seeds_data_and_ladder(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    params = Space(config).points()[0]
    before = Space(config).recipe(params, 0)
    now = ConfirmationSpace(confirmation_of(config, timeout_s=3)).recipe(params | {SEED: 0}, 0)
    assert now.data == before.data.model_copy(update={"validation": 0.0})
    assert now.verification.rungs == LADDER
    assert now.verification.branch_and_bound.timeout_s == 3
    assert now.verification.attack == before.verification.attack
    assert now.threat == before.threat
    for part in ("teacher", "student"):
        assert getattr(now, part).model_copy(update={"seed": 0}) == getattr(before, part).model_copy(update={"seed": 0})


@pytest.mark.parametrize("limits", [{"data__train_images": 500}, {"data__validation_images": 100}, FEW])
def test_a_recipe_names_no_image_that_a_limit_leaves_out(limits: dict[str, Any], tmp_path: Path) -> None:
    """Those of `validation: 0` with the sum of the limits would be others: limits cut each part of the split."""
    config = config_of(tmp_path, **limits)
    assert confirmation_of(config).training_data == config.data


def test_only_its_own_time_limit_counts(tmp_path: Path) -> None:
    """A search may keep its trials short; the whole ladder is not to be cut by that."""
    limits = {"timeout_s": 1, "total_timeout_s": 2, "max_branches": 3, "root_steps": 4}
    kept = confirmation_of(config_of(tmp_path, verification__branch_and_bound=limits)).verification.branch_and_bound
    assert (kept.timeout_s, kept.total_timeout_s, kept.max_branches, kept.root_steps) == (20.0, None, None, 4)


def test_the_ladder_attacks_what_is_not_proved_before_it_branches() -> None:
    assert LADDER == ("pgd", "ibp", "crown", "alpha_crown", "ensemble", "branch_and_bound")


@pytest.mark.parametrize(("activation", "branches"), [("relu", True), ("leaky_relu", True), ("tanh", False)])
def test_an_activation_without_a_kink_does_without_branch_and_bound(
    activation: Any, branches: bool, tmp_path: Path
) -> None:
    config = confirmation_of(config_of(tmp_path, network__activation=activation))
    rungs = config.verifier_of(NetworkConfig(activation=activation)).rungs
    assert rungs == (LADDER if branches else LADDER[:-1])
    assert ("branch and bound" in verifier_text(config.verification)) is branches, "tables say what was done"
    ConfirmationSpace(config)  # its corners are valid recipes: else the space is refused


def test_networks_of_several_activations_have_each_the_ladder_they_can_climb(tmp_path: Path) -> None:
    config = confirmation_of(config_of(tmp_path, network__activation={"choices": ["tanh", "relu"]}))
    found = [config.verifier_of(NetworkConfig(activation=each)).rungs for each in ("tanh", "relu")]
    assert found == [LADDER[:-1], LADDER]
    ConfirmationSpace(config)


def test_what_is_stored_is_read_as_what_it_was(tmp_path: Path) -> None:
    config = config_of(tmp_path, search__seed=3)
    confirming = confirmation_of(config, test_images=9)
    assert confirming.study_name == "tiny-seed3-confirm"
    assert read(json.loads(confirming.model_dump_json())) == confirming
    assert type(read(json.loads(config.model_dump_json()))) is SearchConfig
    assert (config.split, confirming.split, config.kind, confirming.kind) == (
        "validation",
        "test",
        "study",
        "confirmation",
    )
    others = [confirmation_of(config), confirmation_of(config, test_images=9, timeout_s=5)]
    assert len({each.identity_hash for each in [confirming, *others]}) == 3


def test_a_space_file_cannot_name_the_test_set(tmp_path: Path) -> None:
    with pytest.raises(SpaceFileError, match="unknown key confirmation"):
        config_of(tmp_path, confirmation={"study": "tiny"})
    with pytest.raises(SpaceFileError, match="unknown key split"):
        config_of(tmp_path, split="test")


# ---- Which runs ------------------------------------------------------------------------------------------------


def members(*names: str) -> list[Member]:
    return [Member(f"tiny-{index:04d}", index, {"alpha": index}, name, None) for index, name in enumerate(names)]


def test_the_plan_has_every_pair_once() -> None:
    plan = planned(members("a", "b", "c"), 2, None)
    assert [(pair.configuration, pair.seed) for pair in plan] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("c", 0),
        ("b", 1),
        ("c", 1),
    ]
    assert plan[1].params == {"alpha": 0, SEED: 1}


def confirmation_study(config: SearchConfig, searched: StudyRecord, seeds: int, storage: Any) -> ConfirmationStudy:
    confirming = confirmation_of(config)
    stored = load_record_of(confirming, storage)
    plan = planned(chosen_members(searched, []), seeds, stored)
    space = ConfirmationSpace(confirming, plan)
    opened = ConfirmationStudy.open(with_target(confirming, plan), space, storage, "final")
    assert isinstance(opened, ConfirmationStudy)
    return opened


def load_record_of(config: ConfirmationConfig, storage: Any) -> StudyRecord | None:

    if config.study_name not in optuna.get_all_study_names(storage):
        return None
    return study_record(optuna.load_study(study_name=config.study_name, storage=storage))


def places_by_state(study: Study) -> dict[str, Counter[tuple[str, int]]]:
    found: dict[str, Counter[tuple[str, int]]] = {}
    for trial in study.trials():
        found.setdefault(trial.state, Counter())[trial.configuration, trial.params[SEED]] += 1
    return found


def test_a_confirmation_asks_for_its_plan_and_nothing_else(tmp_path: Path) -> None:
    """Begun, killed with two runs at work, gone on, extended: every pair is run once."""
    config, searched = searched_study(tmp_path)
    storage = InMemoryStorage()
    first = confirmation_study(config, searched.record(), 2, storage)
    of_front = {member.configuration for member in chosen_members(searched.record(), [])}
    assert len(of_front) > 1
    done = first.ask()
    first.tell(done.number, closed_form(done.params))
    working = [first.ask(), first.ask()]

    second = confirmation_study(config, searched.record(), 2, storage)
    assert second.unfinished() == [each.number for each in working]
    for number in second.unfinished():
        second.tell(second.adopt(number).number, closed_form(second.adopt(number).params))
    while second.num_done() < second.config.budget.trials:
        assignment = second.ask()
        second.tell(assignment.number, closed_form(assignment.params))
    asked = {(name, seed) for name in of_front for seed in (0, 1)}
    assert places_by_state(second) == {"COMPLETE": Counter(asked)}
    with pytest.raises(StudyError, match="has all its runs"):
        second.prepare()

    third = confirmation_study(config, searched.record(), 3, storage)
    assert third.config.budget.trials == 3 * len(of_front)
    new = third.ask()
    assert (new.configuration, new.params[SEED]) not in asked
    fewer = confirmation_study(config, searched.record(), 1, storage)
    assert fewer.config.budget.trials == 2 * len(of_front) + 1, "what is there stays"


def test_a_run_that_failed_is_tried_again_after_the_others(tmp_path: Path) -> None:
    config, searched = searched_study(tmp_path)
    study = confirmation_study(config, searched.record(), 1, InMemoryStorage())
    bad = study.ask()
    study.tell_failed(bad.number, "not finite: loss")
    others = []
    while study.num_done() < study.config.budget.trials - 1:
        assignment = study.ask()
        study.tell(assignment.number, closed_form(assignment.params))
        others.append(assignment.configuration)
    again = study.ask()
    assert (again.configuration, again.params) == (bad.configuration, bad.params)
    assert bad.configuration not in others
    study.tell(again.number, closed_form(again.params))
    assert runs_left(study.space.plan, study.record()) == []  # type: ignore[attr-defined]


def test_members_are_the_front_or_those_that_are_named(tmp_path: Path) -> None:
    _, study = searched_study(tmp_path)
    record = study.record()
    assert [each.number for each in chosen_members(record, [])] == [each.number for each in study_front(record).members]
    on_front = {member.number for member in chosen_members(record, [])}
    outside = next(trial for trial in record.trials if trial.number not in on_front)
    named = chosen_members(record, [outside.key, "0", "0"])
    assert [each.number for each in named] == [outside.number, 0]
    assert named[0].searched is not None
    assert named[0].searched.standard_accuracy == outside.standard_accuracy
    assert members_of(record, ["nobody's"]) == ()
    with pytest.raises(ConfirmError, match="study tiny has no trial '99'; its trials are 0 to 3"):
        chosen_members(record, ["99"])


# ---- What is left behind ---------------------------------------------------------------------------------------


def test_the_first_seed_s_model_is_registered_whatever_its_result(tmp_path: Path) -> None:
    config, searched = searched_study(tmp_path)
    study = confirmation_study(config, searched.record(), 2, InMemoryStorage())
    while study.num_done() < study.config.budget.trials:
        assignment = study.ask()
        best = assignment.params[SEED] == 1  # the second seed is better in both
        study.tell(assignment.number, result(0.9 + 0.05 * best - 0.1 * assignment.params["alpha"], 0.4 + 0.05 * best))
    confirming = confirmation_of(config)
    closing = Closing(confirming, searched.record(), chosen_members(searched.record(), []), ("pgd", "ibp", "crown"))
    storage = Storage(tmp_path, "sqlite://", tmp_path / "artifacts", None)
    record = study.record()
    found = closing.result(record, storage)
    models = registered(found)
    seed_of = {trial.key: trial.params[SEED] for trial in record.trials}
    assert len(models) == len(found.front) == 1, "the others are dominated"
    assert {seed_of[key] for key in models} == {0}
    assert aliases(found)["knee"] == ""  # two members have none; an earlier one loses its alias
    assert {aliases(found)["best-standard"], aliases(found)["best-certified"]} <= set(models)
    closing.close(record, storage, "KILLED")
    closing.close(record, storage, "FINISHED")
    rows = [line.row for line in read_rows(storage.journals("tiny-confirm") / "_study.jsonl")[0]]
    (row,) = [row for row in rows if isinstance(row, RegisterRow)]
    assert (row.name, set(row.versions), row.aliases) == ("digits-linf-1_10", set(models), aliases(found))
    assert row.versions[next(iter(models))]["cert.split"] == "test"
    assert json.loads((tmp_path / "artifacts/tiny-confirm/confirm.json").read_text())["front"] == [found.front[0].key]


def test_what_the_search_s_rungs_proved_is_counted_from_the_verdicts(tmp_path: Path) -> None:
    """Of ten images ibp and crown prove three, later rungs two more; the search proved 0.45 of its own."""
    config, searched = searched_study(tmp_path, trials=0)
    before = searched.ask()
    searched.tell(before.number, result(0.9, 0.45))
    study = confirmation_study(config, searched.record(), 1, InMemoryStorage())
    run = study.ask()
    study.tell(run.number, result(0.9, 0.5, num_images=10))
    storage = Storage(tmp_path, "sqlite://", tmp_path / "artifacts", None)
    closing = Closing(
        confirmation_of(config), searched.record(), chosen_members(searched.record(), []), ("ibp", "crown")
    )
    assert closing.result(study.record(), storage).members[0].gap_alike is None, "its verdicts are missing"
    places = TrialPlaces.of(storage.artifacts, "tiny-confirm", run.key)
    places.folder.mkdir(parents=True)
    proved = ["ibp", "crown", "crown", "alpha_crown", "branch_and_bound"]
    verdicts = {"verdict": ["certified"] * 5 + ["falsified"] * 4 + ["undecided"], "method": [*proved, *["pgd"] * 4, ""]}
    pq.write_table(pa.table(verdicts), places.verdicts)
    member = closing.result(study.record(), storage).members[0]
    assert member.gap == pytest.approx((0.0, -0.05))
    assert member.gap_alike == pytest.approx(0.15)
    later = replace(closing, rungs=("pgd", "crown"))
    assert later.result(study.record(), storage).members[0].gap_alike == pytest.approx(0.15), (
        "crown proves what ibp does"
    )
    whole = replace(closing, rungs=("branch_and_bound",))
    assert whole.result(study.record(), storage).members[0].gap_alike == pytest.approx(-0.05)
    places.verdicts.write_bytes(b"damaged")
    assert closing.result(study.record(), storage).members[0].gap_alike is None


# ---- The command -----------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert confirm.main([*arguments, "--dry-run"]) == 2  # what is not refused would start Ray
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    (tmp_path / "study.db").write_bytes(empty_database())
    searched_study(tmp_path)
    return tmp_path


def test_a_dry_run_prints_the_plan_and_writes_nothing(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in storage.rglob("*"))
    assert confirm.main(["tiny", "--storage", str(storage), "--seeds", "2", "--test-images", "50", "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "confirmation tiny-confirm of study tiny" in out
    assert "training on 1,527 images (training and validation)" in out
    assert "on 50 test images of digits; threat linf 1/10" in out
    assert "20 s" in out
    count = len(chosen_members(load_record(f"sqlite:///{storage}/study.db", "tiny"), []))
    assert f"{2 * count} of {2 * count} runs are left" in out
    assert "hours" in out
    assert [path for path in sorted(storage.rglob("*")) if not path.name.startswith("study.db-")] == before


def test_the_estimate_of_few_runs_is_not_shared_by_idle_slots(
    storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two seconds of student on 1,222 images, one of verification; 16 slots make one run no faster."""
    monkeypatch.setattr("search.confirming.confirm_table.slots_here", lambda resources: 16)
    told = []
    for seeds in ("1", "16"):
        assert confirm.main(["tiny", "--storage", str(storage), "--members", "0", "--seeds", seeds, "--dry-run"]) == 0
        told.append(re.findall(r"(\d+) at once|estimate: [\de.-]+ hours \((\d+) s", capsys.readouterr().out))
    assert [each[0][0] for each in told] == ["1", "16"]
    assert told[0][1] == told[1][1]


def test_the_command_to_go_on_with_has_no_password() -> None:
    arguments = ["tiny", "--study-url", "postgresql://me:secret@host/db", "--set", "tracking.uri=http://u:secret@h"]
    told = confirm._command(arguments)
    assert "secret" not in told
    assert "postgresql://me:***@host/db" in told


def test_a_complete_confirmation_without_tracking_gets_the_report_that_a_kill_prevented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, searched = searched_study(tmp_path, tracking__enabled=False)
    study = confirmation_study(config, searched.record(), 1, open_storage(f"sqlite:///{tmp_path}/study.db"))
    while study.num_done() < study.config.budget.trials:
        assignment = study.ask()
        study.tell(assignment.number, closed_form(assignment.params))
    assert confirm.main(["tiny", "--storage", str(tmp_path)]) == 0  # with as many seeds as it has: nothing is added
    assert "runs already" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "artifacts/tiny-confirm").iterdir()}
    assert {"confirm.md", "report.html", "front.png", "trials.parquet"} <= names


def test_what_cannot_be_confirmed_is_refused_in_one_line(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--storage", str(storage))
    assert "no study 'other'" in refused(capsys, "other", *where)
    assert "no study database" in refused(capsys, "tiny", "--storage", str(storage / "nowhere"))
    assert "has no trial '77'" in refused(capsys, "tiny", *where, "--members", "77")
    assert "--seeds 0: expected 1" in refused(capsys, "tiny", *where, "--seeds", "0")
    assert "271 were asked for" in refused(capsys, "tiny", *where, "--test-images", "271")
    assert "test_images: 0 is not allowed" in refused(capsys, "tiny", *where, "--test-images", "0")
    assert "timeout_s: 0.0 is not allowed" in refused(capsys, "tiny", *where, "--timeout", "0")
    assert "name: 'A B' is not allowed" in refused(capsys, "tiny", *where, "--name", "A B")
    assert "study tiny exists and is no confirmation" in refused(capsys, "tiny", *where, "--name", "tiny")
    assert "only resources and tracking may change" in refused(capsys, "tiny", *where, "--set", "student.epochs=1")
    assert "gpu" in refused(capsys, "tiny", *where, "--set", "resources.gpu=1.5")
    assert "expected key=value" in refused(capsys, "tiny", *where, "--set", "resources.gpu")


def test_a_study_without_finished_trials_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searched_study(tmp_path, trials=0)
    assert "has no finished trial" in refused(capsys, "tiny", "--storage", str(tmp_path))


def test_other_options_on_a_stored_confirmation_are_refused(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{storage}/study.db"
    config = stored_config(url, "tiny")
    confirming = confirmation_of(config, test_images=30, timeout_s=5)
    ConfirmationStudy.open(confirming, ConfirmationSpace(confirming, [Pair("a", 0, {SEED: 0})]), url, "final")
    where = ("--storage", str(storage))
    error = refused(capsys, "tiny", *where, "--test-images", "31")
    assert "confirmation.test_images: stored 30, given 31" in error
    assert "another --name" in error
    assert "timeout_s: stored 5.0, given 6.0" in refused(capsys, "tiny", *where, "--timeout", "6")
    assert "test_images: 0 is not allowed" in refused(capsys, "tiny", *where, "--test-images", "0")
    assert "timeout_s: 0.0 is not allowed" in refused(capsys, "tiny", *where, "--timeout", "0")
    assert confirm.main(["tiny", *where, "--dry-run"]) == 0, "options that are not given are the stored ones"
    assert "on 30 test images" in " ".join(capsys.readouterr().out.split())
    assert confirm.main(["tiny", *where, "--test-images", "31", "--name", "other", "--dry-run"]) == 0
    capsys.readouterr()
    assert "is a confirmation itself, of tiny" in refused(capsys, "tiny-confirm", *where)
    record = load_record(url, "tiny-confirm")
    assert record.split == "test"
    assert load_record(url, "tiny").split == "validation"


def test_images_that_have_changed_since_are_refused(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(storage, name="moved")
    study = open_study(config, storage / "study.db", "of other images")
    assignment = study.ask()
    study.tell(assignment.number, closed_form(assignment.params))
    error = refused(capsys, "moved", "--storage", str(storage))
    assert "study moved was made from other images than those of digits now" in error
    assert "--data DIR" in error


def test_results_are_joined_with_those_of_the_search(tmp_path: Path) -> None:
    config, searched = searched_study(tmp_path)
    study = confirmation_study(config, searched.record(), 1, InMemoryStorage())
    while study.num_done() < study.config.budget.trials:
        assignment = study.ask()
        study.tell(assignment.number, closed_form(assignment.params))  # what the search found, exactly
    chosen = chosen_members(searched.record(), [])
    found = result_of(study.record(), searched.record(), chosen, {})
    assert {each.key for each in found.front} == {each.key for each in chosen}
    for each in found.members:
        assert each.gap == (0.0, 0.0)
        assert each.num_seeds == 1


@pytest.mark.timeout(30)  # it may be the one that pays for importing Ray
def test_a_run_that_always_fails_ends_a_confirmation_that_has_all_others(tmp_path: Path) -> None:
    """Through the real searcher: the count is exact, and no other run suffers."""
    from test_searcher import Log, searcher_of

    config, searched = searched_study(tmp_path)
    study = confirmation_study(config, searched.record(), 2, InMemoryStorage())
    bad = study.space.plan[0]  # type: ignore[attr-defined]
    log, target = Log(), study.config.budget.trials
    searcher = searcher_of(study, log, target=target, slots=2)
    for step in range(100):
        suggested = searcher.suggest(f"t{step}")
        if suggested == "FINISHED":
            break
        assert suggested is not None
        params = json.loads(suggested["trial"])["params"]
        if (params[SEED], params["alpha"]) == (bad.seed, bad.params["alpha"]):
            report = {"state": "FAILED", "reason": f"not finite: loss at step {step}"}
        else:
            report = {"state": "COMPLETE", "result": json.dumps(asdict(closed_form(params)))}
        searcher.on_trial_complete(f"t{step}", report)
    states = places_by_state(study)
    assert set(states["COMPLETE"].values()) == {1}
    assert len(states["COMPLETE"]) == target - 1
    assert states["FAILED"] == Counter({(bad.configuration, bad.seed): 4}), "once, and three in a row at the end"
    assert searcher.stop_reason is not None
    assert "3 trials in a row" in searcher.stop_reason


def test_the_documented_commands_are_commands_and_name_every_option() -> None:
    text = (Path(__file__).parent.parent / "docs" / "CONFIRM.md").read_text()
    commands = re.findall(r"^python -m search\.confirm (.*?)(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 4
    parser = confirm._parser()
    for command in commands:
        assert parser.parse_args(shlex.split(command)).study in ("digits", "mnist")
    options = {name for action in parser._actions for name in action.option_strings if name.startswith("--")} - {
        "--help"
    }
    assert {option for option in options if f"`{option}" not in text and option not in " ".join(commands)} == set()

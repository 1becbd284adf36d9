"""The study in a real SQLite file: what is stored, what continues it, and what is refused."""

import contextlib
import functools
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic.script import ScriptDirectory
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from studies import FINGERPRINT, closed_form, config_of, empty_database, open_study, result, space_of

from search.config import SearchConfig
from search.recipe import derive_seed
from search.studies.database import sqlite_file
from search.studies.records import RungValues, TrialResult
from search.study import Study, StudyError, load_record, stored_record, trial_key
from search.suggestions.sampling import make_sampler


@pytest.fixture(autouse=True, scope="module")
def migrations_are_read_once() -> Iterator[None]:
    """Optuna runs every migration script at each opening, half of what that costs, to learn the newest version."""
    newest = functools.cache(lambda folder: ScriptDirectory(folder).get_heads()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "get_current_head", lambda scripts: newest(scripts.dir))
        yield


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return config_of(tmp_path)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


def url_of(database: Path) -> str:
    return f"sqlite:///{database}"


def raw(database: Path, name: str = "tiny") -> optuna.Study:
    """The study as any other Optuna program sees it."""
    return optuna.load_study(study_name=name, storage=url_of(database))


def refusal(config: SearchConfig, database: Path, fingerprint: str = FINGERPRINT) -> str:
    before = database.read_bytes()
    with pytest.raises(StudyError) as caught:
        open_study(config, database, fingerprint)
    text = str(caught.value)
    assert "\n" not in text
    assert database.read_bytes() == before
    return text


class Died(Exception):
    """Stands for the moment at which a driver is killed."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, call: int) -> None:
    """The given call of a method, and every one after it, never happens."""
    original, calls = getattr(owner, method), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) >= call:
            raise Died
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, dying)


def test_a_study_is_made_and_continued(config: SearchConfig, database: Path) -> None:
    assert stored_record(config, url_of(database)) is None
    assert not database.exists()
    study = open_study(config, database)
    first = study.ask()
    study.tell(first.number, closed_form(first.params))
    again = open_study(config, database)
    assert again.num_complete() == 1
    assert again.record() == study.record() == stored_record(config, url_of(database))
    assert again.record() == load_record(url_of(database), "tiny")
    assert again.ask().number == 1


def test_the_record_says_what_every_figure_must(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    record = study.record()
    assert (record.name, record.dataset, record.threat) == ("tiny", "digits", "linf 1/10")
    assert record.reference == (0.2, 0.1)
    assert record.verifier == "PGD (40 steps of 0.035 of the radius, 1 restart), IBP, CROWN, no time limit"
    assert record.num_images == 0
    assignment = study.ask()
    study.tell(assignment.number, result(num_images=77))
    assert study.record().num_images == 77


def test_the_budget_and_places_may_change(config: SearchConfig, database: Path, tmp_path: Path) -> None:
    open_study(config, database)
    changed = config_of(tmp_path, budget__trials=99, resources__cpu=2, tracking__enabled=False, data__path="/other")
    assert open_study(changed, database).record().name == "tiny"


def test_the_sampler_may_change_also_in_a_study_whose_identity_names_it(
    config: SearchConfig, database: Path, tmp_path: Path
) -> None:
    """As studies of earlier versions do."""
    study = open_study(config, database)
    identity = config.identity
    identity["search"]["sampler"] = {"kind": "tpe", "startup_trials": 10}
    raw(database).set_user_attr("identity", identity)
    raw(database).set_user_attr("format_version", 1)
    again = open_study(config_of(tmp_path, search__sampler="nsga2"), database)
    assert again.identifier == study.identifier
    assert stored_record(config, url_of(database)) is not None


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"threat__epsilon": "2/10"}, 'threat.epsilon: stored "1/10", given "1/5"'),
        ({"network__width": 9}, "network.width: stored 8, given 9"),
        ({"student__l1": None}, "student.l1: stored 1e-06, given null"),
        ({"student__shi_weight": 0.1}, "student.shi_weight: stored null, given 0.1"),
        ({"student__attack__steps": 2}, 'student.attack.steps: stored {"low": 1, "high": 4, "integer": true}, given 2'),
        ({"search__points": []}, "search.points: stored ["),
        ({"data__validation": 0.3}, "data.validation: stored 0.2, given 0.3"),
    ],
)
def test_another_space_is_refused_with_the_first_difference(
    changes: dict[str, Any], difference: str, config: SearchConfig, database: Path, tmp_path: Path
) -> None:
    open_study(config, database)
    other = config_of(tmp_path, **changes)
    answer = refusal(other, database)
    assert f"study tiny exists with another space ({difference}" in answer
    assert answer.endswith("; choose another name (--set name=...) or another --storage")
    with pytest.raises(StudyError, match="another space"):
        stored_record(other, url_of(database))


def test_another_name_or_seed_is_another_study(config: SearchConfig, database: Path, tmp_path: Path) -> None:
    open_study(config, database)
    open_study(config_of(tmp_path, name="other", threat__epsilon="2/10"), database)
    open_study(config_of(tmp_path, search__seed=1), database)
    assert set(optuna.get_all_study_names(url_of(database))) == {"tiny", "other", "tiny-seed1"}


def test_other_images_are_refused(config: SearchConfig, database: Path) -> None:
    open_study(config, database)
    assert "study tiny was made from other images than those of digits now" in refusal(config, database, "another")


@pytest.mark.parametrize("directions", [["maximize", "minimize"], ["maximize"]])
def test_other_directions_are_refused(directions: list[str], config: SearchConfig, database: Path) -> None:
    database.write_bytes(empty_database())
    optuna.create_study(study_name="tiny", storage=url_of(database), directions=directions)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="study tiny exists with other directions"):
        open_study(config, database)
    assert raw(database).user_attrs == {}
    assert raw(database).trials == []


def test_another_format_is_refused(config: SearchConfig, database: Path) -> None:
    open_study(config, database)
    raw(database).set_user_attr("format_version", 99)
    assert "study tiny has storage format 99; this program reads 1 to 2: update" in refusal(config, database)


@pytest.mark.parametrize("call", range(1, 6))
def test_a_study_whose_making_was_cut_off_is_made_again(
    call: int, config: SearchConfig, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, optuna.Study, "set_user_attr", call)
        with pytest.raises(Died):
            open_study(config, database)
    assert stored_record(config, url_of(database)) is None
    with pytest.raises(StudyError, match="interrupted while it was made"):
        load_record(url_of(database), "tiny")
    record = open_study(config, database).record()
    assert [trial.state for trial in record.trials] == ["WAITING", "WAITING"]


@pytest.mark.parametrize("call", [1, 2])
def test_each_point_is_enqueued_once_also_after_a_kill_between_two(
    call: int, config: SearchConfig, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, RDBStorage, "create_new_trial", call)
        with pytest.raises(Died):
            open_study(config, database)
    for _ in range(3):
        study = open_study(config, database)
    assert [trial.user_attrs["point"] for trial in raw(database).trials] == [0, 1]
    first, second, third = (study.ask() for _ in range(3))
    assert first.params == {"loss": "cc_dist", "alpha": 0.5, "beta": 5.0, "warm_up": 0.05, "steps": 2}
    assert second.params == {"loss": "no_distillation", "alpha": 0.1, "warm_up": 0.0, "steps": 1}
    assert (first.key, second.key, third.key) == ("tiny-0000", "tiny-0001", "tiny-0002")
    assert "point" not in raw(database).trials[2].user_attrs


def test_a_told_result_is_stored_whole(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    assignment = study.ask()
    told = result(0.8, 0.4, costs={"teacher": 1.0, "student": 2.0, "verification": 3.5}, seconds=6.5)
    study.tell(assignment.number, told)
    (trial,) = load_record(url_of(database), "tiny").complete
    assert trial.key == assignment.key
    assert trial.params == assignment.params
    assert trial.objectives == (0.8, 0.4)
    assert trial.adversarial_accuracy == told.adversarial_accuracy
    assert trial.certified_upper == told.certified_upper
    assert trial.costs == told.costs
    assert (trial.seconds, trial.num_images, trial.verification_state) == (6.5, 100, "finished")
    assert trial.configuration == space_of(config).configuration(assignment.params)
    assert trial.seed == space_of(config).recipe(assignment.params, assignment.number).student.seed
    assert trial.finished_at is not None
    assert trial.finished_at >= load_record(url_of(database), "tiny").started_at
    stored = raw(database).trials[0]
    assert stored.values == [0.8, 0.4]
    assert stored.user_attrs["result"]["provenance"] == {"device": "none"}


def test_a_failure_is_stored_with_its_reason_and_without_values(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    number = study.ask().number
    study.tell_failed(number, "not finite: the loss")
    record = study.record()
    assert record.trials[0].state == "FAILED"
    assert record.trials[0].reason == "not finite: the loss"
    assert record.trials[0].objectives is None
    assert record.complete == ()
    assert (study.num_complete(), study.num_failed(), study.unfinished()) == (0, 1, [])


def test_a_trial_that_was_nearly_given_up_may_fail_by_its_own_fault(config: SearchConfig, database: Path) -> None:
    """A kill came between the attributes of an end and the change of state."""
    study = open_study(config, database)
    study._storage.set_attribute(study._ids[study.ask().number], "given_up", True)
    study = open_study(config, database)
    study.tell_failed(0, "diverged")
    assert study.num_failed() == 1


def test_the_states_of_a_study(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    study.tell(study.ask().number, result())
    study.tell_failed(study.ask().number, "why")
    study.tell_stopped(study.ask().number, "dominated", 12.5)
    study.ask()
    study.enqueue(proposal := study.prepare(), proposal.suggest())
    record = study.record()
    assert [trial.state for trial in record.trials] == ["COMPLETE", "FAILED", "STOPPED", "RUNNING", "WAITING"]
    assert (study.unfinished(), study.waiting(), study.num_done(), study.num_failed()) == ([3], [4], 2, 1)
    assert (record.trials[2].reason, record.trials[2].seconds, record.trials[2].objectives) == ("dominated", 12.5, None)
    assert [trial.number for trial in record.done] == [0, 2]
    again = open_study(config, database)
    assert again.record() == load_record(url_of(database), "tiny") == record
    assert (again.unfinished(), again.waiting(), again.num_done(), again.num_failed()) == ([3], [4], 2, 1)


def test_a_started_trial_is_adopted_with_its_key_and_values(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    started = [study.ask() for _ in range(4)]
    again = open_study(config, database)
    assert again.unfinished() == [0, 1, 2, 3]
    assert [again.adopt(number) for number in again.unfinished()] == started
    assert len(again.record().trials) == 4
    again.tell(2, closed_form(started[2].params))
    assert again.unfinished() == [0, 1, 3]
    assert again.ask().number == 4


def older_driver(config: SearchConfig, database: Path) -> optuna.Study:
    """The study as a driver of the first version left it: points without parameters, trials drawn in many writes."""
    open_study(config.model_copy(update={"search": config.search.model_copy(update={"points": ()})}), database)
    study = raw(database)
    study.set_user_attr("identity", config.identity)
    study.set_user_attr("format_version", 1)
    for index, point in enumerate(space_of(config).points()):
        study.enqueue_trial(point, user_attrs={"point": index})
    return study


def older_ask(study: optuna.Study, config: SearchConfig, number: int, *, drawn: int) -> dict[str, Any]:
    """So many parameters of a trial were drawn when that driver was killed."""
    study.sampler = make_sampler(config.search.sampler, derive_seed(config.search.seed, "sampler", number))
    trial = study.ask()
    space, found = space_of(config), dict[str, Any]()
    original = space.suggest

    class Cut:
        def __getattr__(self, method: str) -> Any:
            def suggesting(name: str, *args: Any, **kwargs: Any) -> Any:
                if len(found) == drawn:
                    raise Died
                found[name] = getattr(trial, method)(name, *args, **kwargs)
                return found[name]

            return suggesting

    with contextlib.suppress(Died):
        original(Cut())
    return found


@pytest.mark.parametrize("drawn", [0, 2])
def test_a_trial_that_an_older_driver_left_half_drawn_keeps_what_was_drawn(
    drawn: int, config: SearchConfig, database: Path, tmp_path: Path
) -> None:
    whole = in_memory(config)
    expected = [whole.ask() for _ in range(3)]
    study = older_driver(config, database)
    older_ask(study, config, 0, drawn=0)
    older_ask(study, config, 1, drawn=9)
    kept = older_ask(study, config, 2, drawn=drawn)
    assert len(kept) == drawn
    opened = open_study(config, database)
    adopted = [opened.adopt(number) for number in opened.unfinished()]
    assert adopted[:2] == expected[:2]  # points, also the one of which nothing was drawn
    assert (adopted[2].number, adopted[2].key) == (2, "tiny-0002")
    assert {name: adopted[2].params[name] for name in kept} == kept
    assert set(adopted[2].params) >= {"loss", "alpha", "warm_up", "steps"}
    assert raw(database).trials[2].params == adopted[2].params
    if drawn == 0:  # nothing was drawn, so it is the same draw
        assert adopted == expected
    assert open_study(config, database).record() == opened.record()


def test_a_waiting_point_of_an_older_driver_is_started_with_its_values(config: SearchConfig, database: Path) -> None:
    older_driver(config, database)
    study = open_study(config, database)
    assert study.waiting() == [0, 1]
    assert [study.ask() for _ in range(3)] == [(same := in_memory(config)).ask(), same.ask(), same.ask()]


def in_memory(config: SearchConfig, storage: BaseStorage | None = None) -> Study:
    return Study.open(config, space_of(config), storage or InMemoryStorage(), FINGERPRINT)


def suggestions(config: SearchConfig, count: int, *, reopen: bool = False) -> list[dict[str, Any]]:
    study = in_memory(config, storage := InMemoryStorage())
    found = []
    for _ in range(count):
        if reopen:
            study = in_memory(config, storage)
        assignment = study.ask()
        found.append(assignment.params)
        study.tell(assignment.number, closed_form(assignment.params))
    return found


def test_random_suggestions_depend_on_seed_and_number_only(config: SearchConfig, tmp_path: Path) -> None:
    straight = suggestions(config, 6)
    restarted = suggestions(config, 6, reopen=True)
    asked_at_once = in_memory(config)
    assert straight == restarted == [asked_at_once.ask().params for _ in range(6)]
    assert len({json.dumps(params, sort_keys=True) for params in straight}) == 6
    assert suggestions(config_of(tmp_path, search__seed=1), 6)[2:] != straight[2:]


@pytest.mark.parametrize("sampler", [{"kind": "tpe", "startup_trials": 4}, {"kind": "nsga2", "population": 4}])
def test_a_restart_changes_no_suggestion(sampler: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path, search__sampler=sampler, search__floors={"standard_accuracy": 0.6})
    assert suggestions(config, 12) == suggestions(config, 12, reopen=True)


def test_genetic_samplers_evolve_through_the_database(tmp_path: Path) -> None:
    config = config_of(tmp_path, search__sampler={"kind": "nsga2", "population": 4})
    study = open_study(config, tmp_path / "study.db")
    for number in range(10):
        if number == 6:
            study = open_study(config, tmp_path / "study.db")
        assignment = study.ask()
        study.tell(assignment.number, closed_form(assignment.params))
    stored = [trial.system_attrs["NSGAIISampler:generation"] for trial in raw(tmp_path / "study.db").trials]
    assert stored == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]  # the two points belong to the first generation


def test_a_model_suggests_what_pays(tmp_path: Path) -> None:
    """Most of the trials of TPE, after its start, are above the median of random ones."""
    config = config_of(tmp_path, search__sampler="tpe", search__points=[])
    found = [closed_form(params) for params in suggestions(config, 30)]
    sums = [result.standard_accuracy + result.certified_accuracy for result in found]
    assert sum(sums[10:]) / 20 > sum(sums[:10]) / 10


# ---- asked ahead ---------------------------------------------------------------------------------------------------


def test_a_trial_asked_ahead_is_used_first_after_a_restart(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    proposal = study.prepare()
    assert study.enqueue(proposal, proposal.suggest()) == 2
    assert study.enqueue(proposal, proposal.suggest()) is None  # its number is taken
    again = open_study(config, database)
    assert again.waiting() == [0, 1, 2]
    started = [again.ask() for _ in range(4)]
    assert [assignment.number for assignment in started] == [0, 1, 2, 3]
    assert [assignment.params for assignment in started] == suggestions(config, 4)
    assert started[2] == again.assignment(2)


def test_a_trial_starts_once(config: SearchConfig, database: Path) -> None:
    study, other = open_study(config, database), open_study(config, database)
    study.start(0)
    other.start(1)
    other.tell(1, result())
    for number in (0, 1):
        with pytest.raises(StudyError, match=r"trial tiny-000\d was started already; only one search may run a study"):
            (other if number == 0 else study).start(number)


def test_trials_of_another_program_are_noticed(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    raw(database).enqueue_trial({})
    study.ask(), study.ask()
    with pytest.raises(StudyError, match="study tiny got trials from another program while this search runs"):
        study.ask()
    again = open_study(config, database)
    assert [again.adopt(number).number for number in again.unfinished()] == [0, 1, 3]
    assert again.ask().number == 2  # completed like any point


def test_the_database_is_read_only_when_it_is_opened(
    config: SearchConfig, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(config, database)
    for method in ("get_all_trials", "get_study_user_attrs"):
        die_at(monkeypatch, RDBStorage, method, 1)
    for _ in range(3):
        assignment = study.ask()
        study.note_rung(assignment.number, "a", RungValues(0.5, 0.2, 1.0))
        study.tell(assignment.number, closed_form(assignment.params))
    assert len(study.record().complete) == 3
    assert study.trials() == study.record().trials


# ---- rungs, ends, and what a kill leaves ---------------------------------------------------------------------------


def test_rungs_are_stored_once_and_in_order(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    number = study.ask().number
    for name, certified in [("z", 0.1), ("a", 0.2), ("z", 0.3)]:
        study.note_rung(number, name, RungValues(0.5, certified, 2.0))
    expected = [("z", RungValues(0.5, 0.1, 2.0)), ("a", RungValues(0.5, 0.2, 2.0))]
    for reader in (study, open_study(config, database)):
        assert list(reader.trials()[number].rungs.items()) == expected
    study.tell_stopped(number, "dominated", 3.0)
    study.note_rung(number, "later", RungValues(0.5, 0.1, 2.0))
    assert [name for name, _ in expected] == list(open_study(config, database).trials()[number].rungs)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_stored_and_leaves_no_trial_running(wrong: float, config: SearchConfig) -> None:
    study = in_memory(config)
    numbers = [study.ask().number for _ in range(4)]
    with pytest.raises(ValueError, match=r"trial tiny-0000, rung a: certified_accuracy is .*; a rung holds finite"):
        study.note_rung(numbers[0], "a", RungValues(0.5, wrong, 1.0))
    study.tell(numbers[0], result(expected_certified=wrong))
    study.tell(numbers[1], result(costs={"teacher": wrong}))
    study.tell_stopped(numbers[2], "dominated", wrong)
    study.tell(numbers[3], result())
    with pytest.raises(ValueError, match="tiny-0003: expected_certified is"):
        study.refine(numbers[3], result(expected_certified=wrong))
    reasons = [trial.reason for trial in study.trials()[:3]]
    assert reasons == [
        f"not finite: expected_certified is {wrong}",
        f"not finite: costs is {wrong}",
        f"not finite: stopped after {wrong} s",
    ]
    assert (study.num_failed(), study.unfinished()) == (3, [])
    assert str(wrong) not in str([trial.rungs for trial in study.trials()])


def test_the_first_end_of_a_trial_stays(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    for number, tell in enumerate([lambda n: study.tell(n, result()), lambda n: study.tell_stopped(n, "why", 1.0)]):
        study.ask()
        tell(number)
        first = study.trials()[number]
        study.tell(number, result(0.1, 0.1))
        study.tell_stopped(number, "again", 2.0)
        study.tell_failed(number, "again", given_up=True)
        assert study.trials()[number] == first
    assert open_study(config, database).record() == study.record()


ENDS = {
    "tell": lambda study, number: study.tell(number, result(verification_state="stopped", reason="dominated")),
    "tell_stopped": lambda study, number: study.tell_stopped(number, "dominated", 4.0),
    "tell_failed": lambda study, number: study.tell_failed(number, "why", given_up=True),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_end_that_was_cut_off_is_told_again(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before every single write, and after the last one whose answer never came."""
    config = config_of(tmp_path, search__floors={"standard_accuracy": 0.6}, search__points=[])
    study = in_memory(config, storage := InMemoryStorage())
    writes = ("set_trial_user_attr", "set_trial_system_attr", "set_trial_state_values")
    counts = {"tell": (1, 1, 1), "tell_stopped": (1, 0, 1), "tell_failed": (3, 0, 1)}[end]
    for method, count in zip(writes, counts, strict=True):
        for call in range(1, count + 1):
            number = study.ask().number
            with monkeypatch.context() as patch:
                die_at(patch, InMemoryStorage, method, call)
                with pytest.raises(Died):
                    ENDS[end](study, number)
            assert number in study.unfinished()
            ENDS[end](study, number)
            assert number not in study.unfinished()
            assert in_memory(config, storage).record() == study.record()
    number = study.ask().number
    other = in_memory(config, storage)
    ENDS[end](other, number)
    ENDS[end](study, number)
    assert study.record() == other.record()


def test_a_resumed_verification_narrows_what_the_record_shows(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    number = study.ask().number
    with pytest.raises(ValueError, match="trial tiny-0000 is RUNNING; only a COMPLETE one has a result to refine"):
        study.refine(number, result())
    first = result(0.8, 0.4, certified_upper=0.7, verification_state="stopped", expected_certified=0.55)
    study.tell(number, first)
    better = result(0.8, 0.5, certified_upper=0.6, seconds=9.0)
    study.refine(number, better)
    study.refine(number, first)  # an older one again, from a driver that died
    for record in (study.record(), open_study(config, database).record(), load_record(url_of(database), "tiny")):
        (trial,) = record.complete
        assert (trial.certified_accuracy, trial.certified_upper, trial.expected_certified) == (0.5, 0.6, None)
        assert (trial.verification_state, trial.seconds) == ("finished", 9.0)
    stored = raw(database).trials[0]
    assert stored.values == [0.8, 0.55]  # what was told stays
    assert stored.user_attrs["result"]["certified_upper"] == 0.7


def test_floors_are_constraints(tmp_path: Path) -> None:
    floors = {"standard_accuracy": 0.6, "certified_accuracy": 0.3}
    config = config_of(tmp_path, search__floors=floors)
    study = open_study(config, tmp_path / "study.db")
    for standard, certified in [(0.7, 0.2), (0.6, 0.3), (0.5, 0.9)]:
        study.tell(study.ask().number, result(standard, certified))
    stored = raw(tmp_path / "study.db").trials
    assert [trial.constraints for trial in stored] == [
        {"standard_accuracy": pytest.approx(-0.1), "certified_accuracy": pytest.approx(0.1)},
        {"standard_accuracy": 0, "certified_accuracy": 0},
        {"standard_accuracy": pytest.approx(0.1), "certified_accuracy": pytest.approx(-0.6)},
    ]
    assert [trial.number for trial in raw(tmp_path / "study.db").best_trials] == [1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["standard_accuracy", "certified_accuracy", "adversarial_accuracy", "certified_upper", "seconds"]
)
def test_a_result_that_is_not_finite_cannot_be_told(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*finite numbers only"):
        result(**{name: wrong})


def test_a_result_survives_its_json() -> None:
    told = result()
    assert TrialResult(**json.loads(json.dumps(told.__dict__))) == told


def test_a_missing_study_is_answered_with_those_that_are_there(config: SearchConfig, database: Path) -> None:
    with pytest.raises(StudyError, match=r"there is no study database .*study\.db; run a search first"):
        load_record(url_of(database), "tiny")
    assert not database.exists()
    open_study(config, database)
    with pytest.raises(StudyError, match=r"no study 'tinny' in .*; studies there: tiny$"):
        load_record(url_of(database), "tinny")


@pytest.mark.parametrize("content", [b"this is no database, but a file that somebody wrote here", b"\x00" * 4096])
def test_a_file_that_is_no_database_is_refused(content: bytes, config: SearchConfig, database: Path) -> None:
    database.write_bytes(content)
    for use in (lambda: load_record(url_of(database), "tiny"), lambda: stored_record(config, url_of(database))):
        with pytest.raises(StudyError, match=r"study\.db") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert database.read_bytes() == content


@pytest.mark.parametrize("url", ["nonsense", "nosuchdialect://host/db", "postgresql://127.0.0.1:1/nothing"])
def test_a_database_that_cannot_be_opened_is_refused(url: str, config: SearchConfig) -> None:
    with pytest.raises(StudyError) as caught:
        stored_record(config, url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_in_the_url_is_not_shown(config: SearchConfig) -> None:
    with pytest.raises(StudyError) as caught:
        stored_record(config, "postgresql://me:secret@127.0.0.1:1/nothing")
    assert "secret" not in str(caught.value)


def test_a_reader_does_not_block_the_writer(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connection.execute("BEGIN")
        assert connection.execute("SELECT count(*) FROM trials").fetchone() == (2,)
        study.tell(study.ask().number, result())  # while the reader's transaction is open
        assert load_record(url_of(database), "tiny").complete
        connection.rollback()
    finally:
        connection.close()


def test_keys_sort_like_numbers() -> None:
    assert trial_key("tiny", 7) == "tiny-0007"
    assert sorted(trial_key("tiny", number) for number in (10, 9, 100)) == ["tiny-0009", "tiny-0010", "tiny-0100"]


def test_only_sqlite_urls_have_a_file() -> None:
    assert sqlite_file("sqlite:////a/b.db") == Path("/a/b.db")
    assert sqlite_file("sqlite:///b.db") == Path("b.db")
    assert sqlite_file("postgresql://host/db") is None


def test_a_samplers_seed_zero_is_a_seed(config: SearchConfig) -> None:
    drawn = []
    for _ in range(2):
        study = optuna.create_study(sampler=make_sampler(config.search.sampler, 0))
        drawn.append(study.ask().suggest_float("x", 0, 1))
    assert drawn[0] == drawn[1]


def test_a_repetition_has_a_seed_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path, search__seeds=2)
    study = in_memory(config)
    for _ in range(11):
        assignment = study.ask()
        study.tell(assignment.number, closed_form(assignment.params))
    original = next(trial for trial in study.trials()[:10] if trial.configuration == study.trials()[10].configuration)
    assert original.params == study.trials()[10].params
    assert original.seed != study.trials()[10].seed
    assert study.ask().configuration not in {trial.configuration for trial in study.trials()[:11]}

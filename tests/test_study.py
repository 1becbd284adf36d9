"""The study in a real SQLite file: what is stored, what continues it, and what is refused."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from studies import FINGERPRINT, closed_form, config_of, open_study, result

import search.space
from search.config import SearchConfig
from search.records import TrialResult
from search.space import Space
from search.database import sqlite_file
from search.study import Study, StudyError, load_record, make_sampler, stored_record, trial_key


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
    assert record.verifier == "pgd 40x0.035x1, ibp, crown"
    assert record.num_images == 0
    assignment = study.ask()
    study.tell(assignment.number, result(num_images=77))
    assert study.record().num_images == 77


def test_the_budget_and_places_may_change(config: SearchConfig, database: Path, tmp_path: Path) -> None:
    open_study(config, database)
    changed = config_of(tmp_path, budget__trials=99, resources__cpu=2, tracking__enabled=False, data__path="/other")
    assert open_study(changed, database).record().name == "tiny"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"threat__epsilon": "2/10"}, 'threat.epsilon: stored "1/10", given "1/5"'),
        ({"network__width": 9}, "network.width: stored 8, given 9"),
        ({"student__l1": None}, "student.l1: stored 1e-06, given null"),
        ({"student__shi_weight": 0.1}, "student.shi_weight: stored null, given 0.1"),
        ({"student__attack__steps": 2}, 'student.attack.steps: stored {"low": 1, "high": 4, "integer": true}, given 2'),
        ({"search__sampler": "tpe"}, 'search.sampler.kind: stored "random", given "tpe"'),
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


@pytest.mark.parametrize("directions", [["maximize", "minimize"], ["minimize", "minimize"], ["maximize"]])
def test_other_directions_are_refused(directions: list[str], config: SearchConfig, database: Path) -> None:
    optuna.create_study(study_name="tiny", storage=url_of(database), directions=directions)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="study tiny exists with other directions"):
        open_study(config, database)
    assert raw(database).user_attrs == {}
    assert raw(database).trials == []


def test_another_format_is_refused(config: SearchConfig, database: Path) -> None:
    open_study(config, database)
    raw(database).set_user_attr("format_version", 99)
    assert "study tiny has format 99; this program reads 1" in refusal(config, database)


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
        die_at(patch, optuna.Study, "enqueue_trial", call)
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
    assert trial.configuration == Space(config).configuration(assignment.params)
    assert trial.seed == Space(config).recipe(assignment.params, assignment.number).student.seed
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


def test_the_states_of_a_study(config: SearchConfig, database: Path) -> None:
    study = open_study(config, database)
    study.tell(study.ask().number, result())
    study.tell_failed(study.ask().number, "why")
    study.ask()
    raw(database).enqueue_trial({})
    assert [trial.state for trial in study.record().trials] == ["COMPLETE", "FAILED", "RUNNING", "WAITING"]
    assert study.unfinished() == [2]


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


@pytest.mark.parametrize("drawn", range(4))
def test_a_trial_cut_off_while_it_was_drawn_keeps_what_was_drawn(
    drawn: int, config: SearchConfig, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_study(config, tmp_path / "whole.db")
    expected = [whole.ask() for _ in range(4)]
    study = open_study(config, database)
    for _ in range(3):
        study.ask()
    with monkeypatch.context() as patch:
        die_at(patch, search.space, "_suggest", drawn + 1)
        with pytest.raises(Died):
            study.ask()
    cut = raw(database).trials[3]
    assert cut.state is optuna.trial.TrialState.RUNNING
    assert len(cut.params) == drawn
    adopted = open_study(config, database).adopt(3)
    assert adopted.number == 3
    assert adopted.key == "tiny-0003"
    assert {name: adopted.params[name] for name in cut.params} == cut.params
    assert set(adopted.params) >= {"loss", "alpha", "warm_up", "steps"}
    assert raw(database).trials[3].params == adopted.params
    if drawn == 0:  # nothing was drawn, so it is the same draw
        assert adopted == expected[3]


def test_a_point_cut_off_before_it_was_drawn_is_still_that_point(
    config: SearchConfig, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(config, database)
    with monkeypatch.context() as patch:
        die_at(patch, search.space, "_suggest", 1)
        with pytest.raises(Died):
            study.ask()
    adopted = open_study(config, database).adopt(0)
    assert adopted.params == {"loss": "cc_dist", "alpha": 0.5, "beta": 5.0, "warm_up": 0.05, "steps": 2}


def suggestions(config: SearchConfig, database: Path, count: int, *, reopen: bool) -> list[dict[str, Any]]:
    study = open_study(config, database)
    found = []
    for _ in range(count):
        if reopen:
            study = open_study(config, database)
        assignment = study.ask()
        found.append(assignment.params)
        study.tell(assignment.number, closed_form(assignment.params))
    return found


def test_random_suggestions_depend_on_seed_and_number_only(config: SearchConfig, tmp_path: Path) -> None:
    straight = suggestions(config, tmp_path / "a.db", 6, reopen=False)
    restarted = suggestions(config, tmp_path / "b.db", 6, reopen=True)
    asked_ahead = open_study(config, tmp_path / "c.db")
    assert straight == restarted == [asked_ahead.ask().params for _ in range(6)]
    assert len({json.dumps(params, sort_keys=True) for params in straight}) == 6
    other = config_of(tmp_path, search__seed=1)
    assert suggestions(other, tmp_path / "d.db", 6, reopen=False)[2:] != straight[2:]


@pytest.mark.timeout(60)  # the first trial of a Gaussian process pays for an import
@pytest.mark.parametrize(
    "sampler",
    [
        {"kind": "tpe", "startup_trials": 4},
        {"kind": "nsga2", "population": 4},
        {"kind": "nsga3", "population": 4},
        {"kind": "gp", "startup_trials": 4},
        {"kind": "random"},
    ],
    ids=lambda sampler: sampler["kind"],
)
def test_every_sampler_goes_past_its_start_up(sampler: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path, search__sampler=sampler, search__floors={"standard_accuracy": 0.6})
    study = open_study(config, tmp_path / "study.db")
    for number in range(7):
        assignment = study.ask()
        ahead = study.ask() if number == 5 else None  # another one runs
        study.space.recipe(assignment.params, assignment.number)
        study.tell(assignment.number, closed_form(assignment.params))
        if ahead is not None:
            study.tell_failed(ahead.number, "why")
    record = study.record()
    assert len(record.complete) == 7
    assert len({trial.params["alpha"] for trial in record.trials}) > 4  # children may have a parent's value
    assert len({trial.seed for trial in record.trials}) == 8
    # An adopted trial goes through the same sampler.
    running = study.ask()
    assert open_study(config, tmp_path / "study.db").adopt(running.number) == running


def test_a_model_suggests_what_pays(tmp_path: Path) -> None:
    """Most of the trials of TPE, after its start, are above the median of random ones."""
    config = config_of(tmp_path, search__sampler="tpe", search__points=[])
    found = suggestions(config, tmp_path / "study.db", 30, reopen=False)
    late = [closed_form(params).standard_accuracy + closed_form(params).certified_accuracy for params in found[10:]]
    early = [closed_form(params).standard_accuracy + closed_form(params).certified_accuracy for params in found[:10]]
    assert sum(late) / 20 > sum(early) / 10


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


def test_asking_is_independent_of_what_else_runs(config: SearchConfig, tmp_path: Path) -> None:
    """Two drivers cannot be: but two studies of one configuration in one process do not disturb each other."""
    first, second = (Study.open(config, Space(config), url_of(tmp_path / f"{x}.db"), FINGERPRINT) for x in "ab")
    pairs = [(first.ask(), second.ask()) for _ in range(5)]
    assert all(a == b for a, b in pairs)

"""The space file: what it means, and that every mistake in it is answered with one line that helps."""

from pathlib import Path
from typing import Any

import pytest
from studies import TREE, config_of, tree, write_space

from search.config import (
    GPConfig,
    NSGA2Config,
    NSGA3Config,
    RandomConfig,
    SearchConfig,
    SpaceFileError,
    TPEConfig,
    find_space_file,
    load_search_config,
)
from search.space import Space


def mistake(folder: Path, content: dict[str, Any] | str, *settings: str) -> str:
    """What a wrong space file is answered with: one line, whatever is wrong."""
    path = write_space(folder / "space.yaml", content)
    with pytest.raises(SpaceFileError) as caught:
        Space(load_search_config(path, settings))
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("bugdet", "unknown key bugdet; did you mean budget?"),
        ("data__vaildation", "unknown key data.vaildation; did you mean data.validation?"),
        ("threat__epsilom", "unknown key threat.epsilom; did you mean threat.epsilon?"),
        ("network__widht", "unknown key network.widht; did you mean network.width?"),
        ("teacher__epoch", "unknown key teacher.epoch; did you mean teacher.epochs?"),
        ("teacher__attack__step", "unknown key teacher.attack.step; did you mean teacher.attack.steps?"),
        ("student__batchsize", "unknown key student.batchsize; did you mean student.batch_size?"),
        ("student__attack__stepsize", "unknown key student.attack.stepsize; did you mean student.attack.step_size?"),
        (
            "student__epsilon_schedule__warmup",
            "unknown key student.epsilon_schedule.warmup; did you mean student.epsilon_schedule.warm_up?",
        ),
        ("verification__attack__restart", "did you mean verification.attack.restarts?"),
        ("search__sed", "unknown key search.sed; did you mean search.seed?"),
        ("budget__trails", "unknown key budget.trails; did you mean budget.trials?"),
        ("resources__gpus", "unknown key resources.gpus; did you mean resources.gpu?"),
        ("storage__artefacts", "unknown key storage.artefacts; did you mean storage.artifacts?"),
        ("tracking__url", "unknown key tracking.url; did you mean tracking.uri?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(key: str, expected: str, tmp_path: Path) -> None:
    content = tree(teacher__attack={"steps": 1, "step_size": 1.0}, verification__attack={"steps": 1, "step_size": 1.0})
    *parents, last = key.split("__")
    node = content
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = 1
    assert expected in mistake(tmp_path, content)


def test_unknown_keys_inside_unions_and_choices_are_found(tmp_path: Path) -> None:
    content = tree(student__learning_rate={"kind": "multi_step", "initail": 0.1})
    assert "unknown key student.learning_rate.initail; did you mean student.learning_rate.initial?" in mistake(
        tmp_path, content
    )
    content = tree()
    content["student"]["loss"]["choices"]["cc_dist"]["beto"] = 1
    assert "unknown key student.loss.beto; did you mean student.loss.beta?" in mistake(tmp_path, content)
    content = tree(teacher__attack={"kind": "n_fgsm", "steps": 3})
    assert "unknown key teacher.attack.steps; did you mean teacher.attack.step_size?" in mistake(tmp_path, content)
    content = tree(search__sampler={"kind": "nsga2", "popluation": 8})
    assert "unknown key search.sampler.popluation; did you mean search.sampler.population?" in mistake(
        tmp_path, content
    )


def test_a_key_like_nothing_is_answered_with_the_list(tmp_path: Path) -> None:
    assert (
        mistake(tmp_path, tree(budget__zzz=1))
        == "unknown key budget.zzz; known keys here: accelerator_hours, hours, trials"
    )


@pytest.mark.parametrize("section", ["name", "data", "threat", "network", "teacher", "student", "budget"])
def test_a_missing_section_is_named(section: str, tmp_path: Path) -> None:
    content = tree()
    del content[section]
    assert mistake(tmp_path, content) == f"{section} is missing; it needs a value"


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    assert mistake(tmp_path, tree(student__epochs=None)) == "student.epochs is missing; it needs a value"


@pytest.mark.parametrize(
    ("wrong_range", "expected"),
    [
        ({"low": 2, "high": 1}, "low 2 is above high 1"),
        ({"low": 0, "high": 1, "log": True}, "needs low above 0"),
        ({"low": -1, "high": 1, "log": True}, "needs low above 0"),
        ({"low": 0.1}, "student.l1 has no high"),
        ({"high": 0.1}, "student.l1 has no low"),
        ({"low": 0, "high": 1, "logg": True}, "unknown key student.l1.logg; did you mean student.l1.log?"),
        ({"low": "a", "high": 1}, "student.l1.low: expected a number"),
        ({"low": 0, "high": "1/0"}, "student.l1.high: expected a number"),
        ({"low": float("nan"), "high": 1}, "student.l1.low: expected a number"),
        ({"low": 0, "high": float("inf")}, "student.l1.high: expected a number"),
        ({"low": None, "high": 1}, "student.l1.low: expected a number"),
        ({"low": 0.5, "high": 2, "integer": True}, "is not whole"),
        ({"low": 0, "high": 1, "log": "no"}, "student.l1.log"),
        ({"low": 0, "high": 1, "integer": "no"}, "student.l1.integer"),
        ({"low": -1, "high": 1}, "student.l1: -1"),
        ({"choices": []}, "student.l1.choices is []"),
        ({"choices": 3}, "student.l1.choices is 3"),
        ({"choices": [[1], [2]]}, "give them names"),
        ({"choices": [0, 1], "log": True}, "student.l1.log stands beside choices"),
        ({"choices": {"a": {"low": 0, "high": 1}, "b": 0}}, "student.l1 has different ranges"),
    ],
)
def test_a_wrong_range_is_refused(wrong_range: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in mistake(tmp_path, tree(student__l1=wrong_range))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (8, "write 8/255 if that is what you mean"),
        ("2", "write 2/255 if that is what you mean"),
        (0, "epsilon is 0; expected a radius above 0"),
        ("-1/255", "epsilon is -1/255; expected a radius above 0"),
        ("2/", "expected a number or a fraction like 2/255"),
        (True, "expected a number or a fraction like 2/255"),
        ([1], "expected a number or a fraction like 2/255"),
    ],
)
def test_epsilon_is_a_radius_in_pixel_units(value: Any, expected: str, tmp_path: Path) -> None:
    answer = mistake(tmp_path, tree(threat__epsilon=value))
    assert answer.startswith("threat.epsilon: ")
    assert expected in answer


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"search__sampler": "tpee"}, "search.sampler: {'kind': 'tpee'} names no known kind"),
        ({"search__sampler": {"kind": "cmaes"}}, "names no known kind; expected kind: 'tpe', 'nsga2'"),
        ({"search__sampler": {}}, "search.sampler: {} names no known kind"),
        ({"search__sampler": 3}, "search.sampler"),
        ({"search__sampler": {"kind": "tpe", "startup_trials": 0}}, "search.sampler.startup_trials: 0 is not allowed"),
        ({"search__seed": -1}, "search.seed: -1 is not allowed"),
        ({"search__reference": [0.5, 1]}, "search.reference: [0.5, 1.0] are not fractions in [0, 1)"),
        ({"search__reference": [85, 40]}, "are not fractions"),
        ({"search__reference": [0.5]}, "search.reference.1 is missing"),
        ({"search__floors": {"certified": 0.4}}, "unknown objective 'certified'; objectives are standard_accuracy"),
        ({"search__floors": {"certified_accuracy": 40}}, "certified_accuracy: 40.0 is not a fraction in [0, 1)"),
        ({"search__floors": {"certified_accuracy": float("nan")}}, "search.floors"),
        ({"budget__trials": 0}, "budget.trials: 0 is not allowed"),
        ({"budget__trials": 2.5}, "budget.trials: 2.5 is not allowed"),
        ({"resources__gpu": 1.5}, "1.5 GPUs for a trial; above 1 only whole GPUs"),
        ({"resources__gpu": -1}, "resources.gpu: -1 is not allowed"),
        ({"resources__cpu": 0}, "resources.cpu: 0 is not allowed"),
        ({"resources__memory_gb": 0}, "resources.memory_gb: 0 is not allowed"),
        ({"resources__custom": {"vram_gb": 0}}, "vram_gb: 0.0; expected a number above 0"),
        ({"resources__custom": {"memory": 5}}, "memory has a field of its own: resources.memory_gb"),
        ({"resources__gpu": 1e-6}, "1e-06 GPUs for a trial; expected 0, or at least 0.0001: Ray counts no less"),
        ({"resources__memory_gb": 1e-12}, "resources.memory_gb: 1e-12 is not allowed"),
        ({"resources__custom": {"vram_gb": 1e-5}}, "vram_gb: 1e-05; expected a number above 0, at least 0.0001"),
        ({"resources__custom": {"vram_gb": float("nan")}}, "resources.custom.vram_gb: nan is not allowed"),
        ({"resources__custom": {"": 1}}, "'' is no resource that a trial can hold; expected a name of your own"),
        ({"resources__custom": {"object_store_memory": 5}}, "'object_store_memory' is no resource that a trial can"),
        ({"resources__custom": {"TPU": 0.3}}, "'TPU' is no resource that a trial can hold"),
        ({"resources__concurrency": 0}, "0 trials at once; expected at least 1, or auto"),
        ({"resources__concurrency": "many"}, "resources.concurrency"),
        ({"name": "two words"}, "name: 'two words' is not allowed"),
        ({"name": "../up"}, "name: '../up' is not allowed"),
        ({"data__validation": 1}, "data.validation: 1 is not allowed"),
        ({"verification__rungs": ["ibp", "bab"]}, "verification.rungs.1: 'bab' is not allowed"),
        ({"verification__rungs": ["pgd", "pgd"]}, "verification.rungs: ['pgd', 'pgd'] name one twice"),
        ({"network__name": "cnn9"}, "unknown network 'cnn9'; known: "),
        ({"network": 5}, "network: 5 is not allowed"),
        (
            {"student__learning_rate": {"kind": "constant"}},
            "student.learning_rate: {'kind': 'constant'} names no known",
        ),
        ({"student__seed": 3}, "student.seed is not set there"),
        ({"teacher__network": {"name": "mlp"}}, "teacher.network is not set there"),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in mistake(tmp_path, tree(**changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds a NoneType; expected keys and values"),
        ("- 1\n- 2\n", "holds a list; expected keys and values"),
        ("name: [\n", "cannot be read"),
        ("a: b: c\n", "cannot be read"),
        ("1: 2\n", "keys should be strings"),
        ('"a\\nb": 2\n', "unknown key"),
        ("nmae: x\n", "unknown key nmae; did you mean name?"),
    ],
)
def test_a_file_that_is_no_space_file_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in mistake(tmp_path, text)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaceFileError, match=r"no space file nowhere.*digits"):
        find_space_file("nowhere")
    binary = tmp_path / "space.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceFileError, match="cannot be read"):
        load_search_config(binary)
    with pytest.raises(SpaceFileError, match="cannot be read"):
        load_search_config(tmp_path)


def test_a_shipped_space_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_search_config(find_space_file("digits")).name == "digits"
    assert load_search_config(find_space_file("spaces/digits.yaml")).name == "digits"
    write_space(tmp_path / "digits", TREE)
    assert load_search_config(find_space_file("digits")).name == "tiny"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tpe", TPEConfig), ("nsga2", NSGA2Config), ("nsga3", NSGA3Config), ("gp", GPConfig), ("random", RandomConfig)],
)
def test_a_sampler_may_be_its_name(name: str, kind: type, tmp_path: Path) -> None:
    assert config_of(tmp_path, search__sampler=name).search.sampler == kind()
    assert config_of(tmp_path, search__sampler={"kind": name}).search.sampler == kind()


def test_set_reads_yaml_values(tmp_path: Path) -> None:
    settings = [
        "student.epochs=7",
        "threat.epsilon=2/255",
        "student.l1={low: 1.0e-8, high: 1.0e-3, log: true}",
        "search.sampler=nsga2",
        "search.points=[]",
        "resources.concurrency=1",
        "tracking.enabled=false",
        "teacher.optimizer.kind=sgd",
        "data.path=/a=b",
        "name=other",
    ]
    config = config_of(tmp_path, settings)
    assert config.student["epochs"] == 7
    assert str(config.threat.epsilon) == "2/255"
    assert config.student["l1"] == {"low": 1.0e-8, "high": 1.0e-3, "log": True}
    assert config.search.sampler == NSGA2Config()
    assert config.search.points == ()
    assert config.resources.concurrency == 1
    assert config.tracking.enabled is False
    assert config.teacher["optimizer"] == {"kind": "sgd"}
    assert config.data.path == "/a=b"
    assert config.name == "other"
    assert config_of(tmp_path, ["student.epochs=7", "student.epochs=9"]).student["epochs"] == 9


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("student.epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("student.epochs=[", "is not a YAML value"),
        ("student.epochs.first=3", "student.epochs is the value 2 and has no keys of its own"),
        ("search.points.0=3", "search.points is the value"),
        ("student.epoch=3", "did you mean student.epochs?"),
        ("students.epochs=3", "unknown key students; did you mean student?"),
        ("student..epochs=3", "unknown key student."),
        ("budget.trials=-1", "budget.trials: -1 is not allowed"),
        ("student.epochs=0", "student.epochs: 0 is not allowed"),
        ("threat.epsilon=8", "write 8/255"),
        ("student=3", "student: 3 is not allowed"),
        ("student.loss=3", "student.loss: "),
    ],
)
def test_a_wrong_set_is_refused(setting: str, expected: str, tmp_path: Path) -> None:
    assert expected in mistake(tmp_path, TREE, setting)


def test_the_reference_is_given_or_follows_from_the_floors(tmp_path: Path) -> None:
    assert config_of(tmp_path).search.hypervolume_reference == (0.2, 0.1)
    floors = {"certified_accuracy": 0.3}
    assert config_of(tmp_path, search__floors=floors).search.hypervolume_reference == (0.2, 0.1)
    assert config_of(tmp_path, search__floors=floors, search__reference=None).search.hypervolume_reference == (0, 0.3)
    assert config_of(tmp_path, search__reference=None).search.hypervolume_reference == (0, 0)


def test_the_studys_name_holds_the_seed_when_there_is_one(tmp_path: Path) -> None:
    assert config_of(tmp_path).study_name == "tiny"
    assert config_of(tmp_path, search__seed=0).study_name == "tiny"
    assert config_of(tmp_path, search__seed=3).study_name == "tiny-seed3"


UNIMPORTANT: list[dict[str, Any]] = [
    {"budget__trials": 99},
    {"resources__cpu": 2},
    {"resources__concurrency": 1},
    {"storage__artifacts": "/elsewhere"},
    {"tracking__enabled": False},
    {"data__path": "/elsewhere"},
    {"search__sampler": "tpe"},
    {"search__seeds": 3},
    {"stopping": False},
]
IMPORTANT: list[dict[str, Any]] = [
    {"data__validation": 0.3},
    {"threat__epsilon": "1/11"},
    {"network__width": 9},
    {"teacher__epochs": 3},
    {"student__l1": 0.0},
    {"verification__rungs": ["ibp"]},
    {"search__seed": 1},
    {"search__floors": {"certified_accuracy": 0.1}},
    {"search__reference": [0.0, 0.0]},
    {"search__points": []},
]


def identities(folder: Path, changes: dict[str, Any]) -> tuple[SearchConfig, SearchConfig]:
    return config_of(folder), config_of(folder, **changes)


@pytest.mark.parametrize("changes", UNIMPORTANT, ids=lambda changes: next(iter(changes)))
def test_the_identity_is_free_of_what_changes_no_result(changes: dict[str, Any], tmp_path: Path) -> None:
    before, after = identities(tmp_path, changes)
    assert before.identity == after.identity
    assert before.identity_hash == after.identity_hash


@pytest.mark.parametrize("changes", IMPORTANT, ids=lambda changes: next(iter(changes)))
def test_the_identity_holds_everything_else(changes: dict[str, Any], tmp_path: Path) -> None:
    before, after = identities(tmp_path, changes)
    assert before.identity_hash != after.identity_hash


def test_the_same_value_in_other_words_is_the_same_identity(tmp_path: Path) -> None:
    other = config_of(tmp_path, threat__epsilon=0.1, search__sampler={"kind": "random"})
    assert config_of(tmp_path).identity_hash == other.identity_hash


def test_every_section_is_either_in_the_identity_or_known_to_change_no_result(tmp_path: Path) -> None:
    sections = set(config_of(tmp_path).identity)
    assert set(SearchConfig.model_fields) - sections == {"budget", "stopping", "resources", "storage", "tracking"}


def test_a_configuration_cannot_be_changed_and_survives_its_json(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"
    assert SearchConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("setting", "verification", "training"),
    [
        ("stopping=false", False, "off"),
        ("stopping=true", True, "rungs"),
        ("stopping={training: off}", True, "off"),
        ("stopping.training=off", True, "off"),
        ("stopping={training: fractions, verification: false}", False, "fractions"),
    ],
)
def test_one_line_turns_stopping_off(setting: str, verification: bool, training: str, tmp_path: Path) -> None:
    stopping = config_of(tmp_path, [setting]).stopping
    assert (stopping.verification, stopping.training) == (verification, training)

"""Configurations: exact epsilon, nothing unknown, nothing impossible, nothing that is never read."""

import ast
import inspect
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

import ccdist
from ccdist import config, loss_config, optimizer_config
from ccdist.config import (
    AttackConfig,
    Config,
    DataConfig,
    EpsilonScheduleConfig,
    NetworkConfig,
    StudentConfig,
    TeacherConfig,
    ThreatModel,
    TrainConfig,
    TrainingAttackConfig,
    VerificationOptions,
    VerifyConfig,
    exact_fraction,
    fingerprint,
)
from ccdist.loss_config import CCDistConfig, LossConfig
from ccdist.optimizer_config import CyclicConfig, MultiStepConfig

STUDENT = {"epochs": 4, "loss": {"kind": "cc_dist", "alpha": 0.5, "beta": 5.0}}
SHRUNK = {"loss": {"kind": "sabr", "subbox": 0.5, "relu_shrink": 0.8}}
CONFIGS = [
    value
    for module in (config, loss_config, optimizer_config)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, Config) and not name.startswith("_")
]


@pytest.mark.parametrize(
    ("written", "exact"),
    [
        ("2/255", Fraction(2, 255)),
        ("8 / 255", Fraction(8, 255)),
        (0.1, Fraction(1, 10)),
        ("0.3", Fraction(3, 10)),
        ("1e-3", Fraction(1, 1000)),
        (Fraction(1, 255), Fraction(1, 255)),
    ],
)
def test_epsilon_is_exact(written: Any, exact: Fraction) -> None:
    threat = ThreatModel(epsilon=written)
    assert threat.epsilon == exact
    assert threat.radius == float(exact)
    assert ThreatModel.model_validate_json(threat.model_dump_json()) == threat


def test_two_255ths_are_not_rounded() -> None:
    threat = ThreatModel.model_validate({"epsilon": "2/255"})
    assert threat.radius == 2 / 255
    assert str(threat) == "linf 2/255"
    assert threat.model_dump(mode="json") == {"norm": "linf", "epsilon": "2/255"}


@pytest.mark.parametrize("epsilon", [8, "8", 8.0])
def test_epsilon_in_255ths_is_refused_with_the_hint(epsilon: Any) -> None:
    with pytest.raises(ValidationError, match="write 8/255 if that is what you mean"):
        ThreatModel(epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [0, -0.1, 1, True, None, "two", "1/0", float("nan"), float("inf"), [1]])
def test_other_epsilons_are_refused(epsilon: Any) -> None:
    with pytest.raises(ValidationError, match="epsilon"):
        ThreatModel(epsilon=epsilon)


def test_exact_fraction_reads_the_decimal_digits() -> None:
    assert exact_fraction(0.1) == Fraction(1, 10) != Fraction(0.1)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_configuration_forbids_unknown_keys_and_changes_and_checks_defaults(kind: type[BaseModel]) -> None:
    assert issubclass(kind, Config)
    settings = kind.model_config
    assert (settings["extra"], settings["frozen"], settings["validate_default"]) == ("forbid", True, True)
    assert settings["allow_inf_nan"] is False


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ThreatModel, {"epsilon": 0.1, "eps": 0.1}),
        (DataConfig, {"name": "digits", "augment": True}),
        (StudentConfig, STUDENT | {"epoch": 3}),
        (StudentConfig, STUDENT | {"loss": {"kind": "cc_ibp", "alpha": 0.5, "beta": 5.0}}),
        (TeacherConfig, {"epochs": 1, "loss": {"kind": "cc_ibp", "alpha": 0.5}}),
        (VerifyConfig, {"threat": {"epsilon": 0.1}, "rung": ["ibp"]}),
    ],
)
def test_unknown_keys_are_refused(kind: type[BaseModel], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate(values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (EpsilonScheduleConfig, {"warm_up": "1/2", "ramp": "2/3"}, r"warm_up 1/2 \+ ramp 2/3 is more than 1"),
        (EpsilonScheduleConfig, {"warm_up": 1.5}, r"not in \[0, 1\]"),
        (TrainingAttackConfig, {"steps": 1, "step_size": 1, "keep": "last", "restarts": 2}, "keep: last"),
        (NetworkConfig, {"name": "vgg"}, "unknown network 'vgg'; known: mlp"),
        (NetworkConfig, {"activation": "swish"}, "Input should be 'relu', 'leaky_relu', 'tanh', 'sigmoid' or 'gelu'"),
        (VerifyConfig, {"threat": {"epsilon": 0.1}, "rungs": ["ibp", "ibp"]}, "name one twice"),
        (VerifyConfig, {"threat": {"epsilon": 0.1}, "rungs": ["milp"]}, "rungs"),
        (VerificationOptions, {"rungs": ["branch_and_bound", "pgd"]}, "attacks come before branch_and_bound; move pgd"),
        (VerificationOptions, {"rungs": ["pgd", "branch_and_bound", "ibp", "ensemble"]}, "move ensemble before it"),
        (CCDistConfig, {"alpha": 1.5, "beta": 1}, "alpha"),
        (CCDistConfig, {"alpha": 0.5, "beta": -1}, "beta"),
        (CCDistConfig, {"alpha": 0.5, "beta": float("inf")}, "finite"),
        (CCDistConfig, {"alpha": 0.5, "beta": 1, "alpha_dist": "beta"}, "alpha_dist"),
        (StudentConfig, STUDENT | {"batch_size": 1}, "batch_size"),
        (StudentConfig, STUDENT | {"l1": float("nan")}, "l1"),
        (StudentConfig, STUDENT | {"learning_rate": {"kind": "cyclic"}}, "peak"),
        (StudentConfig, STUDENT | {"optimizer": {"kind": "sgd", "momentum": 1.0}}, "momentum"),
        (DataConfig, {"name": "digits", "validation": 1.0}, "validation"),
        (VerificationOptions, {"rungs": ["pgd", "pgd"]}, "name one twice"),
        (StudentConfig, STUDENT | SHRUNK | {"network": {"activation": "gelu"}}, "no effect on activation gelu"),
        (StudentConfig, STUDENT | {"weight_averaging": {"start": 1}}, "nothing would be averaged"),
        (TeacherConfig, {"epochs": 1, "weight_averaging": {"start": "5/5"}}, "nothing would be averaged"),
    ],
)
def test_impossible_values_are_refused(kind: type[BaseModel], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(values)


def test_what_looks_like_a_refused_value_and_is_not() -> None:
    whole = {"loss": {"kind": "sabr", "subbox": 0.5, "relu_shrink": 1}, "network": {"activation": "gelu"}}
    for changes in (SHRUNK, whole, {"weight_averaging": {"start": "159/160"}}):
        config = StudentConfig.model_validate(STUDENT | changes)
        assert StudentConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_boxes_and_signs_have_no_form_for_balls(norm: str) -> None:
    threat = ThreatModel.model_validate({"norm": norm, "epsilon": 0.5})
    student = StudentConfig.model_validate(STUDENT | SHRUNK)
    teacher = TeacherConfig.model_validate({"epochs": 1, "attack": {"kind": "n_fgsm"}})
    for each, message in ((student, "loss sabr has no form for norm l2"), (teacher, "attack n_fgsm has no form")):
        if norm == "linf":
            each.check_threat(threat)
            continue
        with pytest.raises(ValueError, match=message):
            each.check_threat(threat)
    StudentConfig.model_validate(STUDENT).check_threat(threat)
    TeacherConfig(epochs=1).check_threat(threat)


def test_warm_up_and_ramp_may_fill_the_training_exactly() -> None:
    """Thirds have no exact float: shares are fractions."""
    schedule = EpsilonScheduleConfig.model_validate({"warm_up": "1/3", "ramp": "2/3"})
    assert schedule.warm_up + schedule.ramp == 1


@pytest.mark.parametrize(
    "config",
    [
        StudentConfig.model_validate(STUDENT),
        StudentConfig.model_validate(
            STUDENT | {"optimizer": {"kind": "sgd"}, "learning_rate": {"kind": "cyclic", "peak": 0.1}}
        ),
        TeacherConfig(epochs=1, learning_rate=MultiStepConfig(drops=("1/2", "3/4"))),
        DataConfig(name="digits", mean=(0.5,), std=(0.5,)),
        VerifyConfig(threat=ThreatModel(epsilon="2/255")),
    ],
)
def test_round_trip_hash_and_fingerprint(config: Config) -> None:
    again = type(config).model_validate(config.model_dump(mode="json"))
    assert again == config
    assert hash(again) == hash(config)
    assert fingerprint(again) == fingerprint(config)
    assert {config: 1}[again] == 1
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[attr-defined]


def test_the_fingerprint_is_of_the_values() -> None:
    one = StudentConfig.model_validate(STUDENT)
    shuffled = StudentConfig.model_validate(dict(reversed(list(STUDENT.items()))))
    other = StudentConfig.model_validate(STUDENT | {"epochs": 5})
    assert fingerprint(one) == fingerprint(shuffled) != fingerprint(other)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


@pytest.mark.parametrize("kind", ["cc_dist", "cc_ibp", "mtl_ibp", "exp_ibp"])
def test_a_loss_is_chosen_by_its_kind(kind: str) -> None:
    extra = {"beta": 1.0} if kind == "cc_dist" else {}
    loss = TypeAdapter(LossConfig).validate_python({"kind": kind, "alpha": 0.5} | extra)
    assert loss.kind == kind


def test_defaults_are_valid_by_themselves() -> None:
    configs = [
        StudentConfig.model_validate(STUDENT),
        TeacherConfig(epochs=1),
        VerifyConfig(threat=ThreatModel(epsilon="1/255")),
        CyclicConfig(peak=0.1),
        AttackConfig(steps=1, step_size=1.0),
    ]
    for each in configs:
        assert type(each).model_validate(each.model_dump()) == each


def names_read_in_the_package() -> set[str]:
    """Attributes read, keyword patterns matched and names given to getattr, everywhere but in config.py's fields."""
    names: set[str] = set()
    for file in Path(ccdist.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                names.update(node.kwd_attrs)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    return names


# `kind` and `norm` choose a class and have one value in it; `rungs` and the like are read as attributes.
CHOSEN_BY_TYPE = {"kind", "norm"}


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_field_is_read_somewhere(kind: type[BaseModel]) -> None:
    unread = set(kind.model_fields) - names_read_in_the_package() - CHOSEN_BY_TYPE
    assert unread == set()


def test_the_test_above_covers_the_configurations() -> None:
    assert {TrainConfig, DataConfig, VerifyConfig, StudentConfig, TeacherConfig, ThreatModel} <= set(CONFIGS)


def test_every_number_has_a_range() -> None:
    """STYLE 5: a number without bounds is a typing error waiting to become a run."""
    for kind in CONFIGS:
        for name, field in kind.model_fields.items():
            if field.annotation in (int, float):
                assert any(hasattr(bound, "ge") or hasattr(bound, "gt") for bound in field.metadata), f"{kind}.{name}"

"""Recipe files: what is refused before anything is touched, and those of the papers number by number."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from train_cases import ROOT, TINY, refused

import spaces
from ccdist.data import num_batches
from ccdist.loss_config import CCDistConfig, ExpIBPConfig, IBPConfig, MTLIBPConfig, SABRConfig
from ccdist.optimizer_config import RAdamConfig
from ccdist.recipe import RecipeFile, load_recipe_file
from ccdist.training_step import EpsilonSchedule
from ccdist.yaml_files import YamlFileError
from search.config import SpaceFileError, load_search_config

SPACES = Path(spaces.__file__).parent
RECIPES = sorted((SPACES / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["student.epoch=3"], "unknown key student.epoch; did you mean student.epochs?"),
        (["studnet.epochs=3"], "unknown key studnet; did you mean student?"),
        (["budget={trials: 3}"], "unknown key budget"),
        (["network.widht=3"], "unknown key network.widht; did you mean network.width?"),
        (["student.loss.alpha={low: 0, high: 1}"], "student.loss.alpha: {'low': 0, 'high': 1} is not allowed"),
        (["student.epochs=2.5"], "student.epochs: 2.5 is not allowed: expected a whole number"),
        (["student.epochs"], "--set student.epochs: expected key=value"),
        (["threat.epsilon=8"], "write 8/255 if that is what you mean"),
        (["teacher=null"], "teacher is missing: a student with loss cc_dist and initialization ibp reads one"),
        (["teacher.seed=1"], "teacher.seed is not set there: seeds follow from the recipe's `seed`"),
        (["student.network={name: mlp}"], "student.network is not set there: the network stands beside it"),
        (["seed=-1"], "error: seed: -1 is not allowed"),
        (["seed=abc"], "error: seed: 'abc' is not allowed"),
        (["seed=true"], "error: seed: True is not allowed"),
        (["network.width=abc"], "error: network.width: 'abc' is not allowed"),
        (["verification.rungs=[pgd,pgd]"], "error: verification.rungs: ['pgd', 'pgd'] name one twice"),
        (
            ["verification.rungs=[crown,branch_and_bound]", "network.activation=tanh"],
            "rung branch_and_bound splits relu and leaky_relu at 0; activation tanh has no such point",
        ),
        (
            ["threat={norm: l2, epsilon: 0.5}", "student.loss={kind: sabr, subbox: 0.5}"],
            "error: loss sabr has no form for norm l2: its small box is one of l_inf; use linf",
        ),
        (
            ["threat={norm: l2, epsilon: 0.5}", "teacher.attack={kind: n_fgsm}"],
            "error: attack n_fgsm has no form for norm l2: it moves by signs; use pgd",
        ),
        (
            ["student.loss={kind: sabr, subbox: 0.5, relu_shrink: 0.8}", "network.activation=tanh"],
            "error: student: relu_shrink 0.8 has no effect on activation tanh",
        ),
        (["student.weight_averaging={start: 1}"], "error: student.weight_averaging: start is 1, after the last epoch"),
        (
            ["teacher.attack={kind: n_fgsm, steps: 3}"],
            "unknown key teacher.attack.steps; did you mean teacher.attack.step_size?",
        ),
        (["teacher.attack={kind: none, steps: 3}"], "unknown key teacher.attack.steps; known keys here: kind"),
        (["data.validation=0"], "data.validation is 0, so there are no images to verify; --test evaluates on"),
        (["name=../up"], "name: '../up' is not allowed"),
    ],
)
def test_a_wrong_recipe_touches_nothing(
    settings: list[str], expected: str, recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    assert expected in refused(capsys, recipe, "--out", out, *flags)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n", "holds a list; expected keys and values"),
        ("name: [\n", "cannot be read"),
        ("name: 2020-99-99\n", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("name: a\ndata: {name: digits}\nname: b\n", "key name stands twice, again in line 3; remove one"),
        ("name: a\ndata:\n  name: digits\n  flip: true\n  name: mnist\n", "key name stands twice, again in line 5"),
    ],
)
def test_a_file_that_is_no_recipe(
    text: str, expected: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    answer = refused(capsys, file, "--out", out)
    assert f"recipe {file} " in answer
    assert expected in answer


def test_a_key_that_overrides_a_merged_one_stands_once(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text(TINY.replace("teacher:\n", "teacher: &teacher\n") + "unused: {<<: *teacher, epochs: 3}\n")
    with pytest.raises(YamlFileError, match="unknown key unused"):  # and no word about epochs
        load_recipe_file(file)


def test_a_space_file_with_a_key_twice_is_refused_as_one(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("name: a\nname: b\n")
    with pytest.raises(SpaceFileError, match=r"space file .* key name stands twice, again in line 2"):
        load_search_config(file)


def test_a_search_needs_validation_images() -> None:
    with pytest.raises(SpaceFileError, match=r"data: validation is 0; a search measures"):
        load_search_config(ROOT / "spaces" / "digits.yaml", ["data.validation=0"])


def test_a_recipe_that_is_not_there(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = refused(capsys, "nowhere.yaml", "--out", out)
    assert answer.startswith("error: no recipe nowhere.yaml; give a path, or the name of a shipped one: ")
    assert "cifar_2_255_cc_ibp" in answer


# ---- the recipes of the papers --------------------------------------------------------------------------------------


def recipe_named(name: str) -> RecipeFile:
    return load_recipe_file(next(file for file in RECIPES if file.name == f"{name}.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_shipped_recipe_is_complete(file: Path) -> None:
    loaded = load_recipe_file(file)
    assert loaded.name == file.name.removesuffix(".yaml")
    assert loaded.verification is not None
    assert loaded.needs_teacher == (loaded.teacher is not None)
    assert RecipeFile.model_validate(yaml.safe_load(yaml.safe_dump(loaded.tree()))) == loaded
    if file.stem != "digits":
        assert loaded.data.validation == 0
        assert (loaded.network.name, loaded.network.width) == ("cnn7", 64)


def test_every_row_of_the_papers_is_there() -> None:
    names = {file.name.removesuffix(".yaml") for file in RECIPES}
    settings = {"mnist_0.1", "mnist_0.3", "cifar_2_255", "cifar_8_255", "tiny_imagenet_1_255", "imagenet64_1_255"}
    for method in ("cc_ibp", "mtl_ibp", "cc_dist"):
        assert {f"{setting}_{method}" for setting in settings} <= names
    assert len([name for name in names if name.endswith("_ctbench")]) == 11
    assert len([name for name in names if name.endswith("_ctrain")]) == 2


IMAGES = {"mnist": 60_000, "cifar10": 50_000, "tiny_imagenet": 100_000, "imagenet64": 1_281_167}
# From the tables of the papers' code, by hand: steps an epoch; the ramp's first epoch (0-based, whole) and its length;
# epochs of the drops.
TIMETABLES = {
    "mnist_0.1_cc_ibp": (235, 0, 20, (50, 60), 70),
    "mnist_0.3_mtl_ibp": (235, 0, 20, (50, 60), 70),
    "cifar_2_255_cc_ibp": (391, 1, 80, (120, 140), 160),
    "cifar_2_255_cc_dist": (391, 1, 80, (120, 140), 160),
    "cifar_8_255_cc_ibp": (391, 1, 80, (180, 220), 260),
    "cifar_8_255_mtl_ibp_ctbench": (391, 1, 120, (200, 220), 240),
    "tiny_imagenet_1_255_exp_ibp": (782, 1, 80, (120, 140), 160),
    "tiny_imagenet_1_255_exp_ibp_ctbench": (782, 1, 20, (60, 70), 80),
    "imagenet64_1_255_mtl_ibp": (10010, 1, 20, (60, 70), 80),
    "cifar_2_255_mtl_ibp_ctrain": (98, 5, 83, (100, 129), 160),
    "cifar_2_255_sabr_ctrain": (98, 3, 104, (134, 147), 160),
}


@pytest.mark.parametrize("name", TIMETABLES)
def test_the_timetable_of_a_recipe_is_the_published_one(name: str) -> None:
    steps, start, length, drops, epochs = TIMETABLES[name]
    loaded = recipe_named(name)
    student = loaded.student
    assert student.epochs == epochs
    assert num_batches(IMAGES[loaded.data.name], student.batch_size) == steps
    schedule = EpsilonSchedule(student.epsilon_schedule, loaded.threat, epochs * steps)
    assert (schedule.start, schedule.length) == (start * steps, length * steps)
    end = start + length
    assert tuple(end + round(share * (epochs - end)) for share in student.learning_rate.drops) == drops


def test_the_numbers_of_the_cc_ibp_row_at_2_255() -> None:
    loaded = recipe_named("cifar_2_255_cc_ibp")
    student = loaded.student
    assert loaded.threat.epsilon == Fraction(2, 255)
    assert (student.loss.kind, student.loss.alpha, student.l1, student.shi_weight) == ("cc_ibp", 0.01, 3e-6, 0.5)
    attack = student.attack
    assert (attack.steps, attack.step_size, attack.kappa, attack.restarts, attack.keep) == (8, 0.25, 2.1, 1, "best")
    assert (student.learning_rate.initial, student.learning_rate.decay) == (5e-4, 0.2)
    assert (student.optimizer.kind, student.optimizer.weight_decay, student.gradient_clip) == ("adam", 0, 10)
    assert (student.batch_size, student.batch_norm, student.initialization) == (128, "adversarial", "ibp")
    assert (loaded.data.flip, loaded.data.crop_padding) == (True, 2)


def test_the_numbers_of_the_cc_ibp_row_on_mnist_at_03() -> None:
    loaded = recipe_named("mnist_0.3_cc_ibp")
    student = loaded.student
    assert (loaded.threat.epsilon, student.epsilon_schedule.train_epsilon_factor) == (Fraction(3, 10), 1.334)
    assert (student.loss.alpha, student.l1, student.batch_size) == (0.3, 3e-6, 256)
    assert (student.attack.steps, student.attack.step_size, student.attack.keep) == (1, 10, "last")
    assert (loaded.data.mean, loaded.data.std, loaded.data.flip) == ((0,), (1,), False)


def test_the_numbers_of_the_mtl_ibp_row_of_ctbench_at_2_255() -> None:
    student = recipe_named("cifar_2_255_mtl_ibp_ctbench").student
    assert student.loss == MTLIBPConfig(alpha=0.01)
    assert (student.attack.steps, student.attack.restarts, student.attack.kappa) == (1, 3, 2)
    assert (student.natural_weight, student.l1, student.batch_norm) == (0.1, 3e-6, "clean")
    assert student.population_statistics
    averaging = student.weight_averaging
    assert averaging is not None
    assert (averaging.start * student.epochs, averaging.every) == (150, 10)


def test_the_numbers_of_the_sabr_row_of_ctbench_at_2_255() -> None:
    student = recipe_named("cifar_2_255_sabr_ctbench").student
    assert student.loss == SABRConfig(subbox=0.1, relu_shrink=0.8)
    assert student.epsilon_schedule.train_epsilon_factor == 1.5  # 3/255
    assert (student.attack.steps, student.attack.restarts, student.l1) == (5, 3, 1e-6)
    assert (student.natural_weight, student.weight_averaging) == (0, None)


def test_the_numbers_of_the_exp_ibp_rows_on_tiny_imagenet() -> None:
    published, ctbench = (recipe_named(f"tiny_imagenet_1_255_exp_ibp{suffix}").student for suffix in ("", "_ctbench"))
    assert (published.loss, published.l1, published.shi_weight) == (ExpIBPConfig(alpha=0.04), 5e-5, 0.2)
    assert (ctbench.loss, ctbench.l1, ctbench.shi_weight) == (ExpIBPConfig(alpha=0.4), 1e-6, 0.2)
    assert recipe_named("cifar_2_255_ibp_ctbench").student.loss == IBPConfig()


def test_the_numbers_of_the_best_configuration_of_ctrain() -> None:
    student = recipe_named("cifar_2_255_mtl_ibp_ctrain").student
    assert (student.loss, student.l1, student.shi_weight) == (MTLIBPConfig(alpha=0.00223), 1.43e-6, 0.414)
    assert (student.attack.steps, student.attack.step_size, student.attack.kappa) == (7, 1.63, 2.27)
    assert (student.optimizer, student.batch_size) == (RAdamConfig(), 512)
    assert (student.learning_rate.initial, student.learning_rate.decay) == (5.8e-3, 0.115)
    assert student.epsilon_schedule.train_epsilon_factor == 1.17


@pytest.mark.parametrize("setting", ["mnist_0.1", "mnist_0.3", "cifar_2_255", "cifar_8_255", "imagenet64_1_255"])
def test_a_cc_dist_recipe_is_cc_ibp_with_a_teacher(setting: str) -> None:
    plain, distilled = recipe_named(f"{setting}_cc_ibp"), recipe_named(f"{setting}_cc_dist")
    assert distilled.student.loss == CCDistConfig(alpha=plain.student.loss.alpha, beta=5)
    of_plain = {"loss": plain.student.loss, "precision": plain.student.precision}
    assert distilled.student.model_copy(update=of_plain) == plain.student
    precision = distilled.student.precision
    assert precision.model_copy(update={"teacher": "auto"}) == plain.student.precision  # which reads no teacher
    assert (distilled.data, distilled.threat, distilled.seed) == (plain.data, plain.threat, plain.seed)
    teacher = distilled.teacher
    assert teacher is not None
    assert (teacher.epochs, teacher.attack.steps, teacher.attack.step_size) == (30, 10, 0.25)


def test_the_teachers_of_ctbench() -> None:
    at_2, at_8 = (recipe_named(f"cifar_{radius}_255_cc_dist_pgd_teacher").teacher for radius in (2, 8))
    assert at_2 is not None
    assert at_8 is not None
    assert (at_2.epochs, at_2.attack.steps, at_2.attack.restarts, at_2.l1) == (160, 8, 3, 2e-5)
    assert [share * at_2.epochs for share in at_2.learning_rate.drops] == [120, 140]
    assert (at_8.epochs, at_8.attack.steps, at_8.attack.restarts, at_8.l1) == (240, 10, 3, 1e-6)
    assert [share * at_8.epochs for share in at_8.learning_rate.drops] == [200, 220]


def test_a_space_file_is_no_recipe() -> None:
    with pytest.raises(YamlFileError, match=r"digits.yaml is a space file: python -m search.run"):
        load_recipe_file(SPACES / "digits.yaml")


def test_a_name_where_a_mapping_is_expected() -> None:
    with pytest.raises(YamlFileError, match=r"student.optimizer: 'radam' is a name .* such as \{kind: radam\}"):
        load_recipe_file(SPACES / "recipes" / "digits.yaml", ["student.optimizer=radam"])

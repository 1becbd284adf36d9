"""What a confirmation computes from: a study's space file with the test set and the full ladder."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from ccdist.config import KINKED, Config, DataConfig, NetworkConfig, Rung, VerifyConfig
from ccdist.yaml_files import YamlFileError, apply_setting
from search.config import BudgetConfig, SearchConfig, Split, StoppingConfig, StudyKind, explain
from search.errors import UserError

# Cheap bounds first: what they prove no attack can break, so the ensemble takes what they left, and leaves branch and
# bound what it could not break.
LADDER: tuple[Rung, ...] = ("pgd", "ibp", "crown", "alpha_crown", "ensemble", "branch_and_bound")
TIMEOUT_S = 20.0
OPEN_SECTIONS = ("resources", "tracking")  # what may differ from the search without changing a result


class ConfirmError(UserError):
    """A study cannot be confirmed as asked; the text says what to do."""


class Confirmation(Config):
    """Of what, and on which images."""

    study: str = Field(description="the study whose configurations are confirmed")
    test_images: int | None = Field(None, ge=1, description="the first so many test images; None: all")


class ConfirmationConfig(SearchConfig):
    """A confirmation is a study of its own, with trials that are runs of chosen configurations."""

    split: ClassVar[Split] = "test"
    kind: ClassVar[StudyKind] = "confirmation"

    confirmation: Confirmation

    @property
    def study_name(self) -> str:
        """The name itself: that of the confirmed study, with its seed, is part of it."""
        return self.name

    @property
    def training_data(self) -> DataConfig:
        """The training set as its runs say they used it: all of it, nothing is held out.

        With limits it stays the search's: only both parts of its split, each cut by its own limit, are these images.
        """
        data = self.data
        if (data.train_images, data.validation_images) != (None, None):
            return data
        return data.model_copy(update={"validation": 0.0})

    def verifier_of(self, network: NetworkConfig) -> VerifyConfig:
        """The ladder, without branch and bound where it has no form for the activation."""
        whole = super().verifier_of(network)
        if network.activation in KINKED:
            return whole
        return whole.model_copy(update={"rungs": tuple(rung for rung in whole.rungs if rung != "branch_and_bound")})


def confirmation_config(
    searched: SearchConfig, *, name: str | None, test_images: int | None, timeout_s: float
) -> ConfirmationConfig:
    """The confirmation of a study.

    Args:
        name: of the confirmation; None: the study's with `-confirm` behind it.
        test_images: the first so many of the test set; None: all.
        timeout_s: of branch and bound, seconds an image.

    Raises:
        ConfirmError: a value is out of its range.
    """
    tree = searched.model_dump(mode="json")
    # What else kept the search's trials short is no limit here.
    limits = {"timeout_s": timeout_s, "total_timeout_s": None, "max_branches": None}
    verification = {"rungs": _ladder(searched), "branch_and_bound": tree["verification"]["branch_and_bound"] | limits}
    changes = {
        "name": name or f"{searched.study_name}-confirm",
        "verification": tree["verification"] | verification,
        "confirmation": {"study": searched.study_name, "test_images": test_images},
        # Its runs are given, and each is measured to the end.
        "search": tree["search"] | {"sampler": "random", "points": [], "seeds": 1},
        "stopping": StoppingConfig(verification=False, training="off").model_dump(),
        "budget": BudgetConfig(trials=1).model_dump(),
    }
    try:
        return ConfirmationConfig.model_validate(tree | changes)
    except ValidationError as error:
        raise ConfirmError(explain(error, ConfirmationConfig, "")) from None


def _ladder(searched: SearchConfig) -> tuple[Rung, ...]:
    """The whole ladder, or, where all networks have one activation without a kink, what there is for it."""
    activation = searched.network.get("activation", KINKED[0])
    is_kinked = not isinstance(activation, str) or activation in KINKED
    return LADDER if is_kinked else tuple(rung for rung in LADDER if rung != "branch_and_bound")


def config_of(stored: Mapping[str, Any]) -> SearchConfig:
    """The configuration of a stored study, whichever kind it is of."""
    return (ConfirmationConfig if "confirmation" in stored else SearchConfig).model_validate(stored)


def with_settings(config: ConfirmationConfig, settings: Sequence[str]) -> ConfirmationConfig:
    """The configuration with `key=value` settings of what no result depends on.

    Raises:
        ConfirmError: a setting is about something else, or wrong.
    """
    tree = config.model_dump(mode="json")
    for setting in settings:
        if setting.partition(".")[0] not in OPEN_SECTIONS:
            raise ConfirmError(
                f"--set {setting}: a confirmation has the recipes of its study; only {' and '.join(OPEN_SECTIONS)} may "
                "change, for example --set resources.gpu=1"
            )
    try:
        for setting in settings:
            apply_setting(tree, setting)
        return ConfirmationConfig.model_validate(tree)
    except YamlFileError as error:
        raise ConfirmError(str(error)) from None
    except ValidationError as error:
        raise ConfirmError(explain(error, ConfirmationConfig, "")) from None

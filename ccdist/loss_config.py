"""The losses of certified training as configurations, and what each of them has to be given.

Each kind is one function of `ccdist.losses`; a step leaves out the passes that its loss does not read.
"""

from typing import Annotated, Literal

from pydantic import Field

from ccdist.fields import Config

Alpha = Annotated[float, Field(ge=0, le=1, description="weight of the bounds: 0 adversarial, 1 IBP")]


class _Loss(Config):
    @property
    def reads_attack(self) -> bool:
        """Whether attacked points enter the loss."""
        return True

    @property
    def reads_attacked_outputs(self) -> bool:
        """Whether the student's outputs at the attacked points enter the loss."""
        return self.reads_attack

    @property
    def reads_bounds(self) -> bool:
        """Whether interval bounds over the epsilon box enter the loss."""
        return True

    @property
    def reads_teacher(self) -> bool:
        return False


class _Mixed(_Loss):
    alpha: Alpha

    @property
    def reads_attack(self) -> bool:
        return self.alpha < 1

    @property
    def reads_bounds(self) -> bool:
        return self.alpha > 0


class IBPConfig(_Loss):
    """Interval bounds only."""

    kind: Literal["ibp"] = "ibp"

    @property
    def reads_attack(self) -> bool:
        return False


class CCIBPConfig(_Mixed):
    kind: Literal["cc_ibp"] = "cc_ibp"


class MTLIBPConfig(_Mixed):
    kind: Literal["mtl_ibp"] = "mtl_ibp"


class ExpIBPConfig(_Mixed):
    kind: Literal["exp_ibp"] = "exp_ibp"


class SABRConfig(_Loss):
    """Interval bounds over a small box around the attacked point."""

    kind: Literal["sabr"] = "sabr"
    subbox: float = Field(gt=0, le=1, description="SABR's lambda: the small box's radius relative to the attack's box")
    relu_shrink: float = Field(
        1.0, gt=0, le=1, description="factor on the upper bound of unstable units; below 1 it is no bound any more"
    )

    @property
    def reads_attacked_outputs(self) -> bool:
        return False


class CCDistConfig(_Mixed):
    """CC-IBP plus feature distillation."""

    kind: Literal["cc_dist"] = "cc_dist"
    beta: float = Field(ge=0, description="distillation weight")
    alpha_dist: Literal["alpha"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "alpha", description="weight of the bounds in the distillation term: alpha's own value or a number"
    )

    @property
    def distillation_alpha(self) -> float:
        return self.alpha if self.alpha_dist == "alpha" else self.alpha_dist

    @property
    def reads_attack(self) -> bool:
        return self.alpha < 1 or (self.beta > 0 and self.distillation_alpha < 1)

    @property
    def reads_bounds(self) -> bool:
        return self.alpha > 0 or (self.beta > 0 and self.distillation_alpha > 0)

    @property
    def reads_teacher(self) -> bool:
        return self.beta > 0


class ADCertConfig(_Mixed):
    """IBP plus distillation of the teacher's probabilities (AD-CERT and its variants)."""

    kind: Literal["ad_cert"] = "ad_cert"
    student_input: Literal["adversarial", "clean", "rslad"] = Field(
        "adversarial", description="where the student's probabilities are read; rslad: 1/6 clean + 5/6 adversarial"
    )
    teacher_input: Literal["clean", "adversarial"] = Field(
        "clean", description="where the teacher's probabilities are read"
    )
    soft_attack: bool = Field(False, description="attack the divergence from the teacher instead of the cross-entropy")

    @property
    def reads_attack(self) -> bool:
        return self.alpha < 1 and (self.student_input != "clean" or self.teacher_input == "adversarial")

    @property
    def reads_attacked_outputs(self) -> bool:
        return self.alpha < 1 and self.student_input != "clean"

    @property
    def reads_teacher(self) -> bool:
        return self.alpha < 1


LossConfig = Annotated[
    IBPConfig | CCIBPConfig | MTLIBPConfig | ExpIBPConfig | SABRConfig | CCDistConfig | ADCertConfig,
    Field(discriminator="kind"),
]

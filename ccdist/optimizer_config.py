"""Optimisers, learning rates and weight averaging as configurations."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ccdist.fields import Config, Share


class AdamConfig(Config):
    kind: Literal["adam"] = "adam"
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty, added to the gradient")


class AdamWConfig(Config):
    kind: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.01, ge=0, description="decoupled: weights shrink by learning rate times this")


class RAdamConfig(Config):
    kind: Literal["radam"] = "radam"
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty, added to the gradient")


class SGDConfig(Config):
    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)


class MultiStepConfig(Config):
    """Constant, multiplied by `decay` at each drop."""

    kind: Literal["multi_step"] = "multi_step"
    initial: float = Field(5e-4, gt=0, le=10, description="learning rate at the start")
    decay: float = Field(0.2, gt=0, le=1)
    drops: tuple[Share, ...] = Field(
        (), description="where to drop, as shares of the epochs that remain after the epsilon ramp"
    )


class CyclicConfig(Config):
    """A triangle over the whole training: up for half of the steps, down for the other half."""

    kind: Literal["cyclic"] = "cyclic"
    peak: float = Field(gt=0, le=10)
    floor: float = Field(0.0, ge=0, le=10)

    @model_validator(mode="after")
    def _peak_is_above(self) -> "CyclicConfig":
        if self.floor > self.peak:
            raise ValueError(f"floor {self.floor} is above peak {self.peak}; exchange them")
        return self


class CosineConfig(Config):
    """Half a cosine from initial to final over the whole training."""

    kind: Literal["cosine"] = "cosine"
    initial: float = Field(5e-4, gt=0, le=10)
    final: float = Field(0.0, ge=0, le=10)

    @model_validator(mode="after")
    def _final_is_below(self) -> "CosineConfig":
        if self.final > self.initial:
            raise ValueError(f"final {self.final} is above initial {self.initial}; exchange them")
        return self


OptimizerConfig = Annotated[AdamConfig | AdamWConfig | RAdamConfig | SGDConfig, Field(discriminator="kind")]
LearningRateConfig = Annotated[MultiStepConfig | CyclicConfig | CosineConfig, Field(discriminator="kind")]


class WeightAveragingConfig(Config):
    """Stochastic weight averaging: the plain mean of the weights met late in training replaces the last ones."""

    start: Share = Field(description="share of the epochs after which weights are collected")
    every: int = Field(10, ge=1, description="optimiser steps between two collected weights")

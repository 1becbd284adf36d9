"""What the values of a trial in training say about its result, learned from trials that are finished.

Both objectives are together: (standard, certified) accuracy, fractions. Legend: N finished trials.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Finished trials that the opening guess, "each gains what the mean gains", counts as.
PRIOR_TRIALS = 4.0
# Their standard deviation at least, in accuracy: of trials that lie closer together a slope is noise.
PRIOR_SPREAD = 0.02


class Forecast(NamedTuple):
    """result = final + (values - rung) @ slope, and how far results are from that."""

    rung: Array  # shape [2]: mean values at the rung
    final: Array  # shape [2]: mean result
    slope: Array  # shape [2, 2]
    residual: Array  # shape [2]: standard deviation of the results from the regression
    covariance: Array  # shape [2, 2]: of the slope, for a residual of 1
    num: int

    def of(self, values: Array) -> Array:
        """The results to expect of values at the rung, both [..., 2]; they may lie outside of [0, 1]."""
        expected: Array = self.final + (values - self.rung) @ self.slope
        return expected

    def spread(self, values: Array) -> Array:
        """Standard deviation of a new result from its forecast, both [..., 2].

        residual * sqrt(1 + 1/N + v' (X'X + k D)^-1 v),  v = values - mean: wider, the further out
        """
        out = values - self.rung
        leverage = np.einsum("...i,ij,...j->...", out, self.covariance, out)
        wider: Array = np.sqrt(1 + 1 / self.num + leverage)[..., None] * self.residual
        return wider


def forecast(rung: Array, final: Array) -> Forecast:
    """A ridge regression of results on values at a rung, shrunk towards one gain for all.

        slope = (X'X + k D)^-1 (X'Y + k D),  X, Y = centred values and results,  D = diag(var(values), at least s^2)

    with k of `PRIOR_TRIALS` and s of `PRIOR_SPREAD`. So the slope is the identity without evidence, and with much
    evidence that of least squares. A gain for all alone would be wrong the more, the noisier the rung is: the trials
    that are low there were partly unlucky, and gain more than the mean until the end. Those are the ones that are
    stopped, and whose expected results a sampler is told.

    Residuals have N - 1 degrees of freedom less about 2 N / (N + k) of the slope.

    Args:
        rung: values of finished trials at the rung, shape [N, 2], N at least 1.
        final: their results, shape [N, 2].
    """
    num = len(rung)
    x, y = rung - rung.mean(axis=0), final - final.mean(axis=0)
    prior = PRIOR_TRIALS * np.diag(np.maximum(rung.var(axis=0), PRIOR_SPREAD**2))
    covariance = np.linalg.inv(x.T @ x + prior)
    slope = covariance @ (x.T @ y + prior)
    freedom = max(1.0, num - 1 - 2 * num / (num + PRIOR_TRIALS))
    residual = np.sqrt(((y - x @ slope) ** 2).sum(axis=0) / freedom)
    return Forecast(rung.mean(axis=0), final.mean(axis=0), slope, residual, covariance, num)

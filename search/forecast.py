"""What the values of a trial in training say about its result, learned from trials that are finished.

Both objectives are together: (standard, certified) accuracy, fractions. Legend: N finished trials.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Finished trials that the opening guess, "each gains what the mean gains", counts as.
PRIOR_TRIALS = 4.0


class Forecast(NamedTuple):
    """result = final + (values - rung) @ slope, and how far results are from that."""

    rung: Array  # shape [2]: mean values at the rung
    final: Array  # shape [2]: mean result
    slope: Array  # shape [2, 2]
    spread: Array  # shape [2]: standard deviation of the results from the forecast

    def of(self, values: Array) -> Array:
        """The results to expect of values at the rung, both [..., 2]; they may lie outside of [0, 1]."""
        expected: Array = self.final + (values - self.rung) @ self.slope
        return expected


def forecast(rung: Array, final: Array) -> Forecast:
    """A ridge regression of results on values at a rung, shrunk towards one gain for all.

        slope = (X'X + k D)^-1 (X'Y + k D),  X, Y = centred values and results,  D = diag(var(values))

    So the slope is the identity without evidence, and with much evidence that of least squares. A gain for all alone
    would be wrong the more, the noisier the rung is: the trials that are low there were partly unlucky, and gain more
    than the mean until the end. Those are the ones that are stopped, and whose expected results a sampler is told.

    The spread has N - 1 degrees of freedom less those of the slope, 2 N / (N + k).

    Args:
        rung: values of finished trials at the rung, shape [N, 2], N at least 1.
        final: their results, shape [N, 2].
    """
    num = len(rung)
    means = rung.mean(axis=0), final.mean(axis=0)
    x, y = rung - means[0], final - means[1]
    # Equal values in one objective say nothing about its slope; any positive weight leaves it at the identity.
    prior = PRIOR_TRIALS * np.diag(np.maximum(rung.var(axis=0), 1e-12))
    slope = np.linalg.solve(x.T @ x + prior, x.T @ y + prior)
    left = y - x @ slope
    freedom = max(1.0, num - 1 - 2 * num / (num + PRIOR_TRIALS))
    return Forecast(*means, slope, np.sqrt((left**2).sum(axis=0) / freedom))

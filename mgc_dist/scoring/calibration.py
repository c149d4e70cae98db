"""Temperatures: one scalar that makes probabilities mean what they say."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


def fit_temperature(logits: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    """The scalar T that minimises the negative log-likelihood of softmax(logits / T).

    Args:
        logits: float64 [M, K].
        label: int64 [M].

    Returns:
        T between 0.05 and 20.

    Source: Guo et al., ICML 2017, section 4.2.
    """

    def nll(temperature: float) -> float:
        log_p = log_softmax(logits / temperature, axis=1)
        return float(-log_p[np.arange(len(label)), label].mean())

    return best_temperature(nll)


def best_temperature(nll: Callable[[float], float]) -> float:
    """The temperature with the smallest negative log-likelihood, between 0.05 and 20.

    Args:
        nll: temperature -> mean negative log-likelihood.
    """
    bounds = (np.log(0.05), np.log(20.0))
    found = minimize_scalar(
        lambda log_t: nll(float(np.exp(log_t))), bounds=bounds, method="bounded"
    )
    return float(np.exp(found.x))


def is_at_bound(temperature: float) -> bool:
    """Whether a temperature ran to one of the bounds: it is no minimum, the logits tell nothing."""
    return not 0.051 < temperature < 19.6

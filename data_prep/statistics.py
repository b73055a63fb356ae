"""Figures of token streams that need no model."""

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError


def unigram_entropy(tokens: NDArray[np.integer]) -> float:
    """Entropy of the empirical distribution of these tokens, in nats per token: H = ln N - sum(c ln c) / N.

    It is the loss of the best model that knows how often each token occurs in this very text but nothing of its context.
    DataError where there are no tokens."""
    if tokens.size == 0:
        raise DataError("unigram entropy of no tokens: found an empty stream; at least one token is needed")
    counts = np.unique(tokens, return_counts=True)[1].astype(np.float64)
    entropy = np.log(tokens.size) - float(counts @ np.log(counts)) / tokens.size
    return max(0.0, float(entropy))

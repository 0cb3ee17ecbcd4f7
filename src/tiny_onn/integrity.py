"""The predictive-integrity score PI, and what it does not say."""

import math

# Constants of the project's lineage.
ALPHA = 1.0
GAMMA = 0.5


def predictive_integrity(loss: float, tau: float, surprise: float) -> float:
    """`exp(-alpha * ((1 - gamma) * loss / tau + gamma * surprise))`: 1 without loss and surprise.

    Reported, never optimised: it can mislead. A student that knows nothing has a large tau, which
    excuses its loss; a dead one has no surprise at all. A PI without its loss, tau and surprise
    beside it says little, and PIs of two kinds of surprise, or of two losses, do not compare:
    `gain` has a sign and may lift PI above 1.

    Args:
        loss: the step's loss, nats per token.
        tau: entropy of the student's next-token distribution, nats, mean over the same tokens.
        surprise: mean over the active pairs of token and expert, in units of the per-token loss.

    Returns:
        0 for a positive loss at a tau of 0.
    """
    ratio = loss / tau if tau > 0 else (math.inf if loss > 0 else 0.0)
    exponent = -ALPHA * ((1 - GAMMA) * ratio + GAMMA * surprise)
    # exp of more does not fit a float; only a negative surprise gets there.
    return math.exp(min(exponent, 700.0))

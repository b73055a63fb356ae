"""How much of the time a long run computes: failures, checkpoints and restarts.

Young 1974 and Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps": with failures at
random, M seconds apart on average, a checkpoint of d seconds every t and R seconds to restart, the time a job takes is

    M * exp(R / M) * (exp((t + d) / M) - 1) / t

for each second of work (its equation 13). All times in seconds.
"""

import math
from dataclasses import dataclass

from launcher.config.schema import Cluster


@dataclass(frozen=True)
class Goodput:
    """Of one stage. `goodput` is the part of the time that trains, at the configured interval; `optimum_goodput` at the one
    that costs least, `optimum_interval_s`."""

    failure_interval_s: float
    checkpoint_s: float
    restart_s: float
    interval_s: float
    optimum_interval_s: float
    goodput: float
    optimum_goodput: float


def plan_goodput(cluster: Cluster, *, checkpoint_bytes: float, interval_s: float) -> Goodput | None:
    """None where the cluster does not say how often it fails."""
    operations = cluster.operations
    if operations is None:
        return None
    failure_s = operations.gpu_hours_between_failures * 3600 / cluster.world_size
    checkpoint_s = checkpoint_bytes / (operations.checkpoint_gb_per_s * 1e9)
    optimum_s = daly_interval(checkpoint_s, failure_s=failure_s)
    restart_s = operations.restart_s
    return Goodput(
        failure_interval_s=failure_s,
        checkpoint_s=checkpoint_s,
        restart_s=restart_s,
        interval_s=interval_s,
        optimum_interval_s=optimum_s,
        goodput=goodput(interval_s, checkpoint_s=checkpoint_s, restart_s=restart_s, failure_s=failure_s),
        optimum_goodput=goodput(optimum_s, checkpoint_s=checkpoint_s, restart_s=restart_s, failure_s=failure_s),
    )


def daly_interval(checkpoint_s: float, *, failure_s: float) -> float:
    """Seconds of work between checkpoints (Daly's equation 37); the time between failures where a checkpoint takes longer
    than twice that."""
    if checkpoint_s >= 2 * failure_s:
        return failure_s
    ratio = math.sqrt(checkpoint_s / (2 * failure_s))
    return math.sqrt(2 * checkpoint_s * failure_s) * (1 + ratio / 3 + ratio**2 / 9) - checkpoint_s


def goodput(interval_s: float, *, checkpoint_s: float, restart_s: float, failure_s: float) -> float:
    exponent = (interval_s + checkpoint_s) / failure_s
    if exponent + restart_s / failure_s > 500:  # it would never get from one checkpoint to the next
        return 0.0
    return interval_s / (failure_s * math.exp(restart_s / failure_s) * math.expm1(exponent))

"""Whether this process is to leave soon: set by whoever runs it, asked by whoever computes. Knows no Ray.

A node that is about to be taken away gives notice, some tens of seconds. A stage in a long unit asks `should_stop` as
often as it likes; told yes, it keeps a checkpoint and raises `errors.Drained`. The unit then continues on another node;
it did not fail, so nothing is counted against it. A stage that can't continue a unit need not ask.
"""

from collections.abc import Callable

_is_leaving: Callable[[], bool] | None = None


def watch(is_leaving: Callable[[], bool]) -> None:
    """Say how this process finds out; called often, so it must be cheap."""
    global _is_leaving
    _is_leaving = is_leaving


def should_stop() -> bool:
    """Whether to stop at the next point from which the work can continue elsewhere."""
    return _is_leaving is not None and _is_leaving()

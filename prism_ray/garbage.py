"""How often Python looks for unreachable cycles of objects: seldom while a command reads, as usual once it works.

Of a run's thousands of records none is part of a cycle, and looking through them takes longer than reading them.
"""

import gc

_USUAL = gc.get_threshold()
_NEW_OBJECTS = 1_000_000


def seldom() -> None:
    """Until there is work: imports, settings and records."""
    gc.set_threshold(_NEW_OBJECTS)


def as_usual() -> None:
    """Before anything that may leave tensors or figures in cycles."""
    gc.set_threshold(*_USUAL)


def never_again() -> None:
    """At the end of the process, which looks through everything otherwise: 0.3 s after a large run."""
    gc.freeze()

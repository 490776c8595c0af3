"""The program `prism-ray`, also `python -m prism_ray`: signals are answered from before the verbs are imported."""

import gc

from prism_ray.signals import exit_with


def main() -> None:
    """Run one verb and end the process with its exit code."""
    exit_with(_command)


GARBAGE = 100_000
"""New objects after which some are looked through for cycles: of a run's thousands of records none is part of one."""


def _command() -> int:
    gc.set_threshold(GARBAGE)
    from prism_ray import cli

    return cli.main()


if __name__ == "__main__":
    main()

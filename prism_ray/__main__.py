"""The program `prism-ray`, also `python -m prism_ray`: signals are answered from before the verbs are imported."""

from prism_ray import garbage
from prism_ray.signals import exit_with


def main() -> None:
    """Run one verb and end the process with its exit code."""
    exit_with(_command)


def _command() -> int:
    garbage.seldom()
    from prism_ray import cli

    return cli.main()


if __name__ == "__main__":
    main()

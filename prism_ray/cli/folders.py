"""Run folders as arguments: the settings that a run was made with, read back from its folder."""

import os
import re
from dataclasses import replace
from typing import Any

from prism_ray.artifacts import split
from prism_ray.cli.files import first_lines
from prism_ray.config import Config
from prism_ray.documents import parse_yaml
from prism_ray.errors import InputError
from prism_ray.identity import run_id
from prism_ray.storage import is_remote, open_store
from prism_ray.validation import check_config

OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*=")


def is_folder(argument: str) -> bool:
    """Whether an argument of a verb is a folder: what is no `key=value`."""
    return not OVERRIDE.match(argument)


def config_of_run(folder: str) -> Config:
    """The checked settings of an existing run, with the storage that its folder is in today.

    Raises:
        InputError: it is no folder of a run, or one of other settings than this version has.
    """
    address = folder.rstrip("/") if is_remote(folder) else os.path.abspath(folder)
    runs, name = split(address)
    storage, parent = split(runs)
    store = open_store(address)
    if parent != "runs" or store.size("config.yaml") is None:
        raise InputError(
            f"{folder}: is no folder of a run (it has no config.yaml, or is not in a folder runs); give folders such "
            "as outputs/runs/NAME"
        )
    try:
        settings = parse_yaml(store.read("config.yaml").decode())["settings"]
        config = _typed(settings)
        check_config(config)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{folder}/config.yaml: holds no settings of this version ({first_lines(error, 1)}); make the run again, "
            "or use the version it was made with"
        ) from error
    config = replace(config, storage=storage)
    return config if run_id(config) == name else replace(config, run_id=name)


def _typed(settings: Any) -> Config:
    """The settings in their types; those that are new since then as they are by default.

    Raises:
        ValueError: a setting is unknown or of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), settings))
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error
    assert isinstance(config, Config)
    return config

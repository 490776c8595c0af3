"""Model folders from elsewhere, copied here once and then frozen: from any fsspec URL, or from the Hugging Face hub.

<artifacts>/generators/staged-<hash of the address>/
    ...                     what a pipeline is loaded from, and nothing that could run code
    prism_ray.json          where it came from, and the sha256 of every file
"""

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from prism_ray.artifacts import MARKER, is_complete, join, publish_built
from prism_ray.data.files import open_location
from prism_ray.errors import InputError, PrismError, one_line
from prism_ray.generator_files import check_generator
from prism_ray.identity import content_hash
from prism_ray.storage import is_remote, sha256_of_file, to_json
from prism_ray.weights import find_weights

HUB = "hub:"
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")
VARIANTS = ("*.fp16.*", "*.non_ema.*", "*.bf16.*")
"""Second copies of the same weights, which are not loaded."""
DESCRIPTION = ("model_index.json", "transformer/config.json")
"""Files that tell what a pipeline is asked for; small."""


def is_elsewhere(source: str) -> bool:
    """Whether a model has to be copied before it can be loaded."""
    return source.startswith(HUB) or "://" in source


def check_elsewhere(source: str, artifacts_dir: str | Path) -> None:
    """Refuse an address that can't be copied from, without looking at what is there.

    Raises:
        InputError: a hub's name without its owner, or the hub in offline mode, and no copy here.
    """
    if found_here(source, artifacts_dir) or not source.startswith(HUB):
        return
    name = source.removeprefix(HUB)
    if name.count("/") != 1:
        raise InputError(f"generator.source={source!r}: is no name on the hub; expected hub:OWNER/NAME or …@REVISION")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError(
            f"generator.source={source!r}: no copy is here yet, and HF_HUB_OFFLINE forbids to fetch one; unset it, or "
            "give a local folder"
        )


def staged_path(source: str, artifacts_dir: str | Path) -> str:
    """Where the copy belongs. A folder of this machine counts by its content, for it may change."""
    what = source if is_elsewhere(source) else _folder_digests(source)
    return join(artifacts_dir, "generators", f"staged-{content_hash(what)}")


def found_here(source: str, artifacts_dir: str | Path) -> str | None:
    """The address of a model that can be looked at without fetching anything, None if it must be fetched first."""
    if not is_elsewhere(source):
        return str(Path(source).absolute())
    folder = staged_path(source, artifacts_dir)
    return folder if is_complete(folder) else None


def staged(source: str, artifacts_dir: str | Path) -> str:
    """The address of a model that every worker reaches: of its copy, made if it is not there yet and never asked for
    again; of a local folder as it is, if the storage is local too.

    Raises:
        InputError: nothing is there, it can't be read, or is no pipeline that can be sampled from.
        PrismError: a file was cut off on its way.
    """
    if not is_elsewhere(source):
        check_generator(Path(source).absolute())
        if not is_remote(artifacts_dir):
            return str(Path(source).absolute())
    folder = staged_path(source, artifacts_dir)
    if is_complete(folder):
        return folder

    def build(building: Path) -> None:
        (_from_hub if source.startswith(HUB) else _from_url)(source, building)
        try:
            check_generator(building)
        except InputError as error:
            raise InputError(str(error).replace(str(building), source)) from error
        files = sorted(path for path in building.rglob("*") if path.is_file())
        digests = {str(path.relative_to(building)): sha256_of_file(path) for path in files}
        (building / MARKER).write_bytes(to_json({"source": source, "files": digests}))

    publish_built(folder, build)
    return folder


def staged_classifier(source: str, artifacts_dir: str | Path) -> str:
    """The address of a classifier's folder that every worker reaches: as it is if the storage is local too, else of a
    copy named by its content.

    Raises:
        InputError: the folder, its config.json or its weights are missing.
    """
    folder = Path(source).absolute()  # workers of a cluster that was joined have another working directory
    if not is_remote(artifacts_dir):
        return str(folder)
    files = [find_weights(folder), folder / "config.json"]
    copy = join(artifacts_dir, "sources", content_hash([sha256_of_file(path) for path in files]))

    def build(building: Path) -> None:
        for path in files:
            shutil.copyfile(path, building / path.name)

    if not is_complete(copy):
        publish_built(copy, build)
    return copy


def _folder_digests(source: str) -> list[list[str]]:
    fs, root = open_location(source, source="generator")
    return [[str(name), sha256_of_file(Path(path))] for path, name, _ in _wanted(fs, root)]


def _from_url(source: str, building: Path) -> None:
    fs, root = open_location(source, source="generator")
    try:
        found = list(_wanted(fs, root))
    except (OSError, ValueError) as error:
        raise InputError(
            f"generator.source={source!r}: can't be read ({one_line(error)}); check the address"
        ) from error
    if not found:
        raise InputError(f"generator.source={source!r}: holds no model file; expected a diffusers pipeline folder")
    for path, name, size in found:
        target = building / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.get_file(path, str(target))
        except OSError as error:
            raise PrismError(
                f"generator.source={source!r}: {name} can't be copied ({one_line(error)}); run the same command again"
            ) from error
        if target.stat().st_size != size:
            raise PrismError(f"generator.source={source!r}: {name} was cut off on its way; run the same command again")


def _wanted(fs: Any, root: str) -> Iterator[tuple[str, PurePosixPath, int]]:
    """Path, name and size of the files that a pipeline is loaded from; a name never leads out of the folder."""
    for path, info in sorted(fs.find(root, detail=True).items()):
        name = PurePosixPath(path.removeprefix(root).lstrip("/"))
        if ".." in name.parts or len(name.parts) > 2 or any(part.startswith(".") for part in name.parts):
            continue
        if any(fnmatch(name.name, kind) for kind in WANTED) and not any(fnmatch(name.name, v) for v in VARIANTS):
            yield path, name, int(info["size"])


def _from_hub(source: str, building: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = source.removeprefix(HUB).partition("@")
    try:
        snapshot_download(
            name,
            revision=revision or None,
            local_dir=building,
            allow_patterns=[*WANTED],
            ignore_patterns=[*VARIANTS],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"generator.source={source!r}: can't be fetched ({one_line(error)}); check name and connection, or give a "
            "local folder"
        ) from error
    shutil.rmtree(building / ".cache", ignore_errors=True)  # the hub's own bookkeeping

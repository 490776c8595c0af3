"""What a data set or a student was made from, and under which licences."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from prism_ray.config import Config
from prism_ray.report.contents import RunSummary

# One string, because a formatter would make sixty lines of a list.
_IDENTIFIERS = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl
    gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
    openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
HUB_LICENCES = frozenset(_IDENTIFIERS.split())
"""Identifiers that the hub knows, of https://huggingface.co/docs/hub/repositories-licenses."""

SPDX_TO_HUB = {"odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl"}
"""Where the hub leaves the version out."""


@dataclass(frozen=True)
class Origin:
    """One thing that images are made from. `licence` is None where nobody stated it."""

    what: str
    source: str
    licence: str | None


def licences_of(config: Config) -> dict[str, str | None]:
    """Stated licences of all that a run is made from, by the setting's owner.

    Owners are `dataset`, `generator` and `teachers.models.NAME`.
    """
    teachers = {f"teachers.models.{name}": teacher.licence for name, teacher in config.teachers.models.items()}
    return {"dataset": config.dataset.licence, "generator": config.generator.licence, **teachers}


def licence_header(licence: str | None) -> dict[str, str]:
    """Front matter of a card for a licence: the hub's identifier, or `other` with a name."""
    identifier = (licence or "").strip().lower()
    identifier = re.sub(r"-(only|or-later)$", "", SPDX_TO_HUB.get(identifier, identifier))
    if identifier in HUB_LICENCES:
        return {"license": identifier}
    name = re.sub(r"[^a-z0-9.]+", "-", identifier).strip("-.")
    return {"license": "other", "license_name": name or "not-stated"}


def origins(summary: RunSummary, licences: Mapping[str, str | None]) -> list[Origin]:
    """The real data, the generator and every teacher, with where each comes from and its licence."""
    num_train = summary.dataset.num_train
    data = f"{num_train:,} training images" if num_train else "names of its classes alone"
    found = [Origin(f"data set {summary.dataset.name}", data, licences.get("dataset"))]
    if summary.config.get("method", {}).get("engine") == "diffusion":
        is_own = summary.config.get("generator", {}).get("source") == "train"
        source = f"trained on {summary.dataset.name}, captioned" if is_own else "weights made elsewhere"
        found.append(Origin("generator", source, licences.get("generator")))
    models = summary.config.get("teachers", {}).get("models", {})
    for teacher in summary.teachers:
        source = models.get(teacher.name, {}).get("source", "")
        if source == "train":
            source = f"trained on {summary.dataset.name}"
        elif not source.startswith(("timm:", "imagenet_lite:")):
            source = "weights made elsewhere"  # a folder, and paths of this machine stay here
        licence = licences.get(f"teachers.models.{teacher.name}")
        found.append(Origin(f"teacher {teacher.name} ({teacher.arch})", source, licence))
    return found

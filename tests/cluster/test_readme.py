"""What the README of the cluster names is there: files, overlays, components, policies, options."""

import re
from pathlib import Path

import pytest
from kustomize import KUBERAY, OVERLAYS, rendered

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "cluster/README.md").read_text()
POLICIES = {
    one["metadata"]["name"] for overlay in OVERLAYS for one in rendered(overlay) if one["kind"] == "NetworkPolicy"
}


def test_paths_exist() -> None:
    named = set(re.findall(r"(?<![\w./-])(?:cluster|kuberay|base|components|overlays|ray)/[\w./-]*\w", README))
    assert len(named) > 10
    for name in sorted(named - {"kuberay/kuberay-operator"}):  # helm's name of the operator's chart
        places = (ROOT / name, ROOT / "cluster" / name, KUBERAY / name)
        assert any(place.exists() for place in places), name


@pytest.mark.parametrize("folder", ["overlays", "components"])
def test_every_overlay_and_component_is_described(folder: str) -> None:
    for path in (KUBERAY / folder).iterdir():
        assert re.search(rf"\b{path.name}\b", README), path.name


def test_network_policies_are_called_by_their_names() -> None:
    objects = {"prism-ray-token", "prism-ray-object-store", "prism-ray-outputs", "prism-ray-head-svc"}
    for name in set(re.findall(r"\bprism-ray-[a-z-]+[a-z]\b", README)) - objects:
        assert name in POLICIES, name


def test_the_plan_that_it_asks_for_is_composed() -> None:
    from prism_ray import cli

    (command,) = re.findall(r"^prism-ray plan (.*)$", README, re.MULTILINE)
    assert cli.compose(command.split()).compute.effective_tflops == 100
    assert "method.sampling.micro_batch" in README
    assert cli.compose([*command.split(), "method.sampling.micro_batch=2"]).method.sampling.micro_batch == 2

"""The dashboard draws what is exported: our names are those of the code, Ray's are those of the installed Ray."""

import ast
import json
import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kustomize import OVERLAYS, rendered

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "cluster/kuberay/components/monitoring/dashboard.json").read_text())
RAY = Path(sysconfig.get_path("purelib")) / "ray"


def expressions() -> str:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return "\n".join([*queries, *(one["query"] for one in DASHBOARD["templating"]["list"])])


def exported() -> dict[str, list[str]]:
    """Names as Prometheus sees them, with our labels; read from the module, which a test may not import."""
    module = ast.parse((ROOT / "prism_ray/runtime/metrics.py").read_text())
    names: dict[str, str] = {}
    for node in module.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            names |= {a.id: b.value for a, b in zip(node.targets[0].elts, node.value.elts, strict=True)}  # type: ignore[attr-defined]
    found = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Counter", "Histogram"):
            name = "ray_" + names[node.args[0].id]  # type: ignore[attr-defined]
            labels = re.findall(
                r"run|stage|outcome", ast.unparse(node).partition("tag_keys")[2].replace("labels", "run stage")
            )
            if node.func.id == "Counter":
                found[name + "_total"] = labels
            else:
                found |= {name + end: [*labels, "le"] for end in ("_bucket", "_count", "_sum")}
    return found


def test_every_metric_of_ours_is_drawn_and_every_drawn_one_exists() -> None:
    drawn = set(re.findall(r"\bray_prism_\w+", expressions()))
    assert drawn <= set(exported())
    assert {name for name in exported() if name.endswith(("_total", "_bucket"))} <= drawn


def test_labels_in_queries_are_labels_of_the_metric() -> None:
    for name, selectors in re.findall(r"\b(ray_prism_\w+)\{([^}]*)\}", expressions()):
        assert set(re.findall(r"(\w+)!?=", selectors)) <= set(exported()[name]), name


@cache
def sources_of_ray() -> str:
    folders = ("data/_internal", "dashboard", "train/v2", "autoscaler/v2")
    return "\n".join(path.read_text() for folder in folders for path in (RAY / folder).rglob("*.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bray_(?!prism_)\w+", expressions()))))
def test_rays_own_metrics_are_in_the_installed_ray(name: str) -> None:
    # Ray Data's names are put together from a prefix and a field.
    plain = name.removeprefix("ray_").removeprefix("data_")
    assert re.search(rf"\b{plain}\b", sources_of_ray()), name


def test_panels_are_whole() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24, panel["title"]
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["description"].endswith("."), panel["title"]
            for target in panel["targets"]:
                assert target["expr"].count("(") == target["expr"].count(")"), panel["title"]


@pytest.mark.parametrize("overlay", [one for one in OVERLAYS if one != "cpu-only"])
def test_prometheus_finds_the_pods_and_is_let_in(overlay: str) -> None:
    named = {(one["kind"], one["metadata"]["name"]): one for one in rendered(overlay)}
    monitor = named["PodMonitor", "prism-ray"]["spec"]
    policy = named["NetworkPolicy", "prism-ray-metrics"]["spec"]
    assert monitor["selector"] == policy["podSelector"]
    assert [one["port"] for one in monitor["podMetricsEndpoints"]] == ["metrics"]
    assert policy["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8080}]
    board = named["ConfigMap", "prism-ray-dashboard"]
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(board["data"]["dashboard.json"]) == DASHBOARD

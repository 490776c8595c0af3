"""Overlays as plain manifests: by `kubectl kustomize` where it is installed, else by the part of it that ours use.

That part: resources, components, patches (merge and JSON patch), replacements, images, namespace, generated ConfigMaps
and local-config. A key that it does not know is an error, so it can not leave anything out in silence.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

KUBERAY = Path(__file__).resolve().parents[2] / "cluster/kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
CLUSTER_SCOPED = {"Namespace"}
LOCAL = "config.kubernetes.io/local-config"
Document = dict[str, Any]


@cache
def rendered(overlay: str) -> list[Document]:
    """The documents that `kubectl apply -k` would send. Not to be written to."""
    folder = KUBERAY / "overlays" / overlay
    return by_kubectl(folder) if shutil.which("kubectl") else by_hand(folder)


def by_kubectl(folder: Path) -> list[Document]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return load(done.stdout)


def by_hand(folder: Path) -> list[Document]:
    return [document for document in _accumulate(folder, []) if not _annotations(document).get(LOCAL)]


def load(text: str) -> list[Document]:
    """The documents of a YAML text; what an anchor names twice is two things, as for kustomize."""
    return [json.loads(json.dumps(document)) for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


def _accumulate(folder: Path, documents: list[Document]) -> list[Document]:
    """Apply a folder's kustomization to documents that are there (a component's) or none."""
    steps: Document = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for name in steps.pop("resources", []):
        path = folder / name
        documents += _accumulate(path, []) if path.is_dir() else load(path.read_text())
    for generator in steps.pop("configMapGenerator", []):
        assert generator["options"]["disableNameSuffixHash"], "names with hashes are not supported here"
        metadata = {"name": generator["name"], "labels": generator["options"]["labels"]}
        data = {name: (folder / name).read_text() for name in generator["files"]}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for name in steps.pop("components", []):
        documents = _accumulate(folder / name, documents)
    for patch in steps.pop("patches", []):
        change = yaml.safe_load((folder / patch["path"]).read_text() if "path" in patch else patch["patch"])
        for document in _selected(documents, patch["target"]):
            _patch(document, change) if isinstance(change, list) else _merge(document, change)
    namespace = steps.pop("namespace", None)
    for document in documents if namespace else []:
        if document["kind"] not in CLUSTER_SCOPED:
            document["metadata"]["namespace"] = namespace
    for image in steps.pop("images", []):
        for container in _containers(documents):
            if container["image"] == image["name"]:
                tail = f"@{image['digest']}" if "digest" in image else f":{image['newTag']}"
                container["image"] = image["newName"] + tail
    for replacement in steps.pop("replacements", []):
        (source,) = _selected(documents, replacement["source"])
        value = _at(source, replacement["source"]["fieldPath"].split("."))
        for target in replacement["targets"]:
            for document in _selected(documents, target["select"]):
                for field in target["fieldPaths"]:
                    *parents, last = field.split(".")
                    _at(document, parents)[last] = copy.deepcopy(value)
    assert set(steps) == {"apiVersion", "kind"}, f"{folder}: {sorted(steps)} not supported"
    return documents


def _annotations(document: Document) -> Document:
    return document["metadata"].get("annotations") or {}


def _selected(documents: list[Document], target: Document) -> list[Document]:
    found = [d for d in documents if d["kind"] == target["kind"] and d["metadata"]["name"] == target["name"]]
    assert found, f"{target}: no such document"
    return found


def _merge(document: Document, change: Document) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def _patch(document: Document, operations: list[Document]) -> None:
    """RFC 6902, of which: add, replace, remove, copy."""
    for operation in operations:
        *parents, last = _pointer(operation["path"])
        parent = _at(document, parents)
        kind = operation["op"]
        value = _at(document, _pointer(operation["from"])) if kind == "copy" else operation.get("value")
        if isinstance(parent, list):
            index = len(parent) if last == "-" else int(last)
            if kind != "add" and kind != "copy":
                del parent[index]
            if kind != "remove":
                parent.insert(index, copy.deepcopy(value))
            continue
        assert kind in ("add", "copy") or last in parent, f"{operation['path']}: nothing to {kind}"
        if kind == "remove":
            del parent[last]
        else:
            parent[last] = copy.deepcopy(value)


def _pointer(path: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _at(document: Any, keys: list[str]) -> Any:
    for key in keys:
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def walk(node: Any, visit: Callable[[Document], None]) -> None:
    """Call with every mapping of a document, outermost first."""
    if isinstance(node, dict):
        visit(node)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        walk(child, visit)


def _containers(documents: list[Document]) -> Iterator[Document]:
    found: list[Document] = []
    for document in documents:
        walk(document, lambda node: found.extend(node.get("containers") or []))
    yield from found

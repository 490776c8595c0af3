"""The manifests as they would be applied: valid, closed by default, and in step with the code they start."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import KUBERAY, OVERLAYS, Document, by_hand, by_kubectl, rendered

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.33"
CRDS = os.environ.get("PRISM_RAY_KUBERAY_CRDS", "")
RAY_KINDS = ("RayJob", "RayCluster", "RayCronJob")
IMAGE = re.compile(r"registry\.example\.com/prism-ray-(cpu|cuda)@sha256:[0-9a-f]{64}")
PART_OF = {"app.kubernetes.io/part-of": "prism-ray"}


def documents(overlay: str, *kinds: str) -> list[Document]:
    return [document for document in rendered(overlay) if document["kind"] in kinds]


def clusters_of(manifests: list[Document]) -> Iterator[Document]:
    """The cluster specs, wherever their kind has them."""
    for document in manifests:
        spec = document["spec"] if document["kind"] in RAY_KINDS else {}
        spec = spec.get("jobTemplate", spec)
        if spec:
            yield spec.get("rayClusterSpec", spec)


def jobs_of(manifests: list[Document]) -> Iterator[Document]:
    """The specs of RayJobs, those of a RayCronJob too."""
    for document in manifests:
        if document["kind"] in ("RayJob", "RayCronJob"):
            yield document["spec"].get("jobTemplate", document["spec"])


def pods_of(manifests: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod template that is ours to write, by name."""
    for cluster in clusters_of(manifests):
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
    for job in jobs_of(manifests):
        yield "submitter", job["submitterPodTemplate"]


def containers_of(manifests: list[Document]) -> Iterator[tuple[str, Document]]:
    for name, pod in pods_of(manifests):
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            yield f"{name}/{container['name']}", container


# Schemas


@cache
def crd_validator(kind: str) -> jsonschema.Draft202012Validator:
    """KubeRay's own schema of a kind, as JSON Schema: closed, with the API server's defaults filled in."""
    path = Path(CRDS) / f"ray.io_{kind.lower()}s.yaml"
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return jsonschema.Draft202012Validator(converted(version["schema"]["openAPIV3Schema"]))


def converted(schema: Any) -> Any:
    """OpenAPI as Kubernetes writes it, as JSON Schema."""
    if isinstance(schema, list):
        return [converted(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: converted(value) for key, value in schema.items() if key not in ("description", "default", "format")}
    properties = result.get("properties")
    if isinstance(properties, dict):
        if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
            # At the root the schema leaves `metadata` open.
            result.setdefault("additionalProperties", False)
        defaulted = {name for name, one in schema["properties"].items() if isinstance(one, dict) and "default" in one}
        if "required" in result:
            result["required"] = [name for name in result["required"] if name not in defaulted]
    if schema.get("x-kubernetes-int-or-string"):
        result = {"type": ["integer", "string"]}
    if schema.get("nullable"):
        result = {"anyOf": [result, {"type": "null"}]}
    return result


@pytest.mark.skipif(
    not Path(CRDS).is_dir() or not CRDS, reason="PRISM_RAY_KUBERAY_CRDS names no folder with KubeRay's CRDs"
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_kinds_are_valid_by_kuberays_schemas(overlay: str) -> None:
    found = documents(overlay, *RAY_KINDS)
    assert found
    for document in found:
        errors = [
            f"{error.json_path}: {error.message[:300]}"
            for error in crd_validator(document["kind"]).iter_errors(document)
        ]
        assert not errors, f"{overlay}, {document['kind']}: " + "; ".join(errors)


@pytest.mark.skipif(
    not Path(CRDS).is_dir() or not CRDS, reason="PRISM_RAY_KUBERAY_CRDS names no folder with KubeRay's CRDs"
)
@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec.update(backoffLimits=1),
        lambda spec: spec.update(backoffLimit="many"),
        lambda spec: spec["rayClusterSpec"]["autoscalerOptions"].update(version="v3"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"].pop("template"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=0.5),
    ],
    ids=["misspelt field", "wrong type", "unknown value", "missing field", "half a replica"],
)
def test_the_schemas_catch_mistakes(break_it: Callable[[Document], object]) -> None:
    document = copy.deepcopy(documents("gpu-spot", "RayJob")[0])
    break_it(document["spec"])
    assert list(crd_validator("RayJob").iter_errors(document))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_are_valid_by_kubernetes_schemas(overlay: str) -> None:
    core = [one for one in rendered(overlay) if one["kind"] not in (*RAY_KINDS, "PodMonitor")]
    assert {"Namespace", "ServiceAccount", "NetworkPolicy"} <= {one["kind"] for one in core}
    for document in core:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_valid_by_kubernetes_schemas(overlay: str) -> None:
    for name, pod in pods_of(rendered(overlay)):
        document = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **pod["metadata"]},
            "spec": pod["spec"],
        }
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl to compare with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_both_renderers_agree(overlay: str) -> None:
    def by_name(manifests: list[Document]) -> dict[tuple[str, str], Document]:
        return {(one["kind"], one["metadata"]["name"]): one for one in manifests}

    folder = KUBERAY / "overlays" / overlay
    assert by_name(by_hand(folder)) == by_name(by_kubectl(folder))


# Rules that the schemas don't have: KubeRay's own, in CEL and in its operator


def operator_rules(manifests: list[Document]) -> Iterator[str]:
    for document in manifests:
        if document["kind"] in RAY_KINDS and not re.fullmatch(
            r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document["metadata"]["name"]
        ):
            yield f"{document['metadata']['name']}: not a name that a service can be called by"
    for job in jobs_of(manifests):
        if not (job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0) or "deletionStrategy" in job:
            yield "a RayJob shuts its cluster down after a while, by these fields alone"
        if job["submissionMode"] != "K8sJobMode":
            yield "submitterPodTemplate is for K8sJobMode"
        if "clusterSelector" in job:
            yield "one of rayClusterSpec and clusterSelector"
    for cluster in clusters_of(manifests):
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            if "labels" in group["rayStartParams"]:
                yield "labels belong to the group, the operator refuses them in rayStartParams"
            if "resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"]):
                yield "resources are said twice"
            if group["template"]["spec"]["restartPolicy"] != "Never":
                yield "the autoscaler's second version needs restartPolicy Never everywhere"
        if cluster["enableInTreeAutoscaling"] and any("RAY_enable_autoscaler_v2" in str(group) for group in groups):
            yield "the autoscaler's version is a field, not a variable"
        if any(
            group["minReplicas"] > group["replicas"] or group["replicas"] > group["maxReplicas"] for group in groups[1:]
        ):
            yield "minReplicas <= replicas <= maxReplicas"
        if len({group["groupName"] for group in groups[1:]}) != len(groups) - 1:
            yield "group names are unique"
        if tuple(map(int, cluster["rayVersion"].split(".")[:2])) < (2, 56):
            yield "group priority needs Ray 2.56, token authentication 2.52"


# Policies: each a sentence of what must hold, for every pod of every overlay


def not_root(manifests: list[Document]) -> Iterator[str]:
    for name, pod in pods_of(manifests):
        context = pod["spec"].get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser") or not context.get("fsGroup"):
            yield f"{name}: not said to be another user than root"
        if any(pod["spec"].get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name}: shares the host's namespaces"
    for name, container in containers_of(manifests):
        if container["securityContext"].get("runAsUser") == 0:
            yield f"{name}: root"


def read_only_root(manifests: list[Document]) -> Iterator[str]:
    for name, container in containers_of(manifests):
        if container["securityContext"].get("readOnlyRootFilesystem") is not True:
            yield f"{name}: can write to its image"
    for name, pod in pods_of(manifests):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        (container,) = pod["spec"]["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        wanted = {"/tmp", "/home/prism"} | (set() if name == "submitter" else {"/tmp/ray", "/dev/shm"})
        for path in wanted - {path for path, volume in mounts.items() if "emptyDir" in volume}:
            yield f"{name}: {path} is not an emptyDir, and Ray writes there"
        if any("hostPath" in volume for volume in volumes.values()):
            yield f"{name}: mounts a folder of its host"


def no_capabilities(manifests: list[Document]) -> Iterator[str]:
    for name, container in containers_of(manifests):
        context = container["securityContext"]
        if context.get("capabilities") != {"drop": ["ALL"]} or context.get("privileged"):
            yield f"{name}: keeps capabilities"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: may become more than it is"
    for cluster in clusters_of(manifests):
        if cluster["enableInTreeAutoscaling"]:
            context = cluster["autoscalerOptions"].get("securityContext", {})
            head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContext"]
            if context != head:
                yield "autoscaler: not held as tightly as the head"


def seccomp(manifests: list[Document]) -> Iterator[str]:
    for name, pod in pods_of(manifests):
        if pod["spec"]["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: no seccomp profile"


def tokens_of_service_accounts(manifests: list[Document]) -> Iterator[str]:
    autoscales = any(cluster["enableInTreeAutoscaling"] for cluster in clusters_of(manifests))
    for name, pod in pods_of(manifests):
        if pod["spec"].get("automountServiceAccountToken") is not (name == "head" and autoscales):
            yield f"{name}: a token of the API server is for the head's autoscaler alone"
        account = "prism-ray-head" if name == "head" else "prism-ray-worker"
        if pod["spec"].get("serviceAccountName") != account:
            yield f"{name}: not the service account {account}"
    for account in (one for one in manifests if one["kind"] == "ServiceAccount"):
        if account["automountServiceAccountToken"] is not False:
            yield f"{account['metadata']['name']}: gives tokens to whoever does not refuse them"
    if any(one["kind"] in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding") for one in manifests):
        yield "grants rights of its own"


def limits(manifests: list[Document]) -> Iterator[str]:
    boxes = dict(containers_of(manifests))
    for cluster in clusters_of(manifests):
        if cluster["enableInTreeAutoscaling"]:
            boxes["autoscaler"] = cluster["autoscalerOptions"]
    for name, container in boxes.items():
        resources = container.get("resources", {})
        if resources.get("requests") != resources.get("limits"):
            yield f"{name}: requests are not limits"
        if not {"cpu", "memory", "ephemeral-storage"} <= set(resources.get("limits", {})):
            yield f"{name}: not limited in CPU, memory and disk"


def shared_memory(manifests: list[Document]) -> Iterator[str]:
    for cluster in clusters_of(manifests):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            (shm,) = [one["emptyDir"] for one in group["template"]["spec"]["volumes"] if one["name"] == "shared-mem"]
            if shm.get("medium") != "Memory" or int(group["rayStartParams"]["object-store-memory"]) > quantity(
                shm["sizeLimit"]
            ):
                yield "/dev/shm is not memory, or smaller than the object store"


def token_authentication(manifests: list[Document]) -> Iterator[str]:
    for cluster in clusters_of(manifests):
        if cluster.get("authOptions") != {"mode": "token", "secretName": "prism-ray-token"}:
            yield "no token is asked for"
    for name, container in containers_of(manifests):
        environment = {variable["name"]: variable for variable in container["env"]}
        if environment.get("RAY_AUTH_MODE", {}).get("value") != "token":
            yield f"{name}: RAY_AUTH_MODE is left open"
        reference = environment.get("RAY_AUTH_TOKEN", {}).get("valueFrom", {}).get("secretKeyRef")
        if reference != {"name": "prism-ray-token", "key": "auth_token"}:
            yield f"{name}: the token is not that of the secret"


def secrets_by_reference(manifests: list[Document]) -> Iterator[str]:
    if any(one["kind"] == "Secret" for one in manifests):
        yield "a secret is in the repository"
    for name, container in containers_of(manifests):
        for variable in container["env"]:
            if re.search(r"KEY|SECRET|TOKEN|PASSWORD", variable["name"]) and "value" in variable:
                yield f"{name}: {variable['name']} is written out"
        if name.startswith("submitter"):
            continue
        names = {variable["name"] for variable in container["env"]}
        if not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= names:
            yield f"{name}: cannot reach the object store"
    for cluster in clusters_of(manifests):
        password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
        if "value" in password:
            yield "Redis: the password is written out"


def leaves_gracefully(manifests: list[Document]) -> Iterator[str]:
    for name, pod in pods_of(manifests):
        if name == "submitter":
            continue
        if pod["spec"].get("terminationGracePeriodSeconds") != 120:
            yield f"{name}: not two minutes to leave"
        (container,) = pod["spec"]["containers"]
        drain = [one["value"] for one in container["env"] if one["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        if drain != ["100"]:
            yield f"{name}: not 100 seconds to drain"


def jobs_end(manifests: list[Document]) -> Iterator[str]:
    for job in jobs_of(manifests):
        if not job["backoffLimit"] >= 1:
            yield "a lost head ends the job for good"
        if not job["activeDeadlineSeconds"] <= 86400:
            yield "nothing ends a job that hangs"
    for document in manifests:
        if document["kind"] == "RayCronJob":
            assert document["spec"]["schedule"] == "0 2 * * *"
            if document["spec"]["jobTemplate"]["activeDeadlineSeconds"] >= 86400:
                yield "two nights may meet"


def images_by_digest(manifests: list[Document]) -> Iterator[str]:
    images = {container["image"] for _, container in containers_of(manifests)}
    if len(images) != 1:
        yield f"one cluster, one image: {sorted(images)}"
    # cpu-only's is built where it runs, and never pulled.
    for image in images - {"prism-ray:cpu"}:
        if not IMAGE.fullmatch(image):
            yield f"{image}: not by digest"


def head_computes_nothing(manifests: list[Document]) -> Iterator[str]:
    for cluster in clusters_of(manifests):
        head = cluster["headGroupSpec"]
        if head["rayStartParams"].get("num-cpus") != "0":
            yield "units may land on the head"
        if any("gpu" in name for name in head["template"]["spec"]["containers"][0]["resources"]["limits"]):
            yield "the head holds a GPU"


def denied_by_default(manifests: list[Document]) -> Iterator[str]:
    policies = {one["metadata"]["name"]: one["spec"] for one in manifests if one["kind"] == "NetworkPolicy"}
    deny = policies.get("prism-ray-deny", {})
    if deny != {"podSelector": {"matchLabels": PART_OF}, "policyTypes": ["Ingress", "Egress"]}:
        yield "no policy that denies everything"
    for name, pod in pods_of(manifests):
        if not PART_OF.items() <= pod["metadata"]["labels"].items():
            yield f"{name}: not under that policy"
    for name, policy in policies.items():
        if not PART_OF.items() <= policy["podSelector"].get("matchLabels", {}).items():
            yield f"{name}: about other pods than ours"
        for rule in policy.get("ingress", []):
            if not rule.get("from") or any("ipBlock" in peer for peer in rule["from"]):
                yield f"{name}: lets in what is not a pod"
        for rule in policy.get("egress", []):
            anywhere = [
                peer["ipBlock"] for peer in rule.get("to", []) if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
            ]
            if not rule.get("to") or any("169.254.0.0/16" not in block.get("except", []) for block in anywhere):
                yield f"{name}: reaches everything, credentials of the node too"
            if any("ipBlock" in peer for peer in rule.get("to", [])) and not rule.get("ports"):
                yield f"{name}: every port of addresses outside"
    wanted = {
        "prism-ray-dns",
        "prism-ray-nodes",
        "prism-ray-job-server",
        "prism-ray-api-server",
        "prism-ray-object-store",
    }
    for name in wanted - set(policies):
        yield f"{name}: missing, and Ray needs it"


def restricted_namespace(manifests: list[Document]) -> Iterator[str]:
    (namespace,) = [one for one in manifests if one["kind"] == "Namespace"]
    if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "Kubernetes does not refuse looser pods"
    for document in manifests:
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != "prism-ray":
            yield f"{document['kind']} {document['metadata']['name']}: outside the namespace"


def spot_groups(manifests: list[Document]) -> Iterator[str]:
    for cluster in clusters_of(manifests):
        for group in cluster["workerGroupSpecs"]:
            if group.get("labels", {}).get("ray.io/market-type") not in ("spot", "on-demand"):
                yield f"{group['groupName']}: not said whether it may be taken away"
        spot = [group for group in cluster["workerGroupSpecs"] if group["labels"]["ray.io/market-type"] == "spot"]
        for group in spot:
            (twin,) = [
                one
                for one in cluster["workerGroupSpecs"]
                if one is not group
                and one["labels"].get("ray.io/accelerator-type") == group["labels"]["ray.io/accelerator-type"]
            ]
            shapes = [one["template"]["spec"]["containers"][0]["resources"] for one in (group, twin)]
            if not group["priority"] > twin["priority"] or shapes[0] != shapes[1]:
                yield f"{group['groupName']}: does not come first; priority only decides between equal shapes"
            if group["minReplicas"] != 0:
                yield f"{group['groupName']}: does not go away"
            own = set(map(str, group["template"]["spec"]["tolerations"])) - set(
                map(str, twin["template"]["spec"]["tolerations"])
            )
            if not own or set(group["template"]["spec"]["nodeSelector"]) <= set(
                twin["template"]["spec"]["nodeSelector"]
            ):
                yield f"{group['groupName']}: not bound to spot nodes, or not let onto them"


RULES: dict[str, Callable[[list[Document]], Iterator[str]]] = {
    "KubeRay's own rules": operator_rules,
    "not root": not_root,
    "root file system read-only": read_only_root,
    "no capabilities": no_capabilities,
    "seccomp profile": seccomp,
    "service account tokens": tokens_of_service_accounts,
    "requests are limits": limits,
    "shared memory": shared_memory,
    "token authentication": token_authentication,
    "secrets by reference": secrets_by_reference,
    "graceful shutdown": leaves_gracefully,
    "jobs end": jobs_end,
    "images by digest": images_by_digest,
    "head computes nothing": head_computes_nothing,
    "network denied by default": denied_by_default,
    "restricted namespace": restricted_namespace,
    "spot groups": spot_groups,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_keeps_every_rule(overlay: str, rule: str) -> None:
    assert list(RULES[rule](rendered(overlay))) == []


def cluster(manifests: list[Document]) -> Document:
    return next(clusters_of(manifests))


def head(manifests: list[Document]) -> Document:
    return cluster(manifests)["headGroupSpec"]["template"]["spec"]


def worker(manifests: list[Document]) -> Document:
    return cluster(manifests)["workerGroupSpecs"][2]["template"]["spec"]


def job(manifests: list[Document]) -> Document:
    return next(jobs_of(manifests))


def policy(manifests: list[Document], name: str) -> Document:
    return next(one["spec"] for one in manifests if one["metadata"]["name"] == name)


# What each rule is there to catch: one change to manifests that keep it.
VIOLATIONS: dict[str, list[Callable[[list[Document]], object]]] = {
    "KubeRay's own rules": [
        lambda m: worker(m).update(restartPolicy="Always"),
        lambda m: cluster(m)["workerGroupSpecs"][0]["rayStartParams"].update(labels="a=b"),
        lambda m: cluster(m)["headGroupSpec"].update(resources={"CPU": "0"}),
        lambda m: job(m).update(ttlSecondsAfterFinished=0),
    ],
    "not root": [
        lambda m: worker(m)["securityContext"].pop("runAsNonRoot"),
        lambda m: head(m)["containers"][0]["securityContext"].update(runAsUser=0),
        lambda m: worker(m).update(hostNetwork=True),
    ],
    "root file system read-only": [
        lambda m: worker(m)["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
        lambda m: head(m)["containers"][0]["volumeMounts"].pop(0),
        lambda m: worker(m)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    ],
    "no capabilities": [
        lambda m: worker(m)["containers"][0]["securityContext"].pop("capabilities"),
        lambda m: job(m)["submitterPodTemplate"]["spec"]["containers"][0]["securityContext"].pop(
            "allowPrivilegeEscalation"
        ),
        lambda m: cluster(m)["autoscalerOptions"].pop("securityContext"),
    ],
    "seccomp profile": [lambda m: head(m)["securityContext"].pop("seccompProfile")],
    "service account tokens": [
        lambda m: worker(m).update(automountServiceAccountToken=True),
        lambda m: worker(m).pop("automountServiceAccountToken"),
        lambda m: worker(m).update(serviceAccountName="prism-ray-head"),
    ],
    "requests are limits": [
        lambda m: worker(m)["containers"][0]["resources"]["requests"].update(cpu="1"),
        lambda m: cluster(m)["autoscalerOptions"].pop("resources"),
        lambda m: [head(m)["containers"][0]["resources"][key].pop("memory") for key in ("requests", "limits")],
    ],
    "shared memory": [
        lambda m: cluster(m)["headGroupSpec"]["rayStartParams"].update({"object-store-memory": "4294967296"})
    ],
    "token authentication": [
        lambda m: cluster(m).pop("authOptions"),
        lambda m: job(m)["submitterPodTemplate"]["spec"]["containers"][0]["env"].pop(0),
        lambda m: worker(m)["containers"][0]["env"][1].update(valueFrom={}),
    ],
    "secrets by reference": [
        lambda m: worker(m)["containers"][0]["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        lambda m: m.append({"kind": "Secret", "metadata": {"name": "x"}}),
    ],
    "graceful shutdown": [
        lambda m: worker(m).pop("terminationGracePeriodSeconds"),
        lambda m: worker(m)["containers"][0]["env"].pop(2),
    ],
    "jobs end": [lambda m: job(m).update(backoffLimit=0), lambda m: job(m).update(activeDeadlineSeconds=864000)],
    "images by digest": [
        lambda m: worker(m)["containers"][0].update(image="registry.example.com/prism-ray-cuda:latest"),
    ],
    "head computes nothing": [lambda m: cluster(m)["headGroupSpec"]["rayStartParams"].pop("num-cpus")],
    "network denied by default": [
        lambda m: policy(m, "prism-ray-deny").update(policyTypes=["Ingress"]),
        lambda m: policy(m, "prism-ray-object-store")["egress"][0]["to"][0]["ipBlock"].pop("except"),
        lambda m: policy(m, "prism-ray-job-server")["ingress"][0].pop("from"),
        lambda m: job(m)["submitterPodTemplate"]["metadata"]["labels"].pop("app.kubernetes.io/part-of"),
    ],
    "restricted namespace": [lambda m: m[-1]["metadata"].update(namespace="default")],
    "spot groups": [
        lambda m: cluster(m)["workerGroupSpecs"][2].update(priority=0),
        lambda m: worker(m)["containers"][0]["resources"]["limits"].update(memory="16Gi"),
        lambda m: worker(m)["nodeSelector"].pop("cloud.google.com/gke-spot"),
    ],
}


@pytest.mark.parametrize(("rule", "index"), [(rule, index) for rule in RULES for index in range(len(VIOLATIONS[rule]))])
def test_every_rule_catches_what_it_is_there_for(rule: str, index: int) -> None:
    manifests = copy.deepcopy(rendered("gpu-spot"))
    VIOLATIONS[rule][index](manifests)
    assert list(RULES[rule](manifests))


def test_every_kind_and_every_group_of_workers_is_in_some_overlay() -> None:
    kinds = {one["kind"] for overlay in OVERLAYS for one in documents(overlay, *RAY_KINDS)}
    assert kinds == set(RAY_KINDS)
    groups = {group["groupName"] for group in cluster(rendered("gpu-spot"))["workerGroupSpecs"]}
    assert groups == {"cpu", "gpu-on-demand", "gpu-spot"}


def test_a_queued_job_waits_without_an_autoscaler() -> None:
    (document,) = documents("kueue", "RayJob")
    assert document["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "prism-ray"}
    assert document["spec"]["suspend"] is True
    spec = document["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in spec
    assert all(group["minReplicas"] == group["replicas"] == group["maxReplicas"] for group in spec["workerGroupSpecs"])


def test_redis_is_offered_to_the_cluster_that_stays(tmp_path: Path) -> None:
    copied = shutil.copytree(KUBERAY, tmp_path / "kuberay")
    overlay = copied / "overlays/long-lived"
    text = (overlay / "kustomization.yaml").read_text()
    (overlay / "kustomization.yaml").write_text(
        text.replace("# - ../../components/gcs-redis", "- ../../components/gcs-redis")
    )
    manifests = by_hand(overlay)
    assert cluster(manifests)["gcsFaultToleranceOptions"]["backend"] == "redis"
    assert all(list(rule(manifests)) == [] for rule in RULES.values())
    if CRDS:
        (document,) = [one for one in manifests if one["kind"] == "RayCluster"]
        assert list(crd_validator("RayCluster").iter_errors(document)) == []


# In step with the code


def quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"(\d+)([KMG]i)?", text).groups()  # type: ignore[union-attr]
    return int(number) * {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_version_of_ray_is_that_of_the_image_and_of_the_project(overlay: str) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "cluster/requirements.txt").read_text().split() if "==" in line)
    for spec in clusters_of(rendered(overlay)):
        assert spec["rayVersion"] == pinned["ray"]


@pytest.mark.parametrize("overlay", [one for one in OVERLAYS if one != "long-lived"])
def test_entry_points_name_files_recipes_and_keys_that_exist(overlay: str) -> None:
    from prism_ray import cli

    for spec in jobs_of(rendered(overlay)):
        filled_in = re.sub(r"`date -u \+%F`", "2026-01-31", spec["entrypoint"])
        python, script, *settings = shlex.split(filled_in)
        assert python == "python"
        assert (ROOT / script).is_file(), f"{script} does not exist"
        keys = dict(setting.split("=", 1) for setting in settings)
        if overlay != "cpu-only":
            assert keys["storage"].startswith("s3://"), "pods share no folder"
        configs = [row.config for row in cli.compose_suite(settings)[1]] if "suite" in keys else [cli.compose(settings)]
        for config in configs:
            groups = spec["rayClusterSpec"]["workerGroupSpecs"]
            needs_gpus = config.compute.gpus_per_actor > 0
            assert needs_gpus == any("gpu" in group["groupName"] for group in groups), "GPUs asked for and not used"
            # Without workers to begin with, a run that does not ask for any is refused.
            is_there = all(group["replicas"] > 0 for group in groups if needs_gpus is ("gpu" in group["groupName"]))
            assert is_there or (config.compute.autoscaling and config.compute.actors)


def test_ray_reads_the_groups_as_they_are_meant() -> None:
    """What Ray's own autoscaler makes of the RayCluster: sizes, labels, priorities; and that the options exist."""
    program = """
import json, sys
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive
from ray.scripts.scripts import start
from ray.util import accelerators
from ray._private import ray_constants
options = sorted({name.lstrip("-") for option in start.params for name in option.opts})
spec = json.load(sys.stdin)
config = derive({"metadata": {"name": "prism-ray", "namespace": "prism-ray"}, "spec": spec})
types = [value for name, value in vars(accelerators).items() if isinstance(value, str)]
print(json.dumps({"nodes": config["available_node_types"], "options": options, "types": types,
                  "drain": ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S}))
"""
    spec = cluster(rendered("gpu-spot"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "100"},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    nodes = answer["nodes"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert nodes["gpu-spot"]["resources"] == nodes["gpu-on-demand"]["resources"]
    assert nodes["gpu-spot"]["resources"]["GPU"] == 1
    assert nodes["gpu-spot"]["priority"] > nodes["gpu-on-demand"]["priority"]
    assert nodes["gpu-spot"]["labels"] == {"ray.io/market-type": "spot", "ray.io/accelerator-type": "L4"}
    assert (nodes["gpu-spot"]["min_workers"], nodes["gpu-spot"]["max_workers"]) == (0, 16)
    assert "L4" in answer["types"]
    assert answer["drain"] == 100.0
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert {name for group in groups for name in group["rayStartParams"]} <= set(answer["options"])

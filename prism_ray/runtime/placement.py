"""Which worker goes on which node: arithmetic over nodes as Ray describes them. Imports no Ray.

A worker fits a node that has every label it asks for and enough of every resource. What is counted here node by node
is what Ray will find room for: a worker of two GPUs does not fit two nodes of one GPU each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_ray.config import ComputeConfig
from prism_ray.errors import InputError

ACCELERATOR = "ray.io/accelerator-type"
"""Label that Ray itself puts on nodes with GPUs."""
SLACK = 1e-9
"""1 / 0.1 must count as 10."""


@dataclass(frozen=True)
class Node:
    """What a node offers."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """What one worker reserves, and the labels of the nodes that it may be on."""

    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)

    def amounts(self) -> dict[str, float]:
        wanted = {"GPU": self.gpus, **self.resources, "CPU": self.cpus}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    def has_labels(self, node: Node) -> bool:
        return all(node.labels.get(key) == value for key, value in self.labels.items())


@dataclass(frozen=True)
class Pool:
    """Actors that are alike; `most` is how many there may be, None: as many as fit."""

    name: str
    key: str  # the setting that says how many
    most: int | None
    need: Need


def pools_of(compute: ComputeConfig) -> list[Pool]:
    """The pools of a run's actors, in the order of their settings."""
    if not compute.pools:
        need = Need(compute.cpus_per_actor, compute.gpus_per_actor)
        return [Pool("default", "compute.actors", compute.actors, need)]
    pools = []
    for name, pool in compute.pools.items():
        cpus = compute.cpus_per_actor if pool.cpus is None else pool.cpus
        gpus = compute.gpus_per_actor if pool.gpus is None else pool.gpus
        need = Need(cpus, gpus, pool.labels, pool.resources)
        pools.append(Pool(name, f"compute.pools.{name}.actors", pool.actors, need))
    return pools


def train_need(compute: ComputeConfig) -> Need:
    """What a training worker reserves."""
    return Need(1.0, compute.gpus_per_train_worker, compute.train_labels, compute.train_resources)


def room(need: Need, nodes: Sequence[Node]) -> int:
    """How many workers the nodes hold, if nothing else runs there."""
    return sum(_room_on(need.amounts(), node.resources) for node in nodes if need.has_labels(node))


def _room_on(amounts: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0.0) / amount + SLACK) for name, amount in amounts.items())


def sizes(pools: Sequence[Pool], nodes: Sequence[Node], *, todo: int, grows: bool) -> dict[str, int]:
    """How many actors of each pool to start: as set, or as many as the nodes hold, never more than there is work.

    Where no number is set, a pool without GPUs or other resources has at most one actor per CPU, however small its
    share. Pools share what both could use in their order, and take turns where there is less work than room.

    Args:
        todo: pieces of work.
        grows: the cluster is to grow until it holds what is set.
    """
    free = [dict(node.resources) for node in nodes]
    limits = {}
    for pool in pools:
        need = pool.need
        whole = pool.most is None and need.gpus == 0 and not need.resources
        amounts = {**need.amounts(), **({"CPU": max(need.cpus, 1.0)} if whole else {})}
        count = 0
        for node, left in zip(nodes, free, strict=True):
            most = None if pool.most is None else pool.most - count
            here = _room_on(amounts, left) if need.has_labels(node) else 0
            here = here if most is None else min(here, most)
            for name, amount in amounts.items():
                left[name] = left.get(name, 0.0) - here * amount
            count += here
        limits[pool.name] = pool.most if grows and pool.most is not None else count
    if not any(limits.values()):
        limits[pools[0].name] = 1  # one whole-CPU actor on half a CPU: it was checked that it fits
    chosen = dict.fromkeys(limits, 0)
    while sum(chosen.values()) < min(todo, sum(limits.values())):
        for name, limit in limits.items():
            if chosen[name] < limit and sum(chosen.values()) < todo:
                chosen[name] += 1
    return {name: count for name, count in chosen.items() if count}


def check_room(key: str, count: int, need: Need, nodes: Sequence[Node], *, where: str, may_grow: bool = False) -> None:
    """Refuse workers that would wait for ever.

    Args:
        where: what the nodes are called in the message.
        may_grow: the nodes are those of a cluster that was joined.

    Raises:
        InputError: names the setting, what is missing and the way out.
    """
    if room(need, nodes) >= count:
        return
    grow = ", or set compute.autoscaling=true if the cluster is to grow" if may_grow else ""
    usable = [node for node in nodes if need.has_labels(node)]
    if not usable:
        wanted = ", ".join(f"{name}={value}" for name, value in need.labels.items())
        there = sorted({f"{name}={node.labels[name]}" for node in nodes for name in need.labels if name in node.labels})
        raise InputError(
            f"{key}={count}: no node of {where} has the labels {wanted or 'asked for'} (there are: "
            f"{', '.join(there) or 'none'}); correct them{grow}"
        )
    for name, amount in need.amounts().items():
        present = sum(node.resources.get(name, 0.0) for node in usable)
        if count * amount <= present + SLACK:
            continue
        unit = f"{name}s" if name in ("CPU", "GPU") else name
        short = f"{key}={count} with {amount:g} {unit} each: needs {count * amount:g} {unit}, {where} has {present:g}"
        if name == "CPU":
            raise InputError(f"{short} and would wait for ever; lower the count or compute.cpus_per_actor{grow}")
        raise InputError(
            f"{short}; lower the count or the {unit} each{grow or ', or join a cluster (compute.address)'}"
        )
    amounts = ", ".join(f"{amount:g} {name}" for name, amount in need.amounts().items())
    raise InputError(
        f"{key}={count} with {amounts} each: node by node {where} has room for {room(need, nodes)} and the rest would "
        f"wait for ever; lower the count or what each reserves{grow}"
    )


def device_kinds(pools: Sequence[Pool], nodes: Sequence[Node]) -> dict[str, set[str]]:
    """By pool, what its actors may compute on: "CPU", or types of GPUs as far as labels tell."""
    kinds = {}
    for pool in pools:
        if ACCELERATOR in pool.need.labels:
            kinds[pool.name] = {pool.need.labels[ACCELERATOR]}
        elif pool.need.gpus == 0:
            kinds[pool.name] = {"CPU"}
        else:
            usable = [node for node in nodes if pool.need.has_labels(node) and node.resources.get("GPU", 0) > 0]
            kinds[pool.name] = {node.labels[ACCELERATOR] for node in usable if ACCELERATOR in node.labels}
    return kinds


def check_one_kind(compute: ComputeConfig, nodes: Sequence[Node]) -> None:
    """Refuse pools that would mix devices without being asked to: bytes repeat within one kind only.

    Raises:
        InputError: names the kinds.
    """
    if compute.mixed_devices:
        return
    found = device_kinds(pools_of(compute), nodes)
    kinds = sorted(set().union(*found.values()))
    if len(kinds) > 1:
        raise InputError(
            f"compute.pools: would make units on {' and '.join(kinds)}, between which the same unit differs in bytes; "
            f"keep to one by the label {ACCELERATOR}, or set compute.mixed_devices=true"
        )


def pool_here(pools: Sequence[Pool], node: Node, assigned: Mapping[str, float]) -> Pool:
    """The pool that an actor belongs to, by the labels of its node and the resources that it was given."""
    for pool in pools:
        amounts = pool.need.amounts()
        if pool.need.has_labels(node) and all(abs(assigned.get(k, 0.0) - v) < 1e-3 for k, v in amounts.items()):
            return pool
    raise AssertionError(f"an actor with {dict(assigned)} on a node labelled {dict(node.labels)} belongs to no pool")


def place(pool: Pool, node: Node) -> dict[str, Any]:
    """Where a unit is made, for its receipt, which names the node itself."""
    return {
        "pool": pool.name,
        "gpus": pool.need.gpus,
        "labels": {key: value for key, value in sorted(node.labels.items()) if key != "ray.io/node-id"},
    }

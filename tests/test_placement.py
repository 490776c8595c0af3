"""Which worker goes on which node: arithmetic over nodes, and what is refused before anything starts."""

import pytest

from prism_ray.config import ComputeConfig, PoolConfig
from prism_ray.errors import InputError
from prism_ray.runtime.placement import Need, Node, check_one_kind, pool_here, pools_of, room, sizes
from prism_ray.runtime.session import check_fits, preflight

TYPE, MARKET = "ray.io/accelerator-type", "ray.io/market-type"
A100 = Node({"CPU": 8, "GPU": 2}, {TYPE: "A100", MARKET: "on-demand"})
A100_SPOT = Node({"CPU": 8, "GPU": 2}, {TYPE: "A100", MARKET: "spot"})
T4 = Node({"CPU": 4, "GPU": 1}, {TYPE: "T4", MARKET: "spot"})
HEAD = Node({"CPU": 0})


def counts(compute: ComputeConfig, nodes: list[Node], todo: int = 100) -> dict[str, int]:
    return sizes(pools_of(compute), nodes, todo=todo, grows=compute.autoscaling)


@pytest.mark.parametrize(
    ("node", "cpus_each", "gpus_each", "todo", "expected"),
    [
        # Without GPUs at most one actor per CPU, however small its share.
        (Node({"CPU": 2}), 0.5, 0.0, 10, 2),
        (Node({"CPU": 2}), 0.5, 0.0, 1, 1),
        (Node({"CPU": 1}), 0.5, 0.0, 10, 1),
        (Node({"CPU": 8}), 2.0, 0.0, 10, 4),
        # With GPUs what both hold.
        (Node({"CPU": 4, "GPU": 1}), 1.0, 0.1, 20, 4),
        (Node({"CPU": 4, "GPU": 8}), 1.0, 1.0, 20, 4),
        (Node({"CPU": 1, "GPU": 8}), 0.1, 1.0, 20, 8),
        (Node({"CPU": 16, "GPU": 2}), 0.1, 0.25, 20, 8),
    ],
)
def test_as_many_actors_start_as_the_node_holds_and_the_work_needs(
    node: Node, cpus_each: float, gpus_each: float, todo: int, expected: int
) -> None:
    compute = ComputeConfig(cpus_per_actor=cpus_each, gpus_per_actor=gpus_each)
    assert counts(compute, [node], todo) == {"default": expected}


def test_a_worker_of_two_gpus_does_not_fit_two_nodes_of_one() -> None:
    assert room(Need(cpus=0.1, gpus=2), [T4, T4]) == 0
    assert room(Need(cpus=0.1, gpus=2), [T4, A100]) == 1
    with pytest.raises(InputError, match=r"compute\.actors=2 with 2 GPU, .* each: node by node here has room for 1"):
        check_fits(ComputeConfig(actors=2, gpus_per_actor=2), [T4, T4, A100, HEAD], where="here")


def test_pools_take_the_nodes_that_have_their_labels() -> None:
    pools = {
        "steady": PoolConfig(gpus=1, labels={TYPE: "A100", MARKET: "on-demand"}),
        "spot": PoolConfig(gpus=0.5, labels={TYPE: "A100", MARKET: "spot"}),
        "small": PoolConfig(actors=1, gpus=0.25, labels={TYPE: "T4"}),
    }
    compute = ComputeConfig(cpus_per_actor=0.1, pools=pools, mixed_devices=True)
    nodes = [HEAD, A100, A100_SPOT, T4]
    assert counts(compute, nodes) == {"steady": 2, "spot": 4, "small": 1}
    assert counts(compute, nodes, todo=4) == {"steady": 2, "spot": 1, "small": 1}, "pools take turns"
    check_fits(compute, nodes, where="here")


def test_pools_that_could_share_a_node_do_not_count_it_twice() -> None:
    pools = {"first": PoolConfig(gpus=1), "second": PoolConfig(gpus=1)}
    assert counts(ComputeConfig(cpus_per_actor=0.1, pools=pools), [A100, T4]) == {"first": 3}


def test_other_resources_place_a_pool_as_labels_do() -> None:
    nodes = [Node({"CPU": 2, "a100": 2}), Node({"CPU": 2, "t4": 1})]
    pools = {"a": PoolConfig(resources={"a100": 1}), "t": PoolConfig(resources={"t4": 0.5})}
    assert counts(ComputeConfig(pools=pools), nodes) == {"a": 2, "t": 2}
    with pytest.raises(InputError, match=r"compute\.pools\.a\.actors=3 with 1 a100 each: needs 3 a100, here has 2"):
        check_fits(ComputeConfig(pools={"a": PoolConfig(actors=3, resources={"a100": 1})}), nodes, where="here")


def test_a_label_that_no_node_has_is_refused_with_those_there_are() -> None:
    compute = ComputeConfig(pools={"h": PoolConfig(gpus=1, labels={TYPE: "H100"})})
    with pytest.raises(InputError, match=rf"no node of here has the labels {TYPE}=H100 \(there are: {TYPE}=A100"):
        check_fits(compute, [HEAD, A100, T4], where="here")


def test_training_workers_have_nodes_of_their_own_kind() -> None:
    check_fits(ComputeConfig(train_workers=4, train_labels={TYPE: "T4"}), [HEAD, A100, T4], where="here")
    with pytest.raises(InputError, match=r"compute\.train_workers=5 with 1 CPUs each: needs 5 CPUs, here has 4"):
        check_fits(ComputeConfig(train_workers=5, train_labels={TYPE: "T4"}), [HEAD, A100, T4], where="here")


def test_several_kinds_of_devices_are_refused_unless_they_are_wanted() -> None:
    anywhere = ComputeConfig(gpus_per_actor=1)
    with pytest.raises(InputError, match="on A100 and T4, between which"):
        check_one_kind(anywhere, [A100, T4])
    check_one_kind(anywhere, [A100, A100_SPOT])
    check_one_kind(ComputeConfig(gpus_per_actor=1, mixed_devices=True), [A100, T4])
    both = {"gpu": PoolConfig(gpus=1, labels={TYPE: "T4"}), "cpu": PoolConfig(gpus=0)}
    with pytest.raises(InputError, match=r"on CPU and T4.*compute\.mixed_devices=true"):
        check_one_kind(ComputeConfig(pools=both), [T4])


def test_a_cluster_that_can_grow_is_asked_for_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    here = "the cluster at 10.0.0.1:6379"
    fixed = ComputeConfig(actors=6, gpus_per_actor=1, cpus_per_actor=0.1, gpus_per_train_worker=1)
    with pytest.raises(InputError, match=r"needs 6 GPUs, the cluster at .* has 0; .*compute\.autoscaling=true"):
        check_fits(fixed, [HEAD], where=here)
    growing = ComputeConfig(actors=6, gpus_per_actor=1, gpus_per_train_worker=1, autoscaling=True)
    check_fits(growing, [HEAD], where=here)
    assert counts(growing, [HEAD]) == {"default": 6}
    assert counts(growing, [HEAD], todo=2) == {"default": 2}


def test_a_cluster_that_can_grow_needs_bounds_and_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="a local cluster does not grow"):
        preflight(ComputeConfig(actors=2, autoscaling=True))
    pools = {"spot": PoolConfig(resources={"a100": 1})}
    with pytest.raises(InputError, match=r"compute\.pools\.spot\.actors must say how many"):
        preflight(ComputeConfig(address="127.0.0.1:1", autoscaling=True, pools=pools))


@pytest.mark.parametrize(
    ("compute", "key"),
    [
        (ComputeConfig(gpus_per_actor=1.5), r"compute\.gpus_per_actor=1\.5"),
        (ComputeConfig(pools={"a": PoolConfig(gpus=2.5)}), r"compute\.pools\.a\.gpus=2\.5"),
    ],
)
def test_a_share_of_two_gpus_is_refused(compute: ComputeConfig, key: str) -> None:
    with pytest.raises(InputError, match=rf"{key}: above 1 only whole GPUs"):
        preflight(compute)


def test_an_actor_knows_its_pool_by_its_node_and_what_it_was_given() -> None:
    pools = pools_of(
        ComputeConfig(
            pools={
                "steady": PoolConfig(gpus=1, labels={MARKET: "on-demand"}),
                "half": PoolConfig(gpus=0.5),
                "whole": PoolConfig(gpus=1),
            }
        )
    )
    assert pool_here(pools, A100, {"CPU": 0.5, "GPU": 1.0}).name == "steady"
    assert pool_here(pools, T4, {"CPU": 0.5, "GPU": 1.0}).name == "whole"
    assert pool_here(pools, T4, {"CPU": 0.5, "GPU": 0.5}).name == "half"

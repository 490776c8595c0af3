"""Seeds: named, stable, and apart from each other."""

from prism_ray.seeds import seed_for


def test_a_seed_is_the_same_on_every_machine_and_in_every_process() -> None:
    assert seed_for(0, "image", 3, 7) == 5_359_471_919_758_471_755


def test_seeds_fit_a_signed_64_bit_column() -> None:
    seeds = [seed_for(run_seed, "image", n) for run_seed in (-5, 0, 2**70) for n in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62, "the upper half is used too"


def test_no_two_images_of_many_share_a_seed() -> None:
    seeds = {seed_for(0, "image", class_id, k) for class_id in range(200) for k in range(100)}
    assert len(seeds) == 200 * 100


def test_every_part_of_the_name_of_a_decision_counts() -> None:
    names: list[tuple[int, str, tuple[int | str, ...]]] = [
        (0, "image", (1, 2)),
        (1, "image", (1, 2)),
        (0, "batch", (1, 2)),
        (0, "image", (2, 1)),
        (0, "image", (12,)),
        (0, "image", ("1", 2)),
        (0, "image1", (2,)),
        (0, "image", (1, 2, 0)),
        (0, "image", ("1, 2",)),
    ]
    assert len({seed_for(run_seed, purpose, *keys) for run_seed, purpose, keys in names}) == len(names)

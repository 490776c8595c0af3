"""Sampling from a generator, end to end on the smoke recipe: a pipeline is trained, prompted, calibrated, sampled."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import Command, products, spec_of_copy
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from pipelines import save_twin

from prism_ray import cli, drain
from prism_ray.artifacts import MARKER
from prism_ray.config import Row
from prism_ray.data.imagenet_names import class_names
from prism_ray.errors import Drained, PrismError
from prism_ray.generation import generator_of
from prism_ray.models.classifier import build_classifier, load_classifier, save_classifier
from prism_ray.options import Keep
from prism_ray.plan import Unit
from prism_ray.prompts.names import class_phrases
from prism_ray.prompts.table import from_jsonl
from prism_ray.runs import locate
from prism_ray.seeds import seed_for
from prism_ray.stages.generator import make_generator
from prism_ray.stages.guided import candidates_of
from prism_ray.stages.synthesize import Synthesizer
from prism_ray.work import PROMPTS_FILE, GeneratorItem, RunSpec

SMOKE = ["recipe=digits_dfkd_smoke", "compute=inline"]
KINDS = ("generator", "prompts", "calibration")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with one finished run. Not to be written to."""
    storage = tmp_path_factory.mktemp("sampled") / "outputs"
    assert cli.main(["run", *SMOKE, f"storage={storage}"]) == 0
    return storage


@pytest.fixture
def models(finished: Path, tmp_path: Path) -> Path:
    """Storage with its data, teachers, generator and prompts alone."""
    storage = tmp_path / "outputs"
    for kind in ("datasets", "teachers", "generators", "prompts"):
        shutil.copytree(finished / "artifacts" / kind, storage / "artifacts" / kind)
    return storage


def run_dir(storage: Path) -> Path:
    (folder,) = (storage / "runs").iterdir()
    return folder


def rows_of(storage: Path) -> list[dict[str, Any]]:
    files = sorted((run_dir(storage) / "images").glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def only(storage: Path, kind: str) -> Path:
    (folder,) = [path for path in (storage / "artifacts" / kind).iterdir() if not path.name.startswith(".")]
    return folder


def sampling_spec(finished: Path, copy: Path) -> RunSpec:
    """The finished run in a copy of its storage, as its workers see it."""
    spec = spec_of_copy(finished, copy, SMOKE)
    folders = {f"{kind}_dir": str(only(copy, f"{kind}s" if kind != "prompts" else kind)) for kind in KINDS}
    return replace(spec, **folders)


def test_every_image_tells_its_prompt_its_seed_and_its_energy(finished: Path) -> None:
    rows = rows_of(finished)
    assert len(rows) == 30
    assert all(row["energy_teachers"] == ["vgg"] and np.isfinite(row["energy"]) for row in rows)
    assert {row["prompt"] for row in rows if row["label"] == 3} == {"a digit three"}
    assert len({row["seed"] for row in rows}) == 30
    assert all(row["source_image_id"] is None and row["iterations"] == 4 for row in rows)


def test_energies_are_of_the_stored_pixels(finished: Path) -> None:
    import io

    from PIL import Image

    teacher = load_classifier(only(finished, "teachers")).eval()
    rows = rows_of(finished)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])[:, None]
    with torch.no_grad():
        logits = teacher(torch.from_numpy(pixels).float() / 255)
    energies = -logits[torch.arange(len(rows)), [row["label"] for row in rows]]  # joint energy, as eda has it
    torch.testing.assert_close(
        energies.double(), torch.tensor([row["energy"] for row in rows]).double(), atol=1e-4, rtol=0
    )


def test_the_generator_is_an_ordinary_pipeline_folder(finished: Path) -> None:
    folder = only(finished, "generators")
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a digit three", num_inference_steps=2, output_type="np", guidance_scale=2.0).images
    assert images.shape == (1, 16, 16, 1)
    assert (folder / "tiny_decoder" / "config.json").is_file()
    facts = json.loads((folder / MARKER).read_text())
    assert facts["phrases"][3] == "digit three"


def test_the_same_command_makes_the_same_bytes_elsewhere(finished: Path, tmp_path: Path, prism: Command) -> None:
    """Also the generator, trained again."""
    assert prism("run", *SMOKE).code == 0
    other = tmp_path / "outputs"
    assert products(run_dir(other)) == products(run_dir(finished))
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        digests = {hashlib.sha256((only(s, "generators") / name).read_bytes()).hexdigest() for s in (finished, other)}
        assert len(digests) == 1


def test_a_finished_run_again_does_nothing(finished: Path, tmp_path: Path, prism: Command) -> None:
    shutil.copytree(finished, tmp_path / "outputs")
    before = products(run_dir(finished))
    assert prism("run", *SMOKE).code == 0
    assert products(run_dir(tmp_path / "outputs")) == before


def test_a_killed_generator_continues_from_its_last_checkpoint(
    finished: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed inside each of its three trainings, it ends with the same bytes."""
    config = cli.compose([*SMOKE, f"storage={models}", "generator.world.checkpoint_every=2"])
    run = locate(Row("row", config))
    from prism_ray.data.prepared import find_prepared

    dataset = find_prepared(config.dataset, run.artifacts_dir)
    assert dataset is not None
    folder, item = generator_of(config, dataset, run.artifacts_dir)
    assert isinstance(item, GeneratorItem)
    assert folder == str(only(models, "generators"))
    expected = (Path(folder) / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(folder)

    import prism_ray.stages.training as training

    save, saved = training.save_checkpoint, []

    def killed_after_saving(path: Path, **state: Any) -> None:
        save(path, **state)
        saved.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", killed_after_saving)
    for _ in range(20):
        try:
            make_generator(item)
            break
        except KeyboardInterrupt:
            continue
    assert len(saved) >= 5
    assert (Path(folder) / "unet/diffusion_pytorch_model.safetensors").read_bytes() == expected
    assert not list(Path(folder).parent.glob(".*checkpoint*"))


def test_prompts_are_a_frozen_table(finished: Path) -> None:
    rows = from_jsonl((only(finished, "prompts") / PROMPTS_FILE).read_bytes())
    assert [row.prompt for row in rows][:2] == ["a digit zero", "a digit one"]


def test_a_changed_prompt_table_is_refused_by_its_run(finished: Path, tmp_path: Path, prism: Command) -> None:
    shutil.copytree(finished, tmp_path / "outputs")
    path = only(tmp_path / "outputs", "prompts") / PROMPTS_FILE
    path.write_bytes(path.read_bytes().replace(b"digit zero", b"digit nought"))
    done = prism("run", *SMOKE)
    assert done.code == 2
    assert "sha256 of prompts" in done.err


def test_guidance_stops_at_a_margin_measured_without_real_images(finished: Path) -> None:
    facts = json.loads((only(finished, "calibrations") / MARKER).read_text())
    assert set(facts["teachers"]) == {"vgg"}
    entry = facts["teachers"]["vgg"]
    assert entry["spread"] > 0
    assert 0 <= entry["agreement"] <= 1


def test_neither_micro_batches_nor_their_order_change_a_unit(finished: Path, tmp_path: Path) -> None:
    """Units made in the other order, by another process's Synthesizer, have the published bytes."""
    spec = sampling_spec(finished, tmp_path / "copy")
    made = Synthesizer(spec)
    for unit in reversed(spec.units()):
        table, _ = made.compute(unit)
        published = pq.read_table(run_dir(finished) / "images" / f"{unit.name}.parquet")
        assert table.column("image").to_pylist() == published.column("image").to_pylist()


def test_another_micro_batch_changes_a_unit_by_rounding_alone(finished: Path, tmp_path: Path) -> None:
    spec = sampling_spec(finished, tmp_path / "copy")
    sampling = replace(spec.config.method.sampling, micro_batch=5)
    other = replace(spec, config=replace(spec.config, method=replace(spec.config.method, sampling=sampling)))
    for unit in spec.units():
        energies = [Synthesizer(each).compute(unit)[0]["energy"].to_numpy() for each in (spec, other)]
        np.testing.assert_allclose(energies[0], energies[1], atol=1e-3)


def test_receipts_tell_how_often_samples_were_guided_and_satisfied(finished: Path) -> None:
    """Every second step from 40 % of four on: steps 2 and no other."""
    receipts = [json.loads(path.read_text()) for path in (run_dir(finished) / "receipts/synthesize").glob("*.json")]
    assert receipts
    for receipt in receipts:
        details = receipt["details"]
        assert details["guided_steps"] == receipt["rows"]
        assert 0 <= details["satisfied_share"] <= 1
        assert details["skipped_steps"] == 0


def test_what_a_kill_left_undone_is_sampled_to_the_same_bytes(finished: Path, tmp_path: Path, prism: Command) -> None:
    """As after a kill between two units: one is gone, one has no receipt yet, and with them what was made of them."""
    storage = shutil.copytree(finished, tmp_path / "outputs")
    shutil.rmtree(storage / "artifacts/same_images")
    shards = sorted((run_dir(storage) / "images").glob("*.parquet"))
    for shard in shards[:2]:
        (run_dir(storage) / "receipts/synthesize" / f"{shard.stem}.json").unlink()
    shards[0].unlink()
    (run_dir(storage) / "manifest.json").unlink()
    assert prism("run", *SMOKE).code == 0
    assert products(run_dir(storage)) == products(run_dir(finished))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_student_of_samples_alone_names_real_digits(prism: Command, tmp_path: Path) -> None:
    """It never sees a real image or a real label; ten classes by chance are a tenth."""
    assert prism("run", "recipe=digits_dfkd", "student.seeds=[0]", "student.labels=[soft]").code == 0
    (summary,) = json.loads((run_dir(tmp_path / "outputs") / "report/summary.json").read_text())
    assert summary["students"][0]["top1"] > 0.9


def test_of_candidates_those_of_least_energy_are_kept_and_classes_stay_even(models: Path, prism: Command) -> None:
    plain = prism("run", *SMOKE, "stages=[prepare,teach,synthesize]", f"storage={models}", "run_id=plain")
    more = prism(
        "run",
        *SMOKE,
        "stages=[prepare,teach,synthesize]",
        f"storage={models}",
        "run_id=more",
        "method.sampling.oversample=2.0",
    )
    assert plain.code == more.code == 0

    def rows(name: str) -> list[dict[str, Any]]:
        files = sorted((models / "runs" / name / "images").glob("*.parquet"))
        return [row for path in files for row in pq.read_table(path).to_pylist()]

    for class_id in range(10):
        before, after = ([r["energy"] for r in rows(name) if r["label"] == class_id] for name in ("plain", "more"))
        assert len(before) == len(after) == 3
        assert sum(after) <= sum(before) + 1e-6
    receipts = [json.loads(p.read_text()) for p in (models / "runs/more/receipts/synthesize").glob("*.json")]
    assert sum(receipt["details"]["candidates"] for receipt in receipts) == 60


def test_candidates_have_seeds_of_their_own_and_their_groups_prompts(finished: Path, tmp_path: Path) -> None:
    spec = sampling_spec(finished, tmp_path / "copy")
    unit = spec.units()[0]
    prompts = [f"prompt {n}" for n in range(len(unit.images))]
    for keep, oversample, expected in ((Keep.of_class, 1.5, 30), (Keep.of_prompt, 3.0, 60), (Keep.of_class, 1.0, 20)):
        found = candidates_of(unit, prompts, oversample=oversample, keep=keep)
        assert len(found) == expected
        assert len({candidate.seed for candidate in found}) == expected
        assert [candidate.seed for candidate in found[:20]] == [image.seed for image in unit.images]
        if keep is Keep.of_prompt:
            assert all(candidate.prompt == prompts[candidate.group] for candidate in found)


def test_candidates_may_leave_half_way(models: Path, prism: Command) -> None:
    done = prism(
        "run",
        *SMOKE,
        "stages=[prepare,teach,synthesize]",
        f"storage={models}",
        "method.sampling.oversample=2.0",
        "method.sampling.abort_at=0.5",
    )
    assert done.code == 0, done.err
    assert len(rows_of(models)) == 30


REFUSED = [
    (["generator.source=null"], "generator.source=null: method 'eda' samples from a generator"),
    (["generator.source=/nowhere", "prompts.world=photo"], "is no folder; expected a diffusers pipeline"),
    (["method.guidance.start=0.7", "method.guidance.end=0.3"], "no step is left between them"),
    (["method.sampling.cfg_start=1.0"], "method.sampling.cfg_start=1.0: not below"),
    (["method.guidance.sizing=needed", "method.guidance.rule=noise"], "measured in the clean image"),
    (["method.guidance.sizing=needed", "method.guidance.margin_quantile=null"], "moves until an energy is low enough"),
    (["method.sampling.abort_at=0.5"], "nothing to choose from"),
    (["method.sampling.oversample=1.5", "method.sampling.keep=of_prompt"], "expected a whole number"),
    (["method.guidance.teachers=[nobody]"], "teacher 'nobody' is unknown"),
    (["prompts.world=photo"], "prompts.world=photo, generator.source=train"),
    (["prompts.back_end=http", "prompts.model=m"], "prompts.url=None: back_end=http needs one"),
    (["prompts.back_end=transformers"], "prompts.model=None: back_end=transformers needs one"),
    (["prompts.url=http://127.0.0.1/v1"], "back_end=template has none"),
    (
        ["prompts.back_end=http", "prompts.model=m", "prompts.url=u", "prompts.name_only=false"],
        "captions of world small",
    ),
    (["prompts.back_end=http", "prompts.model=m", "prompts.url=u", "prompts.name_only=true"], "names alone"),
    (["evaluate.shifts=[melted]"], "expected names among sheared"),
    (["evaluate.shifts=['rotation:down']"], "evaluate.shifts=['rotation:down']"),
    (["evaluate.shifted_sets={mine: /nowhere}"], "/nowhere"),
    (["generator.world.vae_channels=[8,8,8,8,8,8]"], "which dataset.image_size=16 is no multiple of"),
    (["generator.world.text_width=10"], "no multiple of 4"),
    (["generator.world.unet_channels=[10]"], "expected multiples of 8"),
    (["generator.world.ema_decay=0.99"], "still holds 96% of the untrained network"),
    (["method.sampling.sampler=magic"], "expected one of ddim"),
    (["generator.attention=magic"], "expected one of auto"),
    (["method.sampling.cfg_scale=0.5"], "at least 1"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_wrong_settings_are_refused_in_one_line(
    overrides: list[str], said: str, prism: Command, tmp_path: Path
) -> None:
    done = prism("run", *SMOKE, *overrides)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "outputs/runs").exists()


def test_checking_a_run_imports_neither_torch_nor_diffusers() -> None:
    script = (
        "import sys; from prism_ray.cli import main; code = main(sys.argv[1:]); "
        "assert code == 2; print(sorted({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)))"
    )
    arguments = ["run", *SMOKE, "method.sampling.abort_at=0.5"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_card_says_that_images_were_sampled(finished: Path) -> None:
    text = (run_dir(finished) / "README.md").read_text()
    assert "sampled from a generator" in text
    assert "real images of digits and can repeat" in text
    assert "The images are real" not in text


@pytest.mark.parametrize("preset", ["unguided", "eda_faithful", "mpgd", "freedom", "dm_kd", "prism_adaptive"])
def test_every_preset_makes_images(preset: str, models: Path, prism: Command) -> None:
    done = prism(
        "run",
        *SMOKE,
        f"method={preset}",
        "method.sampling.steps=4",
        "images_per_class=1",
        "stages=[prepare,teach,synthesize]",
        f"storage={models}",
    )
    assert done.code == 0, done.err
    assert len(rows_of(models)) == 10


def test_a_run_without_prompts_of_a_class_is_an_error_of_one_line(finished: Path, tmp_path: Path) -> None:
    spec = sampling_spec(finished, tmp_path / "copy")
    path = only(tmp_path / "copy", "prompts") / PROMPTS_FILE
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if b'"class_id": 4' not in line))
    with pytest.raises(PrismError, match="no prompt of class 4"):
        Synthesizer(spec)


def test_a_pilot_round_tells_how_each_class_is_named_and_how_diverse_it_is(finished: Path) -> None:
    classes = json.loads((only(finished, "calibrations") / MARKER).read_text())["classes"]
    assert set(classes) == {str(c) for c in range(10)}
    assert all(0 <= entry["agreement"] <= 1 and 0 <= entry["diversity"] <= 2 for entry in classes.values())


def test_the_closed_loop_guides_and_widens_by_class(models: Path, prism: Command) -> None:
    done = prism(
        "run",
        *SMOKE,
        "method=prism_adaptive",
        "prompts=diversified",
        "method.sampling.steps=4",
        "method.sampling.widen=1.0",
        "method.guidance.calibration_images=20",
        "stages=[prepare,teach,synthesize]",
        f"storage={models}",
    )
    assert done.code == 0, done.err
    (found,) = (models / "artifacts/calibrations").iterdir()
    diversity = {int(c): e["diversity"] for c, e in json.loads((found / MARKER).read_text())["classes"].items()}
    best = max(diversity, key=lambda c: diversity[c])
    plain = {row["prompt"] for row in rows_of(models) if row["label"] == best}
    assert len(plain) == 1, "the most diverse class gets plain prompts alone"
    others = {row["prompt"] for row in rows_of(models) if row["label"] == min(diversity, key=lambda c: diversity[c])}
    assert len(others) > 1


def test_energies_of_sampled_images_are_in_the_report(finished: Path) -> None:
    page = (run_dir(finished) / "report" / "report.html").read_text()
    assert '<h2 id="energies">' in page
    assert page.count('<figure class="captioned"') == 60, "every image, and the real one nearest to it"
    assert "\nprompt: a digit three\n" in page


# Generators from elsewhere

CRANE = "crane (n02012849)"  # the bird; ImageNet's other crane lifts
PIPELINE = [
    "recipe=imagenet1k_eda",
    "compute=inline",
    "stages=[prepare,teach,synthesize]",
    f"classes=[zebra,'{CRANE}']",
]


@pytest.fixture(scope="module")
def imagenet_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "t"
    teacher = build_classifier(
        "test_efficientnet",
        num_classes=1000,
        in_chans=3,
        image_size=32,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        model_args={},
        seed=0,
    )
    save_classifier(teacher, folder, class_names=class_names(), extra={})
    return folder


def twin_run(kind: str, teacher: Path, folder: Path) -> list[str]:
    """The recipe of ImageNet-1K on a small twin of its generator, two guided steps."""
    return [
        *PIPELINE,
        f"generator.source={save_twin(kind, folder / kind)}",
        f"teachers.models.resnet50.source={teacher}",
        f"storage={folder}/outputs",
        "dataset.image_size=32",
        "images_per_class=2",
        "generator.dtype=fp32",
        "method.batch_size=4",
        "method.sampling.steps=2",
        "method.sampling.micro_batch=4",
        "method.guidance.start=0.0",
        "method.guidance.end=1.0",
        "method.guidance.calibration_images=4",
    ]


def test_the_imagenet_recipe_runs_guided_on_a_twin_of_stable_diffusion(
    imagenet_teacher: Path, prism: Command, tmp_path: Path
) -> None:
    """With the teacher's choice of what the ambiguous class is called."""
    overrides = [
        *twin_run("sd", imagenet_teacher, tmp_path),
        "prompts.judged_images=2",
        "prompts.per_class=3",
        "prompts.max_tokens=500",
    ]
    done = prism.bare("run", *overrides)
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "outputs")
    assert sorted(row["class_name"] for row in rows) == [CRANE, CRANE, "zebra", "zebra"]
    assert all(np.isfinite(row["energy"]) for row in rows)
    facts = json.loads((only(tmp_path / "outputs", "phrases") / MARKER).read_text())
    possible = class_phrases(class_names())
    asked = {(class_id, phrase) for class_id, phrase, _ in facts["agreement"]}
    assert asked == {(c, phrase) for c in (134, 340) for phrase in possible[c] if len(possible[c]) > 1} != set()
    for row in rows:
        assert facts["phrases"][row["label"]] in row["prompt"]
    assert "2 steps, " in prism.bare("plan", *overrides).out


def test_the_imagenet_recipe_runs_guided_on_a_twin_of_dit(
    imagenet_teacher: Path, prism: Command, tmp_path: Path
) -> None:
    """It is asked by ImageNet's class ids, which the table of prompts holds."""
    overrides = [*twin_run("dit", imagenet_teacher, tmp_path), "prompts=plain"]
    done = prism.bare("run", *overrides)
    assert done.code == 0, done.err
    prompts = {(row["class_name"], row["prompt"]) for row in rows_of(tmp_path / "outputs")}
    assert prompts == {("zebra", "340"), (CRANE, "134")}
    assert "FLOP per image" in prism.bare("plan", *overrides).out


def test_a_generator_of_other_classes_is_refused(prism: Command, tmp_path: Path) -> None:
    folder = save_twin("dit", tmp_path / "dit")
    done = prism("run", *SMOKE, f"generator.source={folder}", "prompts.world=photo")
    assert done.code == 2
    assert "knows 1000 classes, the data set has 10" in done.err


# Both tracks together


def test_samples_are_what_dataset_distillation_starts_from(models: Path, finished: Path, prism: Command) -> None:
    shutil.copytree(finished / "runs", models / "runs")
    sampled = run_dir(models).name
    overrides = ["recipe=digits_smoke", "compute=inline", "stages=[prepare,teach,synthesize]", f"storage={models}"]
    done = prism("run", *overrides, "method.init=generated", f"method.init_run={sampled}", "run_id=both")
    assert done.code == 0, done.err
    rows = [
        row
        for path in sorted((models / "runs/both/images").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert rows
    assert all(row["source_image_id"] for row in rows)


def test_statistics_can_be_matched_while_sampling(models: Path, prism: Command) -> None:
    stages = ["stages=[prepare,teach,synthesize]", f"storage={models}"]
    for name, weight in (("plain", 0.0), ("matched", 1.0)):
        done = prism("run", *SMOKE, *stages, f"run_id={name}", f"method.bn_weight={weight}")
        assert done.code == 0, done.err
    plain, matched = (products(models / "runs" / name) for name in ("plain", "matched"))
    assert plain.keys() == matched.keys()
    assert not set(plain.values()) & set(matched.values())


def test_real_images_can_be_shown_with_the_attributes_of_a_world(models: Path, prism: Command) -> None:
    stages = ["stages=[prepare,synthesize]", f"storage={models}", "recipe=digits_smoke", "compute=inline"]
    for name, share in (("plain", 0.0), ("changed", 0.5)):
        done = prism("run", *stages, "method=random_real", f"run_id={name}", f"method.attribute_share={share}")
        assert done.code == 0, done.err

    def pngs(name: str) -> list[bytes]:
        files = sorted((models / "runs" / name / "images").glob("*.parquet"))
        return [row["image"]["bytes"] for path in files for row in pq.read_table(path).to_pylist()]

    same = [a == b for a, b in zip(pngs("plain"), pngs("changed"), strict=True)]
    assert any(same), "half of them stay as they are"
    assert not all(same)


# What a unit keeps on the way, and images that are no numbers


def with_sampling(spec: RunSpec, **changes: Any) -> RunSpec:
    sampling = replace(spec.config.method.sampling, **changes)
    return replace(spec, config=replace(spec.config, method=replace(spec.config.method, sampling=sampling)))


@pytest.mark.parametrize(
    "changes", [{}, {"oversample": 2.0, "abort_at": 0.5, "sampler": "ddpm"}], ids=["plain", "candidates that drop out"]
)
def test_micro_batches_that_are_done_are_kept_when_the_node_leaves(
    changes: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_sampling(sampling_spec(finished, tmp_path / "copy"), **changes)
    unit, made = spec.units()[0], Synthesizer(spec)
    assert made._sampling is not None
    sampler, begun = made._sampling._sampler, []
    own = sampler._advance
    monkeypatch.setattr(sampler, "_advance", lambda *args: (begun.append(0), own(*args))[1])
    whole, _ = made.compute(unit)
    total = len(begun)
    monkeypatch.setattr(drain, "_is_leaving", lambda: True)
    for left in range(total):
        begun.clear()
        with pytest.raises(Drained):
            made.compute(unit)
        assert len(begun) == 1, f"of the {total - left} micro-batches that were left"
    monkeypatch.setattr(drain, "_is_leaving", None)
    begun.clear()
    table, _ = made.compute(unit)
    assert begun == []
    assert table.to_pylist() == whole.to_pylist()


class Breaking:
    """Makes a generator answer NaN for one place of a micro-batch, at one step of its n-th to m-th micro-batch."""

    def __init__(self, made: Synthesizer, batches: range, place: int, *, step: int = 2, steps: int = 4) -> None:
        assert made._sampling is not None
        self._calls, self._batches, self._place, self._step, self._steps = 0, batches, place, step, steps
        self._handle = made._sampling._sampler._generator.network.register_forward_hook(self._answer)

    def _answer(self, network: Any, arguments: Any, output: Any) -> Any:
        batch, step = divmod(self._calls, self._steps)
        self._calls += 1
        if batch not in self._batches or step != self._step:
            return output
        broken = output[0].clone()
        broken[self._place, 0, 0, 0] = torch.nan
        return (broken,)

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def many(unit: Unit, count: int) -> Unit:
    """A unit of so many images."""
    images = [replace(unit.images[n % len(unit.images)], image_id=f"i{n}", seed=n) for n in range(count)]
    return replace(unit, images=tuple(images))


@pytest.mark.parametrize("place", [0, 5])
def test_one_image_of_64_that_is_no_number_is_drawn_again_and_the_others_keep_their_bytes(
    place: int, finished: Path, tmp_path: Path
) -> None:
    spec = sampling_spec(finished, tmp_path / "copy")
    made = Synthesizer(spec)
    unit = many(spec.units()[0], 64)
    clean, receipt = made.compute(unit)
    assert receipt.details["restarted_images"] == 0
    with Breaking(made, range(1, 2), place):
        table, receipt = made.compute(unit)
    rows, expected = table.to_pylist(), clean.to_pylist()
    hit = 8 + place
    assert receipt.details["restarted_images"] == 1
    assert [n for n in range(64) if rows[n] != expected[n]] == [hit]
    assert rows[hit]["seed"] == seed_for(expected[hit]["seed"], "restart", 1)
    assert np.isfinite(rows[hit]["energy"])
    with Breaking(made, range(1, 2), place):
        assert made.compute(unit)[0].to_pylist() == rows, "again"


def test_an_image_that_stays_no_number_is_left_out_with_its_reason(finished: Path, tmp_path: Path) -> None:
    spec = sampling_spec(finished, tmp_path / "copy")
    made, unit = Synthesizer(spec), many(spec.units()[0], 16)
    clean, _ = made.compute(unit)
    with Breaking(made, range(1, 4), 0):  # its second micro-batch, and both of its restarts, which are alone
        table, receipt = made.compute(unit)
    assert table.to_pylist() == [row for n, row in enumerate(clean.to_pylist()) if n != 8]
    assert receipt.details["lost_images"] == [
        {"image_id": "i8", "reason": "not finite, and neither from 2 other seeds"}
    ]
    assert receipt.details["restarted_images"] == 1


def test_a_unit_without_any_image_that_is_a_number_fails(finished: Path, tmp_path: Path) -> None:
    spec = sampling_spec(finished, tmp_path / "copy")
    made, unit = Synthesizer(spec), many(spec.units()[0], 1)
    with Breaking(made, range(9), 0), pytest.raises(FloatingPointError, match="none of 1 samples is finite"):
        made.compute(unit)


def test_samples_that_depend_on_each_other_fail_together(finished: Path, tmp_path: Path) -> None:
    spec = sampling_spec(finished, tmp_path / "copy")
    coupled = replace(spec, config=replace(spec.config, method=replace(spec.config.method, bn_weight=0.1)))
    made, unit = Synthesizer(coupled), coupled.units()[0]
    with (
        Breaking(made, range(1), 0),
        pytest.raises(FloatingPointError, match="makes those of a micro-batch depend"),
    ):
        made.compute(unit)


def test_a_run_with_an_image_that_can_not_be_made_goes_on_without_it_and_says_so(
    models: Path, prism: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, student, manifest, status and card are of the others."""
    own, breaking = Synthesizer.compute, []

    def compute(self: Synthesizer, unit: Unit) -> Any:
        with Breaking(self, range(4), 3) if unit.index == 0 and not breaking else contextlib.nullcontext():
            breaking.append(unit)
            return own(self, unit)

    monkeypatch.setattr(Synthesizer, "compute", compute)
    monkeypatch.setattr("prism_ray.stages.guided.RESTARTS", 0)
    done = prism("run", *SMOKE, f"storage={models}")
    assert done.code == 0, done.err
    folder = run_dir(models)
    manifest = json.loads((folder / "manifest.json").read_text())
    lost = [entry["image_id"] for entry in manifest["lost_images"]]
    assert len(lost) == 3, "place 3 of the first unit's three micro-batches"
    assert "3 images could not be made" in done.out
    rows = rows_of(models)
    assert len(rows) == 27
    labels = [row for p in sorted((folder / "labels").glob("*.parquet")) for row in pq.read_table(p).to_pylist()]
    assert [row["image_id"] for row in labels] == [row["image_id"] for row in rows]
    assert not {row["image_id"] for row in rows} & set(lost)
    assert f"no image    {lost[0]}" in prism("status", *SMOKE, f"storage={models}").out
    assert "3 images could not be made and are missing" in (folder / "README.md").read_text()
    assert "Images that could not be made: 3" in (folder / "report/report.html").read_text()
    again = products(folder)
    assert prism("run", *SMOKE, f"storage={models}").code == 0
    assert products(folder) == again

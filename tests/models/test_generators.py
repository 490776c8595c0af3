"""Generators and samplers on twins of the real pipelines, offline: equal to diffusers unguided, steered when guided."""

import copy
import json
import logging
import shutil
import socket
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from pipelines import TEXTS, TWINS, save_twin
from torch import Tensor, nn

from prism_ray.errors import InputError
from prism_ray.methods.diffusion.clean_images import FORMS
from prism_ray.methods.diffusion.energies import Guide, guidance_loss
from prism_ray.methods.diffusion.guidance import Guidance
from prism_ray.methods.diffusion.sampling import Cfg, Record, sample
from prism_ray.models.generators import Generator, Placement, StableDiffusion, load_generator
from prism_ray.models.samplers import SAMPLERS, Sampler, check_sampler, sampler_of

CPU = torch.device("cpu")
STEPS, SEEDS = 6, [11, 22, 33, 44]
NUM_CLASSES = 5
VP_PREDICTIONS = ("epsilon", "v_prediction", "sample")
CELLS = [
    (kind, prediction, name)
    for kind in TWINS
    for prediction in (("flow_prediction",) if kind == "sd3" else VP_PREDICTIONS)
    for name in SAMPLERS
]
NOT_OF_FLOWS = ("ddim", "ddpm", "euler", "euler_ancestral")
REFUSED = {
    **{("sd3", "flow_prediction", name): "flow matching" for name in NOT_OF_FLOWS},
    **{(kind, p, "flow_euler"): "not trained by flow" for kind in TWINS if kind != "sd3" for p in VP_PREDICTIONS},
    **{(kind, "sample", "euler_ancestral"): "predicts clean samples" for kind in TWINS if kind != "sd3"},
}
"""Cells that are refused, with a word of the reason; all others must work."""
REFUSED_KEEPING_NOISE = {(kind, p, name): "its corrector rebuilds" for kind, p, name in CELLS if name == "unipc"}
WITHOUT_REFERENCE = {
    ("sd3", "sde-dpm++"),
    *(("dit", name) for name in SAMPLERS if name not in ("ddim", "dpm++", "unipc")),
}
"""Diffusers' pipeline passes its scheduler no generator there, or noise of the wrong scale."""
UNGUIDED, NO_CFG = Guidance(), Cfg()
GUIDED = Guidance(scale=0.2, reference="state")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folders of all twins by kind and prediction."""
    logging.disable(logging.WARNING)
    root = tmp_path_factory.mktemp("twins")
    found = {(k, p): save_twin(k, root / f"{k}-{p}", prediction=p) for k, p in {(k, p) for k, p, _ in CELLS}}
    logging.disable(logging.NOTSET)
    return found


@pytest.fixture(scope="module")
def generators(twins: dict[tuple[str, str], Path]) -> dict[tuple[str, str], Generator]:
    return {key: load_generator(folder, placement=Placement(CPU)) for key, folder in twins.items()}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(32, NUM_CLASSES)).eval().requires_grad_(False)


def prompts_of(generator: Generator) -> list[str]:
    return [TEXTS[0], TEXTS[1], TEXTS[0], ""] if generator.takes_text else ["1", "7", "1", "999"]


def run(
    generator: Generator,
    name: str,
    *,
    cfg: Cfg = NO_CFG,
    guidance: Guidance = UNGUIDED,
    teacher: nn.Module | None = None,
    seeds: list[int] = SEEDS,
    prompts: list[str] | None = None,
    eta: float = 0.0,
    full: bool = False,
    margin: float | None = None,
) -> tuple[Tensor, Record]:
    """Latents by our loop."""
    prompts = prompts_of(generator) if prompts is None else prompts
    sampler = Sampler(
        name,
        generator.scheduler_config,
        STEPS,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        travel_generators=[torch.Generator().manual_seed(seed + 1) for seed in seeds],
        device=CPU,
        eta=eta,
        mu=generator.shift,
    )

    def energy(clean: Tensor) -> Tensor:
        assert teacher is not None
        classes = torch.arange(len(clean)) % NUM_CLASSES
        return guidance_loss(generator.decode_for_guidance(clean, full=full), classes, [Guide(teacher, margin)])

    return sample(
        sampler.initial(generator.latent_shape, generator.dtype),
        denoise=generator.denoiser(generator.conditions(prompts), sampler.timesteps),
        steps=sampler,
        cfg=cfg,
        guidance=guidance,
        energy=None if teacher is None else energy,
    )


def stock(folder: Path, generator: Generator, name: str, *, cfg: float) -> tuple[Tensor, list[torch.Generator]]:
    """Images by diffusers' own pipeline with the same sampler, prompts and seeds; and its generators afterwards."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if (folder / "text_encoder_2").is_dir() else {}
    absent = absent if (folder / "transformer").is_dir() else {}
    pipe: Any = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **absent)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)  # torch picks kernels by that, which differ in the last bit
    kind, changes = SAMPLERS[name]
    if generator.scheduler_config["_class_name"] == "FlowMatchEulerDiscreteScheduler" and name != "flow_euler":
        shift = generator.scheduler_config["shift"]
        changes = {**changes, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    pipe.set_progress_bar_config(disable=True)
    random = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    common: dict[str, Any] = {"guidance_scale": cfg, "num_inference_steps": STEPS, "generator": random}
    common |= {"output_type": "pt", "return_dict": False}
    if not generator.takes_text:
        return pipe([int(prompt) for prompt in prompts_of(generator)], **common)[0], random
    positive, negative = generator.conditions(prompts_of(generator))

    def batch(conditions: Any, key: str) -> Tensor:
        return torch.stack([condition[key] for condition in conditions])

    common["prompt_embeds"] = batch(positive, "encoder_hidden_states")
    common["negative_prompt_embeds"] = batch(negative, "encoder_hidden_states")
    for key in ("text_embeds", "pooled_projections"):
        if key in positive[0]:
            common["pooled_prompt_embeds"] = batch(positive, key)
            common["negative_pooled_prompt_embeds"] = batch(negative, key)
    return pipe(**common)[0], random


def refusal(generator: Generator, name: str, guidance: Guidance) -> str | None:
    try:
        check_sampler(name, generator.scheduler_config, guidance)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", FORMS)
def test_what_is_refused_is_this_and_nothing_else(form: str, generators: dict[tuple[str, str], Generator]) -> None:
    unguided = {cell: refusal(generators[cell[:2]], cell[2], UNGUIDED) for cell in CELLS}
    guided = {cell: refusal(generators[cell[:2]], cell[2], replace(GUIDED, form=form)) for cell in CELLS}
    for found, expected in (
        (unguided, REFUSED),
        (guided, REFUSED | (REFUSED_KEEPING_NOISE if form == "keep_noise" else {})),
    ):
        refused = {cell: text for cell, text in found.items() if text is not None}
        assert refused.keys() == expected.keys()
        for cell, text in refused.items():
            assert text.startswith(f"method.sampling.sampler={cell[2]}: ")
            assert expected[cell] in text


@pytest.mark.parametrize(("kind", "prediction", "name"), CELLS)
def test_unguided_is_the_stock_pipeline_bit_for_bit(
    kind: str, prediction: str, name: str, generators: dict[tuple[str, str], Generator], twins: dict[Any, Path]
) -> None:
    generator = generators[kind, prediction]
    if (kind, prediction, name) in REFUSED:
        return
    if (kind, name) in WITHOUT_REFERENCE:
        first, again = (run(generator, name, cfg=Cfg(3.0))[0] for _ in range(2))
        assert torch.isfinite(first).all()
        assert torch.equal(first, again)
        return
    logging.disable(logging.WARNING)
    for cfg in (1.0, 3.0):
        expected, random = stock(twins[kind, prediction], generator, name, cfg=cfg)
        latents, _ = run(generator, name, cfg=Cfg(cfg))
        assert torch.equal(generator.decode(latents), expected)
        ours = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        sampler = Sampler(name, generator.scheduler_config, STEPS, generators=ours, device=CPU, mu=generator.shift)
        sample(
            sampler.initial(generator.latent_shape, generator.dtype),
            denoise=generator.denoiser(generator.conditions(prompts_of(generator)), sampler.timesteps),
            steps=sampler,
            cfg=Cfg(cfg),
            guidance=Guidance(),
        )
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, random, strict=True))
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "prediction", "name"), CELLS)
def test_guidance_lowers_the_energy_or_is_refused_with_the_reason(
    kind: str,
    prediction: str,
    name: str,
    form: str,
    generators: dict[tuple[str, str], Generator],
    teacher: nn.Module,
) -> None:
    generator = generators[kind, prediction]
    guidance = replace(GUIDED, form=form)
    if refusal(generator, name, guidance):
        return  # see above
    without, _ = run(generator, name, cfg=Cfg(2.0))
    guided, record = run(generator, name, cfg=Cfg(2.0), guidance=guidance, teacher=teacher)
    classes = torch.arange(4) % NUM_CLASSES

    def energy(latents: Tensor) -> Tensor:
        return guidance_loss(generator.decode_for_guidance(latents), classes, [Guide(teacher)])

    assert record.guided.tolist() == [STEPS] * 4
    assert record.skipped.tolist() == [0] * 4
    assert energy(guided).mean() < energy(without).mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("kind", "prediction"), [("sd", p) for p in VP_PREDICTIONS] + [("sd3", "flow_prediction")])
def test_inside_the_scheduler_the_clean_image_is_displaced_by_what_was_asked(
    kind: str, prediction: str, name: str, form: str, generators: dict[tuple[str, str], Generator]
) -> None:
    """The scheduler's own estimate, from before it steps, against ours."""
    generator = generators[kind, prediction]
    if refusal(generator, name, Guidance()):
        return
    random = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    for step in (0, 2, STEPS - 1):
        sampler = Sampler(name, generator.scheduler_config, STEPS, generators=random, device=CPU)
        x = sampler.initial(generator.latent_shape, torch.float32)
        output, shift = torch.randn_like(x), 0.1 * torch.randn_like(x)
        level, scheduler = sampler.level(step), sampler.scheduler
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = step
            scheduler.is_scale_input_called = True

        def own(x: Tensor, output: Tensor, scheduler: Any = scheduler, t: Tensor = sampler.timesteps[step]) -> Tensor:
            if hasattr(scheduler, "convert_model_output"):
                return scheduler.convert_model_output(output, sample=x)
            if name == "flow_euler":
                return x - scheduler.sigmas[scheduler.step_index] * output
            return scheduler.step(output, t, x, return_dict=True).pred_original_sample

        expected = own(x, output) + shift
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = step
        scale = expected.abs().max().item()
        torch.testing.assert_close(own(*FORMS[form](level, x, output, shift)), expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "euler_ancestral"])
def test_a_sample_does_not_depend_on_its_batch_mates(
    name: str, generators: dict[tuple[str, str], Generator], teacher: nn.Module
) -> None:
    generator = generators["sd", "epsilon"]
    together, _ = run(generator, name, cfg=Cfg(2.0), guidance=GUIDED, teacher=teacher)
    others, _ = run(
        generator,
        name,
        cfg=Cfg(2.0),
        guidance=GUIDED,
        teacher=teacher,
        seeds=[SEEDS[0], 7, 8, 9],
        prompts=[TEXTS[0], "", TEXTS[1], TEXTS[1]],
    )
    assert torch.equal(together[0], others[0])
    assert not torch.equal(together[1], others[1])


@pytest.mark.parametrize(("kind", "prediction"), [("sd", "v_prediction"), ("sdxl", "epsilon"), ("dit", "epsilon")])
def test_with_a_margin_energies_fall_through_the_full_decoder_in_pairs(
    kind: str, prediction: str, generators: dict[tuple[str, str], Generator], teacher: nn.Module
) -> None:
    """32 samples each with and without guidance, from the same noise: the mean difference is far from zero."""
    generator = generators[kind, prediction]
    some: dict[str, Any] = {"seeds": list(range(32)), "prompts": [prompts_of(generator)[0]] * 32}
    classes = torch.arange(32) % NUM_CLASSES

    def energies(latents: Tensor, margin: float | None) -> Tensor:
        return guidance_loss(generator.decode_for_guidance(latents, full=True), classes, [Guide(teacher, margin)])

    without, _ = run(generator, "ddim", **some)
    margin = energies(without, None).quantile(0.2).item()
    guided, _ = run(generator, "ddim", **some, guidance=GUIDED, teacher=teacher, full=True, margin=margin)
    fall = energies(without, margin) - energies(guided, margin)
    assert fall.mean() > 3 * fall.std() / 32**0.5


@pytest.mark.parametrize(
    ("name", "eta", "travel"), [("ddpm", 0.0, 1), ("ddim", 0.0, 2), ("ddim", 1.0, 3), ("ddpm", 0.0, 3)]
)
def test_noise_of_guided_and_unguided_samples_is_the_same(
    name: str, eta: float, travel: int, generators: dict[tuple[str, str], Generator], teacher: nn.Module
) -> None:
    """Going back and the steps taken again draw from a stream of their own."""
    generator = generators["sd", "epsilon"]
    states, classes = [], torch.arange(4) % NUM_CLASSES
    of_process = torch.get_rng_state()
    for guidance in (Guidance(), replace(GUIDED, travel=travel), replace(GUIDED, rule="step", travel=travel)):
        random = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        again = [torch.Generator().manual_seed(seed + 1) for seed in SEEDS]
        sampler = Sampler(
            name, generator.scheduler_config, STEPS, generators=random, travel_generators=again, device=CPU, eta=eta
        )
        first = sampler.initial(generator.latent_shape, torch.float32)
        sample(
            first,
            denoise=generator.denoiser(generator.conditions(prompts_of(generator)), sampler.timesteps),
            steps=sampler,
            cfg=Cfg(),
            guidance=guidance,
            energy=lambda clean: guidance_loss(generator.decode_for_guidance(clean), classes, [Guide(teacher)]),
        )
        states.append((first, random[0].get_state()))
    for first, state in states[1:]:
        assert torch.equal(first, states[0][0])
        assert torch.equal(state, states[0][1]), "after the last step"
    assert torch.equal(torch.get_rng_state(), of_process)


@pytest.mark.parametrize("rule", ["noise", "step"])
@pytest.mark.parametrize("kind", TWINS)
def test_guidance_through_the_network_lowers_the_energy(
    kind: str, rule: str, generators: dict[tuple[str, str], Generator], teacher: nn.Module
) -> None:
    generator = next(g for (k, _), g in generators.items() if k == kind)
    name = "flow_euler" if kind == "sd3" else "ddim"
    guidance = Guidance(scale=0.3, rule=rule, reference="state")
    without, _ = run(generator, name)
    guided, record = run(generator, name, guidance=guidance, teacher=teacher)
    classes = torch.arange(4) % NUM_CLASSES
    before, after = (
        guidance_loss(generator.decode_for_guidance(z), classes, [Guide(teacher)]).mean() for z in (without, guided)
    )
    assert record.skipped.sum() == 0
    assert after < before


def test_nothing_that_guides_is_changed_by_guiding(
    generators: dict[tuple[str, str], Generator], teacher: nn.Module
) -> None:
    generator = generators["sd", "epsilon"]
    parts = [teacher, *(p for p in generator._pipe.components.values() if isinstance(p, nn.Module))]
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    run(generator, "ddim", cfg=Cfg(2.0), guidance=replace(GUIDED, rule="noise"), teacher=teacher)
    for part, state in zip(parts, before, strict=True):
        assert not part.training
        assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
        assert all(parameter.grad is None for parameter in part.parameters())


def saved_bytes(run_it: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for backward passes while something runs."""
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_it()
    return total


@pytest.mark.parametrize("kind", TWINS)
def test_the_shortcut_keeps_no_activation_of_the_network(
    kind: str, generators: dict[tuple[str, str], Generator], teacher: nn.Module
) -> None:
    generator = next(g for (k, _), g in generators.items() if k == kind)
    name = "flow_euler" if kind == "sd3" else "ddim"
    has_graph = []
    handle = generator.network.register_forward_hook(lambda m, args, output: has_graph.append(output[0].requires_grad))
    classes = torch.arange(4) % NUM_CLASSES

    def guided(rule: str) -> int:
        has_graph.clear()
        guidance = replace(GUIDED, rule=rule)
        return saved_bytes(lambda: run(generator, name, cfg=Cfg(2.0), guidance=guidance, teacher=teacher))

    def decoder_and_teacher() -> Tensor:
        latents = torch.zeros(4, *generator.latent_shape, requires_grad=True)
        return guidance_loss(generator.decode_for_guidance(latents), classes, [Guide(teacher)])

    try:
        shortcut = guided("clean")
        assert has_graph == [False] * STEPS
        through = guided("noise")
        assert has_graph == [True] * STEPS
    finally:
        handle.remove()
    alone = STEPS * saved_bytes(decoder_and_teacher)
    assert shortcut <= 1.01 * alone, "nothing but decoder and teacher is kept, and the four losses"
    assert through > 1.3 * shortcut, "which the meter would show"


@pytest.mark.parametrize("rule", ["clean", "noise", "step"])
@pytest.mark.parametrize("kind", TWINS)
def test_a_teacher_that_answers_nan_is_skipped_and_counted_and_the_sample_stays_finite(
    kind: str, rule: str, generators: dict[tuple[str, str], Generator], teacher: nn.Module
) -> None:
    generator = next(g for (k, _), g in generators.items() if k == kind)
    name = "flow_euler" if kind == "sd3" else "ddim"

    class Broken(nn.Module):
        """Has no answer for the second image."""

        def forward(self, images: Tensor) -> Tensor:
            return teacher(images) * torch.tensor([1.0, torch.nan, 1.0, 1.0])[:, None]

    guidance = replace(GUIDED, rule=rule)
    plain, _ = run(generator, name)
    whole, _ = run(generator, name, guidance=guidance, teacher=teacher)
    broken, record = run(generator, name, guidance=guidance, teacher=Broken())
    assert record.skipped.tolist() == [0, STEPS, 0, 0]
    assert broken.isfinite().all()
    assert torch.equal(broken[1], plain[1])
    assert torch.equal(broken[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.parametrize("full", [True, False], ids=["full decoder", "tiny decoder"])
@pytest.mark.parametrize("kind", TWINS)
def test_the_gradient_through_decoder_and_teacher_matches_finite_differences(
    kind: str, full: bool, twins: dict[tuple[str, str], Path], teacher: nn.Module
) -> None:
    folder = next(f for (k, _), f in twins.items() if k == kind)
    generator = load_generator(folder, placement=Placement(CPU, dtype=torch.float64), image_size=8)
    exact = copy.deepcopy(teacher).double()
    classes = torch.tensor([0, 3])
    latents = torch.randn(
        2, *generator.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    for temperature, class_weight in ((0.5, 0.0), (1.0, 1.0), (4.0, 0.0)):

        def energy(z: Tensor, t: float = temperature, weight: float = class_weight) -> Tensor:
            images = generator.decode_for_guidance(z, full=full)
            return guidance_loss(images, classes, [Guide(exact)], temperature=t, class_weight=weight)

        assert energy(latents).dtype == torch.float64
        assert torch.autograd.gradcheck(energy, latents)


def test_guidance_decodes_latents_scaled_and_shifted_as_the_model_was_trained(
    generators: dict[tuple[str, str], Generator],
) -> None:
    for kind, generator in {k: g for (k, _), g in generators.items()}.items():
        vae = generator._pipe.vae
        latents = torch.randn(1, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
        shift = 0.06 if kind == "sd3" else 0.0
        expected = vae.decode(latents / 0.6 + shift, return_dict=False)[0] * 0.5 + 0.5
        torch.testing.assert_close(generator.decode_for_guidance(latents, full=True), expected)


def test_a_prompt_is_encoded_once_and_as_the_pipeline_encodes_it(generators: dict[tuple[str, str], Generator]) -> None:
    generator, calls = generators["sd", "epsilon"], []
    own = StableDiffusion._encode

    class Counted(StableDiffusion):
        def _encode(self, prompt: str) -> Any:
            calls.append(prompt)
            return own(self, prompt)

    counted = Counted(generator._pipe, image_size=None, tiny_decoder=None, placement=Placement(CPU))
    counted.conditions([TEXTS[0], TEXTS[1], TEXTS[0]])
    positive, negative = counted.conditions([TEXTS[0]])
    expected = generator._pipe.encode_prompt(TEXTS[0], CPU, 1, True)
    assert calls == TEXTS
    assert torch.equal(positive[0]["encoder_hidden_states"], expected[0][0])
    assert torch.equal(negative[0]["encoder_hidden_states"], expected[1][0])


def test_the_tiny_decoder_guides_and_the_full_one_makes_the_images(
    generators: dict[tuple[str, str], Generator], twins: dict[Any, Path], tmp_path: Path
) -> None:
    generator = generators["sd", "epsilon"]
    latents = torch.randn(1, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    tiny, full = generator.decode_for_guidance(latents), generator.decode_for_guidance(latents, full=True)
    assert generator.has_tiny_decoder
    assert not torch.equal(tiny, full)
    assert torch.equal(full.clamp(0, 1), generator.decode(latents))
    folder = shutil.copytree(twins["sd", "epsilon"], tmp_path / "twin")
    shutil.move(folder / "tiny_decoder", tmp_path / "elsewhere")
    without = load_generator(folder, placement=Placement(CPU))
    assert not without.has_tiny_decoder
    assert torch.equal(without.decode_for_guidance(latents), full)
    named = load_generator(folder, placement=Placement(CPU), tiny_decoder=tmp_path / "elsewhere")
    assert torch.equal(named.decode_for_guidance(latents), tiny)


def test_another_size_than_the_native_one_is_made(twins: dict[Any, Path]) -> None:
    generator = load_generator(twins["sd", "epsilon"], placement=Placement(CPU), image_size=24)
    assert generator.decode(run(generator, "ddim")[0]).shape == (4, 3, 24, 24)


def test_a_size_between_two_latents_is_refused(twins: dict[Any, Path]) -> None:
    with pytest.raises(InputError, match=r"image_size=17: is no multiple of 2.*own size is 16"):
        load_generator(twins["sd", "epsilon"], placement=Placement(CPU), image_size=17)


def test_half_precision_networks_give_energies_in_single(twins: dict[Any, Path], teacher: nn.Module) -> None:
    generator = load_generator(twins["sd", "epsilon"], placement=Placement(CPU, dtype=torch.bfloat16))
    latents, record = run(generator, "dpm++", cfg=Cfg(2.0), guidance=GUIDED, teacher=teacher)
    assert latents.dtype == torch.bfloat16
    assert record.loss.isfinite().all()
    assert generator.decode(latents).dtype == torch.float32


def test_channels_last_and_compiled_blocks_are_settings(twins: dict[Any, Path]) -> None:
    placement = Placement(CPU, channels_last=True)
    generator = load_generator(twins["sd", "epsilon"], placement=placement)
    plain = load_generator(twins["sd", "epsilon"], placement=Placement(CPU))
    torch.testing.assert_close(run(generator, "ddim")[0], run(plain, "ddim")[0], rtol=1e-3, atol=1e-3)


def test_loading_and_sampling_open_no_socket(twins: dict[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for kind in TWINS:
        folder = next(f for (k, _), f in twins.items() if k == kind)
        generator = load_generator(folder, placement=Placement(CPU))
        run(generator, "flow_euler" if kind == "sd3" else "ddim")


def broken(folder: Path, fault: str) -> Path:
    """A copy of a pipeline folder with one fault."""
    unet = folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    if fault == "pickle":
        weights.rename(unet / "diffusion_pytorch_model.bin")
    elif fault == "short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif fault == "unknown":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    elif fault == "no index":
        (folder / "model_index.json").unlink()
    elif fault == "no part":
        shutil.rmtree(unet)
    elif fault == "shards":
        (unet / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    return folder


PARTS = [
    *((kind, part) for kind in ("sd", "sdxl") for part in ("unet", "vae", "text_encoder")),
    ("sdxl", "text_encoder_2"),
    *(("sd3", part) for part in ("transformer", "vae", "text_encoder", "text_encoder_2")),
    *(("dit", part) for part in ("transformer", "vae")),
    *((kind, "tiny_decoder") for kind in TWINS),
]


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_part_that_is_a_pickle_is_refused_by_its_name(
    kind: str, part: str, twins: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(next(f for (k, _), f in twins.items() if k == kind), tmp_path / "twin")
    for weights in (folder / part).glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=rf"part {part}: holds only pickles .*expected \*\.safetensors"):
        load_generator(folder, placement=Placement(CPU))


def test_the_parts_above_are_all_that_have_weights(twins: dict[tuple[str, str], Path]) -> None:
    held = {(k, path.parent.name) for (k, _), folder in twins.items() for path in folder.glob("*/*.safetensors")}
    assert held == set(PARTS)


def test_a_tiny_decoder_from_elsewhere_that_is_a_pickle_is_refused(
    twins: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(twins["sd", "epsilon"] / "tiny_decoder", tmp_path / "tiny")
    for weights in elsewhere.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"tiny_decoder .*: holds only pickles"):
        load_generator(twins["sd", "epsilon"], placement=Placement(CPU), tiny_decoder=elsewhere)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("pickle", "holds only pickles"),
        ("short", "bytes, its header says"),
        ("pointer", "git-lfs pointer"),
        ("unknown", "is a FluxPipeline; supported are StableDiffusionPipeline"),
        ("no index", "no model_index.json"),
        ("no part", "part unet: has no config.json"),
        ("shards", "model-00002.safetensors of its index is missing"),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(
    fault: str, said: str, twins: dict[Any, Path], tmp_path: Path
) -> None:
    folder = broken(shutil.copytree(twins["sd", "epsilon"], tmp_path / "twin"), fault)
    with pytest.raises(InputError, match=said):
        load_generator(folder, placement=Placement(CPU))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        load_generator(tmp_path / "nowhere", placement=Placement(CPU))


def test_classes_that_dit_does_not_have_are_refused(generators: dict[tuple[str, str], Generator]) -> None:
    with pytest.raises(InputError, match="class 1000; expected 0 to 999"):
        generators["dit", "epsilon"].conditions(["1000"])


def test_steps_are_taken_again_only_by_samplers_that_can(generators: dict[tuple[str, str], Generator]) -> None:
    config = generators["sd", "epsilon"].scheduler_config
    check_sampler("ddim", config, replace(GUIDED, travel=2))
    with pytest.raises(InputError, match=r"travel=2.*counts its steps"):
        check_sampler("euler", config, replace(GUIDED, travel=2))


def test_the_models_own_sampler_is_recognized(generators: dict[tuple[str, str], Generator]) -> None:
    assert sampler_of(generators["sd", "epsilon"]._pipe.scheduler) == "ddim"
    assert sampler_of(generators["sd3", "flow_prediction"]._pipe.scheduler) == "flow_euler"


def test_without_xformers_asking_for_it_says_so(twins: dict[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(InputError, match=r"attention=xformers: xformers can't be imported.*attention=native"):
        load_generator(twins["sd", "epsilon"], placement=Placement(CPU, attention="xformers"))


def test_a_build_of_xformers_without_kernels_is_found_out(
    twins: dict[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*args: Any) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    fake: Any = types.ModuleType("xformers.ops")
    fake.memory_efficient_attention = no_kernel
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    with pytest.raises(InputError, match=r"installed but doesn't work on cpu \(No operator found"):
        load_generator(twins["sd", "epsilon"], placement=Placement(CPU, attention="xformers"))


def test_an_unknown_back_end_is_refused_by_name(twins: dict[Any, Path]) -> None:
    with pytest.raises(InputError, match=r"attention='magic': is unknown; known: auto, native, xformers"):
        load_generator(twins["sd", "epsilon"], placement=Placement(CPU, attention="magic"))

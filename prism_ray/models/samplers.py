"""Samplers: diffusers' schedulers with one contract, and what each of them can't do.

A sampler is stateful, so one object serves one batch. Every sample has a random generator of its own, on the CPU, so
that noise depends on neither batch mates nor device.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from prism_ray.errors import InputError
from prism_ray.methods.diffusion.clean_images import Level
from prism_ray.methods.diffusion.guidance import Guidance

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "sde-dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "flow_euler": (FlowMatchEulerDiscreteScheduler, {}),
}
"""By name: the scheduler, and what of its config differs from the model's own."""

RESCALED = ("euler", "euler_ancestral")
"""Samplers whose sample is x0 + sigma n instead of having variance 1."""

MEMORYLESS = ("ddim", "ddpm")
"""Samplers that can take a step again: they count no steps and keep no history."""

ONE_STEP = (*MEMORYLESS, *RESCALED, "flow_euler")
"""Samplers that keep no earlier outputs, so that samples can leave a batch between two steps."""


def sampler_of(scheduler: Any) -> str | None:
    """Name of the sampler that a pipeline comes with, None if it is none of ours."""
    for name, (kind, changes) in SAMPLERS.items():
        if type(scheduler) is kind and all(scheduler.config.get(key) == value for key, value in changes.items()):
            return name
    return None


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is that of a flow-matching model."""
    return config.get("_class_name") == "FlowMatchEulerDiscreteScheduler" or bool(config.get("use_flow_sigmas"))


def check_sampler(name: str | None, config: Mapping[str, Any], guidance: Guidance) -> str:
    """The sampler's name, unless it can't do what is asked; then it is refused before anything is computed.

    Args:
        name: key of `SAMPLERS`; None: a model's own that is none of them.
        config: of the scheduler that the model comes with.

    Raises:
        InputError: names the sampler, the reason and the way out.
    """
    if name is None:
        kind, known = config.get("_class_name"), ", ".join(SAMPLERS)
        raise InputError(
            f"method.sampling.sampler=null: the generator comes with {kind}, which is none of ours; use one of {known}"
        )
    if name not in SAMPLERS:
        raise InputError(f"method.sampling.sampler={name!r}: is unknown; known: {', '.join(SAMPLERS)}")
    if is_flow(config) and name not in ("flow_euler", "dpm++", "sde-dpm++", "unipc"):
        raise InputError(
            f"method.sampling.sampler={name}: the model is trained by flow matching, which this sampler can't "
            "follow; use flow_euler, dpm++ or unipc"
        )
    if name == "flow_euler" and not is_flow(config):
        raise InputError(
            "method.sampling.sampler=flow_euler: the model is not trained by flow matching; use ddim or dpm++"
        )
    if name == "euler_ancestral" and config.get("prediction_type") == "sample":
        raise InputError(
            "method.sampling.sampler=euler_ancestral: the model predicts clean samples, which diffusers' scheduler "
            "of that name can't take; use ddpm or sde-dpm++"
        )
    if not guidance.scale:
        return name
    moves_sample = guidance.rule == "clean" and guidance.form == "keep_noise"
    if name == "unipc" and moves_sample:
        raise InputError(
            "method.sampling.sampler=unipc: its corrector rebuilds each sample from the one before and so undoes "
            "method.guidance.form=keep_noise; use dpm++ or euler, or guidance.form=rederive_noise"
        )
    if guidance.travel > 1 and name not in MEMORYLESS:
        raise InputError(
            f"method.guidance.travel={guidance.travel}: takes steps again, and sampler {name} counts its steps; use "
            "ddim or ddpm, or travel=1"
        )
    return name


class Sampler:
    """The steps of one batch, for `methods.diffusion.sampling`.

    Args:
        name: key of `SAMPLERS`.
        config: of the scheduler that the model comes with; how it was trained.
        num_steps: steps from noise to image.
        generators: of each sample, on the CPU.
        device: of the samples.
        eta: noise of ddim, 0 (none) to 1.
        travel_generators: of each sample, for the noise of going back and of the steps that are then taken again, so
            that all others have the noise that they have without time travel.
        mu: shift of the time steps of models with dynamic shifting.
        first: step that it begins with; of `ONE_STEP` samplers only, if it is not 0.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        num_steps: int,
        *,
        generators: Sequence[torch.Generator],
        device: torch.device,
        eta: float = 0.0,
        travel_generators: Sequence[torch.Generator] = (),
        mu: float | None = None,
        first: int = 0,
    ) -> None:
        kind, changes = SAMPLERS[name]
        if is_flow(config) and name != "flow_euler":
            changes = {**changes, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
            changes["flow_shift"] = config.get("shift", 1.0)
        self._name, self._device = name, device
        self.scheduler: Any = kind.from_config(dict(config), **changes)
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        self.scheduler.set_timesteps(num_steps, device=device, **({"mu": mu} if mu and "mu" in accepted else {}))
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        self.timesteps = self.scheduler.timesteps
        self._generators, self._travel_generators = list(generators), list(travel_generators)
        takes = inspect.signature(self.scheduler.step).parameters
        self._options: dict[str, Any] = {"eta": eta} if "eta" in takes else {}
        self._draws = "generator" in takes

    @property
    def num_steps(self) -> int:
        """Evaluations of the network."""
        return len(self.timesteps)

    def initial(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Noise of the scale that the sampler begins with, (B, *shape)."""
        noise = randn_tensor(
            (len(self._generators), *shape), generator=self._generators, device=self._device, dtype=dtype
        )
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def level(self, step: int) -> Level:
        """Signal and noise of a step's sample."""
        if is_flow(self.scheduler.config):
            sigma = float(self.scheduler.sigmas[step])
            return Level("flow_prediction", 1 - sigma, sigma)
        prediction = self.scheduler.config.prediction_type
        if self._name in MEMORYLESS:
            alpha = float(self.scheduler.alphas_cumprod[self.timesteps[step]])
            return Level(prediction, math.sqrt(alpha), math.sqrt(1 - alpha))
        sigma = float(self.scheduler.sigmas[step])
        if self._name in RESCALED:
            return Level(prediction, 1.0, sigma)
        signal = 1 / math.sqrt(1 + sigma * sigma)
        return Level(prediction, signal, sigma * signal)

    def model_input(self, step: int, x: Tensor) -> Tensor:
        """The sample as the network takes it."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, self.timesteps[step])

    def advance(self, step: int, output: Tensor, x: Tensor, *, again: bool = False) -> Tensor:
        """The next sample; `again` says that the step was taken before and gone back from."""
        options = dict(self._options)
        if self._draws:
            options["generator"] = self._travel_generators if again else self._generators
        following = self.scheduler.step(output, self.timesteps[step], x, **options, return_dict=False)[0]
        return following.to(x.dtype)

    def go_back(self, step: int, x: Tensor) -> Tensor:
        """The sample of a step from the one after it, with new noise; of memoryless samplers only."""
        here = self.level(step)
        after = self.level(step + 1) if step + 1 < self.num_steps else Level(here.prediction, 1.0, 0.0)
        kept = here.signal / after.signal
        noise = randn_tensor(x.shape, generator=self._travel_generators, device=x.device, dtype=x.dtype)
        return kept * x + math.sqrt(max(here.noise**2 - (kept * after.noise) ** 2, 0.0)) * noise

"""The clean image inside a noisy one, and how to move it, for every parameterization of a diffusion model.

A noisy sample is x = a x0 + s n with noise n of variance 1; a network's output o is a linear function of x and x0, so
that x0 = cx x + co o with numbers that depend on the noise level alone. Shapes: x, x0, o (B, C, H, W).
"""

import math
from dataclasses import dataclass

from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""What a network's output stands for, by diffusers' names: n, a n - s x0 (with a^2 + s^2 = 1), x0, n - x0."""


@dataclass(frozen=True)
class Level:
    """A noise level as a network sees it: what its output predicts, the signal a and the noise s in x = a x0 + s n."""

    prediction: str
    signal: float
    noise: float

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r}; known: {', '.join(PREDICTIONS)}")

    @property
    def coefficients(self) -> tuple[float, float]:
        """cx and co of x0 = cx x + co o.

        The velocity v = a' n - s' x0 is that of the sample scaled to variance 1, x / r with r^2 = a^2 + s^2, also where
        the sample itself is x0 + s n (Euler).
        Source: Salimans and Ho 2022 (arXiv:2202.00512), section 4, for v; the others by definition.
        """
        a, s = self.signal, self.noise
        if self.prediction == "epsilon":
            return 1 / a, -s / a
        if self.prediction == "sample":
            return 0.0, 1.0
        if self.prediction == "flow_prediction":
            return 1.0, -s
        square = a * a + s * s
        return a / square, -s / math.sqrt(square)

    def clean(self, x: Tensor, output: Tensor) -> Tensor:
        """x0 as the network's output implies it."""
        from_x, from_output = self.coefficients
        return from_x * x + from_output * output

    def rederive_noise(self, x: Tensor, output: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and output that imply x0 + displacement in the same x, so with other noise ("form A").

        Source: the update of Bansal et al. 2023 (Universal Guidance, arXiv:2302.07121) is of this form.
        """
        return x, output + displacement / self.coefficients[1]

    def keep_noise(self, x: Tensor, output: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and output that imply x0 + displacement with the same noise, so in another x ("form B").

        A sampler's next step moves by 3 to 16 times as much as by `rederive_noise`.
        Source: He et al. 2024 (MPGD, arXiv:2311.16424), algorithm 1, here for every parameterization.
        """
        from_x, from_output = self.coefficients
        return x + self.signal * displacement, output + (1 - from_x * self.signal) / from_output * displacement


FORMS = {"keep_noise": Level.keep_noise, "rederive_noise": Level.rederive_noise}
"""How a displacement of x0 is handed to a scheduler, by name."""

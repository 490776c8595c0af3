import pytest
import torch
from test_classifier import TINY, settled, tiny
from torch import Tensor, nn

from prism_ray.models.classifier import Classifier
from prism_ray.models.folding import folded


def images(classifier: Classifier, *, seed: int) -> Tensor:
    return torch.rand(4, classifier.in_chans, 16, 16, generator=torch.Generator().manual_seed(seed))


def norms(classifier: Classifier) -> list[nn.Module]:
    return [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("arch", [*TINY, "efficientnet_lite0"])
@torch.no_grad()
def test_a_folded_network_gives_the_same_logits_without_batch_norm(arch: str) -> None:
    classifier = settled(tiny(arch))
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    made, shown = folded(classifier), images(classifier, seed=3)
    torch.testing.assert_close(made(shown), classifier(shown), rtol=1e-4, atol=1e-5)
    assert not norms(made)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


class Branching(nn.Module):
    """Uses the output of a convolution twice: with batch norm, and as it is."""

    in_chans, num_classes = 1, 3

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return (self.norm(features) + features).mean(dim=(2, 3))


class Repeating(Branching):
    """Sends two convolutions through one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(1, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).mean(dim=(2, 3)) + self.norm(self.other(images)).mean(dim=(2, 3))


@pytest.mark.parametrize("network", [Branching(), Repeating()])
@torch.no_grad()
def test_a_network_that_would_answer_differently_stays_as_it_is(network: nn.Module) -> None:
    classifier = settled(Classifier(network, architecture="own", model_args={}, input_size=16, mean=[0.3], std=[0.4]))
    made, shown = folded(classifier), images(classifier, seed=3)
    assert torch.equal(made(shown), classifier(shown))
    assert len(norms(made)) == 1

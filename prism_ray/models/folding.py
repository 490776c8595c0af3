"""Networks that answer as before in fewer passes over their activations."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from prism_ray.models.classifier import Classifier

TOLERANCE = 1e-4
"""By how much of their largest value logits may differ: rounding is below a tenth of it."""


@torch.no_grad()
def folded(classifier: Classifier) -> Classifier:
    """A copy in eval mode with batch norm inside the convolutions before it: the same logits up to rounding.

    Which belong together is seen in a forward pass. Where the output of a convolution is used in another way too, and
    wherever else the copy answers differently, the classifier itself is returned.
    """
    parameter = next(classifier.parameters())
    shape = (2, classifier.in_chans, classifier.input_size, classifier.input_size)
    probe = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    made = copy.deepcopy(classifier).eval()
    expected = made(probe)
    for conv, norm in _pairs(made, probe):
        _fold(made, conv, norm)
    is_equal = torch.allclose(made(probe), expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    return made if is_equal else classifier


def _pairs(network: nn.Module, probe: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norm that takes their output, where both are used once."""
    made_by: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    outputs: list[Tensor] = []  # kept, so that none has the id of another
    uses: Counter[str] = Counter()

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            uses[name] += 1
            if isinstance(module, nn.Conv2d):
                made_by[id(output)] = name
                outputs.append(output)
            elif id(inputs[0]) in made_by:
                pairs.append((made_by[id(inputs[0])], name))

        return module.register_forward_hook(hook)

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [watch(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
    try:
        network(probe)
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, norm) for conv, norm in pairs if uses[conv] == uses[norm] == 1]


def _fold(network: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    # timm's batch norm may have an activation behind it.
    left = [part for name, part in norm.named_children() if name in ("drop", "act")]
    network.set_submodule(norm_name, nn.Sequential(*left))

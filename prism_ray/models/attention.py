"""Attention back ends of a generator's network: PyTorch's own, or xformers where it works.

`set_attention_backend` of diffusers does not reach the processors of U-Nets and of SD3, which call PyTorch's own
attention; xformers has a switch of its own there.
"""

import importlib
from typing import Any

import torch

from prism_ray.errors import InputError, one_line

BACKENDS = ("auto", "native", "xformers")
"""`auto` is `native`: PyTorch's attention picks the fastest kernel of a device, and is not slower than xformers."""


def set_attention(network: Any, backend: str, device: torch.device) -> None:
    """Have a diffusers network compute attention by a back end.

    Raises:
        InputError: the name is unknown, or xformers is absent or doesn't work on this device.
    """
    if backend not in BACKENDS:
        raise InputError(f"generator.attention={backend!r}: is unknown; known: {', '.join(BACKENDS)}")
    if backend == "xformers":
        problem = xformers_problem(device)
        if problem is not None:
            raise InputError(
                f"generator.attention=xformers: {problem}; set generator.attention=native, which needs nothing, or "
                "install an xformers built for this torch"
            )
        network.enable_xformers_memory_efficient_attention()


def xformers_problem(device: torch.device) -> str | None:
    """Why xformers can't be used on a device, None if it can. It is tried, with the gradient that guidance needs.

    A build for another torch can be imported and then has no kernel.
    """
    try:
        ops = importlib.import_module("xformers.ops")
    except ImportError as error:
        return f"xformers can't be imported ({one_line(error)})"
    try:
        query = torch.zeros(1, 16, 1, 16, device=device, requires_grad=True)
        ops.memory_efficient_attention(query, query, query).sum().backward()
    except Exception as error:  # each build fails in its own way
        return f"xformers is installed but doesn't work on {device.type} ({one_line(error)[:120]})"
    return None

"""Two small networks of different families, frozen, with batch norm that has seen something."""

import pytest
from torch import nn

from tests.methods.nets import ConvBnNet, ResidualNet, prepared


@pytest.fixture
def primary() -> nn.Module:
    return prepared(ConvBnNet(), 1)


@pytest.fixture
def auxiliary() -> nn.Module:
    return prepared(ResidualNet(), 2)

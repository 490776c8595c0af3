"""The methods as pure functions of tensors, numbers and seeds: no Ray, no disk, no configuration, no logging.

Modules import torch, numpy, the standard library and each other. This file imports nothing, so that the light ones
(`batches`, `inversion.subsets`, `inversion.budgets`) can be used before torch is loaded.
"""

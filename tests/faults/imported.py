"""Imported once by the process that runs are forked from; none of it computes anything or starts a thread."""

import gc

import matplotlib
import pandas
import timm
import torch
import torchmetrics

import prism_ray.inspection
import prism_ray.pipeline
import prism_ray.stages.evaluate
import prism_ray.stages.item_worker
import prism_ray.stages.worker
from prism_ray.cli import compose

__all__ = ["matplotlib", "pandas", "prism_ray", "timm", "torch", "torchmetrics"]

compose(["recipe=digits_smoke"])  # imports Hydra
gc.freeze()  # what is never looked at is never copied

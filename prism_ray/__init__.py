"""prism_ray makes training sets out of models: dataset distillation and data-free distillation on Ray."""

__version__ = "0.1.0"

"""Networks behind one contract: pixels in, logits out. Importing this package registers our own families with timm."""

from prism_ray.models import families

__all__ = ["families"]

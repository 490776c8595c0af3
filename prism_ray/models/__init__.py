"""Networks behind one contract: pixels in, logits out.

Importing this package loads neither torch nor timm, so that `prism_ray.models.weights` can refuse a wrong name or file
at once. `import prism_ray.models.families` (or `.classifier`) registers the architectures defined here with timm.
"""

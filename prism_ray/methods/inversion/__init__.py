"""Images by inversion of trained classifiers: statistics teachers, budgets, augmentations, objective and optimizer.

Source: PRISM (PRIors from diverse Source Models, arXiv:2511.09905) as in its released program, and SRe2L
(arXiv:2306.13092), which is its case of a single teacher. This file imports nothing; see `prism_ray.methods`.
"""

"""Synthesis by guided diffusion: energies of teachers, clean-image estimates, displacements, the sampling loop.

Pure tensor functions; schedulers and networks come in as plain objects with a small contract.
"""

"""Prompts: what a text-to-image model is asked for. Disambiguated names, balanced content and style, a frozen table.

Source: the three parts of PRISM's diversified prompts (arXiv 2509.16897); their form is this project's own.
"""

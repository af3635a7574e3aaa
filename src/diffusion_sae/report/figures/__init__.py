"""Figures for papers, cards and pages: each function returns a matplotlib figure, which `save_figure` writes.

One module a family, `style` for the look of all of them.
"""

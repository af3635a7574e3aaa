"""Recipes: everything from images to a published artifact, stage by stage, from one file."""

from .config import Recipe
from .run import RecipeRun

__all__ = ["Recipe", "RecipeRun"]

"""Training: recipes as data, the loop, exact resuming."""

from .recipe import Recipe, list_recipes, read_recipe

__all__ = ["Recipe", "list_recipes", "read_recipe"]

"""Training: recipes as data, the loop, exact resuming."""

from .distributed import World, world
from .fit import fit, multi_view_test
from .recipe import Recipe, list_recipes, read_recipe

__all__ = ["Recipe", "World", "fit", "list_recipes", "multi_view_test", "read_recipe", "world"]

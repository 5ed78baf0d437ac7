"""Lists of compression algorithms: read from a file, made for a model, driven by a training script of the user's."""

from dwindle.recipe.compression.from_recipe import RecipeRun, from_recipe
from dwindle.recipe.compression.making import make_compressors
from dwindle.recipe.compression.materials import Materials

__all__ = ["Materials", "RecipeRun", "from_recipe", "make_compressors"]

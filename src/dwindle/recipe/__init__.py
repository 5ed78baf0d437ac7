"""Recipes: a YAML file that says a whole run, and the runner that carries it out, resumably."""

from dwindle.recipe.compression import RecipeRun, from_recipe
from dwindle.recipe.context import Event
from dwindle.recipe.model_source import load_model
from dwindle.recipe.parsing import load_recipe, parse_recipe
from dwindle.recipe.runner import RunResult, run_recipe
from dwindle.recipe.schema import Recipe

__all__ = [
    "Event",
    "Recipe",
    "RecipeRun",
    "RunResult",
    "from_recipe",
    "load_model",
    "load_recipe",
    "parse_recipe",
    "run_recipe",
]

"""Searching a recipe: its open places, its trials, each a recipe of its own, and the best of them."""

from dwindle.recipe.searching.reading import load_search, parse_search
from dwindle.recipe.searching.running import SearchOutcome, search_recipe
from dwindle.recipe.searching.subject import RecipeSubject, make_subject

__all__ = ["RecipeSubject", "SearchOutcome", "load_search", "make_subject", "parse_search", "search_recipe"]

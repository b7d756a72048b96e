"""The recipe: everything that defines a training run, as one validated table.

Each option of its components is at once a YAML key, a command-line flag and a line of the help text.
Whatever the source of a value, it is parsed and checked by the option's own parser; all problems of a recipe
are reported together. Nothing here imports torch, so `--help` and a misspelt flag answer at once.
"""

from vimtune.recipe.components import MethodSettings, OptimisationSettings, RunSettings
from vimtune.recipe.earlier import complete_stored, options_then
from vimtune.recipe.files import load_recipe
from vimtune.recipe.options import OPTION_KEYS, changed_options, keeping
from vimtune.recipe.paths import RUN_FILES, absolute_paths, path_problems
from vimtune.recipe.purposes import keys_that_serve, keys_without_use, refuse_keys_without_use
from vimtune.recipe.recipe import TASK, Recipe, RecipeError, components_of, keys_of
from vimtune.tasks.images.settings import BackboneSettings, DataSettings

__all__ = [
    "OPTION_KEYS",
    "RUN_FILES",
    "TASK",
    "BackboneSettings",
    "DataSettings",
    "MethodSettings",
    "OptimisationSettings",
    "Recipe",
    "RecipeError",
    "RunSettings",
    "absolute_paths",
    "changed_options",
    "complete_stored",
    "components_of",
    "keeping",
    "keys_of",
    "keys_that_serve",
    "keys_without_use",
    "load_recipe",
    "options_then",
    "path_problems",
    "refuse_keys_without_use",
]

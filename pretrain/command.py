"""From the words of a command line to a recipe: a named one, a file, or what the doctor proposes."""

from __future__ import annotations

from collections.abc import Sequence

from hybridssl.errors import UserError
from hybridssl.objectives import options_types
from hybridssl.recipe import parse_overrides, read_yaml, resolve
from pretrain.doctor import automatic
from pretrain.recipe import AUTO, Recipe, find


def load(arguments: Sequence[str]) -> Recipe:
    """The recipe of a command line: `recipe=NAME_OR_PATH` (default: auto) and any `key=value`. Raises UserError."""
    overrides = parse_overrides(arguments)
    chosen = str(overrides.pop("recipe", "") or AUTO)
    if chosen == AUTO:
        name, layer = AUTO, automatic(overrides)
    else:
        name, layer = find(chosen).stem, read_yaml(find(chosen))
    recipe = resolve(Recipe, [{"name": name}, layer, overrides])
    if not recipe.data.sets:
        raise UserError("no data: say data.train=FOLDER (a folder with index.json, from `python -m shards build`)")
    if not recipe.out:
        raise UserError(f"no place for the run: say out=runs/{recipe.name}")
    if not recipe.objectives:
        raise UserError(f"no objective: the recipe needs at least one of objectives.{{{', '.join(options_types())}}}")
    return recipe

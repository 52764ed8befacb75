"""The commands about recipes: check one, list and copy those that come along, print the schema of all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli.options import Json, Overrides, Quiet, emit
from llmprune.cli.terminal import print_json
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_files import copy_recipe, recipe_names
from llmprune.core.recipe_text import load_recipe

app = typer.Typer()
recipes = typer.Typer(help="The recipes that come with llmprune.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")


@app.command()
def validate(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a recipe without running it; prints it with every default."""
    from llmprune.core.budgets import parse_budget, parse_pick
    from llmprune.core.recipe_text import to_yaml

    checked = load_recipe(recipe, overrides)
    parse_pick(checked.export.pick)
    for budget in checked.search.budgets:
        parse_budget(budget)
    emit(checked.model_dump(mode="json"), json, lambda: [to_yaml(checked).rstrip()])


@app.command()
def schema(json: Json = True, quiet: Quiet = False) -> None:
    """Print the JSON schema of a recipe."""
    print_json(Recipe.model_json_schema())


@recipes.command("ls")
def recipes_ls(json: Json = False, quiet: Quiet = False) -> None:
    """List the recipes."""
    names = recipe_names()
    emit({"recipes": names}, json, lambda: list(names))


@recipes.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A name that `recipes ls` prints.")],
    to: Annotated[Path, typer.Argument(help="File or directory.")] = Path(),
) -> None:
    """Copy a recipe, to change it."""
    print(copy_recipe(name, to))

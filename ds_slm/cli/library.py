"""`ds-slm recipes`: the existing recipes, with published figures beside those of existing runs. Imports no torch.

library, runs/* --ours_of--> rows --> a table, or one JSON object
"""

from dataclasses import asdict
from pathlib import Path

from ds_slm.cli import tables
from ds_slm.cli.ours import ours_of
from ds_slm.cli.output import print_json
from ds_slm.recipe import loading
from ds_slm.recipe.counts import parameters


def run(runs: Path, as_json: bool) -> None:
    """Print the table.

    Args:
        runs: the folder of the run folders.
        as_json: print one object instead.
    """
    rows = []
    for name in loading.library_names():
        recipe = loading.load(name)
        headline = recipe.targets[0] if recipe.targets else None
        ours = ours_of(name, recipe, runs)

        rows.append(
            {
                "name": name,
                "reproduces": recipe.card.name,
                "params": parameters(recipe.model),
                "published_params": recipe.card.params,
                "tokens": recipe.train.steps * recipe.train.global_batch_tokens,
                "metric": headline.metric if headline else None,
                "published": headline.published if headline else None,
                "ours": str(ours) if ours else None,
                "run": {**asdict(ours), "counts": ours.counts} if ours else None,
            }
        )

    if as_json:
        print_json({"recipes": rows})
    else:
        tables.show_recipes(rows)

"""`ds-slm sft --preview N`: which tokens of some conversations are trained, in the terminal and as HTML."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ds_slm.cli.flags import parse_sources
from ds_slm.cluster.limits import positive
from ds_slm.errors import ConfigError


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of a preview, which the training program does not see."""
    group = parser.add_argument_group("a look at the masks")
    group.add_argument("--preview", type=positive, metavar="N", help="show the masks of N conversations; train nothing")
    group.add_argument("--ids", action="store_true", help="with --preview: print the id of every token")
    group.add_argument("--out", type=Path, metavar="FILE", help="with --preview: its HTML (preview-RECIPE.html)")


def show(name: str, args: Namespace) -> None:
    """Show the masks of some conversations, in the terminal and as HTML; without a base in the recipe's tokenizer."""
    from rich.console import Console

    from ds_slm.files import replace_text
    from ds_slm.publish.models import open_base
    from ds_slm.recipe import loading
    from sft import preview
    from sft.checks import section
    from sft.prepare import prepare_conversations
    from sft.rows import summary_line

    recipe, stem = loading.load(name, args.set), loading.recipe_path(name).stem
    base, with_ids = args.base, args.ids
    section(recipe)
    sources, out = parse_sources(args.source), args.out or Path(f"preview-{stem}.html")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: expected a file in a folder that exists.")

    tokenizer_folder = None
    if base is not None:
        tokenizer_folder = open_base(base, recipe).tokenizer_folder
    prepared = prepare_conversations(recipe, args.data_root / stem, tokenizer_folder, sources)
    shown, summary = preview.read_shown(recipe, prepared, args.preview)

    # The terminal shows masks in colours, or by marks if it has no colours.
    console = Console(highlight=False)
    for one in shown:
        console.print(f"\nconversation {one.number:,}: {one.counts}", style="bold")
        plain = console.color_system is None or console.no_color
        console.print(preview.as_text(one, with_ids, with_marks=plain), soft_wrap=True, end="")
    print(f"\n{summary_line(summary)}")

    replace_text(out, preview.as_html(stem, shown, summary, with_ids))
    print(f"written: {out}")

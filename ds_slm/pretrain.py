"""What DeepSpeed launches for pretraining: read the flags, then hand over to the loop.

deepspeed ds_slm/pretrain.py                                          the demo recipe on this machine
deepspeed --hostfile hostfiles/two_node ds_slm/pretrain.py --recipe slm-10m
python ds_slm/pretrain.py                                             one device, no launcher
"""

import argparse
import difflib
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ds_slm.train import launch

PACKAGE = Path(__file__).resolve().parent

# Python puts this script's own folder first on the path, where `data` and `recipe` would be top-level modules.
sys.path[:] = [str(PACKAGE.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != PACKAGE)]
# Compiled ops need the ninja that was installed beside this interpreter, also in a remote shell.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

from ds_slm.distributed import rendezvous  # noqa: E402
from ds_slm.distributed import world as worlds  # noqa: E402
from ds_slm.errors import ConfigError, DataError, RecipeError  # noqa: E402 - after the path is right

first_on_host = worlds.first_on_host()


def add_training_flags(parser: argparse.ArgumentParser, default_recipe: str) -> None:
    """The flags that pretraining and fine-tuning share."""
    parser.add_argument("--recipe", default=default_recipe, help="name in the library, or path of a .toml file")
    parser.add_argument("--run-dir", type=Path, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--ds-config", type=Path, default=PACKAGE.parent / "ds_configs" / "zero1.json")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where prepared data lies or goes")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME=PATH", help="replace a source by local files"
    )
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto")
    parser.add_argument(
        "--max-steps", type=positive, metavar="N", help="stop after this step; the schedule keeps the recipe's length"
    )
    parser.add_argument(
        "--micro-batch", type=_micro_batch, metavar="N|auto", help="rows per forward and device; auto measures"
    )
    parser.add_argument("--profile", type=_steps, metavar="A:B", help="tell where the time of steps A to B goes")
    parser.add_argument(
        "--skip-rows",
        type=_rows,
        action="append",
        default=[],
        metavar="A:B|none",
        help="leave out the rows at global positions A to B - 1, in later launches too; may come more than once; "
        "none takes again what earlier launches left out",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=25.0,
        metavar="S",
        help="seconds from a stopping signal to the end (default 25)",
    )
    parser.add_argument("--allow-change", action="store_true", help="let a resumed run change its learning rate")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="train together on hosts whose code or libraries differ"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the recipe")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds: expected 0 or more, as in 25")
    return seconds


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps: expected A:B, as in 5:8")
    return range(int(first), int(last) + 1)


def _rows(text: str) -> range:
    if text == "none":
        return range(0)
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of positions: expected A:B with A < B, as in 96:112")
    return range(int(first), int(end))


def run_dir(args: argparse.Namespace, recipe_name: str) -> Path:
    """The run folder: the one that was named, or runs/RECIPE."""
    return args.run_dir or Path("runs") / recipe_name


def options(args: argparse.Namespace, recipe_name: str) -> "launch.Options":
    """What a launch takes of them."""
    from ds_slm.train import launch

    return launch.Options(
        run_dir=run_dir(args, recipe_name),
        ds_config=args.ds_config,
        recipe_name=recipe_name,
        resume=args.resume,
        max_steps=args.max_steps,
        micro_batch=args.micro_batch,
        allow_change=args.allow_change,
        allow_mixed=args.allow_mixed,
        profile=args.profile,
        skip_rows=tuple(args.skip_rows),
        grace_s=args.grace,
    )


def report(line: str) -> None:
    """Print a line about the data, on the rank of this host that prepares them."""
    if first_on_host or "another process" not in line:
        print(line, flush=True)


def _micro_batch(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def parse_sources(pairs: list[str]) -> dict[str, Path]:
    """NAME=PATH flags. Raises DataError for every malformed one."""
    malformed = [pair for pair in pairs if not all(pair.partition("="))]
    if malformed:
        raise DataError([f"--source {pair!r}: expected NAME=PATH." for pair in malformed])
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


class FlagParser(argparse.ArgumentParser):
    """A training program's parser: mistakes are a sentence, told once for all ranks; rank 0 alone prints the help."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}. {self.prog} --help lists the flags.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; the nearest flag is named for one that is not known."""
        found, unknown = self.parse_known_args(args, namespace)
        known = [name for name in self._option_string_actions if name.startswith("--")]
        problems = []
        for one in unknown:
            near = difflib.get_close_matches(one.partition("=")[0], known, n=1) if one.startswith("-") else []
            problems.append(f"{one} is not known" + (f": did you mean {near[0]}?" if near else "."))
        if problems:
            raise ConfigError([*problems, f"{self.prog} --help lists the flags."])
        return found

    def print_help(self, file: Any = None) -> None:
        """On rank 0."""
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


def parser(prog: str = "pretrain.py") -> FlagParser:
    """Every flag of this program."""
    parser = FlagParser(prog=prog, description="Pretrain a recipe.", allow_abbrev=False)
    add_training_flags(parser, default_recipe="demo")
    return parser


def main() -> None:
    """Pretrain a recipe."""
    args = parser().parse_args()

    from ds_slm.cluster.hostfile import refuse_missing_hostfile
    from ds_slm.data.shards.prepare import prepare
    from ds_slm.recipe import schema

    name = schema.recipe_path(args.recipe).stem
    recipe = schema.load(args.recipe, args.set, run_dir(args, name))
    if recipe.sft is not None:
        raise RecipeError(
            f"recipe {args.recipe!r} fine-tunes a base: launch sft/train.py --recipe {name} --base MODEL."
        )
    sources = parse_sources(args.source)
    refuse_missing_hostfile()

    from ds_slm.data.rows import PretrainRows
    from ds_slm.publish.generate import sampler
    from ds_slm.train import launch

    task = launch.Task(
        prepare=lambda: prepare(recipe, name, args.data_root, sources, report=report),
        rows=lambda corpus: PretrainRows(recipe, corpus),
        sample=lambda corpus: sampler(corpus.tokenizer_folder, recipe.eval.prompts),
        val_tokens_per_byte=lambda corpus: corpus.val_tokens / corpus.val_bytes,
    )
    launch.run(recipe, options(args, name), task)


if __name__ == "__main__":
    sys.exit(rendezvous.run_rank(main))

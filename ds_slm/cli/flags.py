"""Every flag of the programs that DeepSpeed launches, once: `ds-slm train` and `ds-slm sft` take and list the same."""

import argparse
import difflib
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ds_slm.cluster.limits import positive
from ds_slm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ds_slm.train.task import Options

CHECKOUT = Path(__file__).resolve().parents[2]


LEAST_GBIT_PER_S = 0.001
MOST_TOKENS = 1e15
"""More tokens than anybody has trained on."""


def of_pretraining(prog: str = "pretrain.py", examples: str | None = None) -> "FlagParser":
    """The flags of ds_slm/pretrain.py; examples end the help."""
    parser = FlagParser(prog, "Pretrain a recipe.", examples)
    add_training_flags(parser, default_recipe="demo")
    return parser


def of_fine_tuning(prog: str = "train.py", examples: str | None = None) -> "FlagParser":
    """The flags of sft/train.py; examples end the help."""
    parser = FlagParser(prog, "Fine-tune a base model.", examples)
    add_training_flags(parser, default_recipe="demo-instruct")
    return parser


def add_training_flags(parser: argparse.ArgumentParser, default_recipe: str) -> None:
    """The flags that pretraining and fine-tuning share."""
    # What is trained, and where it is.
    parser.add_argument("--recipe", default=default_recipe, help="name in the library, or path of a .toml file")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="begin with its weights: run folder, RUN/checkpoints/best, or Hugging Face folder",
    )
    parser.add_argument("--run-dir", type=Path, help="run folder (default: runs/RECIPE)")
    parser.add_argument(
        "--ds-config",
        type=Path,
        default=CHECKOUT / "ds_configs" / "zero1.json",
        metavar="FILE",
        help="what only changes memory and speed (default ds_configs/zero1.json)",
    )
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where prepared data lies or goes")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME=PATH", help="replace a source by local files"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the recipe")

    # How far, and how.
    parser.add_argument(
        "--resume",
        choices=("auto", "must", "never"),
        default="auto",
        help="auto: go on from the newest checkpoint, if there is one; must: refuse to begin anew; never: refuse a "
        "folder that holds anything (default auto)",
    )
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
    # Signals, and permissions.
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
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it


def token_count(text: str) -> int:
    """A number of tokens: 300000, 300_000, 300k, 300M or 1.5B. Raises ConfigError for anything else."""
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)([kKmMbB]?)", text)
    number = float(found[1].replace("_", "").replace(",", "")) if found else 0.0
    count = number * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2].lower()] if found else 0.0
    if not 1 <= count <= MOST_TOKENS:
        raise ConfigError(f"{text!r} is not a number of tokens: expected one such as 500k, 300M or 1.5B.")
    return round(count)


def link_speed(text: str) -> float:
    """The speed of a link in Gbit/s: 10, 10G, 10Gbit, 10Gbit/s, 10Gbps or 400Mbit/s.

    Raises:
        ConfigError: it is none; bytes per second, as in 1GB/s, are refused, too.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MGT](?:[Bb]its?(?:/s|ps)?|bps|b/s|b)?)?", text)
    speed = float(found[1]) * {"M": 1e-3, "G": 1.0, "T": 1e3}[(found[2] or "G")[0]] if found else 0.0
    if not LEAST_GBIT_PER_S <= speed < math.inf:
        raise ConfigError(
            f"--network {text!r}: not the speed of a link: expected Gbit/s, such as 10 or 10Gbit/s, or 400Mbit/s."
        )
    return speed


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


def options(args: argparse.Namespace, recipe_name: str) -> "Options":
    """A launch's options, from the flags."""
    from ds_slm.train.task import Options

    return Options(
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


def _micro_batch(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def parse_sources(pairs: list[str]) -> dict[str, Path]:
    """NAME=PATH flags. Raises DataError for every malformed one."""
    malformed = [pair for pair in pairs if not all(pair.partition("="))]
    if malformed:
        raise DataError([f"--source {pair!r}: expected NAME=PATH." for pair in malformed])
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


class FlagParser(argparse.ArgumentParser):
    """A training program's parser: a mistake is one sentence, printed once for all ranks; rank 0 prints the help."""

    def __init__(self, prog: str, description: str, examples: str | None) -> None:
        """Examples end the help, with their lines unchanged."""
        lines_as_they_are = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, examples, formatter_class=lines_as_they_are, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}. {self.prog} --help lists the flags.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but for an unknown flag the nearest one is named."""
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
        """Print the help, on rank 0 only."""
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)

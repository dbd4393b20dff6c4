"""The program that DeepSpeed launches for pretraining: it reads the flags and starts the loop.

deepspeed ds_slm/pretrain.py                                          the demo recipe on this machine
deepspeed --hostfile hostfiles/two_node ds_slm/pretrain.py --recipe slm-10m
deepspeed ds_slm/pretrain.py --recipe mine.toml --base runs/imported  begins with the weights of another model
python ds_slm/pretrain.py                                             one device, no launcher
"""

import gc
import os
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

# Python puts this script's own folder first on the path, where `data` and `recipe` would be top-level modules.
sys.path[:] = [str(PACKAGE.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != PACKAGE)]
# Compiled ops need the ninja that was installed beside this interpreter, also in a remote shell.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

from ds_slm.cli import flags  # noqa: E402
from ds_slm.distributed import rendezvous  # noqa: E402
from ds_slm.distributed import world as worlds  # noqa: E402
from ds_slm.errors import RecipeError  # noqa: E402 - after the path is right
from ds_slm.files import Waiting  # noqa: E402

first_on_host = worlds.first_on_host()


def report(line: str) -> None:
    """Print a line about the data; leaves out that a host's other ranks wait for its first one, which is normal."""
    if first_on_host or not isinstance(line, Waiting):
        print(line, flush=True)


def main() -> None:
    """Pretrain a recipe."""
    args = flags.of_pretraining().parse_args()
    gc.disable()  # `launch.run` turns it on: what is imported until then stays, and is not worth searching

    from ds_slm.cluster.hostfile import refuse_missing_hostfile
    from ds_slm.data.shards.prepare import needed_folders, prepare
    from ds_slm.data.shards.prepared import Prepared
    from ds_slm.recipe import loading

    name = loading.recipe_path(args.recipe).stem
    recipe = loading.load(args.recipe, args.set, flags.run_dir(args, name))
    if recipe.sft is not None:
        raise RecipeError(
            f"recipe {args.recipe!r} fine-tunes a base: launch sft/train.py --recipe {name} --base MODEL."
        )
    sources = flags.parse_sources(args.source)
    refuse_missing_hostfile()

    from ds_slm.data.rows import PretrainRows
    from ds_slm.data.shards.writer import TEXT, DocumentFormat
    from ds_slm.evaluate.in_training import scored_tasks
    from ds_slm.files import NeededFolder
    from ds_slm.publish.generate import sampler
    from ds_slm.publish.models import needed_base, open_base
    from ds_slm.train import launch
    from ds_slm.train.task import Task

    base = cache(lambda: open_base(args.base, recipe)) if args.base else None

    def needs() -> list[NeededFolder]:
        """The shards and, where there is one, the base."""
        shards = needed_folders(recipe, args.data_root / name, sources)
        return [*shards, needed_base(args.base, base)] if base else shards

    def corpus() -> Prepared:
        document_format = DocumentFormat(tokenizer_of_base=base().tokenizer_folder) if base else TEXT
        return prepare(recipe, args.data_root / name, sources, report=report, document_format=document_format)

    task = Task(
        needs=needs,
        prepare=corpus,
        report=report,
        rows=lambda corpus: PretrainRows(recipe, corpus),
        sample=lambda corpus: sampler(corpus.tokenizer_folder, recipe.eval.prompts),
        val_tokens_per_byte=lambda corpus: corpus.val_tokens / corpus.val_bytes,
        benchmarks=lambda corpus: scored_tasks(recipe, corpus.tokenizer_folder, worlds.rank(), report),
        base=base,
    )
    launch.run(recipe, flags.options(args, name), task)


if __name__ == "__main__":
    sys.exit(rendezvous.run_rank(main))

"""The program that DeepSpeed launches for fine-tuning: it reads the flags, opens the base and starts the loop.

deepspeed sft/train.py --recipe demo-instruct --base runs/demo
deepspeed --hostfile hostfiles/two_node sft/train.py --recipe axiom-380m-instruct --base runs/axiom-380m
"""

import gc
import os
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Python puts this script's own folder first on the path, where `rows` would be a top-level module.
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "sft")]
# Compiled ops need the ninja that was installed beside this interpreter, also in a remote shell.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

from ds_slm.cli import flags  # noqa: E402
from ds_slm.distributed import rendezvous  # noqa: E402
from ds_slm.distributed import world as worlds  # noqa: E402
from ds_slm.errors import ConfigError  # noqa: E402 - after the path is right
from ds_slm.pretrain import first_on_host, report  # noqa: E402


def main() -> None:
    """Fine-tune a base on conversations."""
    args = flags.of_fine_tuning().parse_args()
    if args.base is None:
        raise ConfigError("--base MODEL: name the run folder, checkpoint or Hugging Face folder to begin with.")
    gc.disable()  # `launch.run` turns it on: what is imported until then stays, and is not worth searching

    from ds_slm.cluster.hostfile import refuse_missing_hostfile
    from ds_slm.recipe import loading
    from sft.checks import section

    name = loading.recipe_path(args.recipe).stem
    recipe = loading.load(args.recipe, args.set, flags.run_dir(args, name))
    section(recipe)
    sources = flags.parse_sources(args.source)
    refuse_missing_hostfile()

    from ds_slm.data.shards.prepare import needed_folders
    from ds_slm.data.shards.prepared import Prepared
    from ds_slm.data.tokenizers.tokenizer import IM_END
    from ds_slm.evaluate.in_training import scored_tasks
    from ds_slm.files import NeededFolder
    from ds_slm.publish.generate import sampler
    from ds_slm.publish.models import needed_base, open_base
    from ds_slm.train import launch
    from ds_slm.train.task import Task
    from sft.chatml import ChatML
    from sft.encode import conversation_format
    from sft.prepare import prepare_conversations
    from sft.rows import ConversationRows, summary_line

    base = cache(lambda: open_base(args.base, recipe))

    def rows(corpus: Prepared) -> ConversationRows:
        found = ConversationRows(recipe, corpus)
        if first_on_host:
            print(summary_line(found.summary()), flush=True)
        return found

    def needs() -> list[NeededFolder]:
        """The conversations' shards, and the base."""
        shards = needed_folders(recipe, args.data_root / name, sources, conversation_format(recipe))
        return [*shards, needed_base(args.base, base)]

    task = Task(
        needs=needs,
        prepare=lambda: prepare_conversations(recipe, args.data_root / name, base().tokenizer_folder, sources, report),
        report=report,
        rows=rows,
        sample=lambda corpus: sampler(
            corpus.tokenizer_folder,
            recipe.eval.prompts,
            encode=lambda tokenizer, prompt: ChatML(tokenizer).prompt([{"role": "user", "content": prompt}]),
            end_token=IM_END,
        ),
        val_tokens_per_byte=lambda corpus: None,
        benchmarks=lambda corpus: scored_tasks(recipe, corpus.tokenizer_folder, worlds.rank(), report),
        base=base,
    )
    launch.run(recipe, flags.options(args, name), task)


if __name__ == "__main__":
    sys.exit(rendezvous.run_rank(main))

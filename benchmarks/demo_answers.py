"""The result of the demo's fine-tuning: held-out assistant loss before and after, and answers from the export.

    runs/demo-instruct + exports/demo-instruct --> table, answers; exit code 1 if the loss fell by less than 0.5 nats
    or an answer did not end by itself

python benchmarks/demo_answers.py runs/demo-instruct exports/demo-instruct
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ds_slm.errors import CheckpointError, run_program
from ds_slm.run import metrics_file

QUESTIONS = (
    "What does json.dumps do?",
    "Explain os.path.join.",
    "What is io.StringIO for?",
    "Describe the function re.findall.",
    "What does math.sqrt do?",
    "What is collections.Counter for?",
)
LEAST_GAIN_NATS = 0.5
LONGEST_ANSWER_TOKENS = 96


def answers(folder: Path, questions: tuple[str, ...]) -> dict[str, tuple[str, bool]]:
    """Each question's answer through transformers, always with the likeliest token, and whether it ended by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    found = {}
    for question in questions:
        conversation = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER_TOKENS, do_sample=False)
        new_ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        ended = new_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        found[question] = tokenizer.decode(new_ids, skip_special_tokens=True).strip(), ended
    return found


def main() -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("export", type=Path)
    args = parser.parse_args()

    if not (args.run / "done.json").is_file():
        raise CheckpointError(f"{args.run} has no done.json: the run is not finished; launch it again to go on.")

    records = metrics_file.read(args.run)
    evaluations, steps = records["val"], records["train"]
    base, tuned = evaluations[0], evaluations[-1]
    found = answers(args.export, QUESTIONS)

    console = Console()
    table = Table()
    table.add_column("held-out assistant tokens, nats each")
    table.add_column("loss", justify="right")
    table.add_row("the base", f"{base['loss']:.4f}")
    table.add_row(str(args.run), f"{tuned['loss']:.4f}")
    console.print(table)

    for question, (answer, ended) in found.items():
        end = "" if ended else " ... (did not end)"
        console.print(f"[bold]Q: {question}[/bold]")
        console.print(f"A: {answer}{end}", markup=False, highlight=False)

    seconds = sum(record["step_s"] for record in steps)
    conversations = sum(record["conversations"] for record in steps)
    console.print(
        f"\nmade: {args.run}: step {tuned['step']}, {conversations:,} conversations in {seconds:.0f} s of steps\n"
        f"      {args.export}: a Hugging Face folder with its chat template",
        highlight=False,
    )

    problems = [] if base["loss"] - tuned["loss"] >= LEAST_GAIN_NATS else ["the loss fell by less than 0.5 nats"]
    problems += [f"no end to {question!r}" for question, (_, ended) in found.items() if not ended]
    for problem in problems:
        console.print(problem, style="bold red")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_program(main))

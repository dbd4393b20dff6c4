"""The examples that end each verb's --help."""

EXAMPLES = {
    "recipes": ("recipes", "recipes --runs /data/runs --json"),
    "init": ("init mine --text my/texts", "init mine --from runs/demo --text my/texts --tokens 300M"),
    "plan": (
        "plan slm-10m --devices 8",
        "plan axiom-380m --hostfile hostfiles/two_node --ds-config ds_configs/zero2.json --network 10",
    ),
    "prepare": ("prepare demo", "prepare slm-10m --source fineweb-edu=my/texts --max-tokens 1000000"),
    "doctor": (
        "doctor --hostfile hostfiles/two_node",
        "doctor --hostfile hostfiles/two_node --recipe slm-10m --json",
    ),
    "train": ("train demo --devices 2", "train slm-10m --hostfile hostfiles/two_node --base runs/older"),
    "sft": ("sft demo-instruct --base runs/demo", "sft demo-instruct --base runs/demo --preview 5"),
    "verify": ("verify runs/demo", "verify runs/demo --against runs/other"),
    "export": ("export runs/demo --out exports/demo", "export runs/demo --out exports/best --best --gguf q8_0"),
    "import": (
        "import downloads/SmolLM2-135M --run-dir runs/smollm2",
        "import exports/demo --run-dir runs/again --json",
    ),
    "report": ("report runs/demo", "report runs/demo runs/mine --out compared.html"),
    "eval": ("eval runs/demo --tasks documentation", "eval exports/demo --tasks piqa,hellaswag --bench-dir files"),
    "rank": (
        'rank runs/demo "The function returns" " a list of" " the sea of"',
        "rank runs/demo --file questions.jsonl --mean",
    ),
    "chat": (
        "chat runs/demo-instruct --temperature 0",
        'chat exports/demo-instruct --prompt "What does json.dumps do?" --json',
    ),
}
"""Two examples for each verb, as they are typed after `ds-slm`."""


def of(verb: str) -> str:
    """The end of a verb's --help."""
    return "\n".join(("Examples:", *(f"  ds-slm {example}" for example in EXAMPLES[verb])))


def epilog(verb: str) -> str:
    """The same for typer, which joins the lines of a paragraph unless this mark stands before it."""
    return f"\b\n{of(verb)}"

"""The verbs of `ds-slm`, as programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_slm import __version__
from ds_slm.cli import main, tables
from ds_slm.cli.main import app
from ds_slm.errors import ConfigError
from ds_slm.publish.export import WeightFormat
from ds_slm.recipe import ds_config, loading, plan, rates, times
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.times import Topology
from ds_slm.run.software import find_compiler

ROOT = Path(__file__).resolve().parents[3]
INSTALLED = Path(sys.executable).parent / "ds-slm"
COMMAND = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "-c", "from ds_slm.cli.main import run; run()"]


def ds_slm(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr when it refuses: exit code 2, nothing on stdout. In this process, to be quick."""
    monkeypatch.setattr(sys, "argv", ["ds-slm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.run()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert "\n\n" not in printed.err.strip()
    return printed.err


def test_help_lists_the_verbs_that_exist() -> None:
    """Oracle: the verbs of this release, no more."""
    done = ds_slm("--help")
    assert done.returncode == 0
    commands = done.stdout.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in commands if line.strip()] == [
        *(
            "recipes",
            "init",
            "plan",
            "prepare",
            "doctor",
            "train",
            "sft",
            "verify",
            "export",
            "import",
            "report",
            "eval",
            "rank",
            "chat",
        )
    ]


def test_light_verbs_import_nothing_heavy() -> None:
    """Oracle: sys.modules after the verbs have run, one after another; each takes as long as Python itself."""
    script = (
        "import sys\n"
        "from ds_slm.cli.main import app\n"
        "def run(line, heavy):\n"
        "    app(line.split(), standalone_mode=False)\n"
        "    assert not heavy & set(sys.modules), (line, heavy & set(sys.modules))\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'datasets', 'bitsandbytes', 'rich'}\n"
        "for line in ('--help', '--version'):\n"
        "    run(line, heavy | {'pydantic', 'ds_slm.recipe.schema'})\n"
        "for line in ('plan --help', 'recipes', 'plan axiom-380m', 'plan demo --json'):\n"
        "    run(line, heavy)\n"
        "from ds_slm.recipe.section import Section\n"
        "assert not Section.model_config.get('use_attribute_docstrings'), 'parses the source at each start'\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_launch_does_not_import_a_torch_without_gpus(tmp_path: Path) -> None:
    """Oracle: sys.modules when DeepSpeed would start, where torch is built for CPUs alone."""
    script = (
        "import sys\n"
        "from ds_slm.cluster import launch\n"
        "launch.version = lambda package: '2.0+cpu'\n"
        "launch.run = lambda command, environ, hold_back: sys.exit('torch' in sys.modules)\n"
        "from ds_slm.cli.main import app\n"
        "app(['train', 'demo', '--devices', '2'], standalone_mode=False)\n"
        "sys.exit('launched nothing')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    """Oracle: the package's own."""
    assert ds_slm("--version").stdout == f"ds-slm {__version__}\n"


def test_a_long_last_cell_goes_on_below_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the words of the cell in their order, all in the last column, within the terminal."""
    row = {"name": "mine", "params": 12, "tokens": 34, "metric": None, "ours": " ".join(f"word{n}" for n in range(20))}
    monkeypatch.setenv("COLUMNS", "80")
    tables.show_recipes([row])
    assert len(capsys.readouterr().out.splitlines()) == 2  # into a file or a pipe: one line, however long

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tables.show_recipes([row])
    header, *lines = capsys.readouterr().out.splitlines()
    begin = header.index("ours")
    assert " ".join(line[begin:] for line in lines) == row["ours"]
    assert max(map(len, lines)) <= 80 and not any(line[:begin].strip() for line in lines[1:])


def test_recipes() -> None:
    """Oracle: the library; the JSON is one object, the table one line per recipe."""
    rows = json.loads(ds_slm("recipes", "--json").stdout)["recipes"]
    assert [row["name"] for row in rows] == loading.library_names()
    assert {row["name"]: row["params"] for row in rows} == {
        name: parameters(loading.load(name).model) for name in loading.library_names()
    }
    lines = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    assert lines[0].split() == ["recipe", "parameters", "tokens", "published", "ours"]
    slm_10m = next(line for line in lines if line.startswith("slm-10m"))
    assert slm_10m.split() == ["slm-10m", "9,968,640", "25B", "leaderboard/average", "32.38", "not", "yet", "run"]
    assert len(lines) == 1 + len(rows)


def test_plan_json() -> None:
    """Oracle: the figures of the recipe and ds_slm.recipe.plan; a hostfile says how many devices and hosts."""
    flags = ["--hostfile", "hostfiles/two_node", "--ds-config", "ds_configs/zero2.json", "--network", "10"]
    done = ds_slm("plan", "axiom-380m", *flags, "--set", "train.steps=100", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["params"] == found["published_params"] == 385_849_344
    assert found["flops_per_token"] == 2_617_085_952
    assert (found["world_size"], found["nodes"], found["zero_stage"], found["steps"]) == (2, 2, 2, 100)
    assert found["batch"]["rows_per_step"] == 320
    assert found["memory"]["device_bytes"] == sum(
        part for name, part in found["memory"].items() if name not in ("device_bytes", "host_bytes")
    )


def test_plan_table() -> None:
    """Oracle: the same figures, for people."""
    output = CliRunner().invoke(app, ["plan", "ant-10m", "--devices", "8", "--nodes", "2"]).stdout
    assert "9,902,336 (published: 9,902,464)" in output
    assert "16 on 2 hosts, ZeRO-1" in output
    assert "Assumed: " in output


def test_plan_prints_what_is_inherited_as_toml(tmp_path: Path) -> None:
    """Oracle: what stands between the two marks, with the recipe's own text behind it, is the whole recipe again."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "demo"\n[card]\nname = "mine"\n')
    output = CliRunner().invoke(app, ["plan", str(recipe)]).stdout
    first, _, rest = output.partition("# from its base:\n")
    assert first == f"{recipe}\n\n"
    inherited = rest.partition("\nparameters ")[0]
    assert loading.parse('[card]\nname = "mine"\n' + inherited) == loading.load(str(recipe))


def test_plan_names_the_row_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the row that the CPU's instructions choose, and on a machine without any of them a sentence of none."""
    for own in (rates.OwnCpu(rates.AVX2_CORE, "it has AVX2"), rates.OwnCpu(None, "it has neither AMX nor AVX2")):
        monkeypatch.setattr(rates, "own_cpu", lambda own=own: own)
        output = " ".join(CliRunner().invoke(app, ["plan", "demo"]).stdout.split())
        expected = "Of these, CPU core (AVX2) is nearest" if own.device else "No row is this machine's CPU"
        assert expected in output and own.basis in output


def test_plan_says_whether_a_host_holds_its_ranks() -> None:
    """Oracle: a megabyte holds nothing, a terabyte all; without a figure nothing is known of other machines."""
    elsewhere = next(one.name for one in (rates.AMX_CORE, rates.AVX2_CORE) if one != rates.own_cpu().device)

    def fits(*flags: str) -> str:
        output = CliRunner().invoke(app, ["plan", "demo", *flags]).stdout
        return next(line for line in output.splitlines() if line.startswith(elsewhere)).split()[-1]

    assert (fits("--host-memory", "0.001"), fits("--host-memory", "1000"), fits()) == ("no", "yes", "-")


def test_plan_measures_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the row of a measured core, of 1 s a micro-batch, with the rows, blocks and cores of a launch here."""
    measured = []

    def core_speed(_: Recipe, rows: int, compiled: bool, cores: int) -> rates.CoreSpeed:
        measured.append((rows, compiled, cores))
        return rates.CoreSpeed(1.0, 0.0, compiled)

    monkeypatch.setattr("ds_slm.engine.core_speed.core_speed", core_speed)
    found = json.loads(CliRunner().invoke(app, ["plan", "slm-10m", "--devices", "99", "--measure", "--json"]).stdout)
    cores = min(99, len(os.sched_getaffinity(0)))
    assert measured == [(found["cpu_batch"]["micro_batch"], find_compiler("cpu") is not None, cores)]
    assert any("not packed, compiled blocks" in one for one in found["assumptions"]) == measured[0][1]
    assert found["times"][-1]["device"] == times.MEASURED
    assert found["times"][-1]["step_s"] == found["cpu_batch"]["accumulation_steps"]


def test_plan_table_says_what_is_predicted() -> None:
    """Oracle: the plan's own figures: a save, what three settings would change, and where devices stop helping."""
    flags = ["--gpus-per-node", "8", "--nodes", "64", "--network", "100"]
    output = CliRunner().invoke(app, ["plan", "axiom-380m", *flags]).stdout
    zero1 = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 25_000_000}}
    planned = plan.plan(loading.load("axiom-380m"), "axiom-380m", zero1, Topology(512, 64, 100.0, own=rates.own_cpu()))
    assert f"{planned.save_bytes / 1e9:.2f} GB more of the host's memory" in output
    for one in planned.alternatives:
        row = next(line for line in output.splitlines() if line.startswith(one.name))
        assert f"{one.device_bytes / 1e9:.2f} GB" in row
        on_cpu = [other for other in planned.cpu_alternatives if other.name == one.name]
        assert all(f"{other.device_bytes / 1e9:.2f} GB" in row for other in on_cpu) and len(on_cpu) <= 1
    assert "more than 320 devices bring nothing" in " ".join(output.split())
    assert output.count("redicted") >= 4


def test_plan_of_a_file(tmp_path: Path) -> None:
    """Oracle: a recipe is a name or a path; what is written resolved plans the same."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text(loading.to_toml(loading.load("slm-10m")))
    runner = CliRunner()
    by_path, by_name = (runner.invoke(app, ["plan", name, "--json"]).stdout for name in (str(recipe), "slm-10m"))
    assert {**json.loads(by_path), "recipe": "slm-10m"} == json.loads(by_name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "slm10m"], ["the nearest is 'slm-10m'", "gpt-s-1.4m"]),
        (
            [
                "plan",
                "demo",
                "--set",
                "train.stpes=3",
                "--set",
                "model.num_attention_heads=5",
                "--set",
                "data.seq_len=255",
            ],
            ["the nearest is 'train.steps'", "num_attention_heads = 5", "cannot be split into rows"],
        ),
        (["plan", "demo", "--hostfile", "hostfiles/two_nodes"], ["hostfiles/two_node"]),
        (
            ["plan", "demo", "--hostfile", "hostfiles/two_node", "--nodes", "2"],
            ["leave out --devices and --nodes"],
        ),
        (["plan", "demo", "--ds-config", "ds_configs/zero9.json"], ["zero9.json"]),
        (["prepare", "demo", "--source", "documentation"], ["expected NAME=PATH"]),
        (["prepare", "demo-instruct"], ["'demo-instruct' fine-tunes a base", "ds-slm sft demo-instruct --base MODEL"]),
    ],
)
def test_refusals(
    arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2, one paragraph that names every problem."""
    monkeypatch.chdir(ROOT)
    message = refused(arguments, monkeypatch, capsys)
    assert message.startswith("error: ")
    assert all(part in message for part in expected), message


def test_plan_refuses_a_ds_config_that_training_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message of the join that a launch makes of the same file."""
    content = {"zero_optimization": {"stage": 1}, "optimizer": {}, "compile_blocks": "yes"}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as refusal:
        ds_config.join(loading.load("demo"), content, 1, "cpu", None)
    message = refused(["plan", "demo", "--ds-config", str(tmp_path / "mine.json")], monkeypatch, capsys)
    assert len(refusal.value.problems) == 2 and all(part in message for part in refusal.value.problems)


@pytest.mark.parametrize("arguments", [["plan", "slm10m"], ["plan", "demo", "--nods=2"], ["trian"]])
def test_mistakes_of_the_real_command(arguments: list[str]) -> None:
    """Oracle: an unknown recipe, flag or verb ends in exit code 2, named on stderr and without a traceback."""
    done = ds_slm(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert arguments[-1].partition("=")[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the manifests on disk; with --json one object on stdout, progress on stderr; --verify finds damage."""
    (tmp_path / "texts").mkdir()
    text = "\n\n".join(
        f"Sentence number {number} of a small text that is only here to be cut into tokens." for number in range(999)
    )
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Document {number}.\n{text[number * 500 :][:4000]}")
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        loading.to_toml(
            loading.load(
                "demo",
                [
                    "data.source.0.kind=files",
                    f"data.source.0.path={tmp_path / 'texts'}",
                    "data.val_fraction=0.2",
                    "tokenizer.vocab_size=300",
                    "model.vocab_size=300",
                ],
            )
        )
    )
    flags = ["prepare", str(recipe), "--data-root", str(tmp_path / "data")]
    done = ds_slm(*flags, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    manifest = json.loads((tmp_path / "data" / "small" / "documentation" / "manifest.json").read_text())
    assert summary["train_tokens"] == sum(shard["tokens"] for shard in manifest["shards"]["train"]) > 0
    assert summary["vocab_size"] == 300
    runner = CliRunner()
    assert json.loads(runner.invoke(app, [*flags, "--verify", "--json"]).stdout)["sha256"] == summary["sha256"]
    shard = next((tmp_path / "data" / "small" / "documentation").glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert "sha256" in refused([*flags, "--verify"], monkeypatch, capsys)


def test_export_passes_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the arguments that reach ds_slm.publish.export; two checkpoints at once are refused."""
    calls = []
    exported = {
        "checkpoint": "runs/x/checkpoints/step-00000009",
        "step": 9,
        "params": 7,
        "dtype": "fp32",
        "folder": "out",
    }

    def export_run(*arguments: object, describe: object, **keywords: object) -> dict[str, object]:
        assert describe is not None  # writes the card
        calls.append((arguments, keywords))
        return exported

    monkeypatch.setattr("ds_slm.cli.publishing.export_run", export_run)
    runner = CliRunner()
    flags = ["export", "runs/x", "--out", str(tmp_path / "out")]
    done = runner.invoke(app, [*flags, "--best", "--json"])
    assert json.loads(done.stdout) == exported
    assert calls == [((Path("runs/x"), tmp_path / "out"), {"step": None, "best": True, "weights": WeightFormat()})]
    assert "choose one" in str(runner.invoke(app, [*flags, "--best", "--step", "3"]).exception)
    assert runner.invoke(app, flags).stdout == "out: 7 parameters of runs/x/checkpoints/step-00000009, fp32\n"
    assert len(calls) == 2

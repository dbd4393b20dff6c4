"""DeepSpeed's flags behind `ds-slm train`, the check of hosts before a launch, and what is shown of its launcher."""

import argparse
import os
import sys
from pathlib import Path

import pytest

from ds_slm.cluster import hostfile, launch, runner_flags
from ds_slm.cluster.hostfile import Host
from ds_slm.errors import ConfigError, HostfileError


def test_no_flag_of_deepspeed_is_forgotten() -> None:
    """Oracle: the runner's options, which another test holds against the installed source."""
    passed = argparse.ArgumentParser(add_help=False)
    runner_flags.add_runner_flags(passed)
    known = {*passed._option_string_actions, *runner_flags.INSTEAD, "-H", "--hostfile"}
    assert known == {name for names in (*hostfile.RUNNER_VALUE_OPTIONS, *hostfile.RUNNER_FLAGS) for name in names}


def test_hosts_that_do_not_answer_are_all_named(tmp_path: Path) -> None:
    """Oracle: what a stand-in for ssh says of each, in one sentence, and the port it was given."""
    said = 'for last; do :; done; case "$*" in *" -p 2222 good "*) exit 0;; esac; '
    said += 'echo "noise" >&2; echo "ssh: $*: Name or service not known" >&2; exit 255'
    for name, body in {"ssh": said, "pdsh": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    runner_flags.refuse_unreachable([Host("good", 1)], 2222, environ)
    with pytest.raises(HostfileError) as refused:
        runner_flags.refuse_unreachable([Host("good", 1), Host("bad", 1), Host("worse", 2)], 2222, environ)
    first, second, way_out = refused.value.problems
    assert first.startswith("host bad does not answer over ssh: ssh: ") and "not known" in first
    assert second.startswith("host worse ") and "noise" not in second and "without a password" in way_out
    (tmp_path / "pdsh").unlink()
    with pytest.raises(HostfileError, match="no 'pdsh' on this machine"):
        runner_flags.refuse_unreachable([Host("good", 1)], None, {"PATH": str(tmp_path)})


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int)
    runner_flags.add_runner_flags(parser)
    return parser.parse_args(arguments)


BIND = "--bind_cores_to_rank"


@pytest.mark.parametrize(
    ("arguments", "environ", "told"),
    [
        ([BIND], {}, "needs the program 'numactl', which is not on the PATH: install numactl"),
        ([BIND], {"KMP_AFFINITY": "x"}, "KMP_AFFINITY: unset it"),
        ([BIND, "--devices", "5"], {}, "5 ranks need a core each, this machine has 4"),
        ([BIND, "--bind_core_list", "0-9"], {}, "this machine has cores 0 to 3"),
        *[([BIND, "--bind_core_list", text], {}, "such as 0-3,8") for text in ("", "a", "3-1", "2,1", "0-1-2", "1,,2")],
        (["--bind_core_list", "0-1"], {}, "has no effect without --bind_cores_to_rank"),
        (["--venv_script", "/nope"], {}, "/nope is sourced on hosts that are reached over ssh"),
        (["--venv_script", "/nope", "--bind_core_list", "0"], {}, "has no effect without"),
    ],
)
def test_flags_that_deepspeed_would_not_heed_are_refused(
    arguments: list[str], environ: dict[str, str], told: str, tmp_path: Path
) -> None:
    """Oracle: by hand, on a machine of four cores without numactl; the flag and the way out."""
    with pytest.raises(ConfigError) as refused:
        runner_flags.refuse_unusable(flags(*arguments), [], {"PATH": str(tmp_path), **environ}, cores=4)
    assert told in str(refused.value)


def test_flags_that_work_are_passed_on(tmp_path: Path) -> None:
    """Oracle: the same flags where the program is there, or where hosts are reached over ssh, whose own it is."""
    program = tmp_path / "numactl"
    program.write_text("")
    program.chmod(0o755)
    bound = flags(BIND, "--bind_core_list", "0-1,3-3")
    runner_flags.refuse_unusable(bound, [], {"PATH": str(tmp_path)}, cores=4)
    runner_flags.refuse_unusable(flags(), [], {"PATH": ""}, cores=4)
    sourced = flags(BIND, "--bind_core_list", "0-99", "--venv_script", "/there")
    two = [Host("one", 1), Host("two", 1)]
    runner_flags.refuse_unusable(sourced, two, {"PATH": ""}, cores=4)
    with pytest.raises(ConfigError):
        runner_flags.refuse_unusable(sourced, two[:1], {"PATH": ""}, cores=4)


@pytest.mark.parametrize(("code", "is_shown"), [(0, False), (3, True)])
def test_what_deepspeed_says_is_shown_where_a_launch_fails(
    code: int, is_shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: lines of its log, as its launcher prints them, with and without the name of a host."""
    lines = [
        "[2026-11-29 12:31:55,964] [INFO] [launch.py:152:main] WORLD INFO DICT",
        "node2: [2026-11-29 12:31:55,965] [INFO] [launch.py:158:main] nnodes=2",
        "node2: step 1/2",
        "[2026-11-29 12:31:55,964] [ERROR] [launch.py:1:main] exits",
    ]
    child = f"import sys; print({chr(10).join(lines)!r}); sys.exit({code})"
    assert launch.run([sys.executable, "-c", child], os.environ, hold_back=True) == code
    shown = capsys.readouterr()
    assert shown.out.splitlines() == lines[2:]
    assert shown.err.splitlines()[1:] == (lines[:2] if is_shown else [])

"""Whether torch.compile works on every host: a tiny function is compiled before the model is.

    first rank of each host: a child process compiles --> it works (kept in CACHE/compile_probe.json), or a reason
    all ranks: compiled blocks if every host can compile; else eager blocks, and the reasons

A compiler on the path is not a proof. The headers of Python or of the C library, OpenMP or Triton may be missing, torch
may be too old for this Python, and its cache folder may be read-only. Without the probe the first forward would end the
run with a traceback.

The child compiles into torch's own cache folder, as the run does. Its function holds a random constant, so that the
cache never holds it already.

Known gaps: a success is kept until the compiler, Python.h, torch or the environment changes; other headers that are
removed later are not noticed. A GPU in exclusive-process mode refuses the child: blocks are then eager.
"""

import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ds_slm.distributed.ranks import Control
from ds_slm.engine import devices, instruction_sets
from ds_slm.engine.result_cache import ResultCache
from ds_slm.errors import error_line
from ds_slm.model import cpu_attention, kernels
from ds_slm.recipe.ds_config import EngineConfig
from ds_slm.run import software

PROBE_TIMEOUT_S = 600
PROBE = """
import random
import sys
import torch
import torch._dynamo.config
from torch._inductor import metrics

torch._dynamo.config.suppress_errors = False
device, constant = torch.device(sys.argv[1]), random.random()
if device.type == "cuda":
    torch.cuda.set_device(device)
function = torch.compile(lambda x: (x.sin() + constant).sum(), dynamic=False)
function(torch.ones(64, device=device, requires_grad=True)).backward()
if not metrics.generated_kernel_count:
    sys.exit("an environment variable switches it off")
"""


def agree(engine_config: EngineConfig, dtype: torch.dtype, control: Control) -> EngineConfig:
    """Compile blocks, and attention's backward pass with them, on all ranks or on none. Collective."""
    if not engine_config.compiled:
        return engine_config
    device = devices.current_device()
    if reason := eager_reason(control, device):
        return replace(engine_config, compiled=False, eager_reason=reason)
    if device.type == "cpu":
        instruction_sets.believe_passed_tests()
    if device.type == "cpu" and dtype == torch.bfloat16:  # asked on all ranks, whatever their CPUs are
        build_attention(control)
    return engine_config


def eager_reason(control: Control, device: torch.device) -> str | None:
    """Why blocks must run eagerly; None if every host can compile. Collective, and the same on every rank."""
    return _reason_anywhere(control, _host_reason(device) if control.leads_host else None)


def build_attention(control: Control) -> None:
    """Attention's backward pass in C++ on all ranks, or torch's own on all. Collective."""
    wanted = kernels.wants_blocked_backward("cpu", torch.bfloat16)
    own = cpu_attention.build() if wanted else "this CPU does not multiply in bf16"
    if reason := _reason_anywhere(control, own):
        cpu_attention.disable(reason)


def _reason_anywhere(control: Control, own: str | None) -> str | None:
    """All ranks' reasons as one, the same on every rank; None if no rank has one. Collective."""
    hosts_by_reason: dict[str, list[str]] = {}
    for host, reason in zip(control.hosts, control.gather(own), strict=True):
        if reason:
            hosts_by_reason.setdefault(reason, []).append(host)
    if not hosts_by_reason:
        return None

    # Name hosts only if they differ.
    if len(hosts_by_reason) == 1 and set(*hosts_by_reason.values()) == set(control.hosts):
        return next(iter(hosts_by_reason))
    return "; ".join(f"{', '.join(dict.fromkeys(hosts))}: {reason}" for reason, hosts in hosts_by_reason.items())


def _host_reason(device: torch.device) -> str | None:
    """Why this host cannot compile for the device; None if it can."""
    compiler = software.find_compiler(device.type)
    if compiler is None:
        return f"torch.compile does not work: {' and '.join(software.COMPILERS[device.type][1:])} are missing"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "torch.compile does not work: Triton does not support this GPU"

    cache, key = ResultCache("compile_probe"), _cache_key(compiler, device)
    if cache.load(key) is True:
        return None
    reason = _probe(device)
    if reason is None:
        cache.store(key, True)
    return reason


def _probe(device: torch.device) -> str | None:
    """Compile a function in a child process. Returns why it failed; None if it worked."""
    command = [sys.executable, "-c", PROBE, str(device)]

    try:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stderr:
            child = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
            try:
                exit_code = child.wait(PROBE_TIMEOUT_S)
            except BaseException:  # a timeout or Ctrl-C: end the compilers that the child started, too
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                raise

            stderr.seek(0)
            text = stderr.read().decode(errors="replace")
    except subprocess.TimeoutExpired:
        return f"torch.compile does not work: a tiny function took more than {PROBE_TIMEOUT_S} s"
    except OSError as error:
        return f"torch.compile does not work: {error}"

    cause = error_line(text) or f"exit code {exit_code}"
    return f"torch.compile does not work: {cause}" if exit_code else None


def _cache_key(compiler: str, device: torch.device) -> dict[str, Any]:
    """Everything that the probe's result depends on."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    names, switches = ("CC", "CXX", "CPATH", "LIBRARY_PATH"), ("TORCH_", "TORCHDYNAMO", "TORCHINDUCTOR", "TRITON")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "files": {str(path): software.size_and_mtime(path) for path in (Path(compiler).resolve(), header)},
        "environment": {k: v for k, v in os.environ.items() if k in names or k.startswith(switches)},
        "device": [str(device), gpu],
        "versions": [sys.version, torch.__version__, torch.version.cuda, platform.platform()],
    }

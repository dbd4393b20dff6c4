"""One host's answers to `ds-slm doctor`: this runs on that host, from the text that ssh brought there.

    stdin    {"ask": NAME, ...}   a question a line          stdout    an answer a line: an object, or an error
    error    {"error": TYPE: TEXT, "package": the module that cannot be imported, if that is it}

`describe` and `clock` need no more than the standard library, and any Python from 3.8 on: a host without the checkout
or its packages can still say so. The other answers import ds_slm, as a launch on that host would, and only when asked.
The probe never imports torch, which takes seconds: a child does, for one all-reduce, while other questions are asked.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

LIFE_S = 120
"""A probe that lost its doctor ends after this time."""
PINGS, CHUNK, BULK_BYTES = 20, 1 << 16, 4 << 20
WRITTEN_BYTES = 1 << 16
ALL_REDUCE = """
import os
import sys
import time
from datetime import timedelta
import torch
import torch.distributed as dist

print(time.time(), flush=True)
where, rank, world, within_s = sys.argv[1], *map(int, sys.argv[2:])
dist.init_process_group("gloo", where, timedelta(seconds=within_s), world, rank)
number = torch.tensor([rank + 1.0])
dist.all_reduce(number)
print(int(number), flush=True)
os._exit(0)  # taking torch down takes seconds
"""
children = []


def describe(checkout, folder, folders):
    """Everything that the standard library knows.

    Args:
        checkout: the project's folder on the host where the command was typed.
        folder: the folder where the command was typed.
        folders: name -> path of the folders into which a run writes.
    """
    sys.path.insert(0, checkout)  # as a launch finds the package

    return {
        "hostname": socket.gethostname(),
        "identity": _identity(),
        "addresses": _output(["hostname", "-I"]).split(),
        "python": {"executable": sys.executable, "version": platform.python_version()},
        "checkout": (Path(checkout) / "ds_slm" / "pretrain.py").is_file(),
        "folder": Path(folder).is_dir(),
        "folders": {name: _folder(Path(os.path.expanduser(path))) for name, path in folders.items()},
        "memory_bytes": _memory_bytes(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "python_header": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        "ninja": shutil.which("ninja", path=_path()) is not None,
    }


def clock():
    """This host's clock, which the doctor compares with its own."""
    return {"time": time.time()}


def software():
    """Code, versions, and the compiler of each kind of device."""
    found = importlib.import_module("ds_slm.run.software")
    return {**found.describe(), "compilers": {kind: found.find_compiler(kind) for kind in found.COMPILERS}}


def resolve(names):
    """The addresses that each name has here; none if it is unknown."""
    found = {}
    for name in names:
        try:
            found[name] = sorted({entry[4][0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
        except OSError:
            found[name] = []
    return found


def route(towards, port):
    """This host's own address and interface on the way to another one."""
    network = importlib.import_module("ds_slm.distributed.network")
    address = network.own_address(towards, port)
    return {"address": address, "interface": address and network.interface_of(address)}


def recipe(name, run):
    """The hash of a recipe as this host reads it."""
    loading = importlib.import_module("ds_slm.recipe.loading")
    sha256_of_json = importlib.import_module("ds_slm.files").sha256_of_json
    try:
        return {"sha256": sha256_of_json(loading.load(name, run=Path(run)).model_dump(mode="json"))}
    except importlib.import_module("ds_slm.errors").UserError as error:
        return {"problems": error.problems}


def data(name, data_root, within_s):
    """The hashes of a recipe's prepared data; `absent` names parts that are not there.

    Shards that changed since they were last read are read. `is_read` is false if that takes longer than `within_s`.
    """
    found = {"absent": [], "is_read": False}
    reading = threading.Thread(target=_read_data, args=(name, Path(data_root), found), daemon=True)
    reading.start()
    reading.join(within_s)
    if "error" in found:
        raise found["error"]
    return dict(found)


def _read_data(name, data_root, found):
    try:
        loading = importlib.import_module("ds_slm.recipe.loading")
        identity = importlib.import_module("ds_slm.data.shards.identity")
        prepared = importlib.import_module("ds_slm.data.shards.prepared")
        loaded, stem = loading.load(name), loading.recipe_path(name).stem

        parts = [identity.TOKENIZER, *(source.name for source in loaded.data.source)]
        absent = [part for part in parts if identity.read_manifest(data_root / stem / part) is None]
        if absent:
            found.update(absent=absent, prepared=[part for part in parts if part not in absent])
        else:
            opened = prepared.open_prepared(loaded, data_root / stem)
            found.update(sha256=opened.sha256, tokenizer_sha256=opened.tokenizer_sha256)
    except importlib.import_module("ds_slm.errors").UserError as error:
        found["problems"] = error.problems
    except Exception as error:
        found["error"] = error
    found["is_read"] = True


def launches(run):
    """Launches that write into a run folder now."""
    found = importlib.import_module("ds_slm.run.launches")
    return {"alive": found.others_alive(Path(run), found.Launch())}


def listen(ports):
    """Listen at each port, 0 for a free one, until the end. Returns the ports; None for one that is taken."""
    found = []
    for port in ports:
        try:
            both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
            listener = socket.create_server(("", port), **both)
        except OSError:
            found.append(None)
            continue
        found.append(listener.getsockname()[1])
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    return {"ports": found}


def connect(targets, within_s):
    """Connect to other hosts, each an address and some ports; the first port also tells latency and bandwidth."""
    found = {}
    for name, (address, ports) in targets.items():
        said = found[name] = {"closed": []}
        for number, port in enumerate(ports):
            try:
                with socket.create_connection((address, port), timeout=within_s) as connection:
                    if number == 0:
                        said.update(_measure(connection))
            except OSError as error:
                said["closed"].append([port, error.strerror or "it does not answer"])
                if number == 0:
                    break
    return {"links": found}


def free_port():
    """A port that no program uses at this moment."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        return {"port": taken.getsockname()[1]}


def begin_all_reduce(rank, world, address, port, interface):
    """Let a child meet the other hosts' children and add up their numbers with torch's gloo."""
    host = "[" + address + "]" if ":" in address else address
    where = "tcp://" + host + ":" + str(port)
    command = [sys.executable, "-c", ALL_REDUCE, where, *map(str, (rank, world, LIFE_S))]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface, **os.environ}
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    children.append(child)
    return {}


def end_all_reduce(within_s):
    """That child's result: a sum, or why there is none, or how long torch has waited for the others."""
    child = children[-1]
    try:
        child.wait(within_s)
    except subprocess.TimeoutExpired:
        child.kill()
    output, errors = child.communicate()

    said = output.split()  # when torch had started, and the sum
    if len(said) == 2:
        return {"sum": int(said[1])}
    if child.returncode > 0:
        return {"reason": (errors.strip().splitlines() or ["exit code " + str(child.returncode)])[-1]}
    return {"waited_s": time.time() - float(said[0]) if said else None}


def forwarded(port, word):
    """Whether a port of this host's loopback leads to the doctor, which sends a word there."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
            connection.settimeout(3)
            return {"works": connection.recv(len(word)).decode(errors="replace") == word}
    except OSError as error:
        return {"works": False, "reason": error.strerror or "nothing came through"}


def _identity():
    """An identity that two names of one machine share; containers of a machine differ in their network."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot + " " + os.readlink("/proc/self/ns/net")
    except OSError:
        return socket.gethostname()


def _path():
    """The PATH of a rank: its interpreter's programs first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _output(command):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5).stdout.decode()
    except (OSError, subprocess.SubprocessError):
        return ""


def _folder(path):
    """The nearest existing folder, its free space, and why it cannot be written to."""
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    found = {"path": str(path), "place": str(place), "free_bytes": None, "problem": None}
    try:
        found["free_bytes"] = shutil.disk_usage(place).free
        with tempfile.TemporaryFile(dir=str(place)) as file:
            file.write(bytes(WRITTEN_BYTES))  # a full disk still makes empty files
    except OSError as error:
        found["problem"] = error.strerror or str(error)
    return found


def _memory_bytes():
    """Bytes of free memory, including what the kernel would give back."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _gpus():
    """The CUDA devices that CUDA_VISIBLE_DEVICES leaves; 0 without a driver."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    except OSError:
        pass
    return count.value


def _accept(listener):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection):
    """Send each small message back; for a large one, only confirm that all of it came."""
    left = BULK_BYTES
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            connection.sendall(connection.recv(1))
        while left > 0:
            received = len(connection.recv(CHUNK))
            if not received:
                return
            left -= received
        connection.sendall(b".")


def _measure(connection):
    """The shortest of some round trips, and the speed of some megabytes."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trips = []
    for _ in range(PINGS):
        began = time.perf_counter()
        connection.sendall(b".")
        if not connection.recv(1):
            raise OSError(0, "the connection was cut")
        trips.append(time.perf_counter() - began)

    began = time.perf_counter()
    connection.sendall(bytes(BULK_BYTES))
    connection.recv(1)
    return {"latency_s": min(trips), "bytes_per_s": BULK_BYTES / (time.perf_counter() - began)}


ABOUT_HOST = (describe, software, recipe, data, launches)
ABOUT_LINKS = (clock, resolve, route, listen, connect, free_port, begin_all_reduce, end_all_reduce, forwarded)
ANSWERS = {answer.__name__: answer for answer in ABOUT_HOST + ABOUT_LINKS}


def serve():
    """Answer questions until there are no more of them."""
    signal.alarm(LIFE_S)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = ANSWERS[question.pop("ask")](**question)
        except Exception as error:
            package = error.name if isinstance(error, ImportError) else None
            answer = {"error": type(error).__name__ + ": " + str(error), "package": package}
        print(json.dumps(answer), file=answers, flush=True)
    for child in children:
        child.kill()


if __name__ == "__main__":
    serve()

"""Variables of the environment that are given their place before there is a second thread."""

import os
import subprocess
import sys

from ds_slm.distributed import network

COUNTED = """
import os, sys
from ds_slm.distributed import network
network.NCCL_FILES = ()
network.reserve_variables()
before = set(os.environ)
network.choose(["127.0.0.1", "127.0.0.1"], 0, is_cuda=False)
network.interface_of = lambda address: "eth0"
network.choose(["192.0.2.11", "192.0.2.12"], 0, is_cuda=True)
from torch._inductor.runtime.cache_dir_utils import cache_dir
cache_dir()
print(sorted(set(os.environ) - before), os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
"""


def test_no_variable_is_added_once_the_places_are_taken() -> None:
    """Oracle: the names before and after what a launch sets later: two interfaces, the compiler's cache."""
    environ = {name: value for name, value in os.environ.items() if name not in (network.GLOO, network.NCCL)}
    environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", COUNTED], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "[] lo =eth0\n"

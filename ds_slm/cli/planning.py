"""`ds-slm plan`: the devices of a launch, from its flags, and its plan."""

from dataclasses import asdict, replace
from pathlib import Path

from ds_slm.cli import tables
from ds_slm.cli.output import print_json
from ds_slm.errors import ConfigError
from ds_slm.recipe import loading, plan, rates
from ds_slm.recipe.ds_config import join, read, refuse_conflicts
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.times import Topology


def topology(
    hostfile: Path | None,
    nodes: int | None,
    devices: int | None,
    network_gbit_per_s: float | None,
    host_memory_gb: float | None,
) -> Topology:
    """Where a launch would run, and this machine's CPU.

    Args:
        hostfile: names hosts and their devices; None uses the next two.
        nodes: number of hosts; None means one.
        devices: devices on each host; None means one.
        network_gbit_per_s: speed of each host's link.
        host_memory_gb: memory of each host.

    Raises:
        ConfigError: hosts or devices are given twice.
        HostfileError: the hostfile is missing or malformed.
    """
    host_bytes = round(host_memory_gb * 1e9) if host_memory_gb else None
    known = network_gbit_per_s, host_bytes, rates.own_cpu()
    if hostfile is None:
        return Topology((nodes or 1) * (devices or 1), nodes or 1, *known)
    if devices or nodes:
        raise ConfigError("--hostfile already says how many hosts and devices: leave out --devices and --nodes.")

    from ds_slm.cluster.hostfile import parse_hostfile

    slots = [host.slots for host in parse_hostfile(hostfile)]
    return Topology(sum(slots), len(slots), *known, max(slots))


def run(name: str, recipe: Recipe, ds_config: Path, where: Topology, measure: bool, as_json: bool) -> None:
    """Make a plan and print it.

    Args:
        name: the user's name for the recipe.
        recipe: what is trained.
        ds_config: a ds_configs file.
        where: the devices.
        measure: whether to time a core of this machine first.
        as_json: whether to print one JSON object instead of tables.
    """
    settings, own = read(ds_config), where.own
    assert own is not None
    refuse_conflicts(settings)

    if measure:
        from ds_slm.cluster.launch import own_cores
        from ds_slm.engine.core_speed import core_speed
        from ds_slm.run.software import find_compiler

        # As the run would compute: where it compiles its blocks, the same graph is compiled here.
        launch = join(recipe, settings, where.world_size, "cpu", None)
        compiled = launch.compiled and find_compiler("cpu") is not None
        cores = min(where.ranks_per_host, own_cores())
        own = replace(own, speed=core_speed(recipe, launch.micro_batch, compiled, cores))

    found = plan.plan(recipe, name, settings, replace(where, own=own))
    if not as_json:
        tables.show_plan(found, loading.inherited_toml(name), own)
        return

    memory, cpu_memory = ({**asdict(one), "device_bytes": one.device_bytes} for one in (found.memory, found.cpu_memory))
    print_json({**asdict(found), "memory": memory, "cpu_memory": cpu_memory, "inherited": loading.inherited(name)})

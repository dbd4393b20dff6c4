"""`ds-slm plan`: the devices of a launch, from its flags, and its plan."""

from dataclasses import asdict, replace
from pathlib import Path

from ds_slm.cli import tables
from ds_slm.cli.output import print_json
from ds_slm.errors import ConfigError
from ds_slm.recipe import plan, rates, schema
from ds_slm.recipe.ds_config import read
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.times import Topology


def devices(hostfile: Path | None, nodes: int | None, on_each: int | None) -> tuple[int, int]:
    """Devices over all hosts, and hosts. Raises ConfigError if two flags give the same number."""
    if hostfile is None:
        return (nodes or 1) * (on_each or 1), nodes or 1
    if on_each or nodes:
        raise ConfigError("--hostfile already says how many hosts and devices: leave out --devices and --nodes.")

    from ds_slm.cluster.hostfile import parse_hostfile

    hosts = parse_hostfile(hostfile)
    return sum(host.slots for host in hosts), len(hosts)


def topology(world_size: int, nodes: int, network_gbit_per_s: float | None, host_memory_gb: float | None) -> Topology:
    """The devices, and this machine's CPU."""
    host_bytes = round(host_memory_gb * 1e9) if host_memory_gb else None
    return Topology(world_size, nodes, network_gbit_per_s, host_bytes, rates.own_cpu())


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

    if measure:
        from ds_slm.engine.core_speed import core_speed

        plan.refuse_unusable(settings)
        rows = plan.cut(recipe, settings, where.world_size, "cpu").micro_batch
        own = replace(own, speed=core_speed(recipe, rows))

    found = plan.plan(recipe, name, settings, replace(where, own=own))
    if not as_json:
        tables.show_plan(found, schema.inherited_toml(name), own)
        return

    memory, cpu_memory = ({**asdict(one), "device_bytes": one.device_bytes} for one in (found.memory, found.cpu_memory))
    print_json({**asdict(found), "memory": memory, "cpu_memory": cpu_memory, "inherited": schema.inherited(name)})

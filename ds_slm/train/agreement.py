"""What the hosts of a launch must have in common before they train together; differences are raised on all ranks.

    meet               wait for all ranks; the same code and libraries; the interface that leads to the others
    agree_on_inputs    the same recipe, data and configuration

If one rank ended alone, the others would wait for it.
"""

import socket
from collections.abc import Mapping, Sequence

import torch

from ds_slm.distributed import network, rendezvous
from ds_slm.distributed.ranks import Control
from ds_slm.engine import devices
from ds_slm.errors import ConfigError, DataError
from ds_slm.files import sha256_of_json
from ds_slm.recipe import ds_config
from ds_slm.recipe.schema import Recipe
from ds_slm.run import measure, software


def meet(meeting: rendezvous.Rendezvous, allow_mixed: bool) -> dict[str, list[str]]:
    """Wait for all ranks; compare what their hosts compute with, and choose the interface that leads to them.

    Returns:
        What env.json says of hosts that differ and train together nevertheless.

    Raises:
        ConfigError: on all ranks, if code or libraries differ and that is not allowed.
    """
    world, device = meeting.world, torch.device(devices.device_type())
    everyone = meeting.arrive(
        {
            "host": socket.gethostname(),
            "software": software.describe(),
            "device": measure.device_name(device),
            "address": network.own_address(world.address, world.port),
        }
    )

    hosts, found = [one["host"] for one in everyone], [one["software"] for one in everyone]
    differences = software.differences(hosts, found)
    if differences and not allow_mixed:
        way_out = "Bring all hosts to the same code and versions; --allow-mixed trains nevertheless, and records it."
        raise ConfigError([*differences, way_out])

    if world.size > 1:
        network.choose([one["address"] for one in everyone], world.rank, device.type == "cuda")

    notes = software.notes(hosts, found, [one["device"] for one in everyone])
    return {"mixed_hosts": [*differences, *notes]}


def agree_on_inputs(
    control: Control,
    identity: dict[str, str],
    recipe: Recipe,
    engine_config: ds_config.EngineConfig,
    beginning: Mapping[str, str],
) -> None:
    """Refuse hosts that would train something else: another recipe, other data, another configuration."""
    computes = [engine_config.deepspeed, engine_config.compiled, engine_config.deterministic]
    inputs = {
        "recipe": sha256_of_json(recipe.model_dump(mode="json")),
        "data": identity["data_sha256"],
        "ds_config or batch": sha256_of_json(computes),
        **{name.removesuffix("_sha256"): sha256 for name, sha256 in beginning.items()},
    }

    problems = []
    everyone = control.gather(inputs)
    for what in inputs:
        by_host = {host: theirs[what][:16] for host, theirs in zip(control.hosts, everyone, strict=True)}
        if len({theirs[what] for theirs in everyone}) > 1:
            seen = ", ".join(f"{host}: {found}" for host, found in by_host.items())
            problems.append(f"the hosts differ in their {what} ({seen}): copy the right one over the others.")

    if problems:
        raise DataError(problems)


def mixed_products(hosts: Sequence[str], products: Sequence[str]) -> list[str]:
    """A warning if hosts multiply in different ways, perhaps because their CPUs differ."""
    if len(set(products)) == 1:
        return []
    by_host = dict(zip(hosts, products, strict=True))
    return [
        f"hosts multiply in different ways ({'; '.join(f'{host}: {how}' for host, how in by_host.items())}): a resumed "
        "run is bit for bit the same only while each rank stays on its kind of host."
    ]

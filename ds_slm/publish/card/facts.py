"""What a run folder tells of one of its checkpoints: all that a model card is written from.

RUN/env.json, changes.jsonl, metrics.jsonl, done.json, CHECKPOINT/state.json --read_facts--> RunFacts

Folders of older versions lack some of it: every value may be missing, and the card then says less.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.order import Order
from ds_slm.data.skipping import merged
from ds_slm.files import read_json
from ds_slm.recipe import schema
from ds_slm.recipe.schema import Recipe
from ds_slm.run import folder as run_folder

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """A checkpoint, and the run that made it."""

    recipe: Recipe
    step: int
    weights_sha256: str
    """Of the checkpoint's weights, in fp32."""
    state: Record
    """The checkpoint's state.json."""
    environment: Record
    """env.json, of the last launch."""
    changes: Sequence[Record]
    """What launches did differently that took steps of these."""
    records: Mapping[str, Sequence[Record]]
    """Kind -> records of the steps up to this one."""
    done: Record
    """done.json where this step is the one it was written at, of this recipe; else empty."""

    @property
    def samples(self) -> dict[str, str]:
        """Prompt -> how the run continued it with these weights; empty where it did not, or an older version ran it."""
        found = [one.get("continuations") for one in self.records.get("samples", ()) if one["step"] == self.step]
        texts = found[-1] if found and isinstance(found[-1], Mapping) else {}
        return {prompt: str(texts[prompt]) for prompt in self.recipe.eval.prompts if prompt in texts}

    @property
    def name(self) -> str:
        """What the launch called its recipe; the model's name in older folders."""
        return str(self.environment.get("recipe_name") or self.recipe.card.name)

    @property
    def has_base(self) -> bool:
        """Whether the run began with a trained model: it fine-tunes one, or trains it further."""
        return self.recipe.sft is not None or bool(self.environment.get(checkpoint_files.BASE))

    @property
    def base_name(self) -> str:
        """That model's id on the hub where the recipe says it, else what it was called; empty where nothing does."""
        return self.recipe.card.base_model or str(self.environment.get("base") or "")

    @property
    def is_finished(self) -> bool:
        """Whether this is the model that the recipe asks for."""
        return self.step == self.recipe.train.steps

    @property
    def tokens(self) -> int:
        """Targets it was trained on."""
        return int(self.state.get("tokens") or self.step * self.recipe.train.global_batch_tokens)

    @property
    def held_out(self) -> Record:
        """The losses of these weights on held-out rows; empty where they were not evaluated."""
        if self.done:
            return {key.removeprefix("val_"): value for key, value in self.done.items() if key.startswith("val_")}
        return next((one for one in self.records.get("val", ()) if one.get("step") == self.step), {})

    @property
    def of_held_out(self) -> str:
        """What `held_out` is not taken on all held-out rows of; empty where it is."""
        return "" if self.done or not self.held_out else f"on {self.recipe.run.eval_rows:,} held-out rows at most"

    def figure(self, metric: str, step: int) -> float | None:
        """A loss of the run after a step, by a recipe's name for it such as val/loss; None where it was not taken.

        That of the finished run is on all held-out rows.
        """
        kind, _, field = metric.partition("/")
        found = self.held_out if kind == "val" and step == self.step else None
        if found is None:
            found = next((one for one in self.records.get(kind, ()) if one.get("step") == step), {})
        value = found.get(field)
        return float(value) if isinstance(value, int | float) else None

    @property
    def device_hours(self) -> float | None:
        """Device hours of the training steps, without evaluations and saves; None where no step was recorded.

        Steps that `run.log_every_steps` left out of the records are counted with the mean of the others. Each step
        counts with the devices of its launch; in folders of older versions, which record no launch, of the last one.
        """
        taken = [one for one in self.records.get("train", ()) if isinstance(one.get("step_s"), int | float)]
        hours = [one["step_s"] * devices / 3600 for one in taken if (devices := self._devices_at(one["step"]))]
        return statistics.fmean(hours) * self.step if hours and len(hours) == len(taken) else None

    def launches(self) -> list[tuple[int, Record]]:
        """Of each launch that took steps of these, in their order: the step it began behind, and its facts.

        Folders of older versions record no launch: then env.json stands for all. Of one that this version took over,
        nothing is known of the first launches.
        """
        recorded = self.records.get("launch", ())
        begun: dict[int, Record] = {0: {} if recorded else self.environment}
        for launch in recorded:
            if launch["step"] < self.step or not self.step:
                begun[launch["step"]] = {**self.environment, **launch}
        return sorted(begun.items(), key=lambda one: one[0])

    def _devices_at(self, step: int) -> int | None:
        """Devices of the launch that took a step."""
        devices = [facts.get("world_size") for begin, facts in self.launches() if begin < step][-1]
        return devices if isinstance(devices, int) else None

    def rows_drawn(self) -> list[int]:
        """Rows of each source that were drawn so far, in the recipe's order of sources.

        The order of sources is a function of their weights alone, so this is a count of what was drawn.
        """
        weights = [source.weight for source in self.recipe.data.source]
        order = Order(self.recipe.train.seed, [1] * len(weights), weights)
        position = int(self.state.get("position") or self.step * self.recipe.rows_per_step)

        drawn = order.sources_before(position)
        for first, end in merged(self.state.get("skipped_rows") or ()):
            drawn -= order.sources_before(min(end, position)) - order.sources_before(min(first, position))
        return [drawn[source] for source in range(len(weights))]


def _before(recipe: Recipe, changes: Any) -> Recipe:
    """The recipe as it was before a launch changed its result."""
    pairs = changes.items() if isinstance(changes, Mapping) else ()
    was = {place: pair[0] for place, pair in pairs if schema.changes_result(place) and isinstance(pair, list)}
    return schema.with_values(recipe, was) if was else recipe


def read_facts(run: Path, recipe: Recipe, checkpoint: Path) -> RunFacts:
    """Everything that the run folder tells of a verified checkpoint."""
    state = checkpoint_files.read_state(checkpoint)
    step = state["step"]

    # The records of later steps are not of these weights.
    recorded = run_folder.read_records(run)
    records = {kind: [record for record in of_kind if record["step"] <= step] for kind, of_kind in recorded.items()}

    # A launch behind this step may have changed the recipe: these weights know nothing of that.
    changes = run_folder.changes_by_step(run, recorded.get("launch", []))
    for change in reversed([one for one in changes if one["step"] >= step]):
        recipe = _before(recipe, change.get("changes"))

    done = run_folder.finished(run)
    is_of_these = done.get("step") == step and done.get("recipe_sha256") == recipe.identity_sha256()
    return RunFacts(
        recipe=recipe,
        step=step,
        weights_sha256=checkpoint_files.model_sha256(checkpoint),
        state=state,
        environment=read_json(run / "env.json") or {},
        changes=[one for one in changes if one["step"] < step],
        records=records,
        done=done if is_of_these else {},
    )

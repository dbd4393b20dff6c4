"""The facts of a checkpoint in its run folder, from which a model card is written.

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
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe, changes_result
from ds_slm.run import folder as run_folder
from ds_slm.run import metrics_file

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """A checkpoint, and the run that made it."""

    recipe: Recipe
    step: int
    weights_sha256: str
    """Hash of the checkpoint's weights, in fp32."""
    state: Record
    """The checkpoint's state.json."""
    environment: Record
    """env.json, of the last launch."""
    changes: Sequence[Record]
    """The changes made by launches that took some of these steps."""
    records: Mapping[str, Sequence[Record]]
    """Kind -> records of the steps up to this one."""
    done: Record
    """done.json if it was written at this step and for this recipe; else empty."""

    @property
    def samples(self) -> dict[str, str]:
        """Prompt -> the run's continuation with these weights; empty if there is none, or an older version ran it."""
        found = [one.get("continuations") for one in self.records.get("samples", ()) if one["step"] == self.step]
        texts = found[-1] if found and isinstance(found[-1], Mapping) else {}
        return {prompt: str(texts[prompt]) for prompt in self.recipe.eval.prompts if prompt in texts}

    @property
    def name(self) -> str:
        """The launch's name for its recipe; in older folders the model's name."""
        return str(self.environment.get("recipe_name") or self.recipe.card.name)

    @property
    def has_base(self) -> bool:
        """Whether the run began with a trained model: it fine-tunes one, or trains it further."""
        return self.recipe.sft is not None or bool(self.environment.get(checkpoint_files.BASE))

    @property
    def base_name(self) -> str:
        """That model's id on the hub if the recipe gives it, else its name; empty if neither is known."""
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
        """The losses of these weights on held-out rows; empty if they were not evaluated."""
        if self.done:
            return {key.removeprefix("val_"): value for key, value in self.done.items() if key.startswith("val_")}
        return next((one for one in self.records.get("val", ()) if one.get("step") == self.step), {})

    @property
    def of_held_out(self) -> str:
        """A remark if `held_out` does not cover all held-out rows; empty if it does."""
        return "" if self.done or not self.held_out else f"on {self.recipe.run.eval_rows:,} held-out rows at most"

    def figure(self, metric: str, step: int) -> float | None:
        """A loss of the run after a step, by a recipe's name for it such as val/loss; None if it was not measured.

        For the finished run it is the loss on all held-out rows.
        """
        kind, _, field = metric.partition("/")
        found = self.held_out if kind == "val" and step == self.step else None
        if found is None:
            found = next((one for one in self.records.get(kind, ()) if one.get("step") == step), {})
        value = found.get(field)
        return float(value) if isinstance(value, int | float) else None

    @property
    def device_hours(self) -> float | None:
        """Device hours of the training steps, without evaluations and saves; None if no step was recorded.

        Steps that `run.log_every_steps` left out of the records count with the mean of the others. Each step counts
        with the devices of its launch; in folders of older versions, which record no launch, with the last launch's.
        """
        taken = [one for one in self.records.get("train", ()) if isinstance(one.get("step_s"), int | float)]
        hours = [one["step_s"] * devices / 3600 for one in taken if (devices := self._devices_at(one["step"]))]
        return statistics.fmean(hours) * self.step if hours and len(hours) == len(taken) else None

    def launches(self) -> list[tuple[int, Record]]:
        """For each launch that took some of these steps, in order: the step after which it began, and its facts.

        Folders of older versions record no launch: then env.json stands for all. If this version took over such a
        folder, its first launches are not known.
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

        The order of sources depends only on their weights, so this counts exactly the rows that were drawn.
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
    was = {place: pair[0] for place, pair in pairs if changes_result(place) and isinstance(pair, list)}
    return loading.with_values(recipe, was) if was else recipe


def read_facts(run: Path, recipe: Recipe, checkpoint: Path) -> RunFacts:
    """Read all facts of a verified checkpoint from the run folder."""
    state = checkpoint_files.read_state(checkpoint)
    step = state["step"]

    # The records of later steps are not of these weights.
    recorded = metrics_file.read(run)
    records = {kind: [record for record in of_kind if record["step"] <= step] for kind, of_kind in recorded.items()}

    # A launch after this step may have changed the recipe, which does not concern these weights.
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

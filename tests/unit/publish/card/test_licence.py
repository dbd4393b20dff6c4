"""What the model card says of its licence."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.support.told_runs import recipe_of, write_run

pytestmark = pytest.mark.usefixtures("one_thread", "offline")


def test_another_licence_has_a_name_and_a_place(tmp_path: Path, export: Any) -> None:
    """Oracle: the three keys of hub-docs' model-cards.md."""
    place = "https://example.org/terms"
    given = ("license=other", "license_name=open-terms", f"license_link={place}")
    card = export(
        write_run(tmp_path / "run", recipe_of()), *(word for one in given for word in ("--set", f"card.{one}"))
    )
    head = ModelCard(card).data.to_dict()
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "open-terms", place)
    assert "open-terms: https://example.org/terms." in card.partition("## Licence")[2].partition("\n## ")[0]

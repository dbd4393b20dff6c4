"""What a model card may name, by the hub's own rules as far as they can be checked without it."""

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from ds_slm.errors import RecipeError
from ds_slm.recipe import loading, resume_rules
from ds_slm.recipe.hub_names import LICENSES, is_language, is_repo_id, license_problem


@given(st.text(alphabet="aZ9_-./é \n", max_size=12) | st.text(max_size=6))
@example("org/name.git")
@example("a" * 97)
@example("o/" + "a" * 96)
@example("trailing\n")
def test_a_repositorys_id_is_what_the_client_takes(name: str) -> None:
    """Oracle: huggingface_hub's validate_repo_id."""
    try:
        validate_repo_id(name)
        valid = True
    except HFValidationError:
        valid = False
    assert is_repo_id(name) is valid


@pytest.mark.parametrize("code", ["en", "de", "gsw", "code", "multilingual"])
def test_codes_of_languages(code: str) -> None:
    """Oracle: ISO 639, and the two words that the hub takes beside it."""
    assert is_language(code)


@pytest.mark.parametrize("code", ["english", "xx", "EN", "en-US", "", "e", "en "])
def test_other_words_are_not_languages(code: str) -> None:
    """Oracle: ISO 639's codes have two or three small letters, and no language has xx."""
    assert not is_language(code)


@pytest.mark.parametrize(
    ("name", "nearest"), [("Apache-2.0", "apache-2.0"), ("apache 2", "apache-2.0"), ("MIT", "mit")]
)
def test_a_licence_that_is_misspelt_is_named(name: str, nearest: str) -> None:
    """Oracle: the hub's list holds small letters; a person would have meant this one."""
    assert repr(nearest) in str(license_problem(name))
    assert license_problem(nearest) is None


def test_licences_are_whole_names() -> None:
    """Oracle: the hub's list, where no name begins or ends with a dash, and all versions of a family are there."""
    assert not [name for name in LICENSES if name.startswith("-") or name.endswith("-") or not name[0].isalpha()]
    assert {"cc-by-3.0", "cc-by-nc-nd-4.0", "by-3.0", "nc-nd-4.0"} & LICENSES == {"cc-by-3.0", "cc-by-nc-nd-4.0"}


def test_a_card_is_refused_with_every_problem_at_once() -> None:
    """Oracle: four wrong words, four sentences."""
    wrong = ["card.license=gpl2", 'card.language=["en", "english", "xx"]', "card.base_model=a//b"]
    with pytest.raises(RecipeError) as caught:
        loading.load("demo", wrong)
    assert len(caught.value.problems) == 5  # with the line above them
    for word in ("'gpl2'", "'english'", "'xx'", "'a//b'"):
        assert word in str(caught.value)


def test_what_a_card_says_is_not_part_of_the_result() -> None:
    """Oracle: the hash of the recipe without it; a resumed run may change it."""
    said = loading.load("demo", ["card.license=mit", "card.base_model=org/name"])
    assert said.identity_sha256() == loading.load("demo").identity_sha256()
    assert resume_rules.refused_changes(loading.load("demo"), said, allow_change=False) == []

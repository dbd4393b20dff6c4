"""A finished export and the hub: check the card, and upload the folder. Only if a user asks for it.

README.md's text --validate--> the hub's own check          folder --push--> a private repository, one commit

HF_ENDPOINT names another hub; HF_TOKEN or `hf auth login` logs in. Only this module imports the hub's libraries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_slm.errors import UserError
from ds_slm.recipe.hub_names import is_repo_id

NETWORK = ("httpx", "httpcore")
"""Prefixes of modules whose errors mean that the hub was not reached; huggingface_hub decides which one it uses."""


class HubError(UserError):
    """The hub was not reached, or refuses the request."""


def problem_of_id(repo: str) -> str | None:
    """Why this is not the id of a repository with its owner; None if it is."""
    return None if is_repo_id(repo) and "/" in repo else f"{repo!r}: expected ORG/NAME, a repository's id on the hub."


def validate(card_text: str) -> None:
    """Ask the hub whether it takes a card.

    Raises:
        HubError: the hub refuses the card, with its reasons; or it was not reached.
    """
    from huggingface_hub import ModelCard

    with _told("the hub's check of the model card"):
        try:
            ModelCard(card_text).validate(repo_type="model")
        except ValueError as error:  # the client's error for a refusal by the hub
            raise HubError(f"the hub does not take this model card: {_first_line(error)}.") from error


def push(folder: Path, repo: str) -> str:
    """Upload a folder into a repository of the hub. One that does not exist is made, and is private.

    Returns:
        The address of the repository.

    Raises:
        HubError: the hub was not reached, or refuses. The folder does not change.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _told(f"--push {repo}", f" {folder} is whole: `hf upload {repo} {folder}` tries again."):
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload a model that ds_slm exported")
    return str(address)


@contextmanager
def _told(what: str, way_out: str = "") -> Iterator[None]:
    """Within it the errors of the hub's libraries become one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(f"{what}: the hub refuses ({_reason(error)}).{way_out}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: HF_HUB_OFFLINE forbids to ask the hub: unset it.{way_out}") from error
    except Exception as error:
        network = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(NETWORK)
        if not network:
            raise
        raise HubError(f"{what}: the hub was not reached ({_first_line(error)}).{way_out}") from error


def _reason(error: "Exception") -> str:
    """The hub's answer, and how to log in if that may help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"{status}: {_first_line(getattr(error, 'server_message', None) or error)}"
    if status in (401, 403):
        reason += "; log in as somebody who may write there, with hf auth login or HF_TOKEN"
    return reason


def _first_line(error: object) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")

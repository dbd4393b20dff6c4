"""A finished export and the hub: has it a card that the hub takes, and up it goes. Only where a user asks for it.

README.md's text --validate--> the hub's own check          folder --push--> a private repository, one commit

HF_ENDPOINT names another hub, HF_TOKEN or `hf auth login` says who asks. The hub's libraries are imported here alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_slm.errors import UserError
from ds_slm.recipe.hub_names import is_repo_id

NETWORK = ("httpx", "httpcore")
"""Beginnings of modules whose errors say that the hub was not reached; which of them is huggingface_hub's affair."""


class HubError(UserError):
    """The hub was not reached, or refuses what it is asked for."""


def problem_of_id(repo: str) -> str | None:
    """Why this is not the id of a repository with its owner; None where it is."""
    return None if is_repo_id(repo) and "/" in repo else f"{repo!r}: expected ORG/NAME, a repository's id on the hub."


def validate(card_text: str) -> None:
    """Ask the hub whether it takes a card.

    Raises:
        HubError: it does not, with its reasons; or it was not reached.
    """
    from huggingface_hub import ModelCard

    with _told("the hub's check of the model card"):
        try:
            ModelCard(card_text).validate(repo_type="model")
        except ValueError as error:  # what the client makes of the hub's refusal
            raise HubError(f"the hub does not take this model card: {_first_line(error)}.") from error


def push(folder: Path, repo: str) -> str:
    """Upload a folder into a repository of the hub. One that does not exist is made, and is private.

    Returns:
        The address of the repository.

    Raises:
        HubError: the hub was not reached, or refuses. The folder stays as it is.
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
    """What the hub answered, and how to log in where that may help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"{status}: {_first_line(getattr(error, 'server_message', None) or error)}"
    if status in (401, 403):
        reason += "; log in as somebody who may write there, with hf auth login or HF_TOKEN"
    return reason


def _first_line(error: object) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")

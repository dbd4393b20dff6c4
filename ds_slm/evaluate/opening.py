"""MODEL on a command line, opened to be scored: our own decoder, or any causal model through transformers.

path --open_model--> our decoder on the device, fp32 --> DecoderScorer
     --transformers--> another architecture, fp32 --> TransformersScorer: a context anew for each continuation
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.errors import CheckpointError, DataError
from ds_slm.evaluate.scoring import BATCH_TOKENS, Batch, DecoderScorer, Scorer
from ds_slm.model.decoder import Decoder
from ds_slm.model.loss import TokenScores
from ds_slm.publish.models import OpenModel, open_model


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be scored."""

    scorer: Scorer
    tokenizer: Tokenizer
    folder: Path
    """The run folder, or the model's own: where its results belong."""
    facts: dict[str, Any]
    """What eval.json says of it: sha256, step, dtype, architecture."""


class TransformersScorer:
    """Any causal model of transformers, one plain row for each continuation."""

    branches = False
    at_a_time = 1
    most_logits = 2**27
    """Of a batch: all of its tokens have some."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model.eval().to(device)
        self.device = device
        config = model.config
        lengths = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
        self.max_length = next((length for length in lengths if length), 2048)
        self.batch_tokens = min(BATCH_TOKENS[device.type], max(256, self.most_logits // config.vocab_size))

    @torch.no_grad()
    def __call__(self, batches: Sequence[Batch]) -> list[TokenScores]:
        """The scores of each batch's tokens."""
        return [self._score(batch) for batch in batches]

    def _score(self, batch: Batch) -> TokenScores:
        logits_NV = self.model(batch.ids_BT).logits.flatten(0, 1)[batch.continuations.places_N].float()
        targets_N = batch.continuations.targets_N
        log_probability_N = F.log_softmax(logits_NV, dim=-1).gather(1, targets_N.unsqueeze(1)).squeeze(1)
        return TokenScores(log_probability_N, logits_NV.argmax(-1) == targets_N)


def open_scorer(path: Path) -> Opened:
    """Open a run folder, one of its checkpoints, an export, or a Hugging Face folder of any architecture.

    Raises:
        CheckpointError: there is no model, or it is damaged.
        DataError: it has no tokenizer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if _is_foreign(path):
        return _open_foreign(path, device)

    opened = open_model(path)
    tokenizer = load_tokenizer(opened.tokenizer_folder)
    opened.refuse_other_parameters()
    with torch.device("meta"):
        model = Decoder(opened.shape)
    state = opened.read()
    model.load_state_dict(state, assign=True, strict=False)
    is_run = (opened.tokenizer_folder.parent / "recipe.toml").is_file()
    folder = opened.tokenizer_folder.parent if is_run else path
    if is_run and path.parent.name == "checkpoints":
        folder = folder / "eval" / opened.folder.name  # a checkpoint that was named has a place of its own
    return Opened(DecoderScorer(model.to(device)), tokenizer, folder, _facts(opened))


def _facts(opened: OpenModel) -> dict[str, Any]:
    name = opened.folder.name
    step = int(name.removeprefix("step-")) if name.startswith("step-") else None
    return {
        "path": str(opened.folder),
        "sha256": opened.sha256,
        "step": step,
        "dtype": "float32",
        "scored_by": "ds_slm",
    }


def _is_foreign(path: Path) -> bool:
    """Whether a folder holds a model that our decoder is not."""
    from ds_slm.model import hf

    config_file = path / "config.json"
    if not config_file.is_file() or (path / "recipe.toml").is_file():
        return False
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        hf.shape_from_hf(config)
    except CheckpointError:
        return True
    except (ValueError, AttributeError):  # damaged: `open_model` says how
        return False
    return False


def _open_foreign(path: Path, device: torch.device) -> Opened:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors file: save the model in that format, no pickle is read.")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load {path} ({reason}): get an intact copy.") from error
    # transformers fills what a file lacks with random numbers.
    if lacking := sorted([*map(str, info["missing_keys"]), *map(str, info.get("mismatched_keys", ()))]):
        raise CheckpointError([f"{path} lacks {name}, or has it in another shape." for name in lacking])

    try:
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        eos = loaded.eos_token or loaded.bos_token
        if eos is None or loaded.backend_tokenizer is None:
            raise ValueError("it names no token that ends a document")
        tokenizer = Tokenizer(loaded.backend_tokenizer, eos, loaded.pad_token or eos, loaded.bos_token)
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} holds no tokenizer that can be used ({reason}): save one beside the model.") from error

    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    facts = {"path": str(path), "sha256": digest.hexdigest(), "step": None, "dtype": "float32"}
    return Opened(TransformersScorer(model, device), tokenizer, path, {**facts, "scored_by": "transformers"})

"""MODEL on a command line, opened to be scored: our own decoder, or any causal model through transformers.

path --open_model--> our decoder on the device, fp32 --> DecoderScorer
     --transformers--> another architecture, fp32 --> TransformersScorer: the same branches, if the model takes them
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from ds_slm.checkpoint.files import step_of
from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.errors import CheckpointError, DataError
from ds_slm.evaluate.scoring import BATCH_TOKENS, Batch, DecoderScorer, Scorer
from ds_slm.model.decoder import branched
from ds_slm.model.loss import TokenScores
from ds_slm.publish.models import open_model, sha256_of_weights, weight_files
from ds_slm.recipe.loading import RECIPE_FILE


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be scored."""

    scorer: Scorer
    tokenizer: Tokenizer
    folder: Path
    """Where its results belong."""
    facts: dict[str, Any]
    """Its description in eval.json: path, sha256, step, dtype, what scores it."""
    run: Path | None = None
    """Its run folder, if it is a checkpoint."""


class TransformersScorer:
    """Any causal model of transformers; one plain row for each continuation where it takes no masks of branches."""

    at_a_time = 1
    most_logits = 2**27
    """The most logits of a batch: all its tokens have logits."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model.eval().to(device)
        self.device = device
        config = model.config
        lengths = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
        self.max_length = next((length for length in lengths if length), 2048)
        self.batch_tokens = min(BATCH_TOKENS[device.type], max(256, self.most_logits // config.vocab_size))
        self.branches = self._takes_branches()

    @torch.no_grad()
    def __call__(self, batches: Sequence[Batch]) -> list[TokenScores]:
        """The scores of each batch's tokens."""
        return [self._score(batch) for batch in batches]

    def _takes_branches(self) -> bool:
        """Whether every layer takes a mask of its caller's and positions: two branches give what each gives alone."""
        config = self.model.config
        kinds = getattr(config, "layer_types", None)
        whole = set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
        if not whole or self.max_length < 8:
            return False  # such a mask would replace a layer's own mask

        ids_T = torch.arange(8, device=self.device) % config.vocab_size
        branch_ids_1T = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]], device=self.device)
        try:
            with torch.no_grad():
                got_TV = self._logits(ids_T.unsqueeze(0), branch_ids_1T)[0]
                for begin in (4, 6):
                    alone_T = torch.cat([ids_T[:4], ids_T[begin : begin + 2]])
                    expected_TV = self._logits(alone_T.unsqueeze(0), None)[0, 4:]
                    torch.testing.assert_close(got_TV[begin : begin + 2], expected_TV, rtol=1e-4, atol=1e-4)
        # Each architecture refuses with its own error.
        except (TypeError, ValueError, IndexError, RuntimeError, AssertionError):
            return False
        return True

    def _logits(self, ids_BT: Tensor, branch_ids_BT: Tensor | None) -> Tensor:
        if branch_ids_BT is None:
            return self.model(ids_BT).logits
        positions_BT, seen_BTT = branched(branch_ids_BT)
        lowest = torch.finfo(torch.float32).min
        mask_B1TT = torch.zeros(seen_BTT.shape, device=self.device).masked_fill(~seen_BTT, lowest).unsqueeze(1)
        return self.model(ids_BT, attention_mask=mask_B1TT, position_ids=positions_BT).logits

    def _score(self, batch: Batch) -> TokenScores:
        logits_BTV = self._logits(batch.ids_BT, batch.continuations.branch_ids_BT)
        logits_NV = logits_BTV.flatten(0, 1)[batch.continuations.places_N].float()
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
    model = opened.decoder(device)

    run = opened.tokenizer_folder.parent
    if not (run / RECIPE_FILE).is_file():
        run = None
    folder = run or path
    if run and path.parent.name == "checkpoints":
        folder = run / "eval" / opened.folder.name  # a checkpoint given by name has its own folder
    facts = _facts(opened.folder, opened.sha256, "ds_slm")
    return Opened(DecoderScorer(model), tokenizer, folder, facts, run)


def _facts(folder: Path, sha256: str, scored_by: str) -> dict[str, Any]:
    step = step_of(folder.name)
    return {"path": str(folder), "sha256": sha256, "step": step, "dtype": "float32", "scored_by": scored_by}


def _is_foreign(path: Path) -> bool:
    """Whether a folder holds a model that our decoder does not support."""
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

    files = weight_files(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load {path} ({reason}): get an intact copy.") from error

    # transformers fills missing weights with random numbers.
    if lacking := sorted([*map(str, info["missing_keys"]), *map(str, info.get("mismatched_keys", ()))]):
        raise CheckpointError([f"{path} lacks {name}, or has it in another shape." for name in lacking])

    _refuse_looking_ahead(model.eval(), path)
    try:
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        eos = loaded.eos_token or loaded.bos_token
        if eos is None or loaded.backend_tokenizer is None:
            raise ValueError("it names no token that ends a document")
        tokenizer = Tokenizer(loaded.backend_tokenizer, eos, loaded.pad_token or eos, loaded.bos_token)
    except (OSError, ValueError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} holds no tokenizer that can be used ({reason}): save one beside the model.") from error

    facts = _facts(path, sha256_of_weights(files), "transformers")
    return Opened(TransformersScorer(model, device), tokenizer, path, facts)


@torch.no_grad()
def _refuse_looking_ahead(model: Any, path: Path) -> None:
    """Raise CheckpointError if a token changes the outputs before it: transformers loads BERT as causal."""
    one, other = model(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]], device=model.device)).logits.float()
    changed_T = (one - other).abs().amax(-1)
    if changed_T[:-1].max() > 1e-3 * changed_T[-1]:
        raise CheckpointError(f"{path} is not a causal model: its predictions depend on the tokens that follow them.")

"""A GGUF file: the model and its tokenizer in one file, as llama.cpp, Ollama and LM Studio read it.

    shape, tokenizer's folder --prepare--> GgufFile, or every reason against it --write, by tensor--> OUT-f16.gguf

Matrices are stored as float16, or as 8-bit integers with a float16 scale for each 32 values of a row (q8_0); norms stay
float32. A row that does not divide by 32 stays float16. A plain decoder is llama.cpp's `llama`, one with QK-norm its
`qwen3`; a tied head is left out. `llama` rotates neighbouring components of a head, but we rotate i against i + E / 2,
so the rows of its queries and keys are reordered.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, conversion/ of ggml-org/llama.cpp. Known gap: one
file, however large.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ds_slm.errors import CheckpointError, ConfigError
from ds_slm.files import shortened
from ds_slm.model.decoder import Decoder
from ds_slm.publish.gguf_vocabulary import Vocabulary, read_vocabulary
from ds_slm.recipe.sections import Model

BLOCK = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
"""Values of a row that share a scale."""
PRECISIONS = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
MOST_LAYERS = 512
"""llama.cpp's own limit, LLAMA_MAX_LAYERS."""


@dataclass(frozen=True)
class GgufFile:
    """A file that can be written: everything but the values."""

    name: str
    """The model's name."""
    shape: Model
    vocabulary: Vocabulary
    precision: str
    """f16 or q8_0."""
    types: dict[str, gguf.GGMLQuantizationType]
    """How each parameter is stored, by our name, in the order of the file."""

    @property
    def stored(self) -> str:
        """How the values are stored, for people."""
        kept = [name for name, kind in self.types.items() if kind == gguf.GGMLQuantizationType.F16]
        if self.precision == "f16" or not kept:
            return self.precision
        return (
            f"{self.precision}, but for {len(kept)} matrices in f16, because their rows do not divide by {BLOCK}: "
            f"{shortened(kept)}"
        )

    def write(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write it.

        Args:
            path: the file to make.
            state: every parameter by name, in any dtype; one at a time is converted.

        Raises:
            CheckpointError: a value is too large for float16.
        """
        with contextlib.closing(gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self._architecture])) as writer:
            self._describe(writer, {name: tuple(state[name].shape) for name in self.types})
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()

        # The values follow, each tensor padded to a multiple of the alignment.
        with path.open("ab") as file:
            for name in self.types:
                file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
                file.write(self._converted(name, state[name]).data)
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))

    @property
    def _architecture(self) -> gguf.MODEL_ARCH:
        return gguf.MODEL_ARCH.QWEN3 if self.shape.qk_norm else gguf.MODEL_ARCH.LLAMA

    def _describe(self, writer: gguf.GGUFWriter, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Fill the header: the model, its tokenizer, and each tensor's name, size and type."""
        shape, parameters = self.shape, sum(map(math.prod, sizes.values()))
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.name)
        writer.add_size_label(gguf.size_label(parameters, parameters, 0, 0))
        writer.add_file_type(PRECISIONS[self.precision])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

        writer.add_vocab_size(shape.vocab_size)
        writer.add_context_length(shape.max_position_embeddings)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_feed_forward_length(shape.intermediate_size)
        writer.add_block_count(shape.num_hidden_layers)
        writer.add_head_count(shape.num_attention_heads)
        writer.add_head_count_kv(shape.num_key_value_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
        self.vocabulary.add_to(writer)

        names = gguf.get_tensor_name_map(self._architecture, shape.num_hidden_layers)
        for name, kind in self.types.items():
            theirs = names.get_name(name, try_suffixes=(".weight",))
            assert theirs is not None, name
            stored_bytes = math.prod(gguf.quant_shape_to_byte_shape(sizes[name], kind))
            writer.add_tensor_info(theirs, sizes[name], np.dtype(np.float32), stored_bytes, raw_dtype=kind)

    def _converted(self, name: str, tensor: Tensor) -> np.ndarray:
        """The values of a parameter as the file holds them."""
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        if not self.shape.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, self.shape.head_dim)

        with np.errstate(over="ignore"):
            stored = gguf.quantize(values, self.types[name])
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise CheckpointError(
                f"{name} holds {np.abs(values).max():.3g}, more than the {np.finfo(np.float16).max:,.0f} of float16: "
                "export without --gguf."
            )
        return np.ascontiguousarray(stored)


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of queries or keys, head by head: row i and row i + head_dim / 2 become neighbours."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def prepare(shape: Model, tokenizer_folder: Path, name: str, precision: str) -> GgufFile:
    """A file for a model of this shape and its tokenizer, before its weights are read.

    Raises:
        ConfigError: the precision is neither f16 nor q8_0, or q8_0 would change nothing.
        CheckpointError: llama.cpp does not support such a model.
        DataError: llama.cpp would not give the tokenizer's ids; with every reason.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--gguf is {precision!r}, expected one of {', '.join(PRECISIONS)}.")
    if shape.exclusive_attention:
        raise CheckpointError(
            "llama.cpp has no exclusive attention, so this model has no GGUF file: export without --gguf; transformers "
            "runs it from the modeling file in the folder."
        )
    if shape.num_hidden_layers > MOST_LAYERS:
        raise CheckpointError(
            f"the model has {shape.num_hidden_layers} layers, and llama.cpp takes at most {MOST_LAYERS}: "
            "export without --gguf."
        )

    # Norms do not change; rows that do not divide into blocks cannot be 8-bit.
    kinds = gguf.GGMLQuantizationType
    with torch.device("meta"):
        sizes = {name: parameter.shape for name, parameter in Decoder(shape).named_parameters()}
    types = {
        name: kinds.F32 if len(size) == 1 else kinds.Q8_0 if precision == "q8_0" and size[1] % BLOCK == 0 else kinds.F16
        for name, size in sizes.items()
    }
    if precision == "q8_0" and kinds.Q8_0 not in types.values():
        raise ConfigError(
            f"q8_0 stores rows in blocks of {BLOCK}, and no matrix of this model has a row that divides by {BLOCK}: "
            "use --gguf f16."
        )
    return GgufFile(name, shape, read_vocabulary(tokenizer_folder, shape.vocab_size), precision, types)

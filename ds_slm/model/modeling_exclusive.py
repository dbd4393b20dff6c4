"""Llama with exclusive attention, for transformers: shipped beside the weights and loaded with trust_remote_code=True.

Exclusive attention (arXiv 2603.09078) removes from each head's output y its component along the token's own value v:
z = y - (y.v / v.v) v, in fp32, after attention and before o_proj. Grouped queries use the value of their group. With
`qk_norm`, queries and keys are normalised per head before the rotation.
"""
# pyright: reportArgumentType=false, reportOptionalIterable=false

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


class ExclusiveConfig(LlamaConfig):
    """A Llama configuration, and whether queries and keys are normalised."""

    model_type = "ds_slm_exclusive"
    qk_norm: bool = False


class ExclusiveAttention(LlamaAttention):
    """Llama's attention without what each token would say of itself."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, past_key_values=None, **kwargs
    ):
        """The attention's output and its weights, as LlamaAttention returns them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        own_value = value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        # Before transformers 5.24 the cache had the other name.
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        # vLLM looks in this text for such an assignment, and for one call of what was assigned.
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

        output = exclude_own_value(output.reshape(heads), own_value.transpose(1, 2))
        return self.o_proj(output.flatten(2)), weights


def exclude_own_value(output, own_value):
    """Output [rows, tokens, heads, size] without its part along own_value [rows, tokens, groups, size], in fp32."""
    grouped = output.unflatten(2, (own_value.shape[2], -1)).float()
    value = own_value.unsqueeze(3).float().expand_as(grouped)
    share = (grouped * value).sum(-1, keepdim=True) / (value * value).sum(-1, keepdim=True).clamp_min(1e-20)
    return (grouped - share * value).flatten(2, 3).to(output.dtype)


class ExclusiveDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with exclusive attention."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = ExclusiveAttention(config, layer_idx)


class ExclusiveModel(LlamaModel):
    """A Llama trunk with exclusive attention."""

    config_class = ExclusiveConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(ExclusiveDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class ExclusiveForCausalLM(LlamaForCausalLM):
    """A causal language model with exclusive attention."""

    config_class = ExclusiveConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = ExclusiveModel(config)
        self.post_init()

"""Sizes in which training works, and by which budget.py estimates its memory: a number that both need stands here."""

CPU_LOSS_CHUNK_TOKENS = 512
"""On a CPU, measured. Each chunk reads and writes the head's gradient once more, so short chunks wait for memory (bf16,
a head of 32,000 x 768: 128 tokens take 1.4 times as long); long chunks leave the cache (4,096 x 128: 1,024, 1.6)."""
GPU_LOSS_CHUNK_LOGITS, MIN_LOSS_CHUNK_TOKENS, MAX_LOSS_CHUNK_TOKENS = 2**27, 128, 2048
"""On a GPU: logits of one chunk of the loss, in fp32 and again in the model's precision; limits of its tokens."""
BLOCK_VALUES = 256
"""bitsandbytes: values of 8-bit state that share one fp32 scale."""
SAVE_WINDOW_VALUES = 8 * 2**20
"""Values that a save gathers at a time: 32 MiB."""


def loss_chunk_tokens(device_type: str, vocab_size: int) -> int:
    """Tokens whose logits the loss holds at a time."""
    if device_type == "cpu":
        return CPU_LOSS_CHUNK_TOKENS
    return min(max(GPU_LOSS_CHUNK_LOGITS // vocab_size, MIN_LOSS_CHUNK_TOKENS), MAX_LOSS_CHUNK_TOKENS)

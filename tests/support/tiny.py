"""Tiny random models of real architectures, and a real tokenizer trained on a few sentences."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from uniform predictions, so that mistakes show
}
DEEPSEEK_V4 = {
    **SMALL,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "sliding_window": 12,
}
"""Layers of several kinds, among them some that can't be packed."""


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that every text round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    corpus = ["What is the capital of France? The capital of France is Paris. Question: Answer:"] * 4
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def build(config: PreTrainedConfig, model_class: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = model_class(config).eval()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 3
    return model


def llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    return build(LlamaConfig(**{**SMALL, "eos_token_id": 2, "pad_token_id": 3, **options}), LlamaForCausalLM, seed)

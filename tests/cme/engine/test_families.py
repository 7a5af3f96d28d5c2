"""Every family through its real modelling code: scores against the definition, one unpadded eager forward pass per
response, and what the self-check refuses."""

import copy
import warnings

import pytest
import tiny
import torch
import transformers as tf
from transformers import AttentionInterface

import cme.engine.lm_head
import cme.engine.selfcheck
import cme.verifier
from cme.engine.attention import IMPLEMENTATION, packed_attention
from cme.engine.forward import score_requests
from cme.engine.memory import token_budget
from cme.engine.packing import Request
from cme.engine.rope import follows_length
from cme.engine.selfcheck import why_not_packed, why_not_scored
from cme.errors import ModelError
from cme.verifier import Verifier

V = {"vocab_size": tiny.VOCAB_SIZE, "initializer_range": 0.3}
S = tiny.SMALL
H = {**S, "head_dim": 16}
WINDOW = {"sliding_window": 12}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {  # attention of DeepSeek's kind, with experts
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {**S, **LATENT, "first_k_dense_replace": 1}
GPT2 = {**V, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = {**V, "init_std": 0.3, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}


def rope(rope_type, **options):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **options}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=8.0, original_max_position_embeddings=32)
LONGROPE = rope(
    "longrope",
    factor=8.0,
    short_factor=[1.0] * 8,
    long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=32,
)
# Attention that grows with the position, as in Ministral 3
SCALED_ATTENTION = rope(
    "yarn",
    factor=8.0,
    original_max_position_embeddings=16,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.5,
)

PACKED = {
    "llama": tf.LlamaConfig(**S),
    "llama3": tf.LlamaConfig(**S, **LLAMA3),
    "llama-tied-bias": tf.LlamaConfig(**S, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-linear": tf.LlamaConfig(**S, **rope("linear", factor=4.0)),
    "llama-yarn": tf.LlamaConfig(**S, **YARN),
    "llama-dynamic": tf.LlamaConfig(**S, **rope("dynamic", factor=2.0)),
    "qwen2.5": tf.Qwen2Config(**S, tie_word_embeddings=True),
    "qwen2-window": tf.Qwen2Config(**S, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": tf.Qwen3Config(**H),
    "gemma": tf.GemmaConfig(**H),
    "gemma2": tf.Gemma2Config(**H, **WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma3": tf.Gemma3TextConfig(**H, **WINDOW, **ALTERNATING),
    "gemma4": tf.Gemma4TextConfig(
        **H,
        **WINDOW,
        **ALTERNATING,
        num_kv_shared_layers=0,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
    ),
    "gemma4-wide": tf.Gemma4TextConfig(
        **H,
        **WINDOW,
        **ALTERNATING,
        num_kv_shared_layers=0,
        global_head_dim=32,
        hidden_size_per_layer_input=0,
    ),
    "olmo": tf.OlmoConfig(**S, clip_qkv=2.0),
    "olmo2": tf.Olmo2Config(**S),
    "olmo3": tf.Olmo3Config(**S, **WINDOW, **ALTERNATING),
    "olmoe": tf.OlmoeConfig(**S, **EXPERTS),
    "smollm3": tf.SmolLM3Config(**S, no_rope_layers=[1, 0], pad_token_id=0, eos_token_id=2),
    "mistral": tf.MistralConfig(**S, **WINDOW),
    "ministral3": tf.Ministral3Config(**H, **SCALED_ATTENTION),
    "mixtral": tf.MixtralConfig(**S, **WINDOW, **EXPERTS),
    "phi": tf.PhiConfig(**S),
    "phi3-longrope": tf.Phi3Config(**S, **LONGROPE, original_max_position_embeddings=32, pad_token_id=0),
    "gpt2": tf.GPT2Config(**GPT2),
    "gptj": tf.GPTJConfig(**GPT2, rotary_dim=8),
    "pythia": tf.GPTNeoXConfig(**S),
    "opt": tf.OPTConfig(**OPT, max_position_embeddings=256, word_embed_proj_dim=64),
    "opt-projected": tf.OPTConfig(**OPT, max_position_embeddings=256, word_embed_proj_dim=32),
    "starcoder2": tf.Starcoder2Config(**S, **WINDOW),
    "cohere": tf.CohereConfig(**S, logit_scale=0.3),
    "cohere2": tf.Cohere2Config(**S, **WINDOW, logit_scale=0.3),
    "granite": tf.GraniteConfig(
        **S, logits_scaling=4.0, attention_multiplier=0.1, residual_multiplier=0.5, embedding_multiplier=2.0
    ),
    "minicpm3": tf.MiniCPM3Config(**{**MLA, "dim_model_base": 32}),
    "gpt-oss": tf.GptOssConfig(**H, **WINDOW, **EXPERTS),
    "qwen2-moe": tf.Qwen2MoeConfig(**S, **EXPERTS, shared_expert_intermediate_size=48),
    "qwen3-moe": tf.Qwen3MoeConfig(**H, **EXPERTS),
    "deepseek-v2": tf.DeepseekV2Config(**MLA),
    "deepseek-v3": tf.DeepseekV3Config(**MLA),
    "gemma3-vision": tf.Gemma3Config(text_config={**H, **WINDOW}, vision_config=VISION, mm_tokens_per_image=4),
    "qwen2.5-vision": tf.Qwen2_5_VLConfig(
        text_config={**S, **rope("default", mrope_section=[2, 3, 3])}, vision_config=QWEN_VISION
    ),
}
MAMBA = {**V, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
INDEXED = {
    **H,
    **LATENT,
    "index_topk": 40,
    "index_head_dim": 16,
    "index_n_heads": 16,  # few leave many scores at exactly 0, and ties to chance
    "mlp_layer_types": ["dense", "sparse"],
}
PADDED = {
    # recurrent layers, convolutions and chunks, which would mix the responses of a pack
    "mamba": tf.MambaConfig(**MAMBA),
    "mamba2": tf.Mamba2Config(**MAMBA, num_heads=8, head_dim=16, n_groups=1, chunk_size=8),
    "rwkv": tf.RwkvConfig(vocab_size=320, hidden_size=64, attention_hidden_size=64, num_hidden_layers=2),
    "recurrent-gemma": tf.RecurrentGemmaConfig(
        **{**S, "num_hidden_layers": 3}, lru_width=64, attention_window_size=12, logits_soft_cap=1.0
    ),
    "qwen3-next": tf.Qwen3NextConfig(
        **H,
        **EXPERTS,
        **LINEAR,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=48,
        layer_types=["linear_attention", "full_attention"],
    ),
    "jamba": tf.JambaConfig(
        **S, num_experts=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ),
    "bamba": tf.BambaConfig(
        **S, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, attn_layer_indices=[1]
    ),
    "falcon-h1": tf.FalconH1Config(
        **S, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, lm_head_multiplier=0.5
    ),
    "lfm2": tf.Lfm2Config(**S, layer_types=["conv", "full_attention"]),
    "llama4": tf.Llama4TextConfig(
        **{**H, "num_hidden_layers": 4}, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=64
    ),
    "deepseek-v4": tf.DeepseekV4Config(**tiny.DEEPSEEK_V4),
    # sparse attention, to the tokens that an index chooses: fewer here than the sequences have
    "deepseek-v3.2": tf.DeepseekV32Config(**INDEXED),
    "glm-dsa": tf.GlmMoeDsaConfig(**INDEXED, indexer_types=["full", "shared"]),
    # biases by distance instead of positions, in the mask
    "bloom": tf.BloomConfig(**V, hidden_size=64, n_layer=2, n_head=4),
    "mpt": tf.MptConfig(**V, d_model=64, n_layers=2, n_heads=4),
    "falcon-alibi": tf.FalconConfig(**V, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    # attention of their own
    "falcon": tf.FalconConfig(**V, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "stablelm": tf.StableLmConfig(**S),
    # a window that only the mask knows, and frequencies that follow the length, in padded batches
    "qwen2-moe-window": tf.Qwen2MoeConfig(
        **S, **EXPERTS, **WINDOW, shared_expert_intermediate_size=48, use_sliding_window=True, max_window_layers=1
    ),
    "phimoe-longrope": tf.PhimoeConfig(
        **S,
        original_max_position_embeddings=32,
        **WINDOW,
        **EXPERTS,
        **rope(**{**LONGROPE["rope_parameters"], "short_mscale": 1.0, "long_mscale": 1.5}),
    ),
}
ALL = {**PACKED, **PADDED}
CLASSES = {
    "gemma3-vision": tf.Gemma3ForConditionalGeneration,
    "qwen2.5-vision": tf.Qwen2_5_VLForConditionalGeneration,
    "llama4": tf.Llama4ForCausalLM,
}


def build(config, model_class=None):
    """The model, well off its initial uniformity: biases, norms and sinks start as constants."""
    torch.manual_seed(0)
    model_class = model_class or tf.AutoModelForCausalLM._model_mapping[type(config)]
    model = model_class(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def family(name):
    return build(ALL[name], CLASSES.get(name))


def requests():
    """Prompts beyond the windows and the original contexts, and of one token; two that begin alike."""
    generator = torch.Generator().manual_seed(1)

    def tokens(n):
        return tuple(torch.randint(4, tiny.VOCAB_SIZE, (n,), generator=generator).tolist())

    shared = tokens(20)
    prompts = [(*shared, *tokens(20)), (*shared, *tokens(3)), tokens(1)]
    return [Request(prompt, tokens(n)) for prompt in prompts for n in (17, 3, 1)]


def plain(model, request):
    ids = torch.tensor([[*request.prompt, *request.response]])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    logprobs = logits.double().log_softmax(-1)[len(request.prompt) - 1 :]
    return logprobs.gather(1, ids[0, len(request.prompt) :, None]).squeeze(1)


def assert_scores_are_plain(model, verifier, asked):
    assert token_budget(verifier.model) > 0  # it reads sizes, which families name and hide in their own ways
    model.set_attn_implementation("eager")
    want = [plain(model, request) for request in asked]
    assert torch.cat(want).std() > 0.3, "predictions are too uniform for mistakes to show"
    scored = score_requests(verifier.model, asked, max_batch_tokens=150, packed=verifier.packed)
    for request, stats, expected in zip(asked, scored, want, strict=True):
        torch.testing.assert_close(stats.logprob.double(), expected, rtol=0, atol=5e-5, msg=str(len(request)))


@pytest.mark.parametrize("name", PACKED)
def test_packed_scores_are_those_of_plain_forward_passes(name):
    if name == "gptj" and not tf.GPTJForCausalLM._supports_attention_backend:
        pytest.skip("this version of transformers gives GPT-J an attention of its own")
    verifier = Verifier.of(family(name), tiny.tokenizer())
    assert verifier.packed
    assert_scores_are_plain(family(name), verifier, requests())


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_cannot_be_packed_is_padded_and_agrees(name):
    with pytest.warns(UserWarning, match="right-padded batches"):
        verifier = Verifier.of(family(name), tiny.tokenizer())
    assert not verifier.packed
    assert_scores_are_plain(family(name), verifier, requests())


@pytest.mark.parametrize("name", ["phi3-longrope", "phimoe-longrope"])
@pytest.mark.filterwarnings("ignore:.*right-padded")
def test_frequencies_follow_each_sequence_and_not_its_batch(name):
    verifier = Verifier.of(family(name), tiny.tokenizer())
    # The last token is not fed: 33 tokens are as long as the original context of 32, 34 are longer
    asked = [Request(tuple(range(10, 10 + n)), (50 + n, 60, 61)) for n in (28, 29, 30, 31, 32, 40, 2)]
    assert_scores_are_plain(family(name), verifier, asked)
    assert_scores_are_plain(family(name), verifier, asked[:1])  # after a long one
    assert follows_length(verifier.model.config) == "longrope"


def test_dynamic_rope_beyond_its_context_is_refused():
    verifier = Verifier.of(family("llama-dynamic"), tiny.tokenizer())
    fits = Request(tuple(range(10, 264)), (20, 21, 22))
    assert_scores_are_plain(family("llama-dynamic"), verifier, [fits])
    with pytest.raises(ModelError, match="258 tokens exceeds the context of 256"):
        score_requests(verifier.model, [Request((9, *fits.prompt), fits.response)], max_batch_tokens=300)
    assert follows_length(verifier.model.config) == "dynamic"


@pytest.mark.parametrize("name", ["llama", "llama3", "llama-linear", "llama-yarn", "gemma3", "gpt2"])
def test_other_frequencies_do_not_follow_the_length(name):
    assert follows_length(ALL[name]) is None


LONG_WINDOW = {"sliding_window": 64, "max_position_embeddings": 256}  # longer than the self-check's sequences
MISTAKES = {
    "a window that is not heeded": ("sliding_window", tf.MistralConfig(**{**S, **LONG_WINDOW})),
    "a window in some layers": ("sliding_window", tf.Gemma3TextConfig(**{**H, **LONG_WINDOW}, **ALTERNATING)),
    "a cap on attention": ("softcap", tf.Gemma2Config(**H, attn_logit_softcapping=2.0)),
    "attention sinks": ("s_aux", tf.GptOssConfig(**H, **EXPERTS)),
    "a scale of attention": ("scaling", tf.Gemma2Config(**H, query_pre_attn_scalar=64)),
}


@pytest.mark.parametrize(
    ("mistake", "dtype"),
    # 16-bit rounding hides a wrong scale in a model this small
    [*((m, torch.float32) for m in MISTAKES), *((m, torch.bfloat16) for m in MISTAKES if "scale" not in m)],
)
def test_the_self_check_misses_nothing_that_attention_is_told(mistake, dtype):
    forgotten, config = MISTAKES[mistake]

    def forgetful(*args, **kwargs):
        kwargs.pop(forgotten)
        return packed_attention(*args, **kwargs)

    model = build(config).to(dtype)
    model.set_attn_implementation(IMPLEMENTATION)
    assert why_not_packed(model) is None
    try:
        AttentionInterface.register(IMPLEMENTATION, forgetful)
        assert "differs from the plain forward pass" in why_not_packed(model)
    finally:
        AttentionInterface.register(IMPLEMENTATION, packed_attention)
    if "window" in mistake:  # the check cuts windows, and puts them back
        windows = {m.sliding_window for m in (model.config, *model.modules()) if hasattr(m, "sliding_window")}
        assert windows - {None} == {64}


def test_a_long_window_that_only_the_mask_knows_is_padded():
    config = tf.Qwen2MoeConfig(**{**S, **LONG_WINDOW}, **EXPERTS, use_sliding_window=True, max_window_layers=1)
    with pytest.warns(UserWarning, match="right-padded batches"):
        verifier = Verifier.of(build(config), tiny.tokenizer())
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 320, (90,), generator=generator).tolist()
    assert_scores_are_plain(build(config), verifier, [Request(tuple(ids[:80]), tuple(ids[80:]))])


FEW_INDEX_HEADS = {**INDEXED, "index_topk": 64, "index_n_heads": 4}
del FEW_INDEX_HEADS["head_dim"]
CHOSEN_KEYS = {
    "axk2": tf.AXK2Config(**FEW_INDEX_HEADS),
    "hy_v4": tf.HYV4Config(**FEW_INDEX_HEADS, pad_token_id=0),
    "doge": tf.DogeConfig(**S, keep_window_size=64),
}


@pytest.mark.parametrize("name", CHOSEN_KEYS)
def test_attention_to_chosen_keys_is_refused_where_equal_words_are_chosen_by_chance(name):
    # Texts up to the limit see every key; it is longer ones whose scores are none
    with pytest.raises(ModelError, match=r"predictions change with the tokens .* in a text of \d+ tokens"):
        Verifier.of(build(CHOSEN_KEYS[name]), tiny.tokenizer())


def test_a_limit_as_long_as_the_context_limits_nothing():
    config = tf.DogeConfig(**{**S, "max_position_embeddings": 128}, keep_window_size=128)
    with pytest.warns(UserWarning, match="right-padded batches"):
        Verifier.of(build(config), tiny.tokenizer())


def test_a_plain_model_is_not_checked_on_a_long_text():
    for name in ("llama", "qwen3", "mistral", "gpt2", "phi3-longrope"):
        assert cme.engine.selfcheck._long_lengths(build(ALL[name]), 0) == [], name


def test_wrong_positions_fail_the_self_check(monkeypatch):
    def positions_of_the_pack(*args):
        batch = pack(*args)
        batch.inputs["position_ids"] = torch.arange(batch.inputs["input_ids"].shape[1])[None]
        return batch

    pack = cme.engine.selfcheck.pack
    for name in ("llama", "gpt2", "opt"):
        model = family(name)
        model.set_attn_implementation(IMPLEMENTATION)
        monkeypatch.setattr(cme.engine.selfcheck, "pack", positions_of_the_pack)
        assert "differs from the plain forward pass" in why_not_packed(model)
        monkeypatch.setattr(cme.engine.selfcheck, "pack", pack)


HEADS = {
    **{name: ALL[name] for name in ("cohere", "granite", "gemma2", "recurrent-gemma", "falcon-h1")},
    # As built, their logits are small: a cap at 30 changes no log-probability by the tolerance of the check
    "gemma2-small": tf.Gemma2Config(**{**H, "initializer_range": 0.02}),
    "recurrent-gemma-small": tf.RecurrentGemmaConfig(
        **{**S, "initializer_range": 0.02, "num_hidden_layers": 1}, lru_width=64
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore:.*right-padded")
def test_a_cap_or_scale_of_the_logits_that_no_name_tells_is_measured(name, dtype, monkeypatch):
    model = build(HEADS[name]).to(dtype)
    want = cme.engine.lm_head.LMHead.of(model)
    assert (want.softcap, want.scale) != (None, 1.0)
    monkeypatch.setattr(cme.engine.lm_head, "_from_config", lambda config: (None, 1.0))
    with monkeypatch.context() as unmeasured:
        unmeasured.setattr(cme.verifier, "measure_head", lambda model: None)
        with pytest.raises(ModelError, match="final layers do more than one linear projection"):
            Verifier.of(model, tiny.tokenizer())
    found = cme.engine.lm_head.LMHead.of(Verifier.of(model, tiny.tokenizer()).model)
    precision = 1e-6 if dtype == torch.float32 else 1e-3
    assert found.scale == pytest.approx(want.scale, rel=precision)
    assert found.softcap == (want.softcap and pytest.approx(want.softcap, rel=precision))


@pytest.mark.parametrize("scale", ["inv_sqrt_d_model", 0.5])
def test_a_scale_that_the_model_ignores_is_not_applied(scale):
    config = tf.MptConfig(**V, d_model=64, n_layers=2, n_heads=4, logit_scale=scale)
    with pytest.warns(UserWarning, match="right-padded batches"):
        verifier = Verifier.of(build(config), tiny.tokenizer())
    assert_scores_are_plain(build(config), verifier, requests())


REFUSED = {
    "encoder-decoder": (
        tf.T5Config(vocab_size=320, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4),
        None,
    ),
    "not a causal": (tf.BertConfig(**V, hidden_size=64, num_hidden_layers=1, num_attention_heads=4), None),
    "not a causal language": (tf.Gemma3TextConfig(**H, use_bidirectional_attention=True), None),
    "it is not a causal": (
        tf.BertConfig(**V, hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
        tf.BertLMHeadModel,
    ),
    "more than one linear": (
        tf.BertConfig(**V, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, is_decoder=True),
        tf.BertLMHeadModel,
    ),
}
REFUSED_CLASSES = {
    tf.T5Config: tf.T5ForConditionalGeneration,
    tf.BertConfig: tf.BertForMaskedLM,
    tf.Gemma3TextConfig: tf.Gemma3ForCausalLM,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_causal_language_model_is_refused(reason):
    config, model_class = REFUSED[reason]
    with pytest.raises(ModelError, match=reason):
        Verifier.of(build(config, model_class or REFUSED_CLASSES[type(config)]), tiny.tokenizer())


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [(tf.LlamaModel, r"lacks lm_head\.weight"), (tf.LlamaForSequenceClassification, r"lacks lm_head\.weight")],
)
def test_a_checkpoint_without_a_head_is_not_given_a_random_one(model_class, reason, tmp_path):
    build(tf.LlamaConfig(**S), model_class).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        Verifier.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_checkpoint_is_refused_by_name(name, tmp_path):
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4}
    config, model_class, reason = {
        "t5": (REFUSED["encoder-decoder"][0], tf.T5ForConditionalGeneration, "could not load the verifier"),
        "bart": (
            tf.BartConfig(vocab_size=320, d_model=64, **heads),
            tf.BartForConditionalGeneration,
            "decoder-only",
        ),
    }[name]
    config.num_hidden_layers = config.decoder_layers = config.encoder_layers = 1
    build(config, model_class).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        Verifier.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("llama", "gemma2", "mixtral") for dtype in (torch.bfloat16, torch.float16)),
        ("llama", torch.float64),
    ],
)
def test_the_self_check_allows_for_the_rounding_of_each_dtype(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = family(name).to(dtype)
        assert Verifier.of(model, tiny.tokenizer()).packed
        assert why_not_scored(model) is None


def test_rows_that_see_nothing_harm_no_other():
    # Left padding longer than the window: its queries see no key at all
    model, ids = family("gemma2"), torch.arange(10, 30)[None]
    model.set_attn_implementation("eager")  # SDPA has no softcap in all versions of transformers
    with torch.no_grad():
        want = model(input_ids=ids).logits
        model.set_attn_implementation(IMPLEMENTATION)
        padding = torch.zeros(1, 20, dtype=torch.int64)
        mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
        out = model(
            input_ids=torch.cat([padding, ids], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        )
    torch.testing.assert_close(out.logits[:, 20:], want, rtol=0, atol=1e-4)

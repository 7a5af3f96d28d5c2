"""What a verifier does with prompts and responses; its scores family by family are in test_families.py."""

import itertools
import math

import pytest
import tiny
import torch

import cme.engine.forward
from cme.engine.attention import IMPLEMENTATION
from cme.engine.forward import score_requests
from cme.engine.lm_head import LMHead, UnsupportedModelError
from cme.engine.packing import Request
from cme.engine.plan import AttentionPlan, Cascade
from cme.errors import ModelError
from cme.text.rendering import Renderer
from cme.verifier import Verifier

PROMPTS = ["What is the capital of France?"] * 3 + ["Where?"] * 2
RESPONSES = ["Paris.", "The capital of France is Paris.", "no idea", "Here!", "In the north, I think."]


@pytest.fixture(scope="module")
def verifier():
    return Verifier.of(tiny.llama(), tiny.tokenizer())


def own_only(segments):
    return tuple((s.start, 1, s.length) for s in segments)


def test_a_wrong_mask_fails_the_self_check(monkeypatch):
    # No response sees its prompt
    monkeypatch.setattr(AttentionPlan, "cascade", property(lambda self: Cascade(own_only(self.segments), ())))
    with pytest.warns(UserWarning, match="differs from the plain forward pass"):
        assert not Verifier.of(tiny.llama(), tiny.tokenizer()).packed


def test_scores_do_not_depend_on_the_batch_or_the_order():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer(), max_batch_tokens=20)
    together = verifier.score(PROMPTS, RESPONSES)
    for i in range(len(PROMPTS)):
        alone = verifier.score([PROMPTS[i]], [RESPONSES[i]])[0]
        assert alone.mean_logprob == pytest.approx(together[i].mean_logprob, abs=1e-5)


def test_equal_requests_are_computed_once(monkeypatch):
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    rows = []
    original = cme.engine.forward.score_batch
    monkeypatch.setattr(
        cme.engine.forward,
        "score_batch",
        lambda m, batch, *a: rows.append(len(batch.targets)) or original(m, batch, *a),
    )
    twice = verifier.score(["Hi", "Hi", "Ho"], ["yes", "yes", "yes"])
    assert sum(rows) == 2 * twice[0].num_tokens
    assert twice[0].mean_logprob == twice[1].mean_logprob != twice[2].mean_logprob


def test_signals_follow_their_definitions():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    score = verifier.score(["Hi"], ["Paris é"], stats=("entropy", "max_logprob"))[0]
    total = float(score.tokens.logprob.double().sum())
    assert score.sum_logprob == pytest.approx(total)
    assert score.mean_logprob == pytest.approx(total / score.num_tokens)
    assert score.perplexity == pytest.approx(math.exp(-total / score.num_tokens))
    assert score.num_bytes == 8
    assert score.bits_per_byte == pytest.approx(-total / math.log(2) / 8)
    assert 0 < score.mean_entropy < math.log(320)
    assert score.top1_rate == pytest.approx(
        float((score.tokens.logprob == score.tokens.max_logprob).double().mean())
    )


def test_what_cannot_be_scored_says_why_and_the_rest_is_scored():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    scores = verifier.score(["Hi"] * 3, ["", "Where? " * 200, "Paris"])
    assert scores[0].unscorable == "the response is empty"
    assert "exceed the verifier's context of 256" in scores[1].unscorable
    assert scores[0].mean_logprob is scores[1].perplexity is None
    assert scores[2].mean_logprob is not None


def test_nothing_to_score_is_an_empty_list():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    assert verifier.score([], []) == []
    assert verifier.score(["Hi"], [""])[0].unscorable


def test_prompts_and_responses_must_pair_up():
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        Verifier.of(tiny.llama(), tiny.tokenizer()).score(["a", "b"], ["c"])


def test_broken_weights_are_refused_by_name(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="weights are broken"):
        Verifier.of(model, tiny.tokenizer())
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"NaN or infinite values in model\.layers\.1\.mlp\.up_proj"):
        Verifier.from_pretrained(str(tmp_path))


def test_log_probabilities_that_overflow_are_not_a_score():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    with torch.no_grad():
        verifier.model.get_output_embeddings().weight[5] = math.inf
    assert "not finite" in verifier.score(["Hi"], ["Paris"])[0].unscorable


def test_an_unknown_model_is_named():
    with pytest.raises(ModelError, match="could not load the verifier 'no-such-folder'"):
        Verifier.from_pretrained("no-such-folder")


def test_an_unknown_token_is_caught_before_the_model_runs_and_the_rest_is_scored():
    model, counts = tiny.llama(vocab_size=100), []
    model.set_attn_implementation(IMPLEMENTATION)
    requests = [Request((1, 2), (3, 100)), Request((1, -1), (3,)), Request((1, 2), (99,))]
    *unknown, score = score_requests(model, requests, on_scored=counts.append)
    assert unknown == [f"the verifier has no token {i}: its vocabulary has 100" for i in (100, -1)]
    assert score.logprob.shape == (1,)
    assert counts == [2, 1]


def test_a_response_that_no_memory_is_left_for_says_why_and_the_rest_is_scored(monkeypatch):
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    want = verifier.score(PROMPTS, RESPONSES)
    longest = max(range(len(PROMPTS)), key=lambda i: want[i].num_tokens)
    original = cme.engine.forward.score_batch
    sizes, most = [], math.inf

    def small_device(model, batch, *args):
        sizes.append(batch.inputs["input_ids"].numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch, *args)

    monkeypatch.setattr(cme.engine.forward, "score_batch", small_device)
    monkeypatch.setattr(cme.engine.forward, "FEWEST_TOKENS", 1)
    verifier.score([PROMPTS[longest]], [RESPONSES[longest]])
    most = sizes[-1] - 1
    counts = []
    scores = verifier.score(PROMPTS, RESPONSES, on_scored=counts.append)
    assert "out of memory" in scores[longest].unscorable
    assert scores[longest].mean_logprob is None
    for i in set(range(len(PROMPTS))) - {longest}:
        assert scores[i].mean_logprob == pytest.approx(want[i].mean_logprob, abs=1e-5)
    assert sum(counts) == len(PROMPTS)


def test_a_head_with_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UnsupportedModelError, match=r"not a plain torch\.nn\.Linear"):
        LMHead.of(model.get_base_model())
    with pytest.raises(ModelError):
        Verifier.of(model.get_base_model(), tiny.tokenizer())


def test_a_peft_model_scores_with_its_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny.llama(), config)
    got = Verifier.of(adapted, tiny.tokenizer()).score(PROMPTS, RESPONSES)
    merged = Verifier.of(adapted.merge_and_unload(), tiny.tokenizer()).score(PROMPTS, RESPONSES)
    plain = Verifier.of(tiny.llama(), tiny.tokenizer()).score(PROMPTS, RESPONSES)
    for a, b, c in zip(got, merged, plain, strict=True):
        assert a.mean_logprob == pytest.approx(b.mean_logprob, abs=1e-4)
        assert abs(a.mean_logprob - c.mean_logprob) > 1e-3


def test_adapters_that_cannot_be_scored_say_why_and_what_to_do():
    peft = pytest.importorskip("peft")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="PROMPT_TUNING puts virtual tokens before the prompt"):
        Verifier.of(peft.get_peft_model(tiny.llama(), prompts), tiny.tokenizer())
    for config in (
        peft.LoraConfig(target_modules=["lm_head"]),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        with pytest.raises(ModelError, match=r"output layer is .*, not a plain .* merge_and_unload\(\)"):
            Verifier.of(peft.get_peft_model(tiny.llama(), config), tiny.tokenizer())


def test_loading_from_a_folder_scores_like_the_model_in_memory(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = Verifier.from_pretrained(str(tmp_path), device="cpu")
    here = Verifier.of(model, tiny.tokenizer())
    assert loaded.score(["Hi"], ["Paris"])[0].mean_logprob == here.score(["Hi"], ["Paris"])[0].mean_logprob
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_stream_is_scored_in_order_and_read_no_further_than_a_chunk(verifier):
    read = []

    def pairs():
        for i in itertools.count():
            read.append(i)
            yield ("Hi", "", None) if i == 3 else (f"Where is {i}?", "Paris is" + " nice" * (i % 3), True)

    stream = verifier.score_stream(pairs(), chunk_size=4, score_end_of_turn=True)
    scores = list(itertools.islice(stream, 6))
    assert len(read) == 8
    for i, score in enumerate(scores):
        if i == 3:
            assert score.unscorable == "the response is empty"
            continue
        (alone,) = verifier.score(
            [f"Where is {i}?"], ["Paris is" + " nice" * (i % 3)], finished=[True], score_end_of_turn=True
        )
        assert score.token_ids == alone.token_ids
        assert score.mean_logprob == pytest.approx(alone.mean_logprob, abs=1e-5)
    assert len(list(verifier.score_stream([("a", "b"), ("c", "d"), ("e", "f")], chunk_size=2))) == 3
    assert list(verifier.score_stream([])) == []


def test_text_that_is_no_unicode_is_not_scored(verifier):
    scores = verifier.score(["Hi", "\udc00", "Hi"], ["\ud83d", "Paris", "Paris"])
    assert scores[0].unscorable == "the response is not valid Unicode: it holds half of a surrogate pair"
    assert scores[1].unscorable.startswith("the prompt is not valid Unicode")
    assert scores[2].mean_logprob is not None


def test_a_huge_response_is_not_even_tokenised(verifier, monkeypatch):
    seen = []
    original = Renderer.response_ids
    monkeypatch.setattr(
        Renderer, "response_ids", lambda self, text, **how: seen.append(len(text)) or original(self, text, **how)
    )
    scores = verifier.score(["Hi", "Hi", "x" * 10**6], ["é " * 10**6, "Paris", "Paris"])
    assert scores[0].unscorable == "the response's 2000000 characters exceed the verifier's context of 256"
    assert scores[2].unscorable.startswith("the prompt's 1000000 characters exceed")
    assert scores[1].mean_logprob is not None
    assert seen == [5]


def test_a_template_that_refuses_a_conversation_spoils_that_one_alone():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{{ raise_exception('roles must alternate') if messages|length > 1 }}" + tiny.CHAT_TEMPLATE
    )
    verifier = Verifier.of(tiny.llama(), tokenizer)
    twice = [{"role": "user", "content": "Hi"}] * 2
    scores = verifier.score([twice, "Hi"], ["Paris", "Paris"])
    assert "refuses the prompt" in scores[0].unscorable
    assert "roles must alternate" in scores[0].unscorable
    assert scores[1].mean_logprob is not None


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    with pytest.raises(ModelError, match="does not belong to this model"):
        Verifier.of(tiny.llama(vocab_size=200), tiny.tokenizer())


def test_a_padded_vocabulary_is_fine_and_an_added_token_without_a_row_is_not_scored():
    tokenizer = tiny.tokenizer()
    rows = tokenizer.vocab_size
    tokenizer.add_tokens("<image>")
    padded = Verifier.of(tiny.llama(vocab_size=rows + 60), tokenizer)
    assert padded.score(["Hi"], ["Paris"])[0].mean_logprob is not None
    exact = Verifier.of(tiny.llama(vocab_size=rows), tokenizer)
    scores = exact.score(["Hi", "Hi"], ["An <image>", "Paris"])
    assert scores[0].unscorable == f"the verifier has no token {rows}: its vocabulary has {rows}"
    assert scores[1].mean_logprob is not None


def test_a_head_with_fewer_rows_than_the_embedding_limits_the_vocabulary():
    model = tiny.llama()
    model.lm_head = torch.nn.Linear(64, 250, bias=False)
    model.config.vocab_size = 250
    with pytest.raises(ModelError, match=r"303 tokens and the model only 250"):
        Verifier.of(model, tiny.tokenizer())

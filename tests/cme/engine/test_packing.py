import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.utils import _apply_to_tensors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import cme.engine.prefixes
from cme.engine.forward import score_batch
from cme.engine.packing import Request, make_batches, pack, pad

CPU = torch.device("cpu")
ids = st.integers(0, 1)  # few, so that many prompts begin alike
requests_lists = st.lists(
    st.builds(
        Request,
        st.lists(ids, min_size=1, max_size=8).map(tuple),
        st.lists(ids, min_size=1, max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module", autouse=True)
def split_for_any_gain():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cme.engine.prefixes, "MIN_SAVED", 1)
        yield


def visible_in_buckets(batch):
    """For every token of the pack, the indices of the tokens that the masks let it see, in order of position."""
    seen = {}
    for bucket in batch.inputs["cme_plan"].buckets(CPU)[0]:
        mask = bucket.mask(None)
        if mask is None:
            mask = (bucket.key_positions[:, None, :] <= bucket.query_positions[:, :, None]).unsqueeze(1)
        for b in range(bucket.queries.shape[0]):
            for q, index in enumerate(bucket.queries[b].tolist()):
                seen[index] = bucket.keys[b][mask[b, 0, q]].tolist()
    return seen


def visible_in_cascade(batch):
    """The same for the calls on slices."""
    cascade = batch.inputs["cme_plan"].cascade
    seen = {}
    for start, count, length in cascade.own:
        for i in range(start, start + count * length):
            seen[i] = [*range(i - (i - start) % length, i + 1)]
    for start, end, stop in reversed(cascade.shared):  # ancestors stand before their descendants
        for i in range(end, stop):
            seen[i] = [*range(start, end), *seen[i]]
    return seen


def contexts(batch, seen):
    """For every target the tokens that predict it, and the target."""
    tokens, positions = batch.inputs["input_ids"][0], batch.inputs["position_ids"][0]
    for keys in seen.values():
        assert positions[keys].tolist() == list(range(len(keys)))
    return [
        (tuple(tokens[seen[row]].tolist()), int(target))
        for row, target in zip(batch.rows.tolist(), batch.targets, strict=True)
    ]


def expected(requests, members):
    return [
        ((*requests[i].prompt, *requests[i].response)[: len(requests[i].prompt) + j], requests[i].response[j])
        for i in members
        for j in range(len(requests[i].response))
    ]


@pytest.mark.parametrize("visible", [visible_in_buckets, visible_in_cascade])
@settings(max_examples=100, deadline=None)
@given(requests=requests_lists)
def test_every_target_is_predicted_from_its_own_prompt_and_response(visible, requests):
    batch = pack(requests, CPU)
    assert sorted(batch.members) == list(range(len(requests)))
    assert contexts(batch, visible(batch)) == expected(requests, batch.members)


@settings(max_examples=60, deadline=None)
@given(requests=requests_lists, max_tokens=st.integers(1, 30), packed=st.booleans())
def test_batches_cover_every_request_once_within_the_budget(requests, max_tokens, packed):
    batches = list(make_batches(requests, max_tokens, CPU, packed))
    assert sorted(i for b in batches for i in b.members) == list(range(len(requests)))
    for batch in batches:
        most = max_tokens
        if packed:  # beside a long prefix there may be half as many all the same
            most = max(max_tokens, batch.inputs["cme_plan"].longest + max_tokens // 2)
        assert batch.inputs["input_ids"].numel() <= most or len(batch.members) == 1
        if packed:
            assert contexts(batch, visible_in_cascade(batch)) == expected(requests, batch.members)
        assert batch.lengths == [len(requests[i].response) for i in batch.members]


def test_a_shared_prompt_is_there_once():
    prompt = tuple(range(100, 150))
    batch = pack([Request(prompt, (1, 2, 3)), Request(prompt, (4, 5))], CPU)
    assert batch.inputs["input_ids"].shape == (1, 49 + 3 + 2)


def test_padded_rows_predict_the_same_targets():
    requests = [Request((1, 2), (3, 4, 5)), Request((6,), (7,))]
    batch = pad(requests, CPU)
    flat = batch.inputs["input_ids"].flatten()
    assert flat[batch.rows].tolist() == [2, 3, 4, 6]
    assert batch.targets.tolist() == [3, 4, 5, 7]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_prompts_that_begin_alike_share_their_beginning():
    system, example = tuple(range(100, 120)), tuple(range(200, 210))
    requests = [
        Request((*system, *example, 1, 2), (3,)),
        Request((*system, *example, 4, 5), (6, 7)),
        Request((*system, 8, 9), (3, 3)),
    ]
    batch = pack(requests, CPU)
    assert batch.inputs["input_ids"].shape == (1, 20 + 10 + 2 + 3 + 3)
    assert contexts(batch, visible_in_buckets(batch)) == expected(requests, batch.members)


def test_a_prefix_that_saves_little_is_computed_again(monkeypatch):
    monkeypatch.setattr(cme.engine.prefixes, "MIN_SAVED", 8)
    alone = [Request((1, 2, 3, 4, i), (i,)) for i in (5, 6)]
    assert len(pack(alone, CPU).inputs["cme_plan"].segments) == 2
    many = [Request((1, 2, 3, 4, i), (i,)) for i in (5, 6, 7)]
    assert len(pack(many, CPU).inputs["cme_plan"].segments) == 4


def test_a_response_that_shares_nothing_is_one_segment_with_its_prompt():
    batch = pack([Request((1, 2, 3), (4, 5)), Request((6, 7), (8,))], CPU)
    assert [s.length for s in batch.inputs["cme_plan"].segments] == [4, 2]
    assert all(bucket.causal for bucket in batch.inputs["cme_plan"].buckets(CPU)[0])


def test_a_group_that_fits_one_pack_is_not_cut():
    lonely, prompt = Request(tuple(range(10)), (1,) * 10), tuple(range(100, 120))
    group = [Request(prompt, (i,) * 4) for i in range(5)]
    batches = list(make_batches([lonely, *group], 50, CPU))
    assert [sorted(b.members) for b in batches] == [[0], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("limit", "sizes"), [(230, [30]), (140, [17, 13]), (100, [12, 12, 6]), (40, [5] * 6), (2, [1] * 30)]
)
def test_a_prompt_that_fills_the_budget_is_not_encoded_for_each_response(limit, sizes):
    prompt = tuple(range(100, 200))
    requests = [Request(prompt, (i,) * 4) for i in range(30)]  # 99 tokens, and 4 a response beside them
    batches = list(make_batches(requests, limit, CPU))
    assert [len(batch.members) for batch in batches] == sizes


def test_chains_of_prefixes_may_be_long():
    tokens = tuple(range(1200))
    requests = [Request(tokens[:n], (0,)) for n in range(1, 1200)]
    batch = pack(requests, CPU)
    assert batch.inputs["input_ids"].shape[1] == 1198 + 1199
    assert batch.inputs["cme_plan"].longest == 1199


WINDOWED = {"head_dim": 16, "sliding_window": 6}
FAMILIES = {
    "llama": (LlamaConfig(**tiny.SMALL), LlamaForCausalLM),
    "gemma2": (Gemma2Config(**tiny.SMALL, **WINDOWED), Gemma2ForCausalLM),  # softcapped scores
    "gemma3": (Gemma3TextConfig(**tiny.SMALL, **WINDOWED), Gemma3ForCausalLM),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_beginnings_change_neither_scores_nor_gradients(family):
    model = tiny.build(*FAMILIES[family])
    model.set_attn_implementation("cme_packed")
    system = tuple(range(10, 22))
    prompts = [(*system, *range(30, 30 + n)) for n in (1, 9, 4)] + [tuple(range(50, 60))]
    requests = [Request(p, tuple(range(70 + i, 70 + i + n))) for i, p in enumerate(prompts) for n in (1, 5)]
    weights = torch.randn(len(requests), generator=torch.Generator().manual_seed(0))

    def scores(batches):
        """Each request's log-probabilities, from (batch, the requests that its members index)."""
        found = {}
        for batch, indices in batches:
            parts = score_batch(model, batch).logprob.split(batch.lengths)
            found.update((indices[i], part) for i, part in zip(batch.members, parts, strict=True))
        return [found[i] for i in range(len(requests))]

    def gradients(values):
        model.zero_grad()
        sum(w * v.sum() for w, v in zip(weights, values, strict=True)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    together = [(pack(requests, CPU), range(len(requests)))]
    assert any(len(s.lineage()) == 3 for s in together[0][0].inputs["cme_plan"].segments)
    want = scores([(pad([request], CPU), [i]) for i, request in enumerate(requests)])
    masked = scores(together)
    with torch.no_grad():
        cascaded = scores(together)
    torch.testing.assert_close(torch.cat(masked), torch.cat(want), atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.cat(cascaded), torch.cat(want), atol=2e-5, rtol=0)
    exact = gradients(want)
    assert (gradients(masked) - exact).norm() <= 1e-5 * exact.norm()


def test_a_wrapper_that_moves_tensors_leaves_the_plan_alone():
    model = tiny.build(*FAMILIES["gemma3"])
    model.set_attn_implementation("cme_packed")
    system = tuple(range(10, 22))
    batch = pack([Request((*system, i), (i, 7, 8)) for i in (30, 31) for _ in range(2)], CPU)
    want = score_batch(model, batch).logprob
    moved = _apply_to_tensors(torch.clone, batch)  # as FSDP does at each wrapped module
    assert moved.rows is not batch.rows
    assert moved.inputs["cme_plan"] is batch.inputs["cme_plan"]
    assert torch.equal(score_batch(model, moved).logprob, want)


@pytest.mark.parametrize(("prompt", "response"), [((), (1,)), ((1,), ())])
def test_requests_need_a_token_on_both_sides(prompt, response):
    with pytest.raises(ValueError, match="at least one"):
        Request(prompt, response)

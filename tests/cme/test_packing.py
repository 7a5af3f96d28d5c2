import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cme.attention import AttentionPlan, Segment
from cme.packing import Request, make_batches, pack, pad

CPU = torch.device("cpu")
tokens = st.integers(0, 9)
requests_lists = st.lists(
    st.builds(
        Request,
        st.lists(tokens, min_size=1, max_size=4).map(tuple),
        st.lists(tokens, min_size=1, max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


def visible(batch):
    """For every target the tokens that the plan lets its row see, in order of position, and the target."""
    ids, positions = batch.inputs["input_ids"][0], batch.inputs["position_ids"][0]
    seen = {}
    for bucket in batch.inputs["cme_plan"].buckets:
        mask = bucket.mask(None)
        if mask is None:
            mask = (bucket.key_positions[:, None, :] <= bucket.query_positions[:, :, None]).unsqueeze(1)
        for b in range(bucket.queries.shape[0]):
            for q, index in enumerate(bucket.queries[b].tolist()):
                keys = bucket.keys[b][mask[b, 0, q]]
                assert positions[keys].tolist() == list(range(len(keys)))
                seen[index] = tuple(ids[keys].tolist())
    return [(seen[row], int(target)) for row, target in zip(batch.rows.tolist(), batch.targets, strict=True)]


def expected(requests, members):
    return [
        ((*requests[i].prompt, *requests[i].response)[: len(requests[i].prompt) + j], requests[i].response[j])
        for i in members
        for j in range(len(requests[i].response))
    ]


@settings(max_examples=60, deadline=None)
@given(requests=requests_lists)
def test_every_target_is_predicted_from_its_own_prompt_and_response(requests):
    batch = pack(requests, CPU)
    assert sorted(batch.members) == list(range(len(requests)))
    assert visible(batch) == expected(requests, batch.members)


@settings(max_examples=60, deadline=None)
@given(requests=requests_lists, max_tokens=st.integers(1, 30), packed=st.booleans())
def test_batches_cover_every_request_once_within_the_budget(requests, max_tokens, packed):
    batches = list(make_batches(requests, max_tokens, CPU, packed))
    assert sorted(i for b in batches for i in b.members) == list(range(len(requests)))
    for batch in batches:
        assert batch.inputs["input_ids"].numel() <= max_tokens or len(batch.members) == 1
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


def test_partial_prefixes_are_ancestors():
    root = Segment(0, 2)
    child = Segment(2, 3, root)
    leaf = Segment(5, 1, child)
    assert leaf.offset == 5
    assert leaf.keys() == [0, 1, 2, 3, 4, 5]
    plan = AttentionPlan.of([root, child, Segment(5, 1, root)], CPU)
    assert sorted(plan.order.tolist()) == sorted(set(plan.order.tolist()))


@pytest.mark.parametrize(("prompt", "response"), [((), (1,)), ((1,), ())])
def test_requests_need_a_token_on_both_sides(prompt, response):
    with pytest.raises(ValueError, match="at least one"):
        Request(prompt, response)

"""Scoring a group of responses to one prompt, against the ways in which it is commonly done.

    pytest benchmarks/test_scoring.py -m real_models -s              # everything, which takes hours on a CPU
    pytest benchmarks/test_scoring.py -m real_models -s -k 256/64/8  # one shape
    pytest benchmarks/test_scoring.py -m real_models -s --contestants logits_to_keep,cache  # against these two
    pytest benchmarks/test_scoring.py -m real_models -s --benchmark-json benchmarks/results/scoring.json

A shape is prompt tokens / response tokens / responses. The gain depends on it: with long prompts and short
responses most of a padded batch is copies of the prompt, and with the opposite almost nothing is.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from benchmarks.timing import DEVICE, Result, measure, race, report
from cme.demo.models import local_path
from cme.engine.attention import IMPLEMENTATION
from cme.engine.forward import score_requests
from cme.engine.memory import free_memory
from cme.engine.packing import Request

MODEL, DTYPE = "smollm2-135m-instruct", torch.float32
SHAPES = ["150/1000/8", "150/300/8", "150/300/8 mixed", "512/512/8", "2048/256/8", "2048/64/64", "256/64/8"]
ROUNDS = 3
SLOW = 20.0
"""Seconds. What takes longer, and twice as long as ours, is timed once."""

pytestmark = pytest.mark.real_models
Values = list[Tensor]
"""Log-probabilities of each response's tokens, or their mean where that is all there is."""


def group(shape: str) -> list[Request]:
    """Random tokens. Of a mixed shape the responses have from a tenth to all of the length, evenly."""
    prompt, length, count = (int(n) for n in shape.split()[0].split("/"))
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1000, 40000, (n,), generator=generator).tolist())

    shared = tokens(prompt)
    shortest = length // 10 if "mixed" in shape else length
    return [Request(shared, tokens(int(n))) for n in torch.linspace(shortest, length, count)]


def load(attention: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        local_path(MODEL), dtype=DTYPE, attn_implementation=attention, device_map=DEVICE
    )
    return model.eval().requires_grad_(False)


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """[B, L], on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(DEVICE)


def whole(request: Request) -> tuple[int, ...]:
    return (*request.prompt, *request.response)


def inputs(rows: Sequence[Sequence[int]], before: int = 0) -> dict[str, Tensor]:
    """A right-padded batch, after `before` cached tokens. Rows of one length need no mask."""
    lengths = {len(row) for row in rows}
    ids = padded(rows)
    if len(lengths) == 1:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": padded([[1] * (before + len(row)) for row in rows])}


def of_responses(logprobs: Tensor, requests: Sequence[Request]) -> Values:
    """Cut [G, T], whose columns begin with the first response token, to the responses' lengths."""
    return [row[: len(r.response)].cpu() for row, r in zip(logprobs, requests, strict=True)]


def of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def one_by_one(model: PreTrainedModel, requests: Sequence[Request]) -> Values:
    values = []
    for r in requests:
        ids = padded([whole(r)])
        logits = model(input_ids=ids, use_cache=False).logits[:, len(r.prompt) - 1 : -1]
        values.append(of_targets(logits, ids[:, len(r.prompt) :])[0].cpu())
    return values


def full_logits(model: PreTrainedModel, requests: Sequence[Request]) -> Values:
    """The log-softmax of every position's logits, of which the responses' are kept."""
    batch = inputs([whole(r) for r in requests])
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return of_responses(of_targets(logits, batch["input_ids"][:, 1:])[:, len(requests[0].prompt) - 1 :], requests)


def logits_to_keep(model: PreTrainedModel, requests: Sequence[Request]) -> Values:
    """Logits from the prompt's last position on: all rows have the same prompt."""
    batch = inputs([whole(r) for r in requests])
    targets = batch["input_ids"][:, len(requests[0].prompt) :]
    logits = model(**batch, use_cache=False, logits_to_keep=targets.shape[1] + 1).logits[:, :-1]
    return of_responses(of_targets(logits, targets), requests)


def prompt_cache(model: PreTrainedModel, requests: Sequence[Request]) -> Values:
    """The prompt once, its cache copied for each response."""
    *shared, last = requests[0].prompt
    cache = DynamicCache(config=model.config)
    model(input_ids=padded([shared]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(requests))
    batch = inputs([(last, *r.response[:-1]) for r in requests], before=len(shared))
    logits = model(**batch, past_key_values=cache, use_cache=True).logits
    return of_responses(of_targets(logits, padded([r.response for r in requests])), requests)


def trl_fused_head(model: PreTrainedModel, requests: Sequence[Request]) -> Values:
    labels = padded([(*[-100] * len(r.prompt), *r.response) for r in requests], value=-100)
    batch = inputs([whole(r) for r in requests])
    logprobs = model(**batch, labels=labels, fused_lm_head=True).log_probs
    return of_responses(logprobs[:, len(requests[0].prompt) - 1 :], requests)


def lm_eval(model: Any, requests: Sequence[Request]) -> Values:
    """lm-evaluation-harness on token ids."""
    pairs = [(("", ""), list(r.prompt), list(r.response)) for r in requests]
    sums = model._loglikelihood_tokens(pairs, disable_tqdm=True)
    return [torch.tensor([total / len(r.response)]) for (total, _), r in zip(sums, requests, strict=True)]


def vllm(model: Any, requests: Sequence[Request]) -> Values:
    parameters = importlib.import_module("vllm").SamplingParams(max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": list(whole(r))} for r in requests]
    outputs = model.generate(prompts, parameters, use_tqdm=False)
    return [
        torch.tensor([p[t].logprob for p, t in zip(o.prompt_logprobs[len(r.prompt) :], r.response, strict=True)])
        for o, r in zip(outputs, requests, strict=True)
    ]


def packs(model: PreTrainedModel, requests: Sequence[Request]) -> Values:
    return [tokens.logprob for tokens in score_requests(model, requests) if not isinstance(tokens, str)]


def load_with_fused_head() -> PreTrainedModel:
    model = load("sdpa")
    add_fused_lm_head(model)
    return model


def load_lm_eval() -> Any:
    harness = importlib.import_module("lm_eval.models.huggingface").HFLM
    return harness(
        pretrained=load("sdpa"), tokenizer=AutoTokenizer.from_pretrained(local_path(MODEL)), batch_size=8
    )


def load_vllm() -> Any:
    return importlib.import_module("vllm").LLM(local_path(MODEL), dtype="float32", max_logprobs=1)


def all_tokens(requests: Sequence[Request]) -> int:
    return len(requests) * max(map(len, requests))


def response_tokens(requests: Sequence[Request]) -> int:
    return len(requests) * max(len(r.response) for r in requests)


def longest(requests: Sequence[Request]) -> int:
    return max(map(len, requests))


@dataclass(frozen=True)
class Contestant:
    """A way to score.

    Attributes:
        tokens: how many tokens it has activations of at once, a function of the group.
        logits: of how many tokens it has logits at once.
        package: what it needs to be installed.
    """

    run: Callable[[Any, Sequence[Request]], Values]
    load: Callable[[], Any] = lambda: load("sdpa")
    tokens: Callable[[Sequence[Request]], int] = all_tokens
    logits: Callable[[Sequence[Request]], int] = lambda requests: 0
    package: str = "torch"

    def why_skipped(self, requests: Sequence[Request]) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        # Two copies of the logits in float32; 40 KiB of activations and 46 KiB of keys and values per token
        needs = 2 * 4 * 49152 * self.logits(requests) + 86 * 1024 * self.tokens(requests)
        free = free_memory(DEVICE)
        return f"needs about {needs / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if needs > 0.9 * free else None


CONTESTANTS = {
    "cme": Contestant(packs, lambda: load(IMPLEMENTATION), tokens=lambda requests: 0),
    "one by one, eager": Contestant(one_by_one, lambda: load("eager"), tokens=longest, logits=longest),
    "padded, full logits": Contestant(full_logits, logits=all_tokens),
    "padded, logits_to_keep": Contestant(logits_to_keep, logits=response_tokens),
    "reused prompt cache": Contestant(prompt_cache, logits=response_tokens),
    "TRL's fused head": Contestant(trl_fused_head, load_with_fused_head),
    "lm-evaluation-harness": Contestant(lm_eval, load_lm_eval, logits=all_tokens, package="lm_eval"),
    "vLLM prompt_logprobs": Contestant(vllm, load_vllm, package="vllm"),
}


@pytest.fixture
def contestants(pytestconfig: pytest.Config) -> dict[str, Contestant]:
    """Those of --contestants, or all."""
    only = pytestconfig.getoption("contestants", None)
    if only is None:
        return CONTESTANTS
    wanted = only.split(",")
    unknown = [text for text in wanted if not any(text in name for name in CONTESTANTS)]
    if unknown:
        pytest.exit(f"no contestant's name contains {unknown[0]!r}: {', '.join(CONTESTANTS)}", 2)
    return {n: c for n, c in CONTESTANTS.items() if n == "cme" or any(text in n for text in wanted)}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_group(benchmark: Any, contestants: dict[str, Contestant], shape: str) -> None:
    requests = group(shape)
    values: dict[str, Values] = {}
    calls: dict[str, Callable[[], Any]] = {}
    slow: dict[str, tuple[float, float]] = {}  # seconds, MiB
    ours = math.inf
    skipped: dict[str, str] = {}
    with torch.inference_mode():
        for name, contestant in contestants.items():
            if (reason := contestant.why_skipped(requests)) is not None:
                skipped[name] = reason
                continue
            call = partial(score_into, values, name, contestant.run, contestant.load(), requests)
            taken, extra = measure(call)  # the warm-up of those that will take turns
            if name == "cme":
                ours = taken
            if taken > max(SLOW, 2 * ours):
                slow[name] = taken, extra
            else:
                calls[name] = call
        results = race(calls, "cme", ROUNDS, warm_up=False)
        benchmark.pedantic(calls["cme"], rounds=1)
    ours = results["cme"].milliseconds / 1e3
    results |= {name: Result(taken * 1e3, taken / ours, extra) for name, (taken, extra) in slow.items()}
    errors = {name: difference(found, values["cme"]) for name, found in values.items()}
    report(
        "scoring a group", "cme", results, errors, benchmark,
        tokens=sum(len(r.response) for r in requests),
        model=MODEL, dtype=str(DTYPE), shape=shape, timed_once=[*slow], skipped=skipped,
    )  # fmt: skip
    for name, reason in skipped.items():
        print(f"{name:<26}skipped: {reason}")
    assert torch.cat(values["cme"]).std() > 1
    assert max(errors.values()) <= 1e-3


def score_into(
    values: dict[str, Values],
    name: str,
    run: Callable[[Any, Sequence[Request]], Values],
    model: Any,
    requests: Sequence[Request],
) -> None:
    values[name] = run(model, requests)


def difference(values: Values, ours: Values) -> float:
    """Largest difference of a token's log-probability, or of a response's mean."""
    pairs = [(v, o if len(v) == len(o) else o.mean().view(1)) for v, o in zip(values, ours, strict=True)]
    return max(float((v - o).abs().max()) for v, o in pairs)


def test_cost_against_the_number_of_responses(benchmark: Any) -> None:
    """Groups of 8 responses of 64 tokens to prompts of 256: time is linear, memory flat."""
    model = load(IMPLEMENTATION)
    generator = torch.Generator().manual_seed(0)
    requests: list[Request] = []
    print(f"\n{'responses':<12}{'ms':>10}{'ms/response':>14}{'extra MiB':>12}")
    extra = 0.0
    packs(model, group("256/64/8"))
    for count in (8, 32, 128, 512):
        while len(requests) < count:
            prompt = tuple(torch.randint(1000, 40000, (256,), generator=generator).tolist())
            responses = torch.randint(1000, 40000, (8, 64), generator=generator).tolist()
            requests.extend(Request(prompt, tuple(response)) for response in responses)
        taken, extra = measure(partial(packs, model, list(requests)))
        taken *= 1e3
        print(f"{count:<12}{taken:>10.0f}{taken / count:>14.1f}{extra:>12.0f}")
        benchmark.extra_info[f"{count} responses"] = {"milliseconds": taken, "extra_mib": extra}
    benchmark.pedantic(lambda: packs(model, requests[:8]), rounds=1)
    assert not extra > 200

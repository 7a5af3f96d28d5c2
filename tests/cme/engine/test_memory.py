"""Budgets, and what happens when memory runs out: for real, in processes with a limit."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import Gemma3nTextConfig

from cme.engine import memory
from cme.engine.attention import IMPLEMENTATION
from cme.engine.forward import score_requests
from cme.engine.packing import Request

LIMITED = """
import json, resource
import torch
import tiny
from cme.engine.packing import Request
import cme.engine.forward
from cme.engine.attention import IMPLEMENTATION
from cme.engine.forward import score_requests

torch.set_num_threads(1)
model = tiny.llama(hidden_size=64, head_dim=2048, num_hidden_layers=1, max_position_embeddings=65536)
model.set_attn_implementation(IMPLEMENTATION)
original, tokens = cme.engine.forward.score_batch, []

def counted(model, batch, *args):
    tokens.append(batch.inputs["input_ids"].numel())
    return original(model, batch, *args)

cme.engine.forward.score_batch = counted
{requests}
score_requests(model, requests[-1:])  # libraries take what they need
tokens.clear()
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
scores = score_requests(model, requests, max_batch_tokens=8000)
print(json.dumps([tokens, [s if isinstance(s, str) else float(s.logprob.double().sum()) for s in scores]]))
"""
SUPPORT = Path(tiny.__file__).parent

MANY = "requests = [Request((5, 6, i), (7,) * 497) for i in range(10, 26)]"
ONE_HUGE = "requests = [Request((5, 6, 7), (8,) * 7000)] * 2 + [Request((5, 6), (9,))]"


def run_limited(requests: str) -> tuple[list[int], list[str | float]]:
    """Score in a process that may allocate 200 MiB more than it has; 8000 tokens need 1500. Returns the tokens of
    each forward pass that was tried, and for each request its log-probability or the reason why it has none."""
    script = textwrap.dedent(LIMITED).replace("{requests}", requests)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=SUPPORT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens, scores = json.loads(done.stdout)
    return tokens, scores


needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")


@needs_limits
def test_out_of_memory_halves_the_batch_until_it_fits():
    sizes, scores = run_limited(MANY)
    assert sizes[0] > 7000  # which was too much
    assert max(sizes[-3:]) < 2000
    model = tiny.llama(hidden_size=64, head_dim=2048, num_hidden_layers=1, max_position_embeddings=65536)
    model.set_attn_implementation(IMPLEMENTATION)
    requests = [Request((5, 6, i), (7,) * 497) for i in range(10, 26)]
    want = score_requests(model, requests, max_batch_tokens=500)
    assert scores == pytest.approx([float(s.logprob.double().sum()) for s in want], rel=1e-6)


@needs_limits
def test_a_response_that_never_fits_says_so_and_the_others_are_scored():
    sizes, scores = run_limited(ONE_HUGE)
    assert sizes[-2:] == [7002, 2]
    assert scores[0] == scores[1]
    assert scores[0].startswith("out of memory in a forward pass over this response alone, 7002 tokens")
    assert "free memory" in scores[0]
    assert scores[2] < 0


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def put_group(folder, names, limit, used, inactive):
    folder.mkdir(parents=True)
    for name, value in zip(names, (limit, used), strict=False):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\n{names[2]} {inactive}\n")


def put_process(root, text):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "mount", "names", "unlimited"),
    [
        ("0::/user/job\n", "sys/fs/cgroup", V2, "max"),
        ("2:cpu,cpuacct:/user/job\n5:memory:/user/job\n", "sys/fs/cgroup/memory", V1, 2**63 - 4096),
    ],
)
def test_the_limits_of_a_container_and_of_those_around_it_hold(cgroup, mount, names, unlimited, tmp_path):
    put_process(tmp_path, cgroup)
    put_group(tmp_path / mount / "user/job", names, 1000, 700, 50)
    assert memory.cgroup_free_memory(tmp_path) == 350  # the files at the top are missing, as on most machines
    for name, value in zip(names, (900, 800), strict=False):
        (tmp_path / mount / "user" / name).write_text(str(value))
    (tmp_path / mount / "user/memory.stat").write_text("anon 1\n")
    assert memory.cgroup_free_memory(tmp_path) == 100
    (tmp_path / mount / "user" / names[0]).write_text(str(unlimited))
    assert memory.cgroup_free_memory(tmp_path) == 350
    (tmp_path / mount / "user/job" / names[1]).write_text("2000")
    assert memory.cgroup_free_memory(tmp_path) == 0


def test_a_container_that_sees_itself_as_the_topmost_group_has_its_limit(tmp_path):
    put_process(tmp_path, "0::/docker/4f2a\n")
    put_group(tmp_path / "sys/fs/cgroup", V2, 1000, 700, 0)
    assert memory.cgroup_free_memory(tmp_path) == 300


def test_without_limits_or_groups_the_system_says_what_is_free(tmp_path, monkeypatch):
    assert memory.cgroup_free_memory(tmp_path) is None
    put_process(tmp_path, "0::/\n")
    assert memory.cgroup_free_memory(tmp_path) is None
    monkeypatch.setattr(memory, "cgroup_free_memory", lambda: None)
    assert memory.free_memory(torch.device("cpu")) > 2**20
    monkeypatch.setattr(memory, "cgroup_free_memory", lambda: 12345)
    assert memory.free_memory(torch.device("cpu")) == 12345


def test_the_budget_follows_the_free_memory(monkeypatch):
    model = tiny.llama()
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 1000 * memory.bytes_per_token(model))
    assert memory.token_budget(model) == 1000
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert memory.token_budget(model) == memory.FEWEST_TOKENS
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**50)
    assert memory.token_budget(model) == memory.MOST_TOKENS
    wide = tiny.llama(num_hidden_layers=1, head_dim=2**12)
    assert memory.token_budget(wide) == memory.CPU_ALLOWANCE // memory.bytes_per_token(wide)


def test_inner_vectors_count_where_they_are_there_for_the_whole_batch():
    model = tiny.llama(hidden_size=64, intermediate_size=2**14, num_attention_heads=4, num_key_value_heads=2)
    attention = 4 * (2 * 64 + 4 * 64 + 3 * 32)
    assert memory.bytes_per_token(model) == attention
    model.model.layers[1].compile()
    assert memory.bytes_per_token(model) == 4 * (4 * 2**14 + 6 * 64)


def test_a_budget_must_be_positive():
    with pytest.raises(ValueError, match="max_batch_tokens must be positive or 'auto', not 0"):
        score_requests(tiny.llama(), [Request((1,), (2,))], max_batch_tokens=0)


def test_memory_that_others_took_is_not_blamed_on_a_short_response(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("cme.engine.forward.score_batch", fail)
    with pytest.raises(MemoryError, match="over 2 tokens: something else took it"):
        score_requests(tiny.llama(), [Request((5, 6), (7,))], packed=False)


def test_a_model_may_have_inner_layers_of_several_sizes():
    config = Gemma3nTextConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=[16, 96])
    model = SimpleNamespace(config=config, dtype=torch.float32, modules=lambda: [])
    assert memory.bytes_per_token(model) == 4 * (4 * 96 + 6 * 64)

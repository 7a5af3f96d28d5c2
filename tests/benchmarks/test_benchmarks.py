"""`python -m benchmarks` from its arguments to its files, on a shape of milliseconds; never how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as program
from benchmarks import oracle, peers, results, runner, tables
from benchmarks.ceilings import ALLOCATING, PREALLOCATED
from benchmarks.oracle import Oracle
from benchmarks.peers import BACKWARD, FORWARD, FROZEN, PASSES, PEERS, Peer, cme, eager
from benchmarks.shapes import Shape, make_inputs, parse_shapes
from benchmarks.timing import take_turns

CPU = torch.device("cpu")
TINY = "20,8,300"


def broken(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB")


def summed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return eager(hidden, weight, targets).sum()


def load_missing() -> Any:
    import a_kernel_library_that_nobody_wrote  # noqa: F401


REGISTRY = (
    Peer("eager", "torch", lambda: eager, "full", True),
    Peer("broken", "torch", lambda: broken, "full", True),
    Peer("missing", "a-kernel-library", load_missing, "none", False),
    Peer("gpu", "torch", lambda: eager, "none", False, devices=("cuda",)),
    Peer("half", "torch", lambda: eager, "none", False, dtypes=(torch.bfloat16,)),
    Peer("summed", "torch", lambda: summed, "full", True, passes=(BACKWARD,), per_token=False),
    Peer("slow", "torch", lambda: eager, "full", True, slow=("cpu",)),
    Peer("cme", "cme", lambda: cme, "none", False),
)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "PEERS", REGISTRY)
    monkeypatch.setattr(peers, "PEERS", REGISTRY)
    monkeypatch.setattr(program, "limit_memory", lambda: None)  # it would last for all later tests
    monkeypatch.setattr("benchmarks.ceilings.COPY_BYTES", 2**20)


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(registry: None, tmp_path: Path) -> Run:
    """Run the command with a tiny shape and return its results."""

    def call(*arguments: str) -> dict[str, Any]:
        given = ["--output", str(tmp_path), "--rounds", "2", *arguments]
        assert program.main(given if "--shapes" in arguments else [*given, "--shapes", TINY]) == 0
        return results.read(folder(tmp_path))

    return call


def folder(output: Path) -> Path:
    (found,) = output.glob("*-float32")
    return found


def test_the_command_as_a_user_starts_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--shapes", TINY, "--peers", "eager", "cme", "--rounds", "2"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(folder(tmp_path)) in done.stdout
    document = json.loads((folder(tmp_path) / "results.json").read_text())
    assert {"name", "threads"} <= document["hardware"].keys()
    assert document["versions"]["torch"] == torch.__version__
    assert document["copy_bytes_per_second"] > 0
    assert [cell["pass"] for cell in document["cells"]] == [FORWARD, BACKWARD]
    for cell in document["cells"]:
        assert cell["contestants"].keys() == {ALLOCATING, PREALLOCATED, "eager", "cme"}
        for own in cell["contestants"].values():
            assert len(own["seconds"]) == len(own["extra_mib"]) == 2
    forward, both = (cell["contestants"]["cme"] for cell in document["cells"])
    assert 0 < forward["rms_error"] <= forward["max_error"] < 1e-5
    assert 0 < both["weight_gradient_error"] < 1e-5
    assert (folder(tmp_path) / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_come_from_the_json(run: Run, tmp_path: Path) -> None:
    run("--peers", "eager", "cme")
    document = results.read(folder(tmp_path))
    text = (folder(tmp_path) / "results.md").read_text()
    assert text == tables.markdown(document)
    document["cells"][0]["contestants"]["cme"]["median_ms"] = 123456.0
    assert "| `cme` | 123456 |" in tables.markdown(document)


def test_who_cannot_take_part_is_listed_with_the_reason(run: Run, tmp_path: Path) -> None:
    document = run()
    reasons = {peer["name"]: peer["obstacle"] for peer in document["peers"]}
    assert reasons["cme"] is None
    assert reasons["missing"].startswith("a-kernel-library is not installed: ModuleNotFoundError")
    assert reasons["gpu"] == "runs on cuda only"
    assert reasons["half"] == "takes bfloat16 only"
    forward, both = (cell["contestants"] for cell in document["cells"])
    assert forward["summed"] == {"skipped": "has no forward pass"}
    assert "seconds" in both["summed"]
    text = (folder(tmp_path) / "results.md").read_text()
    assert "**left out**: a-kernel-library is not installed" in text
    assert "slow" not in forward
    assert reasons["slow"] == "measured only when named in --peers: slow here"
    reasons = {peer["name"]: peer["obstacle"] for peer in run("--peers", "slow", "--shapes", "5,8,30")["peers"]}
    assert reasons["slow"] is reasons["cme"] is None  # measured earlier
    assert reasons["missing"] == "not requested"


def test_who_fails_is_recorded_and_the_others_go_on(run: Run, tmp_path: Path) -> None:
    for cell in run()["cells"]:
        assert cell["contestants"]["broken"] == {"failed": "OutOfMemoryError: CUDA out of memory."}
        assert "seconds" in cell["contestants"]["cme"]
    assert (
        f"`broken` failed at custom, {TINY.replace(',', ' x ')}" in (folder(tmp_path) / "results.md").read_text()
    )


def test_a_failure_after_the_warm_up_leaves_no_samples() -> None:
    calls_left = iter(range(2))
    samples, failures = take_turns({"good": lambda: None, "late": lambda: next(calls_left)}, 4)
    assert failures == {"late": "StopIteration"}
    assert samples.keys() == {"good"}
    assert len(samples["good"].seconds) == 4


def test_turns_change_from_round_to_round_and_repeat_with_the_seed() -> None:
    def order(seed: int) -> list[str]:
        names: list[str] = []
        take_turns({name: lambda: None for name in "abcd"}, 5, seed=seed, after_call=names.append)
        return names

    turns = order(0)
    rounds = ["".join(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(rounds)) > 1
    assert turns == order(0) != order(1)


def test_a_shape_that_does_not_fit_leaves_the_others(run: Run, tmp_path: Path) -> None:
    huge, tiny = run("--shapes", "1,1,9000000000000000", TINY, "--passes", FORWARD, "--peers", "cme")["cells"]
    assert huge["contestants"].keys() == {ALLOCATING}
    assert "failed" in huge["contestants"][ALLOCATING]
    assert "seconds" in tiny["contestants"]["cme"]
    assert f"`{ALLOCATING}` failed at custom, 1 x 1 x 9" in (folder(tmp_path) / "results.md").read_text()


def test_a_later_run_keeps_what_is_measured(run: Run) -> None:
    first = run("--peers", "eager", "--passes", FORWARD)["cells"]
    second = run("--peers", "eager")["cells"]
    assert second[0] == first[0]
    assert [cell["pass"] for cell in second] == [FORWARD, BACKWARD]
    more_rounds = run("--peers", "eager", "--passes", FORWARD, "--rounds", "3")["cells"]
    assert len(more_rounds[0]["contestants"]["eager"]["seconds"]) == 3
    assert more_rounds[1] == second[1]
    with_a_peer = run("--peers", "eager", "cme", "--passes", FORWARD)["cells"]
    assert "cme" in with_a_peer[0]["contestants"]
    assert with_a_peer[1] == second[1]
    fresh = run("--peers", "eager", "--fresh")["cells"]
    assert fresh[1]["contestants"]["eager"]["seconds"] != second[1]["contestants"]["eager"]["seconds"]


def test_an_interruption_keeps_the_cells_before_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = program.run_cell

    def interrupted(shape: Shape, pass_name: str, *rest: Any) -> dict[str, Any]:
        if pass_name == BACKWARD:
            raise KeyboardInterrupt
        return measure(shape, pass_name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(program, "run_cell", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("--peers", "cme")
    (kept,) = results.read(folder(tmp_path))["cells"]
    assert run("--peers", "cme")["cells"][0] == kept


DAMAGES: list[tuple[Callable[[str], str], str]] = [
    (lambda text: text[: len(text) // 2], "is broken"),
    (lambda text: "[]", "is broken"),
    (lambda text: text.replace('"format": 1', '"format": 0'), "has format 0, this program writes 1"),
    (lambda text: text.replace('"torch": "', '"torch": "0.'), "torch was 0."),
    (lambda text: text.replace('"threads": ', '"threads": 9'), "threads was 9"),
    (lambda text: text.replace('"spread": 3.0', '"spread": 4.0'), "spread was 4.0, is 3.0"),
]


def test_results_that_cannot_be_continued(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--peers", "cme", "--passes", FORWARD)
    path = folder(tmp_path) / "results.json"
    intact = path.read_text()
    for damage, message in DAMAGES:
        path.write_text(damaged := damage(intact))
        assert program.main(["--shapes", TINY, "--output", str(tmp_path), "--peers", "cme"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "another --output, or --fresh" in error
        assert path.read_text() == damaged
    run("--peers", "cme", "--passes", FORWARD, "--fresh")


def test_medians_and_ratios_of_given_times() -> None:
    shape = Shape("given", 10, 4, 100)
    cell = {
        "shape": vars(shape),
        "flop": 3 * shape.matmul_flop,
        "contestants": {
            ALLOCATING: {"seconds": [2.0, 4.0, 8.0], "extra_mib": [1.0, 1.0, 1.0]},
            PREALLOCATED: {"seconds": [1.0, 1.0, 1.0], "extra_mib": [0.0, 0.0, 0.0]},
            "one": {"seconds": [6.0, 4.0, 40.0], "extra_mib": [5.0, 9.0, float("nan")], "max_error": 0.5},
            "two": {"failed": "ValueError"},
        },
    }
    one = results.summarise(cell)["contestants"]["one"]
    assert one["median_ms"] == 6000
    assert one["median_ratio"] == 3  # of 3, 1 and 5: not 6 / 4
    assert one["median_ratio_preallocated"] == 6
    assert one["median_extra_mib"] == 7
    assert one["flop_per_second"] == 3 * 8000 / 6
    assert one["max_error"] == 0.5
    assert results.summarise(cell)["contestants"][ALLOCATING]["flop_per_second"] == 8000 / 4
    assert results.summarise(cell)["contestants"]["two"] == {"failed": "ValueError"}


def test_ratios_without_a_baseline() -> None:
    contestants = {ALLOCATING: {"failed": "too large"}, "one": {"seconds": [6.0], "extra_mib": [float("nan")]}}
    cell = {"shape": vars(Shape("given", 1, 1, 1)), "flop": 1, "contestants": contestants}
    one = results.summarise(cell)["contestants"]["one"]
    assert one["median_ratio"] is one["median_ratio_preallocated"] is one["median_extra_mib"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [True, False])
def test_the_oracle_is_the_float64_eager(
    dtype: torch.dtype, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "COLUMNS", 64)
    inputs = make_inputs(Shape("small", 130, 8, 300), dtype, CPU, seed=1, spread=5)
    hidden, weight = (x.double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    logits = hidden @ weight.T
    assert 4 < logits.std() < 6
    logprob = logits.log_softmax(-1)[torch.arange(130), inputs.targets]
    forward = Oracle(inputs, FORWARD)
    assert len(forward.rows) == oracle.ROWS
    assert forward.errors(logprob.detach(), per_token)["max_error"] < 1e-12
    assert forward.errors(logprob.detach() + 0.5, per_token)["rms_error"] == pytest.approx(0.5)
    upstream = inputs.upstream.double() if per_token else torch.ones(130).double()
    exact = torch.autograd.grad(logprob, (hidden, weight), upstream)
    backward = Oracle(inputs, BACKWARD)
    assert all(error < 1e-12 for error in backward.errors(exact, per_token).values())
    tilted = backward.errors((exact[0] * 1.25, exact[1] * 0.5), per_token)
    assert list(tilted.values()) == pytest.approx([0.25, 0.5])
    assert list(Oracle(inputs, FROZEN).errors(exact[:1], per_token)) == ["hidden_gradient_error"]


@pytest.mark.parametrize(
    "peer",
    [peer for peer in PEERS if "cpu" in peer.devices and "compiled" not in peer.name],  # compiling takes long
    ids=lambda peer: peer.name,
)
@pytest.mark.parametrize("pass_name", PASSES)
def test_every_peer_that_runs_here_computes_the_same(peer: Peer, pass_name: str) -> None:
    obstacle = peer.obstacle(CPU, torch.float32, pass_name)
    if obstacle:
        pytest.skip(f"{peer.name}: {obstacle}")
    inputs = make_inputs(Shape("small", 70, 8, 300), torch.float32, CPU, seed=0, spread=3)
    runner.require_gradients(inputs, pass_name)
    output = runner.make_call(peer.function(), inputs, pass_name)()
    errors = Oracle(inputs, pass_name).errors(output, peer.per_token)
    assert len(errors) == {FORWARD: 2, BACKWARD: 2, FROZEN: 1}[pass_name]
    assert all(error < 1e-5 for error in errors.values())


def test_a_sum_gets_a_gradient_of_one() -> None:
    inputs = make_inputs(Shape("small", 20, 8, 300), torch.float32, CPU, seed=0, spread=3)
    runner.require_gradients(inputs, BACKWARD)
    output = runner.make_call(summed, inputs, BACKWARD)()
    judge = Oracle(inputs, BACKWARD)
    assert max(judge.errors(output, per_token=False).values()) < 1e-5
    assert min(judge.errors(output, per_token=True).values()) > 0.1


def test_shapes_by_name_and_by_size() -> None:
    assert parse_shapes(["Qwen2.5-7B"], None, torch.device("cuda")) == [Shape("Qwen2.5-7B", 8192, 3584, 152064)]
    assert [s.tokens for s in parse_shapes(["SmolLM2-135M"], [64, 1024], CPU)] == [64, 1024]
    assert len(parse_shapes(["small", "SmolLM2-135M", "7,8,9"], None, CPU)) == 4


@pytest.mark.parametrize("shape", ["GPT-5", "1,2", "1,2,0", "1,2,x", "1,2,3,4"])
def test_unknown_shapes(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--shapes", shape]) == 2
    assert repr(shape) in capsys.readouterr().err


def test_unknown_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--peers", "cmee"]) == 2
    assert "unknown peers ['cmee']; choose from eager," in capsys.readouterr().err


def test_the_list_names_every_shape_and_peer(capsys: pytest.CaptureFixture[str], registry: None) -> None:
    assert program.main(["--list", "--dtype", "bfloat16"]) == 0
    listed = capsys.readouterr().out
    assert "gemma-3-270m" in listed
    assert "left out: runs on cuda only" in listed
    assert all(peer.name in listed for peer in REGISTRY)

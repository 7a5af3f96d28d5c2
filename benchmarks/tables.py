"""results.md, from what results.json holds and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.ceilings import ALLOCATING, PREALLOCATED
from benchmarks.oracle import ROWS
from benchmarks.peers import FORWARD
from benchmarks.results import flop_unit, matmul_peaks, shape_key

SHAPE = "shape (N x H x V)"

LEGEND = f"""\
Contestants take turns, in an order shuffled anew in each round; every figure is a median over the rounds.
*x matmul* is the time over that of a bare `hidden @ weight.T` in the same round, which allocates its output as
users' code does (row `{ALLOCATING}`); *x preallocated* is the same over a matmul into memory that it already has
(row `{PREALLOCATED}`). Both baselines are forward matmuls in every pass. *FLOP/s* count the products that the
pass needs, none twice: one in the forward, three with both gradients, two with a frozen head. *extra MiB* is the
peak of memory beyond what was in use before the call: on a GPU of torch's allocator, on a CPU of resident memory.
Errors are against float64. In the forward: of log-probabilities, in nats, over {ROWS} rows spread over the batch.
Else: norm of the error over norm of the exact gradient, that of `hidden` at these rows, that of `weight` at their
targets. The upstream gradient is random for each token, or one for all where the last table says so."""

ERRORS = {
    True: {"max_error": "max error", "rms_error": "rms error"},
    False: {"hidden_gradient_error": "error of d hidden", "weight_gradient_error": "error of d weight"},
}


def markdown(results: dict[str, Any]) -> str:
    hardware, settings = results["hardware"], results["settings"]
    parts = [
        f"# linear_logprob on {hardware['name']}, {settings['dtype']}",
        "Written by `python -m benchmarks` from `results.json`.",
        _facts("Hardware", hardware) + "  \n" + _facts("Versions", results["versions"]) + "  \n"
        f"Inputs: seed {settings['seed']}, logits with a standard deviation of {settings['spread']}.",
        "## Ceilings",
        f"Copy: {results['copy_bytes_per_second'] / 1e9:.1f} GB/s (read and written). The fastest of all "
        "bare matmuls of each shape, before its contestants and among them:",
        _ceilings(results),
    ]
    for pass_name in dict.fromkeys(cell["pass"] for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if cell["pass"] == pass_name]
        unit, size = flop_unit(hardware)
        errors = ERRORS[pass_name == FORWARD]
        header = (SHAPE, "contestant", "ms", "x matmul", "x preallocated", unit, "extra MiB", *errors.values())
        parts += [
            f"## {pass_name}",
            _table(header, [row for cell in cells for row in _rows(cell, size, tuple(errors))]),
        ]
        failures = [line for cell in cells for line in _failures(cell)]
        if failures:
            parts.append("\n".join(failures))
    parts += [LEGEND, "![roofline](roofline.png)", "## Contestants", _peers(results["peers"])]
    return "\n\n".join(parts) + "\n"


def _facts(title: str, facts: dict[str, Any]) -> str:
    return f"{title}: " + ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None) + "."


def _ceilings(results: dict[str, Any]) -> str:
    unit, size = flop_unit(results["hardware"])
    titles = {shape_key(cell): _shape(cell) for cell in results["cells"]}
    rows = [
        (titles[shape], *(f"{peak / size:.3g}" for peak in peaks.values()))
        for shape, peaks in matmul_peaks(results["cells"]).items()
    ]
    return _table((SHAPE, f"`{ALLOCATING}`, {unit}", f"`{PREALLOCATED}`, {unit}"), rows)


def _rows(cell: dict[str, Any], unit: float, errors: tuple[str, ...]) -> list[tuple[str, ...]]:
    rows = []
    shape = _shape(cell)
    for name, own in _ordered(cell).items():
        if "skipped" in own:
            continue
        rows.append((shape, f"`{name}`", *_figures(own, unit, errors)))
        shape = ""
    return rows


def _ordered(cell: dict[str, Any]) -> dict[str, Any]:
    """By time; the baselines first and failures last."""

    def order(item: tuple[str, Any]) -> tuple[bool, float]:
        name, own = item
        return name not in (ALLOCATING, PREALLOCATED), own.get("median_ms", float("inf"))

    return dict(sorted(cell["contestants"].items(), key=order))


def _figures(own: dict[str, Any], unit: float, errors: tuple[str, ...]) -> tuple[str, ...]:
    if "failed" in own:
        return ("failed", *[""] * 6)
    return (
        f"{own['median_ms']:.0f}" if own["median_ms"] >= 1000 else f"{own['median_ms']:.3g}",
        _number(own["median_ratio"], ".2f"),
        _number(own["median_ratio_preallocated"], ".2f"),
        f"{own['flop_per_second'] / unit:.3g}",
        _number(own["median_extra_mib"], ".0f"),
        *(_number(own.get(error), ".1e") for error in errors),
    )


def _failures(cell: dict[str, Any]) -> list[str]:
    failed = {name: own["failed"] for name, own in cell["contestants"].items() if "failed" in own}
    return [f"- `{name}` failed at {_shape(cell)}: {_plain(why)}" for name, why in failed.items()]


def _peers(peers: list[dict[str, Any]]) -> str:
    header = ("contestant", "package", "logits", "per-token gradients", "note", "runs here")
    rows = [
        (
            f"`{p['name']}`",
            p["package"],
            p["logits"],
            "yes" if p["per_token"] else "no, one for all",
            p["note"],
            "yes" if p["obstacle"] is None else f"**left out**: {_plain(p['obstacle'])}",
        )
        for p in peers
    ]
    return _table(header, rows)


def _shape(cell: dict[str, Any]) -> str:
    shape = cell["shape"]
    return f"{shape['name']}, {shape['tokens']} x {shape['hidden_size']} x {shape['vocab_size']}"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

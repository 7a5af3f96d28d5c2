"""Measures `cme_kernels.linear_logprob` against the bare matmul, eager computation and other projects' kernels.

For each shape it first measures the two ceilings (copy bandwidth and the bare `hidden @ weight.T`, in the same
process and dtype), then lets the contestants take turns, and writes after each shape and pass, to
OUTPUT/<hardware>-<dtype>/:

  results.json   hardware, versions, raw times of every round, medians, ratios, memory, errors
  results.md     the same as tables
  roofline.png   achieved FLOP/s against arithmetic intensity, under the two ceilings

A run that was interrupted resumes where it stopped. What is measured already is kept; a shape and pass are
measured again, as a whole, when they lack a requested peer or have fewer rounds. A peer that is not installed or
has no path here is listed with the reason; one that raises is recorded with its message, and the others run on.

On a CPU the default is the small heads in float32 with 512 or 1024 tokens, on a GPU every head in bfloat16 with
8192. OMP_NUM_THREADS sets the threads. For the peers: pip install -e '.[bench]'; on a Hopper GPU there are also
liger-kernel[cutedsl], liger-kernel[cutile], quack-kernels, verl and, for clocks, nvidia-ml-py. None of this has
run on a GPU yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ceilings, environment, results, roofline, tables
from benchmarks.peers import BACKWARD, FORWARD, PASSES, PEERS, Peer, parse_peers
from benchmarks.runner import failed_cell, run_cell
from benchmarks.shapes import HEADS, Inputs, Shape, default_tokens, make_inputs, parse_shapes
from benchmarks.timing import CUDA, DEVICE, describe, proc_bytes

DTYPES = ("float32", "bfloat16", "float16")
OUTPUT = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for arguments or results that do not fit."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.list:
        print(listing(args.dtype))
        return 0
    try:
        shapes = parse_shapes(args.shapes, args.tokens, DEVICE)
        peers = parse_peers(args.peers, DEVICE)
        for dtype in args.dtype:
            folder = run(args, shapes, peers, getattr(torch, dtype))
            print((folder / "results.md").read_text(encoding="utf-8") if args.print else f"Written to {folder}")
    except (ValueError, results.ResultsError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        default=["all" if CUDA else "small"],
        help=f"{', '.join(HEADS)}; small, all; or N,H,V (default: %(default)s)",
    )
    add(
        "--tokens",
        nargs="+",
        type=positive,
        metavar="N",
        help="tokens of each named shape, one or several (default: see --list)",
    )
    add("--peers", nargs="+", metavar="PEER", help="contestants, see --list (default: all)")
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=[FORWARD, BACKWARD],
        help="frozen-head has no gradient for the weight (default: %(default)s)",
    )
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["bfloat16" if CUDA else "float32"],
        help="of hidden and weight (default: %(default)s)",
    )
    add(
        "--rounds",
        type=positive,
        default=20 if CUDA else 3,
        help="calls of each contestant (default: %(default)s)",
    )
    add("--spread", type=float, default=3.0, help="standard deviation of the logits (default: %(default)s)")
    add("--seed", type=int, default=0, help="of inputs and turns (default: %(default)s)")
    add("--output", type=Path, default=OUTPUT, help="folder of the results' folders (default: benchmarks/results)")
    add("--fresh", action="store_true", help="measure everything again and overwrite what is there")
    add("--print", action="store_true", help="print the tables at the end")
    add("--list", action="store_true", help="list shapes and peers, and who can run here, and stop")
    return parser  # fmt: skip


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def listing(dtypes: Sequence[str]) -> str:
    lines = [f"Shapes on {DEVICE.type} (tokens x hidden x vocabulary):"]
    lines += [f"  {Shape(name, default_tokens(name, DEVICE), *sizes)}" for name, sizes in HEADS.items()]
    for dtype in dtypes:
        lines.append(f"\nPeers on {DEVICE.type} in {dtype}:")
        for peer in PEERS:
            obstacle = peer.obstacle(DEVICE, getattr(torch, dtype))
            state = f"{peer.version() or ''} {peer.note}" if obstacle is None else f"left out: {obstacle}"
            lines.append(f"  {peer.name:<20}{state.strip()}")
    return "\n".join(lines)


def run(args: argparse.Namespace, shapes: Sequence[Shape], peers: Sequence[Peer], dtype: torch.dtype) -> Path:
    """Measure what is not measured yet in one dtype. Returns the folder of the results."""
    limit_memory()
    hardware = environment.hardware(DEVICE)
    versions = environment.versions(PEERS)
    settings = {"dtype": str(dtype).removeprefix("torch."), "seed": args.seed, "spread": args.spread}
    folder = args.output / f"{environment.slug(hardware)}-{settings['dtype']}"
    kept = [] if args.fresh else results.load(folder, hardware, versions, settings)
    cells = {results.key(cell): cell for cell in kept}
    able = {p: [peer.name for peer in peers if not peer.obstacle(DEVICE, dtype, p)] for p in args.passes}
    todo = [
        (shape, pass_name)
        for shape in shapes
        for pass_name in args.passes
        if (cell := cells.get((*vars(shape).values(), pass_name))) is None
        or not results.finished(cell, able[pass_name], args.rounds)
    ]
    document: dict[str, Any] = {
        "hardware": hardware,
        "versions": versions,
        "settings": settings,
        "copy_bytes_per_second": ceilings.copy_bandwidth(dtype, DEVICE),
    }
    calls = sum((len(able[pass_name]) + 2) * (args.rounds + 1) for _, pass_name in todo)
    bar = tqdm(total=calls, unit="call", dynamic_ncols=True)
    try:

        def progress(label: str, name: str) -> None:
            bar.set_description(label + name, refresh=False)
            bar.update()

        def save() -> None:
            results.save(
                folder, {**document, "peers": describe_peers(peers, dtype, cells), "cells": [*cells.values()]}
            )

        for shape, group in groupby(todo, key=lambda cell: cell[0]):
            inputs: Inputs | None = None
            for _, pass_name in group:
                label = f"{shape.name}, {pass_name}: "
                try:
                    inputs = inputs or make_inputs(shape, dtype, DEVICE, args.seed, args.spread)
                    cell = run_cell(
                        shape, pass_name, inputs, peers, args.rounds, args.seed, partial(progress, label)
                    )
                except (RuntimeError, MemoryError) as error:  # not even the matmul fits; other shapes may
                    cell = failed_cell(shape, pass_name, args.rounds, describe(error))
                cells[results.key(cell)] = results.summarise(cell)
                save()
        save()
    finally:
        bar.close()
        if (folder / results.FILE).exists():
            render(folder)
    return folder


def describe_peers(
    requested: Sequence[Peer], dtype: torch.dtype, cells: dict[Any, dict[str, Any]]
) -> list[dict[str, Any]]:
    """All peers, also those that this run or an earlier one left out, with the reason."""
    fields = ("name", "package", "logits", "in_memory", "per_token", "note")
    measured = {name for c in cells.values() for name, own in c["contestants"].items() if "seconds" in own}

    def obstacle(peer: Peer) -> str | None:
        if peer in requested:
            return peer.obstacle(DEVICE, dtype)
        if peer.name in measured:
            return None
        return "measured only when named in --peers: slow here" if peer.slow_on(DEVICE) else "not requested"

    return [{**{name: getattr(peer, name) for name in fields}, "obstacle": obstacle(peer)} for peer in PEERS]


def render(folder: Path) -> None:
    """Tables and picture, from the JSON."""
    document = results.read(folder)
    results.write(folder / "results.md", tables.markdown(document))
    roofline.draw(document, folder / "roofline.png")


def limit_memory() -> None:
    """Let an allocation that does not fit raise, which fails one contestant; else the system kills the process."""
    if not CUDA and sys.platform == "linux":
        import resource

        limit = proc_bytes("/proc/self/status", "VmData") + proc_bytes("/proc/meminfo", "MemAvailable")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())

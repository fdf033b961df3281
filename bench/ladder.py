"""What each switch brings, one on top of the other: peak bytes and images/s of exact training and of local learning.

python bench/ladder.py                                   # ResNet-50, ResNet-101, ViT-S, ViT-B and Swin-T at 224 pixels
python bench/ladder.py resnet50 --batch-size 8 --no-compile          # on a CPU
python bench/ladder.py resnet8 --image-size 32 --batch-size 16 --out runs/ladder

One table a network, on CUDA where there is one. The upper rows keep the gradients of back-propagation, the lower ones
train blocks locally. An exact row is bold where it needs neither more memory nor more time than one of ours, and less
of one; ours then says which. Peak: live tensors above weights and optimizer state, gradients included; and what the
allocator (on a CPU the process) grew by, by which ways are compared where one of them is compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from localgrad import methods, models, tasks
from localgrad.measure.sizes import size
from localgrad.measure.tables import markdown
from localgrad.method import Method
from localgrad.spec import build_method, described, parse_method
from localgrad.study.contest import contest
from localgrad.study.contest_report import Contest
from localgrad.study.ways import REFERENCE, Way
from localgrad.train.experiment import device_of

NETWORKS = {
    "resnet50": "torchvision:resnet50",
    "resnet101": "torchvision:resnet101",
    "vit_s": "timm:vit_small_patch16_224",
    "vit_b": "timm:vit_base_patch16_224",
    "swin_t": "torchvision:swin_t",
}
Rung = tuple[str, Callable[[Way], Way]]


def climbed(way: Way, rungs: Iterable[Rung]) -> list[Way]:
    """``way`` and, for each rung, the way below it with one switch more, named by what was added."""
    ways = [way]
    for name, switch in rungs:
        ways.append(replace(switch(ways[-1]), name=name))
    return ways


def variant(text: str) -> Callable[[Way], Way]:
    """How a step runs, see `Way`."""
    return lambda way: replace(way, variant=text)


def by_method(plugin: Callable[[Method], Method], **changes: object) -> Callable[[Way], Way]:
    """A plug-in around the method."""
    return lambda way: replace(way, method=plugin(way.method), **changes)


def ladder(local: Method, name: str, num_blocks: int, parts: int, compiled: bool) -> list[Way]:
    """The rows: exact ones from plain float32 up, then local ones, both with the same switches first.

    Args:
        local: trains the blocks; ``name`` is what to call it.
        num_blocks: K.
        parts: micro-batches of the last rung.
        compiled: also compile, from that rung on.
    """
    last = "bf16+channels_last"
    switches: list[Rung] = [("+ bf16", variant("bf16")), ("+ channels_last", variant(last))]
    if compiled:
        switches.append(("+ compile", variant(f"{last}+compile")))
    e2e = methods.e2e(local.task)
    exact: list[Rung] = [
        *switches,
        (f"+ checkpointing, {num_blocks} blocks",
         by_method(methods.checkpointing, kind="checkpointing", num_blocks=num_blocks)),
        ("+ checkpointing, every unit", lambda way: replace(way, num_blocks=None)),
        (f"+ accumulation x{parts}", by_method(lambda m: methods.accumulation(m, parts=parts), kind="accumulation")),
    ]  # fmt: skip
    ours: list[Rung] = [
        *switches,
        ("+ a step per block", lambda way: replace(way, per_block=True)),
        ("+ units recomputed", lambda way: replace(way, inside=True)),
        (f"+ micro-batches x{parts}", by_method(lambda m: methods.accumulation(m, parts=parts))),
    ]
    accumulated = Way(f"accumulation x{parts} alone", "accumulation", methods.accumulation(e2e, parts=parts))
    return [
        *climbed(Way(f"{REFERENCE}, fp32", REFERENCE, e2e), exact),
        replace(accumulated, variant=switches[-1][1](accumulated).variant),
        *climbed(Way(f"{name}, {num_blocks} blocks, fp32", "local", local, num_blocks), ours),
    ]


def table(found: Contest) -> str:
    """Markdown: the exact rows, an empty one, the local ones."""
    exact, ours = ([row for row in found.rows if (row.kind == "local") is local] for local in (False, True))
    cells = [["way", "live tensors", "allocator" if found.device != "cpu" else "process", "images/s", "gradients", ""]]
    for row in [*exact, None, *ours]:
        if row is None:
            cells.append([""] * len(cells[0]))
            continue
        beaten = [other for other in ours if row.dominates(other)] if row.kind != "local" else []
        by = [other for other in exact if other.dominates(row)] if row.kind == "local" else []
        fastest = min(by, key=lambda other: other.time_ratio, default=None)
        cells.append(
            [
                f"**{row.name}**" if beaten else row.name,
                *("-" if b is None else size(b) for b in (row.total_bytes, row.peak_bytes)),
                f"{found.batch_size / row.seconds:.4g}",
                row.gradients,
                f"below {fastest.name}" if fastest else "",
            ]
        )
    lines = markdown(cells, text=(0, 4, 5))
    head = f"{found.model}, batch {found.batch_size} of {found.image_shape[1]} pixels, {found.device}, {found.threads} "
    head += f"thread{'s' * (found.threads > 1)}, torch {found.torch}; {found.clock}, "
    head += f"median of {len(found.rows[0].rounds)} rounds"
    return "\n".join([head, "", *lines, *(f"\nLeft out: {reason}" for reason in found.skipped)])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Those of the command line, or ``words``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="names as above, or as for localgrad bench")
    parser.add_argument("--method", "-m", default="[{dgl: {head: linear}}]", help="of the local rows")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--num-blocks", "-k", type=int, default=4)
    parser.add_argument("--parts", type=int, default=4, help="micro-batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiler out")
    parser.add_argument("--out", type=Path, help="folder for NETWORK.json and NETWORK.md")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """The command."""
    asked = arguments(words)
    torch.set_num_threads(1)
    for network in asked.networks:
        model = NETWORKS.get(network, network)
        side, num_classes = models.made_for(model)
        spec = parse_method(asked.method)
        local = build_method(spec, tasks.classification(num_classes, mean=(0.5,) * 3, std=(0.25,) * 3))
        found = contest(
            model,
            ladder(local, described(spec), asked.num_blocks, asked.parts, not asked.no_compile),
            batch_size=asked.batch_size,
            image_size=asked.image_size or side,
            num_classes=num_classes,
            balance="bytes",
            device=device_of("auto"),
            rounds=asked.rounds,
            progress=lambda what: print(what, file=sys.stderr, flush=True),
        )
        text = table(found)
        print(text, end="\n\n", flush=True)
        if asked.out is not None:
            asked.out.mkdir(parents=True, exist_ok=True)
            name = network.rpartition(":")[2]
            (asked.out / f"{name}.json").write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
            (asked.out / f"{name}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

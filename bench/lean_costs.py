"""Cost of a training step as a share of end-to-end: exact bytes, FLOPs, and processor time, contestants in turn.

python bench/lean_costs.py resnet32 16 dgl '[{dgl: {head: linear}}, {pooled: {factor: 4}}, man_pp]'
python bench/lean_costs.py torchvision:resnet101 4 --balance bytes --batch-size 4 --image-size 224 METHOD ...

Processor time of one thread, not wall time, and the median over the rounds of the ratio within a round: on a busy
machine that is what can be compared. Bytes are those of step 0, the largest; time and FLOPs are averaged over
``--steps`` steps, for methods that do not do the same at each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from localgrad import backward, cuts, exchange, localize, models, tasks
from localgrad.costs import cost
from localgrad.spec import build_method, parse_method

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("num_blocks", type=int)
parser.add_argument("methods", nargs="+", help="as on the command line, or as YAML in brackets")
parser.add_argument("--options", type=yaml.safe_load, default={}, help="of the model, as YAML: '{depth: 8}'")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--balance", choices=("count", "bytes"), default="count")
parser.add_argument("--rounds", type=int, default=7, help="0 leaves out the times")
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--channels-last", action="store_true")
parser.add_argument("--out", type=Path, help="also write the ratios as JSON here")
arguments = parser.parse_args()

torch.set_num_threads(1)
task = tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)
memory_format = torch.channels_last if arguments.channels_last else torch.contiguous_format
generator = torch.Generator().manual_seed(0)
shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
inputs = torch.randn(shape, generator=generator).to(memory_format=memory_format)
targets = torch.randint(10, (arguments.batch_size,), generator=generator)

cut = {"count": cuts.by_count, "bytes": cuts.by_bytes}[arguments.balance]
rows = ["e2e", *arguments.methods]
networks = []
for text in rows:
    torch.manual_seed(0)
    method = build_method(yaml.safe_load(text) if text.startswith("[") else parse_method(text), task)
    model = models.create(
        arguments.model, num_classes=10, in_channels=3, image_size=arguments.image_size, **arguments.options
    )
    network = localize(model, method, cut(arguments.num_blocks), example=inputs[:2])
    networks.append(network.to(memory_format=memory_format).train())
costs = [cost(network, inputs, targets) for network in networks]
flops = []
for network in networks:
    with FlopCounterMode(display=False) as counter:
        for step in range(arguments.steps):
            backward(network, inputs, targets, step)
    flops.append(counter.get_total_flops())
times: list[list[float]] = [[] for _ in networks]
for turn in range(arguments.rounds + 1 if arguments.rounds else 0):
    for network, taken in zip(networks, times, strict=True):
        started = time.process_time()
        for step in range(arguments.steps):
            network.zero_grad(set_to_none=True)
            backward(network, inputs, targets, step)
            exchange(network)
        if turn > 0:
            taken.append(time.process_time() - started)

print(
    f"torch {torch.__version__}, 1 thread, {arguments.model} in {arguments.num_blocks} blocks by {arguments.balance}, "
    f"batch {arguments.batch_size}, {arguments.image_size} px, {arguments.rounds} rounds, {memory_format}"
)
print("| method | activations | with gradients | processor time | FLOPs |")
print("|---|---|---|---|---|")
ratios = {}
for text, one, count, taken in zip(rows, costs, flops, times, strict=True):
    ratios[text] = {
        "activations": one.activation_bytes / costs[0].activation_bytes,
        "with gradients": one.total_bytes / costs[0].total_bytes,
        "time": statistics.median(a / b for a, b in zip(taken, times[0], strict=True)) if taken else None,
        "FLOPs": count / flops[0],
    }
    activations, total, took, work = ratios[text].values()
    print(f"| `{text}` | {activations:.3f} | {total:.3f} | {'-' if took is None else f'{took:.2f}'} | {work:.2f} |")
if arguments.out is not None:
    arguments.out.write_text(json.dumps(ratios, indent=2) + "\n")

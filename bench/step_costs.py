"""Cost of one training step, contestants in turn in one process, as ratios to end-to-end.

python bench/step_costs.py --model resnet32 --num-blocks 16 --batch-size 64 dgl infopro e2e+checkpointing
"""

from __future__ import annotations

import argparse

import torch

from localgrad import localize, models, tasks
from localgrad.bench.cost import cost, step_seconds
from localgrad.config import build_method, parse_method

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("methods", nargs="+", help="for instance dgl, infopro, e2e+checkpointing")
parser.add_argument("--model", default="resnet32")
parser.add_argument("--num-blocks", type=int, default=16)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--channels-last", action="store_true")
arguments = parser.parse_args()

torch.set_num_threads(1)
task = tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)
memory_format = torch.channels_last if arguments.channels_last else torch.contiguous_format
generator = torch.Generator().manual_seed(0)
shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
inputs = torch.randn(shape, generator=generator).to(memory_format=memory_format)
targets = torch.randint(10, (arguments.batch_size,), generator=generator)

names = ["e2e", *arguments.methods]
networks = []
for name in names:
    torch.manual_seed(0)
    method = build_method(parse_method(name), task)
    network = localize(models.create(arguments.model), method, num_blocks=arguments.num_blocks, example=inputs[:2])
    networks.append(network.to(memory_format=memory_format))
seconds = step_seconds(networks, inputs, targets, rounds=arguments.rounds)
costs = [cost(network, inputs, targets) for network in networks]

print(f"torch {torch.__version__}, 1 thread, {arguments}")
print("| method | activations | with gradients | step time (median) | FLOPs | parameters |")
print("|---|---|---|---|---|---|")
for name, one, taken in zip(names, costs, seconds, strict=True):
    print(
        f"| {name} | {one.activation_bytes / costs[0].activation_bytes:.2f} "
        f"| {one.total_bytes / costs[0].total_bytes:.2f} | {taken / seconds[0]:.2f} ({taken * 1e3:.0f} ms) "
        f"| {one.flops / costs[0].flops:.2f} "
        f"| {(one.parameters + one.auxiliary_parameters) / one.parameters:.1f} |"
    )

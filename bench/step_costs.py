"""Cost of one training step of every method in its published form, contestants in turn, as ratios to end-to-end.

python bench/step_costs.py                                        # every method, ResNet-32 in 16 blocks, batch 64
python bench/step_costs.py --num-blocks 8 dgl '[dgl, {man: {borders: 2}}]'   # some, as on the command line or as YAML
"""

from __future__ import annotations

import argparse

import torch
import yaml

from localgrad import localize, models, tasks
from localgrad.bench.cost import cost, step_seconds
from localgrad.config import build_method, parse_method

MAN_PP_HEAD = "{dgl: {head: {mlp: {grid: 8, width: 128, pooled: 1, hidden: 512}}}}"
# Name in the table -> method; what differs from the defaults is how the released code was configured.
PUBLISHED = {
    "checkpointing": "e2e+checkpointing",
    "accumulation x4": "e2e+accumulation",
    "deep supervision": "deep_supervision",
    "greedy (linear head)": "[{dgl: {head: linear}}]",
    "DGL": "dgl",
    "PredSim": "predsim",
    "InfoPro": "infopro",
    "AugLocal, depth 2": "auglocal",
    "DGL + MAN": "dgl+man",
    "InfoPro + MAN": "infopro+man",
    "DGL + MAN++ (its own DGL head)": f"[{MAN_PP_HEAD}, man_pp]",
    "DGL + HPFF": "dgl+hpff",
    "InfoPro + HPFF": "infopro+hpff",
    "linear + MLAAN": "[{dgl: {head: linear}}, mlaan]",
    "DGL + MLAAN": "dgl+mlaan",
    "DGL + PGL, guided step by back-propagation": "dgl+pgl",
    "DGL + PGL, guided step by distillation": "[dgl, {pgl: {guidance: distill}}]",
    "DGL + TRGL": "dgl+trgl",
    "DGL + SGR": "dgl+sgr",
    "local critic": "local_critic",
    "DGL + logit consistency": "dgl+logit_consistency",
    "feature distillation": "feature_distillation",
    "ours: DGL + MAN on pooled features": "dgl+pooled+man",
    "ours: the same, its parts recomputed": "[dgl, pooled, man, {checkpointing: {where: auxiliary}}]",
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("methods", nargs="*", help="for instance dgl, infopro, e2e+checkpointing; none for all")
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

rows = {"end-to-end": "e2e"} | ({name: name for name in arguments.methods} or PUBLISHED)
networks = []
for text in rows.values():
    torch.manual_seed(0)
    spec = yaml.safe_load(text) if text.startswith("[") else parse_method(text)
    if spec == ["feature_distillation"]:
        spec = [{"feature_distillation": {"teacher": models.create(arguments.model)}}]
    method = build_method(spec, task)
    network = localize(models.create(arguments.model), method, num_blocks=arguments.num_blocks, example=inputs[:2])
    networks.append(network.to(memory_format=memory_format) if arguments.channels_last else network)
seconds = step_seconds(networks, inputs, targets, rounds=arguments.rounds)
costs = [cost(network, inputs, targets) for network in networks]

print(
    f"torch {torch.__version__}, 1 thread, {arguments.model} in {arguments.num_blocks} blocks, batch "
    f"{arguments.batch_size}, {arguments.image_size} px, {arguments.rounds} rounds, {memory_format}"
)
print("| method | activations | with gradients | step time (median) | FLOPs | parameters trained |")
print("|---|---|---|---|---|---|")
for name, one, taken in zip(rows, costs, seconds, strict=True):
    print(
        f"| {name} | {one.activation_bytes / costs[0].activation_bytes:.3f} "
        f"| {one.total_bytes / costs[0].total_bytes:.3f} | {taken / seconds[0]:.2f} ({taken * 1e3:.0f} ms) "
        f"| {one.flops / costs[0].flops:.2f} "
        f"| {(one.parameters + one.auxiliary_parameters) / one.parameters:.1f} |"
    )

"""Cost of one training step of every method in its published form, contestants in turn, as ratios to end-to-end.

python bench/step_costs.py                                        # every method, ResNet-32 in 16 blocks, batch 64
python bench/step_costs.py --num-blocks 8 dgl '[dgl, {man: {depth: 2}}]'   # some, as on the command line or as YAML
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from localgrad import models, tasks
from localgrad.spec import build_method, parse_method
from localgrad.study.contest import contest
from localgrad.study.ways import REFERENCE, Way

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
    "DGL, guided step by distillation": "[dgl, last_head_distillation]",
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
parser.add_argument("--channels-last", action="store_true", help="all but the end-to-end training of the first row")
arguments = parser.parse_args()

torch.set_num_threads(1)
task = tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)
variant = "fp32+channels_last" if arguments.channels_last else "fp32"
ways = [Way(REFERENCE, REFERENCE, build_method(["e2e"], task))]
if arguments.channels_last:
    ways.append(replace(ways[0], variant=variant))
for name, text in ({name: name for name in arguments.methods} or PUBLISHED).items():
    spec = parse_method(text)
    if spec == ["feature_distillation"]:
        spec = [{"feature_distillation": {"teacher": models.create(arguments.model)}}]
    method = build_method(spec, task)
    kind = "local" if method.terms else REFERENCE
    ways.append(Way(name, kind, method, arguments.num_blocks, variant=variant))
print(
    contest(
        arguments.model,
        ways,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        num_classes=10,
        rounds=arguments.rounds,
    )
)

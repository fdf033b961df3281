"""The planner against measurement: peak bytes by the tracker and step times on this CPU, for 14 small cases.

python bench/plan_check.py                 # all, about four minutes on two busy cores
python bench/plan_check.py --only vit      # those whose model's name holds this
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import groupby

import torch

from localgrad import localize, models, tasks
from localgrad.costs import run_step, step_seconds
from localgrad.measure.memory import measure
from localgrad.planning import Planner, measure_rates
from localgrad.spec import build_method, parse_method

# model, image size, batch size, K, method; the cases of one model stand together and alternate with plain training.
CASES = [
    ("resnet32", 32, 64, 4, "dgl"),
    ("resnet32", 32, 64, 16, "dgl"),
    ("resnet32", 32, 64, 8, "infopro"),
    ("resnet32", 32, 64, 8, "e2e+checkpointing"),
    ("resnet110", 32, 32, 16, "dgl"),
    ("torchvision:resnet18", 128, 8, 4, "[{dgl: {head: linear}}]"),
    ("torchvision:resnet50", 160, 4, 4, "[{dgl: {head: linear}}]"),
    ("torchvision:resnet50", 160, 4, 8, "e2e+checkpointing"),
    ("timm:vit_tiny_patch16_224", 224, 8, 4, "dgl"),
    ("timm:vit_tiny_patch16_224", 224, 8, 12, "e2e+checkpointing"),
    ("timm:vit_tiny_patch16_224", 224, 8, 1, "e2e+accumulation"),
    ("timm:convnext_atto", 128, 8, 4, "[{dgl: {head: linear}}]"),
    ("timm:mobilenetv3_small_100", 160, 8, 4, "[{dgl: {head: linear}}]"),
    ("torchvision:vgg11_bn", 64, 8, 4, "[{dgl: {head: linear}}]"),
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="")
parser.add_argument("--rounds", type=int, default=7)
arguments = parser.parse_args()

torch.set_num_threads(1)
rates = measure_rates()
task = tasks.classification(10)
print(
    f"torch {torch.__version__}, 1 thread, {arguments.rounds} rounds, contestants alternate; "
    f"{rates.flops / 1e9:.0f} GFLOP/s, {rates.bytes / 1e9:.1f} GB/s"
)
print("| model | px | batch | K | method | predicted MiB | tracker MiB | off | predicted time | measured time | off |")
print("|---|---|---|---|---|---|---|---|---|---|---|")
for (name, pixels, batch), cases in groupby((c for c in CASES if arguments.only in c[0]), key=lambda c: c[:3]):
    torch.manual_seed(0)
    model = models.create(name, num_classes=10, image_size=pixels)
    planner = Planner(model, (3, pixels, pixels), batch, "fp32", rates)
    x = torch.randn(batch, 3, pixels, pixels)
    y = torch.randint(10, (batch,))
    plain = build_method(["e2e"], task)
    contestants = [localize(model, plain, 1, example=x[:2])]
    steps = [planner.step(planner.network(plain, ()), plain)]
    rows = list(cases)
    for _, _, _, count, text in rows:
        method = build_method(parse_method(text), task)
        cuts = [cut.name for cut in planner.cuts(count, method)] if count > 1 else []
        steps.append(planner.step(planner.network(method, cuts), method))
        contestants.append(localize(model, method, cuts or 1, example=x[:2]))
    seconds = step_seconds(contestants, x, y, rounds=arguments.rounds)
    for row, network, step, taken in zip(rows, contestants[1:], steps[1:], seconds[1:], strict=True):
        *_, count, text = row
        network.train().zero_grad(set_to_none=True)
        trained = [p for p in network.parameters() if p.requires_grad]
        seen = measure(partial(run_step, network, x, y), trained).peak_total
        network.zero_grad(set_to_none=True)
        ratios = step.seconds / steps[0].seconds, taken / seconds[0]
        print(
            f"| {name} | {pixels} | {batch} | {count} | {text.replace('|', ' ')} | {step.tracked / 2**20:.2f} "
            f"| {seen / 2**20:.2f} | {step.tracked / seen - 1:+.1%} | {ratios[0]:.3f} | {ratios[1]:.3f} "
            f"| {ratios[0] / ratios[1] - 1:+.1%} |",
            flush=True,
        )

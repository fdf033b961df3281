"""Every way of bench that is not compiled, by dgl with linear heads: a model and its batch size are given."""

import sys

import torch

from localgrad import tasks
from localgrad.study.contest import contest
from localgrad.study.ways import standard_ways

torch.set_num_threads(1)
name, batch_size = sys.argv[1], int(sys.argv[2])
found = standard_ways(tasks.classification(1000), [[{"dgl": {"head": "linear"}}]], [4])
ways = [way for way in found if not way.has("compile")]
print(contest(name, ways, batch_size=batch_size, image_size=64, rounds=2))

"""Activation bytes of a step of a small Llama: end to end, checkpointing, and blocks, with logits whole or in chunks.

python bench/language_model_memory.py
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import localgrad
from localgrad.costs import cost
from localgrad.models import ChunkedLM

WAYS: dict[str, tuple[bool, str, int]] = {  # chunks, read-out, blocks; 1 is end to end
    "end to end": (False, "own", 1),
    "end to end, in chunks": (True, "own", 1),
    "checkpointing each layer, in chunks": (True, "own", 1),
    "`dgl`, K = 3": (False, "own", 3),
    "`dgl`, K = 3, in chunks": (True, "own", 3),
    "`dgl`, K = 3, in chunks, shared read-out": (True, "shared", 3),
    "`auglocal(depth=1, tail=1)`, K = 3, in chunks": (True, "own", 3),
}


def llama(vocabulary: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, use_cache=False, **sizes)).train()


def main() -> None:
    vocabularies = (256, 8192)
    tokens = torch.randint(256, (8, 256), generator=torch.Generator().manual_seed(0))
    print("| way | " + " | ".join(f"vocabulary {n:,}: MiB | of end to end | FLOPs" for n in vocabularies) + " |")
    print("|---|" + "---:|" * 3 * len(vocabularies))
    first: dict[int, Any] = {}
    for name, (chunks, read_out, blocks) in WAYS.items():
        cells = []
        for vocabulary in vocabularies:
            chunk = 256 if chunks else 10**9
            task = localgrad.tasks.language_model(vocabulary, chunk=chunk, read_out=read_out)
            model = llama(vocabulary)
            if "checkpointing" in name:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            base = localgrad.methods.dgl(task) if blocks > 1 else localgrad.methods.e2e(task)
            method = localgrad.methods.auglocal(task, depth=1, tail=1) if "auglocal" in name else base
            network = localgrad.localize(ChunkedLM(model) if chunks else model, method, blocks, example=tokens)
            found = cost(network, tokens, tokens)
            whole = first.setdefault(vocabulary, found)
            cells += [
                f"{found.activation_bytes / 2**20:.1f}",
                f"{found.activation_bytes / whole.activation_bytes:.3f}",
                f"{found.flops / whole.flops:.2f}",
            ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

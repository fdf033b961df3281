"""The auxiliary head of language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from localgrad.errors import MethodError
from localgrad.site import Site

ReadOut = Literal["own", "shared"]


@dataclass(frozen=True)
class TokenReadOut:
    """A norm, then one linear layer on each token.

    The head answers ``{"features": (B, T, C), "weight": (outputs, C)}``: `localgrad.tasks.language_model` makes the
    logits ``features @ weight.T`` of them a chunk at a time.

    Args:
        outputs: the vocabulary.
        read_out: ``own`` is a norm of the kind of the model's last one, and a matrix of the head's own, drawn as
            PyTorch draws a linear layer. ``shared`` reads the model's own output matrix, detached: only the last block
            trains it; the norm is the head's own.

    Raises:
        MethodError: features are no tokens; or ``shared``, and the model has no matrix (outputs, C).
    """

    outputs: int
    read_out: ReadOut = "own"

    def __call__(self, site: Site) -> nn.Module:
        if site.layout.kind != "tokens" or len(site.layout.grid) != 1:
            raise MethodError(
                f"after block {site.span.stop - 1} features have the shape {tuple(site.features.shape)}; a language "
                "model is read out from tokens (B, T, C): cut it between its layers (cuts=...)"
            )
        if site.inputs.dim() == 2 and site.features.shape[1] != site.inputs.shape[1]:
            raise MethodError(
                f"after block {site.span.stop - 1} there are {site.features.shape[1]} positions for "
                f"{site.inputs.shape[1]} tokens, each of which is to be answered; leave pooled out, or write "
                "lean(task, factor=1): pooled positions know of tokens that they are to answer"
            )
        norm = _norm_like(site.partition.model, site.channels)
        if self.read_out == "own":
            return _Own(norm, nn.Linear(site.channels, self.outputs, bias=False))
        return _Shared(norm, output_matrix(site.partition.model, self.outputs, site.channels))


def _norm_like(model: nn.Module, width: int) -> nn.Module:
    """A norm of the kind and ``eps`` of the model's last one of this width, new; LayerNorm where it has none."""
    found: nn.Module = nn.LayerNorm(width)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, Tensor) and weight.shape == (width,):
            found = module
    eps = getattr(found, "eps", getattr(found, "variance_epsilon", 1e-5))
    return nn.LayerNorm(width, eps=eps) if isinstance(found, nn.LayerNorm) else nn.RMSNorm(width, eps=eps)


def output_matrix(model: nn.Module, outputs: int, width: int) -> nn.Parameter:
    """The matrix (outputs, width) of the model's last linear layer.

    Raises:
        MethodError: there is none, or the layer has a bias.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape == (outputs, width)]
    if not linears or linears[-1].bias is not None:
        raise MethodError(
            f"read_out='shared' reads the model's output matrix ({outputs}, {width}) without a bias, and "
            f"{type(model).__name__} has none; write read_out='own'"
        )
    return linears[-1].weight


class _Own(nn.Module):
    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"features": self.norm(features), "weight": self.linear.weight}


class _Shared(nn.Module):
    def __init__(self, norm: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.norm = norm
        self._matrix = (weight,)  # in a tuple, so that it is no parameter of the head

    def forward(self, features: Tensor) -> dict[str, Any]:
        return {"features": self.norm(features), "weight": self._matrix[0].detach()}

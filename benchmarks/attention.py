"""Benchmarks softmax attention in bf16 by every implementation that is installed.

PyTorch's backends, its attention for sequences of several lengths, and the packages flash-attn and flash-attn-4. The
texts of SANA's cross-attention are padded: a mask hides the padding, or an implementation that knows the lengths never
reads it. Results are checked against fp32.
"""

import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .autoencoder import FP32_ERROR, reason, relative_error, release
from .ceilings import Ceilings
from .timing import graphed, measure
from .transformer import times_of

CALLS = 10  # per captured graph
NAMES = [  # of contenders; eager is what a patched model calls
    "eager", "SDPA cudnn", "SDPA flash", "SDPA efficient", "varlen_attn of torch", "flash-attn", "flash-attn-4"
]  # fmt: skip
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of q, k, v: [B, tokens, heads, dim]


@dataclass(frozen=True)
class AttentionWorkload:
    """tokens: of the queries. text: tokens of keys and values, None for self-attention. padded: texts differ in length.

    gradient: forward and backward.
    """

    batch: int
    heads: int
    dim: int
    tokens: int
    text: int | None = None
    padded: bool = False
    gradient: bool = False

    @property
    def name(self) -> str:
        kind = "attention" if self.text is None else f"cross_attention, {'padded ' * self.padded}text of {self.text}"
        shape = f"{self.batch} × {self.tokens} tokens, {self.heads} heads of {self.dim}"
        return f"{kind}, {shape}{', gradient' * self.gradient}"

    def lengths(self, device: torch.device) -> torch.Tensor:
        """The number of tokens of each text: from an eighth of the longest to the longest, [B] int32."""
        keys = self.text or self.tokens
        lengths = torch.linspace(keys / 8, keys, self.batch) if self.padded else torch.full((self.batch,), keys)
        return lengths.to(device, torch.int32)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """Added to the scores, as diffusers passes it: [B, 1, 1, text] in bf16; None without padding."""
        if not self.padded:
            return None
        hidden = torch.arange(self.text, device=device) >= self.lengths(device)[:, None]
        return hidden.to(torch.bfloat16).mul(-10000.0)[:, None, None]


WORKLOADS = [
    *(AttentionWorkload(b, 20, 112, n, 300, padded=True) for b, n in [(2, 1024), (8, 1024), (2, 16384)]),  # SANA 1.6 B
    AttentionWorkload(8, 20, 112, 1024, 300),
    AttentionWorkload(8, 16, 72, 1024, 300, padded=True),  # SANA 0.6 B
    AttentionWorkload(8, 20, 112, 1024, 300, padded=True, gradient=True),
    *(AttentionWorkload(128, 16, 72, 1024, gradient=gradient) for gradient in (False, True)),  # DiT-XL
    AttentionWorkload(128, 16, 72, 1026),  # UViT-H
    AttentionWorkload(32, 16, 72, 4096),
]
REHEARSAL = [AttentionWorkload(2, 2, 16, 8, 16, padded=True), AttentionWorkload(2, 2, 16, 8, gradient=True)]


def sdpa(backend: SDPBackend | None, mask: torch.Tensor | None) -> Attention:
    """PyTorch's attention by one backend; None: by the backend that PyTorch chooses."""

    def run(q, k, v):
        with nullcontext() if backend is None else sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    return run


def packed(varlen: Callable[..., torch.Tensor], workload: AttentionWorkload, lengths: torch.Tensor) -> Attention:
    """An implementation for sequences of several lengths, packed one behind the other.

    varlen(q, k, v, ends of queries, ends of keys, most queries, most keys). The keys are packed within the timed call.
    In a model, the projections of the text would be computed of packed tokens at once.
    """
    tokens, keys = workload.tokens, workload.text or workload.tokens
    used = (torch.arange(keys, device=lengths.device) < lengths[:, None]).flatten().nonzero().flatten()
    ends_q = torch.arange(0, workload.batch * tokens + 1, tokens, device=lengths.device, dtype=torch.int32)
    ends_k = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def run(q, k, v):
        k, v = (x.flatten(0, 1) for x in (k, v))
        k, v = (k.index_select(0, used), v.index_select(0, used)) if workload.padded else (k, v)
        return varlen(q.flatten(0, 1), k, v, ends_q, ends_k, tokens, keys).view_as(q)

    return run


def contenders(workload: AttentionWorkload, device: torch.device) -> dict[str, Callable[[], Attention]]:
    """Each of `NAMES`, and a function that makes the implementation or raises ImportError."""
    lengths, mask = workload.lengths(device), workload.mask(device)

    def of_torch():
        from torch.nn.attention.varlen import varlen_attn

        return packed(varlen_attn, workload, lengths)

    def of_flash_attn():
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        return packed(flash_attn_varlen_func, workload, lengths) if workload.padded else flash_attn_func

    def of_flash_attn_4():
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        function = partial(flash_attn_varlen_func, seqused_k=lengths) if workload.padded else flash_attn_func
        return lambda *qkv: _first(function(*qkv))

    backends = None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    of_backends = [partial(sdpa, backend, mask) for backend in backends]
    return dict(zip(NAMES, [*of_backends, of_torch, of_flash_attn, of_flash_attn_4], strict=True))


def _first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def call(attention: Attention, tensors: list[torch.Tensor], gradient: bool) -> torch.Tensor:
    """The result, or with `gradient` the gradients of q, k and v in a row. tensors: q, k, v, gradient of the result."""
    *qkv, dout = tensors
    if not gradient:
        with torch.no_grad():
            return attention(*qkv)
    leaves = [x.detach().requires_grad_() for x in qkv]
    return torch.cat(torch.autograd.grad(attention(*leaves), leaves, dout), dim=1)


def exact_result(workload: AttentionWorkload, tensors: list[torch.Tensor]) -> torch.Tensor:
    """`call` in fp32, sample by sample."""
    mask, results = workload.mask(tensors[0].device), []
    for index in range(workload.batch):
        attention = sdpa(SDPBackend.MATH, None if mask is None else mask[index : index + 1].float())
        results.append(call(attention, [x[index : index + 1].float() for x in tensors], workload.gradient))
    return torch.cat(results)


def benchmark(workload: AttentionWorkload, device: torch.device, ceilings: Ceilings, names: Collection[str]) -> dict:
    """The record of a workload: error, ms and MFU of eager and of the contenders in `names`, or a failure.

    Contenders whose package is not installed have no row.
    """
    torch.manual_seed(0)
    shape = workload.batch, workload.tokens, workload.heads, workload.dim
    of_keys = workload.batch, workload.text or workload.tokens, *shape[2:]
    tensors = [torch.randn(size, device=device, dtype=torch.bfloat16) for size in (shape, of_keys, of_keys, shape)]
    exact, rows, runs, limit = exact_result(workload, tensors), {}, {}, math.inf
    for name, make in contenders(workload, device).items():
        if name not in {"eager", *names}:
            continue
        try:
            run = partial(call, make(), tensors, workload.gradient)
            rows[name] = {"error": relative_error(run(), exact)}
            if rows[name]["error"] <= limit:
                runs[name] = graphed(run, CALLS)
            else:
                rows[name]["failure"] = "wrong"
        except ImportError:
            continue
        except Exception as failure:
            rows[name] = {"failure": reason(failure)}
        if name == "eager":
            limit = max(2 * rows[name].get("error", math.inf), FP32_ERROR)
        release()
    flops = (3.5 if workload.gradient else 1) * 4 * math.prod(shape) * of_keys[1]
    for name, timing in measure(runs, seconds=0.05).items():
        times = {key: value / CALLS for key, value in times_of(timing).items()}
        rows[name] |= times | {"mfu": flops / (times["ms"] * 1e9) / ceilings.tflops}
    return {"workload": workload.name, "flops": flops, "floor_ms": ceilings.floor(flops), "contenders": rows}

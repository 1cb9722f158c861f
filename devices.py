"""What a model runs on: device, precision, and the processes of torchrun. Torch, nothing of faces."""

import torch
import torch.distributed as dist
from torch import Tensor

from cli import UserError, environment_number

# ------------------------------------------------------------------------------------------------------------
# Device and precision
# ------------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device named, or for `auto` the best of cuda, mps and cpu; UserError if it is not there.

    Under torchrun, cuda is the process's own GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        own = environment_number("LOCAL_RANK")
        if device.type == "cuda" and device.index is None and own is not None:
            device = torch.device("cuda", own)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not available on this machine: try auto or cpu") from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The forward pass's dtype: what is named, or for `auto` bf16 where the device computes in it by itself,
    else fp16 on CUDA and fp32 elsewhere."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        tells = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")  # older versions do not
        found = torch.cpu.get_capabilities() if tells else {}
        name = "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "fp32"
    if name == "fp16" and device.type != "cuda":  # fused AdamW on mps does not heed the gradient scaler
        raise UserError(f"--precision fp16 needs CUDA: use fp32 or bf16 with --device {device.type}")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which the forward pass runs in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def copy_to(device: torch.device, values: Tensor) -> Tensor:
    """A tensor on `device`, not waited for where that is safe: what lies in pinned memory, to CUDA."""
    return values.to(device, non_blocking=device.type == "cuda" and values.is_pinned())


# ------------------------------------------------------------------------------------------------------------
# The processes of torchrun
# ------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's number among those of torchrun; 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over processes, without gradient."""
    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


class AllGather(torch.autograd.Function):
    """(N, …) of each process → (N·W, …), rank by rank; a row's gradient is the sum of all processes' own."""

    @staticmethod
    def forward(_, rows):
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(_, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """(N, …) of each process → (N·W, …), rank by rank, with gradient; all must have the same N."""
    return AllGather.apply(rows) if world_size() > 1 else rows


def merge_ranks(rows: Tensor) -> Tensor:
    """Rows of which process r of W has r, r + W, r + 2W, …, in their order again, on the CPU."""
    if world_size() == 1:
        return rows.cpu()
    shares = [None] * world_size()
    dist.all_gather_object(shares, rows.cpu())
    merged = torch.empty(sum(map(len, shares)), *rows.shape[1:], dtype=rows.dtype)
    for start, share in enumerate(shares):
        merged[start :: world_size()] = share
    return merged

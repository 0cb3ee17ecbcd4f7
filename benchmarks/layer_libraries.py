"""Other projects' expert layers as functions of the same tensors, for `layer_peers`.

A library yields its layers by name, or in their place the reason why one does not run here. Nothing
of a library is imported before its layers are asked for.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.sparse_layer import Layer

# Output and gradients from the input, both weights, the active experts and their routing weights.
Peer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
NOT_CAPTURED = {
    "transformers eager": "its loop over experts waits for their numbers of tokens",
    "transformers batched_mm": "its copies of weights for each pair would stay in the graph",
    "liger": "it waits for the number of tiles",
}
TUNING = {
    "liger": "4 of 32 candidates of each product, 4 of 16 of weights' gradients, 2 of 40 of sums",
    "sonicmoe": "QuACK's default configuration, 4 candidates of sums",
}


def transformers_peers(layer: Layer, *, tuned: bool) -> Iterator[tuple[str, Peer | str]]:
    """Transformers' experts implementations by name; a text says why one does not run."""
    del tuned
    from transformers import Qwen3MoeConfig  # noqa: PLC0415
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: PLC0415

    from benchmarks import expert_layer  # noqa: PLC0415

    T, E, I, D = layer.shape
    dtype = str(layer.gate_up.dtype).removeprefix("torch.")
    device = layer.gate_up.device
    case = expert_layer.Case(
        device=str(device), dtype=dtype, tokens=T, hidden=D, num_experts=E, expert_dim=I,
        k=layer.k, compiled=False,
    )  # fmt: skip
    for name in ("eager", *sorted(expert_layer.ALL_EXPERTS_FUNCTIONS.valid_keys())):
        label = f"transformers {name}"
        if (reason := expert_layer.why_not(name, case)) is not None:
            yield label, reason
            continue
        config = Qwen3MoeConfig(
            hidden_size=D, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=layer.k
        )
        config._experts_implementation = name
        with torch.device("meta"):
            experts: Any = modeling_qwen3_moe.Qwen3MoeExperts(config)

        def run(  # noqa: PLR0917
            x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor,
            experts: Any = experts,
        ) -> Tensor:  # fmt: skip
            # The same leaves every time, so that gradients are asked for of these.
            experts._parameters |= {"gate_up_proj": gate_up, "down_proj": down}
            return experts(x, index, weights.to(x.dtype))

        yield label, run


def liger_peer(layer: Layer, *, tuned: bool) -> Iterator[tuple[str, Peer | str]]:
    """Liger's fused MoE, a set of Triton kernels."""
    if (reason := _lacking(layer, "liger_kernel", "triton")) is not None:
        yield "liger", reason
        return
    from liger_kernel.ops import (  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
        fused_moe,
        fused_moe_kernels,
    )

    if not tuned:

        def wanted(config: Any) -> bool:
            sizes = config.kwargs
            if "BLOCK_H" in sizes:
                return sizes == {"BLOCK_H": 512, "BLOCK_K": 4}
            if "BLOCK_M" in sizes:
                return (sizes["BLOCK_N"], sizes["BLOCK_K"]) == (128, 32)
            return sizes["BLOCK_K"] == 64 and config.num_stages == 3

        try_only(fused_moe_kernels, wanted)

    def run(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        apply = fused_moe.LigerFusedMoEFunction.apply
        return apply(x, gate_up, down, index.int(), weights)

    yield "liger", run


def sonicmoe_peer(layer: Layer, *, tuned: bool) -> Iterator[tuple[str, Peer | str]]:
    """SonicMoE, called as transformers' `sonicmoe` calls the same function from the hub."""
    if (reason := _lacking(layer, "sonicmoe", "quack", "cutlass", "triton")) is not None:
        yield "sonicmoe", reason
        return
    import quack.gemm_interface as products  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    import sonicmoe  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import (  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
        reduction_over_k_gather as sums,
    )

    if not tuned:
        default = products.default_config(layer.gate_up.device)
        try_only(products, lambda config: config.kwargs.get("config") == default)
        try_only(sums, lambda c: c.num_warps == 4 and c.kwargs["BLOCK_H"] in {512, 1024}
                  and c.kwargs["BLOCK_K"] in {4, 8})  # fmt: skip
    E, (T, k) = layer.shape[1], (layer.shape[0], layer.k)
    token = torch.arange(T, device=layer.gate_up.device, dtype=torch.int32).repeat_interleave(k)

    def run(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y, _ = sonicmoe.moe_general_routing_inputs(
            x, weights.flatten(), token, index.flatten().int(), gate_up.permute(1, 2, 0), None,
            down.permute(1, 2, 0), None, E=E, stream_id=None,
            activation_type=ActivationType.SWIGLU, is_inference_mode_enabled=False,
            concat_layout=True,
        )  # fmt: skip
        return y

    yield "sonicmoe", run


LIBRARIES = {
    "sonicmoe": sonicmoe_peer,
    "liger": liger_peer,
    "transformers": transformers_peers,
}


def _lacking(layer: Layer, *packages: str) -> str | None:
    """Why kernels of these packages cannot run here; None if they can."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return None if layer.gate_up.is_cuda else "its kernels need a GPU"


def try_only(module: Any, wanted: Callable[[Any], bool]) -> None:
    """Leave the kernels of a module the candidates that are wanted, or all where none is."""
    for kernel in vars(module).values():
        if isinstance(configs := getattr(kernel, "configs", None), list):
            kernel.configs = [config for config in configs if wanted(config)] or configs

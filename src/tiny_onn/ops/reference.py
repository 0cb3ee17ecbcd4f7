"""The definition of the expert layer and of every surprise, one token and one expert at a time.

Slow and obvious: loops, and `torch.autograd.grad` per token and expert for the gradients. Use
float64. `dense_masked` is tested against this in outputs, gradients and surprise.

Legend: T tokens, D hidden, E experts, I expert width.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn.config import Surprise


def expert(
    x_D: Float[Tensor, " hidden"],
    gate_up_2ID: Float[Tensor, "2 width hidden"],
    down_ID: Float[Tensor, "width hidden"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, " hidden"]:
    """One expert's output for one token: `down^T (act(gate x) * (up x))`."""
    gate_ID, up_ID = gate_up_2ID
    return down_ID.T @ (activation(gate_ID @ x_D) * (up_ID @ x_D))


def expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_2EID: Float[Tensor, "2 experts width hidden"],
    down_EID: Float[Tensor, "experts width hidden"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "tokens hidden"]:
    """The layer's output: `y[t] = sum_e weights[t, e] * expert_e(x[t])`, inactive experts too.

    Their weight is 0, and the gradient of that weight is what the expert would contribute.
    """
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for e in range(down_EID.shape[0]):
            out_D = expert(x_TD[t], gate_up_2EID[:, e], down_EID[e], activation)
            y_D = y_D + weights_TE[t, e] * out_D
        rows.append(y_D)
    return torch.stack(rows)


def surprise(  # noqa: PLR0917
    kind: Surprise,
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_2EID: Float[Tensor, "2 experts width hidden"],
    down_EID: Float[Tensor, "experts width hidden"],
    grad_y_TD: Float[Tensor, "tokens hidden"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "tokens experts"]:
    """Surprise of every token at every expert, at unit routing weight, from per-token autograd.

    With `loss = <grad_y[t], expert_e(x[t])>`, the loss to first order in the expert's output:

    - `parameters`: L2 norm of its gradient with respect to all of the expert's weights;
    - `input`: L2 norm of its gradient with respect to x[t];
    - `output`: L2 norm of its gradient with respect to the expert's output, `|grad_y[t]|`;
    - `gain`: minus the loss, the first-order decrease that the expert brings;
    - `magnitude`: `|expert_e(x[t])|`;
    - `relative`: `parameters` divided by the norm of the expert's hidden activations, 0 where that
      is 0.
    """
    values_TE = x_TD.new_zeros(x_TD.shape[0], down_EID.shape[0])
    for t in range(x_TD.shape[0]):
        for e in range(down_EID.shape[0]):
            x_D = x_TD[t].detach().clone().requires_grad_()
            gate_up_2ID = gate_up_2EID[:, e].detach().clone().requires_grad_()
            down_ID = down_EID[e].detach().clone().requires_grad_()
            out_D = expert(x_D, gate_up_2ID, down_ID, activation)
            loss = out_D @ grad_y_TD[t]
            grad_x, grad_gate_up, grad_down = torch.autograd.grad(loss, (x_D, gate_up_2ID, down_ID))
            parameters = torch.cat([grad_gate_up.flatten(), grad_down.flatten()]).norm()
            hidden = (activation(gate_up_2ID[0] @ x_D) * (gate_up_2ID[1] @ x_D)).norm()
            values_TE[t, e] = {
                "parameters": parameters,
                "input": grad_x.norm(),
                "output": grad_y_TD[t].norm(),
                "gain": -loss,
                "magnitude": out_D.norm(),
                "relative": parameters / hidden if hidden > 0 else parameters * 0,
            }[kind].detach()
    return values_TE

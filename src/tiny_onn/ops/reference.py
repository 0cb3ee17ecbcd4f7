"""The definition of the expert layer and of every surprise, one token and one expert at a time.

The code is slow and obvious: it loops, and calls `torch.autograd.grad` per token and expert. It
belongs to float64 inputs. `dense_masked` is tested against it in outputs, gradients and surprise.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I rows (gate, then up).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn.config.schema import Surprise


def expert(
    x_D: Float[Tensor, " hidden"],
    gate_up_JD: Float[Tensor, "rows hidden"],
    down_DI: Float[Tensor, "hidden width"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, " hidden"]:
    """Return one expert's output for one token, `down (act(gate x) * (up x))`."""
    gate_ID, up_ID = gate_up_JD.chunk(2)
    return down_DI @ (activation(gate_ID @ x_D) * (up_ID @ x_D))


def expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "tokens hidden"]:
    """Return the layer's output, `y[t] = sum_e weights[t, e] * expert_e(x[t])` over all experts.

    An inactive expert's weight is 0, and the gradient of that weight is what the expert would
    contribute.
    """
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for e in range(down_EDI.shape[0]):
            out_D = expert(x_TD[t], gate_up_EJD[e], down_EDI[e], activation)
            y_D = y_D + weights_TE[t, e] * out_D
        rows.append(y_D)
    return torch.stack(rows)


def surprise(  # noqa: PLR0917
    kind: Surprise,
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    grad_y_TD: Float[Tensor, "tokens hidden"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "tokens experts"]:
    """Return the surprise of every token at every expert, at unit routing weight, by autograd.

    With `loss = <grad_y[t], expert_e(x[t])>`, the loss to first order in the expert's output:

    - `parameters`: L2 norm of its gradient with respect to all of the expert's weights;
    - `input`: L2 norm of its gradient with respect to x[t];
    - `output`: L2 norm of its gradient with respect to the expert's output, `|grad_y[t]|`;
    - `gain`: minus the loss, the first-order decrease that the expert brings;
    - `magnitude`: `|expert_e(x[t])|`;
    - `relative`: `parameters` divided by the norm of the expert's hidden activations, 0 where that
      is 0.
    """
    values_TE = x_TD.new_zeros(x_TD.shape[0], down_EDI.shape[0])
    for t in range(x_TD.shape[0]):
        for e in range(down_EDI.shape[0]):
            x_D = x_TD[t].detach().clone().requires_grad_()
            gate_up_JD = gate_up_EJD[e].detach().clone().requires_grad_()
            down_DI = down_EDI[e].detach().clone().requires_grad_()
            out_D = expert(x_D, gate_up_JD, down_DI, activation)
            loss = out_D @ grad_y_TD[t]
            grad_x, grad_gate_up, grad_down = torch.autograd.grad(loss, (x_D, gate_up_JD, down_DI))
            parameters = torch.cat([grad_gate_up.flatten(), grad_down.flatten()]).norm()
            gate_ID, up_ID = gate_up_JD.chunk(2)
            hidden = (activation(gate_ID @ x_D) * (up_ID @ x_D)).norm()
            values_TE[t, e] = {
                "parameters": parameters,
                "input": grad_x.norm(),
                "output": grad_y_TD[t].norm(),
                "gain": -loss,
                "magnitude": out_D.norm(),
                "relative": parameters / hidden if hidden > 0 else parameters * 0,
            }[kind].detach()
    return values_TE

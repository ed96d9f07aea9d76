"""torch.func over a model with attention: directional derivatives, per-sample gradients, vmap.

python compile_examples/func_transforms.py
"""

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from attn_ops.nn import MultiheadAttention

Parameters = dict[str, Tensor]


def main() -> None:
    torch.manual_seed(0)
    model = MultiheadAttention(32, heads=4, kv_heads=2, learned_scale=8.0).double()
    parameters: Parameters = {name: p.detach() for name, p in model.named_parameters()}
    samples, targets = torch.randn(2, 5, 12, 32, dtype=torch.float64)  # 5 samples of 12 tokens

    def run(parameters: Parameters, x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],), {"causal": True})[0]

    def loss(parameters: Parameters, x: Tensor, target: Tensor) -> Tensor:
        return (run(parameters, x) - target).square().mean()

    # jvp: how the output moves as the input moves, in one forward pass. Against differences:
    x, direction = samples[0], torch.randn_like(samples[0])
    _, tangent = jvp(lambda x: run(parameters, x), (x,), (direction,))[:2]
    step = 1e-6
    ahead, behind = (run(parameters, x + sign * step * direction) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)
    print(f"jvp: |tangent| = {tangent.norm():.6f}, as finite differences say")

    # vmap(grad): the gradient of every sample by itself, in one pass. Against a loop:
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, samples, targets)
    for i in range(len(samples)):
        alone = grad(loss)(parameters, samples[i], targets[i])
        for name in parameters:
            torch.testing.assert_close(each[name][i], alone[name])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in each.values()]).sum(0).sqrt()
    print("gradient norm of each sample:", [round(norm, 4) for norm in norms.tolist()])

    # vmap over parameters: an ensemble of models in one call. Against a loop:
    ensemble = [MultiheadAttention(32, heads=4, dtype=torch.float64) for _ in range(3)]
    stacked, _ = stack_module_state(list(ensemble))

    def member(parameters: Parameters) -> Tensor:
        return functional_call(ensemble[0], parameters, (samples,))

    outputs = vmap(member)(stacked)  # [3, 5, 12, 32]
    torch.testing.assert_close(outputs, torch.stack([model(samples) for model in ensemble]))
    print(f"an ensemble of {len(ensemble)} models in one call: {tuple(outputs.shape)}")


if __name__ == "__main__":
    main()

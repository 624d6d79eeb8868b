"""Autograd functions of channel gates and affine layers, cheaper to differentiate twice than what they replace."""

import torch


class _Affine(torch.autograd.Function):
    """y = f(x), f affine, with its linear part and adjoint: a derivative of any order is one of these."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, f, linear, adjoint):
        return f(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.linear, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx, z):
        return _Affine.apply(z, ctx.adjoint, ctx.adjoint, ctx.linear), None, None, None


class _Gate(torch.autograd.Function):
    """y = m x at m = 1, where it is x: its derivatives need one pass over x where those of a product need two or three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, m):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, z):
        return _GateAdjoint.apply(z, *ctx.saved_tensors)


class _GateAdjoint(torch.autograd.Function):
    """(m z, <z, x> for each gate) at m = 1: what `_Gate` sends back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, x, m):
        return z.view_as(z), (z * x).sum_to_size(m.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, y, u):
        z, x, m = ctx.saved_tensors
        return torch.addcmul(y, x, u), z * u, (y * z).sum_to_size(m.shape)

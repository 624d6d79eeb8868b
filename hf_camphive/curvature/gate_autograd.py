"""Autograd functions for channel gates and affine layers that are cheaper to differentiate twice than torch's own."""

import torch


class Affine(torch.autograd.Function):
    """Apply an affine function f(x) = linear(x) + constant, given its linear part and the adjoint of that part.

    The backward pass applies `adjoint` as an `Affine` too, so derivatives of any order need these two functions only.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, f, linear, adjoint):
        return f(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.linear, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx, z):
        return Affine.apply(z, ctx.adjoint, ctx.adjoint, ctx.linear), None, None, None


class Gate(torch.autograd.Function):
    """Multiply x by gates m that are all 1: return x itself, with the derivatives of the product m x at m = 1.

    The derivatives read x once, where those of an ordinary product read it two or three times.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, m):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, z):
        return GateAdjoint.apply(z, *ctx.saved_tensors)


class GateAdjoint(torch.autograd.Function):
    """Return the gradients of `Gate` for an upstream gradient z, at m = 1: m z = z for x, and <z, x> for each gate."""

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

"""Slow measures of complexity from the formulas, in numpy and loops; nothing here imports alignreg."""

import itertools
import math

import numpy as np
from torch import nn


def array(tensor):
    return tensor.detach().cpu().double().numpy()


def matrices(model):
    """Weights as (out, in·kh·kw), with zeros outside the blocks of groups."""
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            w = array(layer.weight)
            outs, ins = w.shape[:2]
            full = np.zeros((outs, layer.in_channels, *w.shape[2:]))
            for o in range(outs):
                group = o // (outs // layer.groups)
                for i in range(ins):
                    full[o, group * ins + i] = w[o, i]
            found.append(full.reshape(outs, -1))
        elif isinstance(layer, nn.Linear):
            found.append(array(layer.weight))
    return found


def largest_singular_value(W):
    return math.sqrt(np.linalg.eigvalsh(W.T @ W)[-1])


def squares(W):
    return sum(value**2 for value in W.flatten())


def paths_of_mlp(model):
    """Every path from an input or a bias to an output, one by one."""
    layers = [(array(m.weight), array(m.bias)) for m in model if isinstance(m, nn.Linear)]
    total = 0.0
    for first in range(len(layers) + 1):
        widths = [len(b) for _, b in layers[first:]]
        if first == 0:
            widths = [layers[0][0].shape[1], *widths]
        for units in itertools.product(*map(range, widths)):
            product = 1.0
            if first:  # from the bias of a unit of the layer before
                for unit in range(len(layers[first - 1][1])):
                    product = layers[first - 1][1][unit]
                    at = unit
                    for (W, _), to in zip(layers[first:], units, strict=True):
                        product *= W[to, at]
                        at = to
                    total += product**2
            else:
                for (W, _), (at, to) in zip(layers, itertools.pairwise(units), strict=True):
                    product *= W[to, at]
                total += product**2
    return total


def paths_of_cnn(model, shape):
    conv, linear = model[0], model[-1]
    w, b, V, c = (array(t) for t in (conv.weight, conv.bias, linear.weight, linear.bias))
    outs, ins, kh, kw = w.shape
    channels, height, width = shape
    rows, columns = (height + 2 - kh) // 2 + 1, (width + 2 - kw) // 2 + 1
    assert V.shape[1] == outs * rows * columns
    total = sum(value**2 for value in c)
    for k, o, i, j in itertools.product(range(len(V)), range(outs), range(rows), range(columns)):
        out = V[k, (o * rows + i) * columns + j]
        total += (out * b[o]) ** 2
        for channel, y, x in itertools.product(range(channels), range(height), range(width)):
            a, e = y - (2 * i - 1), x - (2 * j - 1)
            within = channel - (o // (outs // 2)) * ins
            if 0 <= a < kh and 0 <= e < kw and 0 <= within < ins:
                total += (out * w[o, within, a, e]) ** 2
    return total


def bartlett2017(model, initial):
    Ws, starts = matrices(model), matrices(initial)
    product, ratios = 1.0, 0.0
    for W, W0 in zip(Ws, starts, strict=True):
        s = largest_singular_value(W)
        product *= s
        ratios += (sum(math.sqrt(squares(row)) for row in W - W0) / s) ** (2 / 3)
    return product * ratios**1.5


def neyshabur2018(model, initial):
    (U, V), (U0, _) = matrices(model), matrices(initial)
    return math.sqrt(squares(V)) * (math.sqrt(squares(U - U0)) + largest_singular_value(U0)) + math.sqrt(len(U))


def distance(model, initial):
    pairs = zip(model.parameters(), initial.parameters(), strict=True)
    return math.sqrt(sum(squares(array(p) - array(q)) for p, q in pairs))


def frobenius_product(model, initial):
    return math.prod(squares(W) for W in matrices(model))


def spectral_product(model, initial):
    return math.prod(largest_singular_value(W) ** 2 for W in matrices(model))


def path_norm(model, shape):
    return paths_of_cnn(model, shape) if isinstance(model[0], nn.Conv2d) else paths_of_mlp(model)

"""The vocabulary of axes: the same words in signatures, zarr dimension names, table columns and figures.

step     optimizer steps, counted from 0; step s leads from theta[s] to theta[s + 1]
example  training examples, named by the ids that were given to ``recorder.examples``
query    the inputs whose predictions are explained, counted from 0
output   entries of the measure's last dimension (classes, tokens, …)
layer    parameter tensors, named as in ``model.named_parameters()``
param    single numbers of the parameter tensors, in the order of the layers, row-major

A *measure* is one (query, output) pair: a scalar that the ledger explains, in the measure's own unit (nats, logits, …).
"""

MEASURE_AXES = ("query", "output")
"""The axes that name a measure."""

KEEPABLE = ("query", "output", "example", "layer", "param", "step")
"""What ``keep`` may hold, in the order in which the axes of a ledger stand."""

ROWS = ("initial", "data", "decay", "momentum0", "buffers", "gap", "arithmetic", "path")
"""The terms of the sum that a ledger is, in the order in which they are told."""

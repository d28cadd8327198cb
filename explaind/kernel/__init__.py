"""The mathematics: path rules, the backward sweep, per-example products. Knows no disk."""

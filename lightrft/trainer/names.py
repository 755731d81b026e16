"""Names that settings allow, without loading what they stand for; a test compares them with the registries."""

from __future__ import annotations

__all__ = ["ADVANTAGES", "AGGREGATIONS", "AGGREGATION_OF", "GROUPED", "KL_ESTIMATORS", "POLICY_LOSSES"]

ADVANTAGES = (
    "gae",
    "reinforce",
    "rloo",
    "reinforce_baseline",
    "reinforce++",
    "group_norm",
    "grpo",
    "dr_grpo",
    "cpgd",
)
GROUPED = ("rloo", "reinforce_baseline", "group_norm", "grpo", "dr_grpo", "cpgd")
"""Estimators that compare the samples of one prompt, and so need several."""

AGGREGATION_OF = {
    "ppo": "token_mean",
    "gspo": "sequence_mean",
    "gmpo": "sequence_mean",
    "cispo": "token_mean",
    "cpgd": "token_mean",
}
"""Every policy loss, and how its tokens are put together unless the settings say otherwise."""

POLICY_LOSSES = tuple(AGGREGATION_OF)
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")

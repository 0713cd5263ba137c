"""The mathematics and the bookkeeping of reinforcement learning; nothing here knows Ray.

`rollout_schema` says what travels, `ledger` which state each group is in, `rewards` what a
completion is worth; advantages, losses and corrections are pure functions over flat token tensors.
"""

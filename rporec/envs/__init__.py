"""Gymnasium environments: `import rporec.envs` registers them.

    rporec/NextItem-v0   one prompt, one completion or one ranking, one reward
    rporec/Session-v0    a user's next `horizon` items in a row

    gymnasium.make(ID, data=None, run=None, action="tokens", split="train", exclude_history=None)
    gymnasium.make_vec(ID, num_envs=8, ...)   the whole batch scored in one call, see `rporec.envs.vector`

Both are thin: `rporec.envs.task.Task` says what is asked and pays with the functions that training and
`rporec evaluate` use. The arguments are explained at `rporec.envs.opening.open_task`, observations,
actions and infos at `rporec.envs.next_item.NextItemEnv`.
"""

import gymnasium

NEXT_ITEM, SESSION = "rporec/NextItem-v0", "rporec/Session-v0"

gymnasium.register(
    NEXT_ITEM,
    entry_point="rporec.envs.next_item:NextItemEnv",
    vector_entry_point="rporec.envs.vector:NextItemVectorEnv",
)
gymnasium.register(
    SESSION,
    entry_point="rporec.envs.session:SessionEnv",
    vector_entry_point="rporec.envs.vector:SessionVectorEnv",
)

"""Age, foretold. Pure.

Little's law: rollouts are as old as there are rollouts between their first token and their step, in steps of them. At
dispatch these are the ones in batches whose weights are not in the engines yet, and the groups before it.
"""

from palestra.orchestrate.state import GroupStatus, LoopState


def predicted_age(state: LoopState, group_id: int, *, groups_per_step: int, loaded: int) -> int:
    """Of a rollout of this group whose first token is sampled now, by engines that hold version `loaded`.

    An open group counts as much as groups have trained so far.
    """
    before = [group.status for known, group in state.groups.items() if known < group_id]
    num_ready = before.count(GroupStatus.READY) + before.count(GroupStatus.PARTED)
    ahead = num_ready + kept_share(state) * before.count(GroupStatus.OPEN)
    return state.next_step + int(ahead / groups_per_step) - loaded


def kept_share(state: LoopState) -> float:
    """Of the groups closed so far, those that had signal; 1 before any."""
    ready = state.counts.get("groups_ready", 0)
    closed = ready + state.counts.get("groups_zero_signal", 0) + state.counts.get("groups_all_invalid", 0)
    return ready / closed if closed else 1.0

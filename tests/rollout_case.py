"""A rollout and its example, as the scorer takes them."""

from megatron_sr1.records import Completion, Example, Message, Rollout


def case(response, gold, question="", description=None, reading=None, has_image=False):
    """Return the rollout that sampled a response to a question, and the example of that."""
    completion = Completion((1,), (-0.5,), response, "stop")
    rollout = Rollout(0, 0, (1, 2), completion, description, reading, 0)
    turn = Message("user", question)
    return rollout, Example(0, "7", "shard", (turn,), gold, int(has_image))

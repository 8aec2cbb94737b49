"""GRPO on two ranks with a function of the user's for the total, which gets batches and images.

Not covered: that such a reward teaches anything.
"""

from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FUNCTION = """
async def reward(*, responses, images, self_rewards, totals, num_tokens, low):
    assert images[0].mode == "RGB" and len(responses) == 4
    width = images[0].width
    return [
        {"score": max(low, -total), "wide": width > 30, "read": read, "tokens": count}
        for total, read, count in zip(totals, self_rewards, num_tokens, strict=True)
    ]
"""


@pytest.fixture(scope="module")
def run(tiny_model, join_as_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    shards = make_digits(folder, 1, num_train=12, num_eval=6, num_cold_start=1)
    (folder / "mine.py").write_text(FUNCTION)
    join_as_ranks(
        *(2, "train", ROOT / "examples" / "digits_cpu.yaml", f"model.path={tiny_model}"),
        *(
            f"data.train={shards['train']}",
            "evaluation.sets=",
            f"evaluation.sets.held_out.path={shards['eval']}",
        ),
        *(f"output={folder / 'run'}", "optimizer.num_steps=2", "data.prompts_per_step=6"),
        *("algorithm.prompts_per_update=6", "rollout.samples_per_prompt=4"),
        *(f"reward.function={folder / 'mine.py'}:reward", "reward.function_for=total"),
        *("reward.function_range=[-0.5,0]", "reward.arguments.low=-0.5"),
        *("rollout.max_response_tokens=24", "reward.overlong.cache_tokens=12"),
        *("reward.overlong.weight=0.25", "checkpoint.every_steps=0"),
    )
    return folder / "run"


def test_totals_and_metrics_are_the_functions_and_verdicts_the_graders(run):
    steps = read_lines(run / "metrics.jsonl")
    assert [line["reward/wide"] for line in steps] == [1, 1]
    for line in steps:
        lines = read_lines(run / f"rollouts/step_{line['step']}.jsonl")
        rewards = [each["reward"] for each in lines]
        assert len(rewards) == 24
        for reward in rewards:
            tokens = reward["metrics"]["tokens"]
            assert reward["overlong"] == min(max((tokens - 12) / 12, 0), 1)
            weighted = 0.9 * reward["accuracy"] + 0.1 * reward["format"] + reward["self_reward"]
            wanted = max(-0.5, -weighted) - 0.25 * reward["overlong"]
            assert reward["total"] == pytest.approx(wanted)
            assert reward["self_reward"] == reward["metrics"]["read"]
            assert reward["because"] != "function"
        for name in ("overlong", "total"):
            mean = sum(reward[name] for reward in rewards) / 24
            assert line[f"reward/{name}"] == pytest.approx(mean)
    assert all(each["because"] != "function" for each in read_lines(run / "eval/held_out.jsonl"))

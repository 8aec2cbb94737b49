"""Evaluate a model on held-out questions: both passes and all verdicts, set by set.

In: the engine's weights and the sets of `evaluation.sets`. Out: a line per response in
`eval/NAME.jsonl`, and rates. Questions are read and answered in chunks, so that memory does not
grow with a set. A set is always asked in the same order with the same seeds, so that models can be
compared question by question.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from megatron_sr1.checkpoint.folders import fingerprint, resolve_model
from megatron_sr1.data.processor import Processor
from megatron_sr1.evaluation.lines import Line, LinesFile, evaluation_line
from megatron_sr1.evaluation.results import set_rates
from megatron_sr1.records import Prompt
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.two_pass import RolloutHooks, roll_out
from megatron_sr1.runtime.files import write_text
from megatron_sr1.runtime.groups import gather_objects
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer import rollouts
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.rollouts import Scored
from megatron_sr1.trainer.samples import Samples

log = logging.getLogger(__name__)
RUN_FILE = "eval/run.json"
"""What an evaluation was started with: one with other settings or weights starts over."""


def make_sets(
    context: Context, engine: Engine, processor: Processor, scorers: dict[str, Scorer]
) -> list[HeldOut]:
    """Open the shards of `evaluation.sets`, in their order."""
    config = context.config
    return [
        HeldOut(context, engine, Samples(config, each.path, processor), name, scorers[name])
        for name, each in config.evaluation.sets.items()
    ]


class HeldOut:
    """Evaluates the engine's weights on one set, always on the same questions with the same seeds.

    Attributes:
        name: of the set in `evaluation.sets`.
        skipped: unusable questions of the evaluation.
    """

    def __init__(
        self, context: Context, engine: Engine, samples: Samples, name: str, scorer: Scorer
    ) -> None:
        """Select the first questions of `samples`, as many as configured."""
        config = context.config
        own, common = config.evaluation.sets[name], config.evaluation
        self.name = name
        self._context, self._engine, self._scorer = context, engine, scorer
        self._samples = samples
        self._rollout = replace(
            config.rollout,
            samples_per_prompt=own.samples_per_prompt or common.samples_per_prompt,
            temperature=common.temperature if own.temperature is None else own.temperature,
            pass2_mode="generate",
            pass2_samples=1,  # so that it is right or wrong
        )
        limit = common.max_samples if own.max_samples is None else own.max_samples
        self._indices = range(len(self._samples))[: limit or None]
        self.skipped = 0

    def evaluate(self, name: str, resume: bool = False) -> dict[str, float]:
        """Answer the questions and save every verdict in `eval/{name}.jsonl`; collective.

        With `resume`, questions whose lines an earlier start has written are not asked again.

        Returns:
            the rates of `set_rates`, over the questions that could be graded; `ungraded` and
            `skipped` count the others. If none could be graded, all are wrong.
        """
        context, chunk = self._context, self._context.config.evaluation.chunk_prompts
        target = context.run_dir / f"eval/{name}.jsonl"
        resume_with = self._rollout.samples_per_prompt if resume else 0
        written = LinesFile(target, context.is_writer, resume_with)
        written.verdicts = gather_objects(written.verdicts, context.groups.world)[0]
        seen = {row["index"] for row in written.verdicts}
        left = [index for index in self._indices if index not in seen]
        self.skipped, ungraded = 0, list[Scored]()
        for start in range(0, len(left), chunk):
            with context.phase("evaluate"):
                usable, limits = self._answer(left[start : start + chunk])
                ungraded += limits
                lines = self._lines(usable)
                written.append(lines)
                if start == 0 and context.is_writer:
                    context.show_answers(self.name, lines, self._samples.images)
                self._samples.forget()
            if len(left) > chunk:
                done = len(self._indices) - len(left) + min(start + chunk, len(left))
                log.info("%s: %d of %d questions", name, done, len(self._indices))
        if ungraded and not written.verdicts:
            log.warning("NO QUESTION COULD BE GRADED; all count as wrong, see the warnings above")
            written.append(self._lines(ungraded))
        written.close()
        num_ungraded = len({item.rollout.index for item in ungraded})
        return {**set_rates(written.verdicts), "ungraded": num_ungraded, "skipped": self.skipped}

    def _answer(self, indices: Sequence[int]) -> tuple[list[Scored], list[Scored]]:
        """Return the rollouts of questions that were graded, and those that met a limit."""
        context, engine, samples = self._context, self._engine, self._samples
        has_pass2 = context.config.reward.recipe != "vision_r1"
        hooks = RolloutHooks(
            find_description,
            samples.reading_prompt if has_pass2 else None,
            # The same seeds for every model, so that comparisons are paired.
            partial(request_seed, 0, -1),
        )
        found, _ = roll_out(engine, self.prompts(indices), self._rollout, hooks)
        own = found if engine.is_replica_leader else ()
        scored = rollouts.score(own, samples, self._scorer)
        scored = rollouts.gather_scored(scored, indices, context.groups)
        return [s for s in scored if s.limit is None], [s for s in scored if s.limit is not None]

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """Read this replica's questions; unusable ones count for each evaluation by itself."""
        context = self._context
        of_training, context.skipped = context.skipped, self.skipped
        prompts = rollouts.read_prompts(context, self._engine, self._samples, indices)
        self.skipped, context.skipped = context.skipped, of_training
        return prompts

    def _lines(self, scored: Sequence[Scored]) -> list[Line]:
        samples = self._samples
        return [
            evaluation_line(
                each.rollout,
                each.reward,
                samples.example(each.rollout.index),
                samples.processor.rendered(each.rollout.prompt_token_ids),
            )
            for each in scored
        ]


def can_resume(context: Context) -> bool:
    """Return True if the run directory has an evaluation by the same settings and weights.

    Otherwise the one that starts is recorded there. Collective over all ranks.
    """
    config, path = context.config, context.run_dir / RUN_FILE
    same = False
    if context.is_writer:
        own: dict[str, Any] = {n: asdict(getattr(config, n)) for n in ("data", "rollout", "reward")}
        own["model"] = fingerprint(resolve_model(config.model.path))
        own["evaluation"] = evaluation = asdict(config.evaluation)
        del evaluation["category"]  # like the weights, only results depend on it
        for each in evaluation["sets"].values():
            del each["weight"]
        same = path.is_file() and json.loads(path.read_text()) == own
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(own, indent=2) + "\n")
    return bool(gather_objects(same, context.groups.world)[0])

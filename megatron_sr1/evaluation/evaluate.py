"""Evaluate a model on held-out questions: both passes and all verdicts, set by set.

In: the engine's weights and the sets of `evaluation.sets`. Out: a line per response in
`eval/NAME.jsonl`, and rates. Questions are read and answered in chunks, so that memory does not
grow with a set. A set is always asked in the same order with the same seeds, so that models can be
compared question by question.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from megatron_sr1.checkpoint.folders import fingerprint, resolve_model
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.prompts import template_texts
from megatron_sr1.evaluation.judge import Judge
from megatron_sr1.evaluation.lines import Line, LinesFile, evaluation_line
from megatron_sr1.evaluation.results import set_rates
from megatron_sr1.records import Prompt
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.text_stats import text_stats
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.chat import PHASE_SHARE
from megatron_sr1.runtime.files import write_text
from megatron_sr1.runtime.groups import gather_objects
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer import grading
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.grading import Scored
from megatron_sr1.trainer.rollouts import read_prompts
from megatron_sr1.trainer.samples import Samples

log = logging.getLogger(__name__)
RUN_FILE = "eval/run.json"
"""What an evaluation was started with: one with other settings or weights starts over."""


def make_sets(
    context: Context,
    engine: Engine,
    processor: Processor,
    scorers: dict[str, GradingPool],
    judge: Judge | None = None,
) -> list[HeldOut]:
    """Open the shards of `evaluation.sets`, in their order."""
    config = context.config
    return [
        HeldOut(context, engine, Samples(config, each.path, processor), name, scorers[name], judge)
        for name, each in config.evaluation.sets.items()
    ]


class HeldOut:
    """Evaluates the engine's weights on one set, always on the same questions with the same seeds.

    Attributes:
        name: of the set in `evaluation.sets`.
        skipped: unusable questions of the evaluation.
    """

    def __init__(
        self,
        context: Context,
        engine: Engine,
        samples: Samples,
        name: str,
        scorer: GradingPool,
        judge: Judge | None = None,
    ) -> None:
        """Select the first questions of `samples`, as many as configured."""
        config = context.config
        setting = partial(config.evaluation.setting, name)
        self.name = name
        self._context, self._engine, self._samples = context, engine, samples
        self._scorer, self._judge = scorer, judge
        self._rollout = replace(
            config.rollout,
            samples_per_prompt=setting("samples_per_prompt"),
            temperature=setting("temperature"),
            # By its likelihood, an answer would not be right or wrong.
            pass2_mode=config.rollout.pass2_mode.replace("likelihood", "generate"),
            pass2_samples=1,  # so that it is right or wrong
        )
        self._indices = range(len(self._samples))[: setting("max_samples") or None]
        self.skipped = 0

    @property
    def has_answers(self) -> bool:
        """True if the first sample has a gold answer: conversations have a loss alone."""
        return self._samples.example(0).answer is not None

    def evaluate(self, name: str, resume: bool = False) -> dict[str, float]:
        """Answer the questions and save every verdict in `eval/{name}.jsonl`; collective.

        With `resume`, questions whose lines an earlier start has written are not asked again. The
        judge, if there is one, sees all lines, as its cache has the verdicts of earlier starts.

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
        self.skipped, ungraded, started = 0, list[Scored](), time.monotonic()
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
                asked = min(start + chunk, len(left))
                seconds = (time.monotonic() - started) / asked * (len(left) - asked)
                done = len(seen) + asked, len(seen) + len(left)
                log.info("%s: %d of %d questions, %.0f s left", name, *done, seconds)
        if ungraded and not written.verdicts:
            log.warning("NO QUESTION COULD BE GRADED; all count as wrong, see the warnings above")
            written.append(self._lines(ungraded))
        if context.config.has_judge:
            self._ask_judge(written)
        written.close()
        num_ungraded = len({item.rollout.index for item in ungraded})
        return {**set_rates(written.verdicts), "ungraded": num_ungraded, "skipped": self.skipped}

    def _answer(self, indices: Sequence[int]) -> tuple[list[Scored], list[Scored]]:
        """Return the rollouts of questions that were graded, and those that met a limit."""
        context, engine, samples = self._context, self._engine, self._samples
        has_pass2 = context.config.reward.recipe != "vision_r1"
        hooks = RolloutHooks(
            samples.find_description,
            samples.reading_prompts if has_pass2 else None,
            # The same seeds for every model, so that comparisons are paired.
            partial(request_seed, 0, -1),
            reading_messages=samples.reading_messages,
            reader=context.reader(engine.is_replica_leader),
            finished=grading.grade_early(samples, self._scorer, self._rollout)
            if engine.is_replica_leader
            else None,
        )
        found, _ = roll_out(engine, self.prompts(indices), self._rollout, hooks)
        own = found if engine.is_replica_leader else ()
        scored = grading.score(own, samples, self._scorer)
        named = [(*s.key, s) for s in scored]
        scored = [s for *_, s in grading.gather_in_order(named, indices, context.groups.world)]
        return [s for s in scored if s.limit is None], [s for s in scored if s.limit is not None]

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """Read this replica's questions; unusable ones count for each evaluation by itself."""
        context = self._context
        of_training, context.skipped = context.skipped, self.skipped
        prompts = read_prompts(context, self._engine, self._samples, indices)
        context.count_skipped()
        self.skipped, context.skipped = context.skipped, of_training
        return prompts

    def _ask_judge(self, written: LinesFile) -> None:
        """Add the judge's verdicts to all lines; collective.

        The writer asks, about some lines at a time. The others wait for each of these chunks, so
        that neither the deadline of a phase nor a collective's time limit is exceeded.
        """
        context, launch = self._context, self._context.config.launch
        chunks: Iterator[int] = iter(())
        if self._judge is not None:
            ask = partial(self._judge.judge, seconds=PHASE_SHARE * launch.phase_deadline_seconds)
            chunks = written.rewrite(ask, context.config.evaluation.chunk_prompts)
        is_asking = True
        while is_asking:
            with context.phase("judge"):
                done = next(chunks, 0)
                is_asking = gather_objects(done > 0, context.groups.world)[0]
        written.verdicts = gather_objects(written.verdicts, context.groups.world)[0]

    def _lines(self, scored: Sequence[Scored]) -> list[Line]:
        samples = self._samples
        stats = text_stats([each.rollout for each in scored], samples.processor.encode)
        return [
            evaluation_line(
                each.rollout,
                each.reward,
                samples.example(each.rollout.index),
                samples.processor.rendered(each.rollout.prompt_token_ids),
                own,
            )
            for each, own in zip(scored, stats, strict=True)
        ]


def can_resume(context: Context) -> bool:
    """Return True if the run directory has an evaluation by the same settings and weights.

    Otherwise the one that starts is recorded there. Collective over all ranks.
    """
    config, path = context.config, context.run_dir / RUN_FILE
    same = False
    if context.is_writer:
        own: dict[str, Any] = {n: asdict(getattr(config, n)) for n in ("data", "rollout", "reward")}
        own["model"] = fingerprint(resolve_model(*config.model.at))
        own["evaluation"] = evaluation = asdict(config.evaluation)
        del evaluation["category"]  # like the weights, only results depend on it
        del evaluation["judge"]  # it is asked about all lines again
        for each in evaluation["sets"].values():
            del each["weight"]
        own["prompts"] = template_texts(config.data)
        same = path.is_file() and json.loads(path.read_text()) == own
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(own, indent=2) + "\n")
    return bool(gather_objects(same, context.groups.world)[0])

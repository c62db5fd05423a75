"""From resolved adapters to what is written: which tensors change, which tie ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.checkpoint import tied as ties
from loraformat.checkpoint.change import Change
from loraformat.checkpoint.folder import Files
from loraformat.checkpoint.grids import grid_of, refusal
from loraformat.dtypes import dtype_name
from loraformat.errors import LoraFormatError, Problem
from loraformat.plan import Job, size
from loraformat.quantised import form_of
from loraformat.shapes import shape_problems

if TYPE_CHECKING:
    from loraformat.resolve import Match
    from loraformat.tiles import Norms
    from loraformat.updates import Update

__all__ = ["Merge"]


@dataclass
class Merge:
    """The merge of some jobs into a checkpoint, as data.

    Attributes:
        changes: tensor → what becomes of it; also copies of tensors that were tied.
        homes: of added tensors, the shard that will hold them.
        config: ``config.json`` as it will be; the same object where nothing changes.
        notes: what a person should know.
        requantize: round to few bits again where a weight is stored so.
    """

    files: Files
    tied: Mapping[str, str]
    config: Mapping[str, Any]
    changes: dict[str, Change] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    requantize: bool = False

    @classmethod
    def of(
        cls,
        files: Files,
        tied: Mapping[str, str],
        config: Mapping[str, Any],
        jobs: Sequence[Job],
        *,
        requantize: bool = False,
    ) -> Merge:
        """Everything settled, or every reason why it cannot be.

        Raises:
            LoraFormatError: LF-606, LF-608, LF-609.
        """
        merge = cls(files, tied, config, requantize=requantize)
        problems = list(merge._gather(jobs))
        problems += merge._untie()
        merge._follow_vocabulary()
        for name, shard in files.shards.items():
            problems += shard.obstacles(merge.of_shard(name))
        if problems:
            raise LoraFormatError(problems)
        if files.left_out:
            some = ", ".join(files.left_out[:4]) + (", …" if len(files.left_out) > 4 else "")
            merge.notes.append(f"not taken along, as these hold the unmerged weights: {some}")
        return merge

    def home(self, name: str) -> str:
        """The shard that holds, or will hold, a tensor; what is new goes to the last."""
        known = self.files.homes.get(self.tied.get(name, name))
        return known or max(self.files.shards)

    def of_shard(self, shard: str) -> list[Change]:
        """The changes of one shard."""
        return [change for name, change in self.changes.items() if self.home(name) == shard]

    def norms(self) -> dict[str, Norms]:
        """Target → the norms of the first tensor that it changes."""
        return {key: change.norms for change in reversed(self.changes.values()) for key in change.keys}

    # Jobs → changes.

    def _gather(self, jobs: Sequence[Job]) -> Iterator[Problem]:
        for job in jobs:
            for key, places in job.resolution.require().targets.items():
                for match in places:
                    update = match.turned(job.adapter[key])
                    earlier = self.changes.get(match.weight)
                    change = self._change(match, update)
                    if why := self._fault(change, earlier, update):
                        yield Problem(why[0], why[1], key, why[2])
                        continue
                    yield from (p for p in shape_problems(key, update) if p.severity == "error")
                    if earlier is not None and "replace" in update and not _same(earlier.updates, (update,)):
                        self.notes.append(f"{job.name} replaces {match.weight}: what came before it there is gone")
                    before, keys = (earlier.updates, earlier.keys) if earlier else ((), ())
                    change = replace(change, updates=(*before, update), keys=tuple(dict.fromkeys((*keys, key))))
                    self.changes[match.weight] = change

    def _change(self, match: Match, update: Update) -> Change:
        """Without updates yet."""
        name, stored = match.weight, self.tied.get(match.weight, match.weight)
        new = update["replace"].replace if "replace" in update else None
        if stored not in self.files.homes:
            assert new is not None
            return Change(name, dtype_name(new.dtype), new.shape, None)
        shard = self.files.shards[self.files.homes[stored]]
        info = shard.infos[stored]
        grid = grid_of(stored, self.files, self.config) if self.requantize else None
        shape = info.shape if new is None else new.shape
        return Change(name, info.dtype, shape, shard.tensor(stored), grid=grid)

    def _fault(self, change: Change, earlier: Change | None, update: Update) -> tuple[str, str, str] | None:
        stored = self.tied.get(change.name, change.name)
        # What replaces a weight would have to be divided by a scale that stands beside it.
        scaled = update.replaces and form_of(stored, self.files.homes, self.config) is not None
        if change.base is not None and (scaled or not change.holds(update)):
            return refusal(stored, self.files, self.config, requantize=self.requantize)
        old = change.base.shape if change.base is not None else change.shape
        if change.shape != old and "resize" not in update["replace"].allows:
            return "LF-606", f"the base tensor is {list(old)}, its replacement {list(change.shape)}", "another base?"
        if "rows" in update and (misfit := update["rows"].misfit(change.shape)):
            return "LF-606", misfit, "is this the base that the adapter was trained on?"
        if earlier is not None and earlier.shape != change.shape:
            what = f"one adapter makes the tensor {list(earlier.shape)}, another {list(change.shape)}"
            return "LF-606", what, "merge them one after the other"
        return None

    # Ties.

    def _untie(self) -> Iterator[Problem]:
        """Where only one of two tied modules changes, the other keeps the old values in a tensor of its own."""
        yield from self._unknown_ties()
        apart = [alias for alias, stored in self.tied.items() if self._parts(alias, stored)]
        for alias, stored in self.tied.items():
            one, other = self.changes.get(alias), self.changes.get(stored)
            if alias in apart and len(others := [a for a, s in self.tied.items() if s == stored]) > 1:
                if alias == others[0]:
                    yield _too_many(others, stored, self.changes)
            elif apart:  # one flag unties them all, so every one needs a tensor
                info = self.files.shards[self.home(stored)].infos[stored]
                tensor = self.files.shards[self.home(stored)].tensor(stored)
                self.changes[alias] = one or Change(alias, info.dtype, info.shape, tensor)
            elif one is not None and other is not None:
                del self.changes[alias]  # still one tensor
                self.changes[stored] = replace(other, keys=tuple(dict.fromkeys((*other.keys, *one.keys))))
        for alias in apart:
            self._say_untied(alias, self.tied[alias], self.changes[alias].nbytes if alias in self.changes else 0)
        for head, embedding in ties.paired(self.files.homes, self.config).items():
            if self._parts(head, embedding):
                self._say_untied(head, embedding, 0)

    def _parts(self, one: str, other: str) -> bool:
        """Whether two names that mean one tensor mean two afterwards."""
        changes = self.changes.get(one), self.changes.get(other)
        if changes[0] is None or changes[1] is None:
            return changes != (None, None)
        return not _same(changes[0].updates, changes[1].updates)

    def _unknown_ties(self) -> Iterator[Problem]:
        for name, change in self.changes.items():
            if name not in self.files.homes or change.base is None or not change.shape:
                continue
            if all(len(ties.moving(update, change.base.shape)) == len(update.parts) for update in change.updates):
                continue
            if ties.may_be_tied(name, change.shape[0], self.files.homes, self.config):
                what = f"config.json ties the embedding and the head, and nothing says to what {name} is tied"
                fix = "if it is not, say so there: tie_word_embeddings false"
                yield Problem("LF-609", what, change.keys[0], fix)

    def _say_untied(self, head: str, embedding: str, count: int) -> None:
        changed = [name for name in (embedding, head) if name in self.changes and self.changes[name].updates]
        which = changed[0] if len(changed) == 1 else "each in another way"
        cost = f", +{size(count)}" if count else ""
        then = "tie_word_embeddings becomes false"
        if not self.config:
            then = "there is no config.json beside it: load it with tie_word_embeddings=False"
        self.notes.append(
            f"{head} and {embedding} are tied, and the adapter changes {which}: both are stored{cost}; {then}"
        )
        if self.config:
            self.config = ties.unties(self.config)

    def _follow_vocabulary(self) -> None:
        for name, change in self.changes.items():
            old = change.base.shape if change.base is not None else change.shape
            if old == change.shape or old[1:] != change.shape[1:]:
                continue
            config = ties.vocabulary(self.config, old[0], change.shape[0])
            if config != self.config:
                self.config = config
                self.notes.append(f"{name} grows from {old[0]} to {change.shape[0]} rows: vocab_size follows")


def _same(one: Sequence[Update], other: Sequence[Update]) -> bool:
    """Whether two lists of updates set the same values, as PEFT stores them once for each of two tied modules."""
    if len(one) != len(other):
        return False
    return all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(one: Update, other: Update) -> bool:
    if len(one.parts) != len(other.parts):
        return False
    for a, b in zip(one.parts, other.parts, strict=True):
        if a is b:
            continue
        if a.kind != b.kind or a.kind not in ("rows", "replace"):
            return False
        names = ("values", "indices") if a.kind == "rows" else ("replace",)
        if not all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names):
            return False
    return True


def _too_many(aliases: Sequence[str], stored: str, changes: Mapping[str, Change]) -> Problem:
    # transformers 5.23 modeling_t5.py: an untied T5 does not scale the input of its head, so a flag would not do.
    change = next(changes[name] for name in (stored, *aliases) if name in changes)
    what = f"{stored} is {', '.join(aliases)} as well: what more than two modules share cannot change for one of them"
    return Problem("LF-609", what, change.keys[0], "leave it out with --only, or attach instead")

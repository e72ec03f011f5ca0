"""One step of a search as a module: the decoder, and the choice that `model.search` makes, step for step.

The rows of a sentence are queries of the decoder that are told apart by masks, so that reordering them gathers masks
and short histories, never a key or a value.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Float64, Int, Shaped
from torch import Tensor, nn

from export.graphs import key_values
from model.options import LARGEST_BEAM, UNWRITABLE
from model.transformer import Transformer
from model.vocabulary import BEGIN, END


class Beams(NamedTuple):
    """What goes from step to step."""

    totals: Float64[Tensor, "batch beam"]
    """Log-probability of each row so far; minus infinity where nothing lives. Best first."""
    read: Int[Tensor, "batch beam age"]
    """What each row has read and is to read next, the begin token first."""
    values: Float32[Tensor, "batch beam age"]
    """Log-probabilities of these; 0 for the begin token."""
    rows: Int[Tensor, "batch beam age"]
    """Which row of its sentence chose each."""
    visible: Bool[Tensor, "batch beam past"]
    """Which columns of the past each row sees. The first is seen by nobody, so that no axis is ever empty."""
    score: Float64[Tensor, " batch"]
    """Of the best finished hypothesis; minus infinity where there is none."""
    best_read: Int[Tensor, "batch age"]
    """Its tokens, a begin token before them and padding after."""
    best_values: Float32[Tensor, "batch age"]
    """Log-probabilities of these."""
    best_rows: Int[Tensor, "batch age"]
    """Which row chose each."""
    length: Int[Tensor, " batch"]
    """Its length, without the begin token."""
    finished: Int[Tensor, " batch"]
    """Hypotheses that have ended."""
    done: Bool[Tensor, " batch"]
    """Sentences whose best hypothesis stands."""
    state: list[Tensor]
    """Keys and values of the past, [batch head past width], a pair for each layer."""


class Candidates(NamedTuple):
    """Continuations of a sentence's rows."""

    totals: Float64[Tensor, "batch rank"]
    values: Float32[Tensor, "batch rank"]
    tokens: Int[Tensor, "batch rank"]
    parents: Int[Tensor, "batch rank"]

    def take(self, ranks: Int[Tensor, "batch taken"], possible: Bool[Tensor, "batch taken"]) -> "Candidates":
        """Some of them; those that are not possible are dead rows."""
        totals, values, tokens, parents = (field.gather(1, ranks) for field in self)
        return Candidates(
            torch.where(possible, totals, -torch.inf),
            values,
            torch.where(possible, tokens, BEGIN),
            torch.where(possible, parents, 0),
        )


class SearchStep(nn.Module):
    """One step of a search: the body of the Loop."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.decoder = model.decoder
        vocabulary = self.decoder.projection.out_features
        self.missing = max(0, LARGEST_BEAM + 1 - vocabulary)
        self.register_buffer("ruled_out", torch.isin(torch.arange(vocabulary), torch.tensor(sorted(UNWRITABLE))))

    def forward(
        self,
        step: Int[Tensor, ""],
        beams: Beams,
        memory: list[Tensor],
        source_mask: Bool[Tensor, "batch source"],
        longest: Int[Tensor, ""],
        length_penalty: Float32[Tensor, ""],
    ) -> tuple[Tensor, ...]:
        """Returns whether to go on, the next beams, and the cross-attention [batch beam layer head source]."""
        batch, width = beams.totals.shape
        alone = torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)
        decoded = self.decoder(
            beams.read[:, :, -1],
            step.expand(batch, width),
            key_values(memory),
            source_mask,
            alone,
            key_values(beams.state),
            beams.visible,
        )
        age = step + 1
        candidates = self._candidates(decoded.logits.log_softmax(-1), beams.totals)
        chosen, ended = _choose(candidates)
        following = _advance(beams, chosen, ended, age, longest, length_penalty)
        seen = torch.cat((beams.visible, alone), -1)
        parents = chosen.parents[:, 1:, None].expand(-1, -1, seen.shape[-1])
        new = [tensor for pair in decoded.state for tensor in pair]
        following = following._replace(
            visible=seen.gather(1, parents),
            state=[torch.cat(pair, 2) for pair in zip(beams.state, new, strict=True)],
        )
        cross = torch.stack(decoded.cross_attention, 1).permute(0, 3, 1, 2, 4)
        return (~following.done.all(), *following[:-1], *following.state, cross)

    def _candidates(
        self, log_probabilities: Float32[Tensor, "batch beam vocabulary"], totals: Float64[Tensor, "batch beam"]
    ) -> Candidates:
        """The best 2 · beam continuations: so many that enough live on, however many end."""
        width = totals.shape[1]
        allowed = log_probabilities.masked_fill(self.get_buffer("ruled_out"), -torch.inf)
        if self.missing:  # there must be as many entries as the largest beam wants candidates
            allowed = nn.functional.pad(allowed, (0, self.missing), value=-torch.inf)
        values, ids = allowed.topk(width + 1)  # one of them may end
        totals, order = (totals[:, :, None] + values.double()).flatten(1).topk(2 * width)
        return Candidates(
            totals, values.flatten(1).gather(1, order), ids.flatten(1).gather(1, order), order // (width + 1)
        )


def _choose(candidates: Candidates) -> tuple[Candidates, Int[Tensor, " batch"]]:
    """Returns the best candidate that ends and then those that live on, and how many end."""
    totals, tokens = candidates.totals, candidates.tokens
    width = totals.shape[1] // 2
    ranks = torch.arange(totals.shape[1]).expand_as(tokens)
    possible = totals > -torch.inf
    ends = possible & (tokens == END) & (ranks < width)
    live = possible & (tokens != END)
    end = torch.where(ends, -ranks, -totals.shape[1]).topk(1).indices
    kept = torch.where(live, -ranks, -ranks - totals.shape[1]).topk(width).indices
    chosen = torch.cat((end, kept), 1)
    return candidates.take(chosen, torch.cat((ends.gather(1, end), live.gather(1, kept)), 1)), ends.long().sum(1)


def _advance(
    beams: Beams,
    chosen: Candidates,
    ended: Int[Tensor, " batch"],
    age: Int[Tensor, ""],
    longest: Int[Tensor, ""],
    length_penalty: Float32[Tensor, ""],
) -> Beams:
    """Take the chosen candidates: the first ends, the others live on, or end too at the longest length."""
    penalty = length_penalty.double()
    read = _extend(beams.read, chosen.parents, chosen.tokens)
    values = _extend(beams.values, chosen.parents, chosen.values)
    rows = _extend(beams.rows, chosen.parents, chosen.parents)
    contends = (torch.arange(chosen.totals.shape[1]) == 0) | (age == longest)
    score, winner = torch.where(contends, chosen.totals / age.double() ** penalty, -torch.inf).topk(1)
    better = (score[:, 0] > beams.score) & ~beams.done
    score = torch.where(better, score[:, 0], beams.score)
    finished = beams.finished + ended
    # The bound on every live row: totals only fall, and the penalty is most lenient at the longest length.
    bound = chosen.totals[:, 1] / longest.double() ** penalty
    done = beams.done | (age == longest) | (finished >= beams.totals.shape[1]) | (score >= bound)
    return beams._replace(
        totals=chosen.totals[:, 1:],
        read=read[:, 1:],
        values=values[:, 1:],
        rows=rows[:, 1:],
        score=score,
        best_read=_replace(beams.best_read, read, winner, better),
        best_values=_replace(beams.best_values, values, winner, better),
        best_rows=_replace(beams.best_rows, rows, winner, better),
        length=torch.where(better, age, beams.length),
        finished=finished,
        done=done,
    )


def _extend(
    history: Shaped[Tensor, "batch beam age"], parents: Int[Tensor, "batch taken"], new: Shaped[Tensor, "batch taken"]
) -> Shaped[Tensor, "batch taken age+1"]:
    before = history.gather(1, parents[:, :, None].expand(-1, -1, history.shape[2]))
    return torch.cat((before, new[:, :, None]), 2)


def _replace(
    best: Shaped[Tensor, "batch age"],
    histories: Shaped[Tensor, "batch taken age+1"],
    winner: Int[Tensor, "batch 1"],
    better: Bool[Tensor, " batch"],
) -> Shaped[Tensor, "batch age+1"]:
    new = histories.gather(1, winner[:, :, None].expand(-1, -1, histories.shape[2]))[:, 0]
    return torch.where(better[:, None], new, nn.functional.pad(best, (0, 1)))

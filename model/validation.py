"""How good a network is in the middle of its training: loss on all validation pairs, a metric on some, a picture."""

from collections.abc import Sequence

import torch

from model.batches import Example, bucket, collate
from model.config import Config
from model.evaluate import Decoder, evaluate
from model.forced import score
from model.loss import token_loss
from model.pairs import Pairs, sample_pairs
from model.picture import AttentionPicture
from model.tokenizer import Tokenizer
from model.torch_steps import TorchStepModel
from model.transformer import Transformer

PICTURE_LENGTH = 40
"""Most tokens of a pair whose attention is pictured: beyond it the picture says little at TensorBoard's size."""


class Validation:
    """Measures a network on the validation part.

    Args:
        config: of the run.
        validation: the validation pairs.
        examples: the same, encoded, without those over the limits.
        source: source tokenizer.
        target: target tokenizer.
        device: where the network computes.
    """

    def __init__(
        self,
        config: Config,
        validation: Pairs,
        examples: Sequence[Example],
        source: Tokenizer,
        target: Tokenizer,
        device: torch.device,
    ) -> None:
        self._config, self._source, self._target, self._device = config, source, target, device
        self._pairs = sample_pairs(validation.pairs, config.training.validation_pairs)
        self._others = validation.others
        batches = bucket(examples, 4000, seed=0, epoch=0)
        self._batches = [collate([examples[index] for index in batch]) for batch in batches]
        short = (example for example in examples if max(map(len, example)) <= PICTURE_LENGTH)
        self._pictured = max(short, key=lambda example: len(example.source), default=None)

    def measure(self, model: Transformer) -> dict[str, float]:
        """Loss (natural logarithm, a token, without label smoothing) and the metrics of the task, in percent."""
        was_training = model.training
        model.eval()
        decoder = Decoder(
            TorchStepModel(model),
            self._source,
            self._target,
            self._config.model.longest_source,
            self._config.model.longest_target,
        )
        metrics = evaluate(decoder, self._config.task, self._pairs, others=self._others).metrics
        measured = {"loss": self._loss(model), **metrics}
        model.train(was_training)
        return measured

    def picture(self, model: Transformer) -> AttentionPicture | None:
        """Cross-attention over one fixed validation pair; None if every pair is too long to picture."""
        if self._pictured is None:
            return None
        was_training = model.training
        model.eval()
        source, target = self._pictured
        weights = score(TorchStepModel(model), [source], [target])[0].cross_attention
        model.train(was_training)
        if weights is None:
            return None
        layers, heads = weights.shape[:2]
        return AttentionPicture(
            family="cross",
            layers=tuple(range(layers)),
            heads=tuple(range(heads)),
            rows=tuple(map(self._target.token_text, target)),
            columns=tuple(map(self._source.token_text, source)),
            weights=weights,
        )

    @torch.inference_mode()
    def _loss(self, model: Transformer) -> float:
        total, tokens = 0.0, 0
        for batch in self._batches:
            total += token_loss(model, batch.to(self._device), 0.0).item()
            tokens += batch.target_tokens
        return total / tokens

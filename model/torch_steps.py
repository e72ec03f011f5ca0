"""A PyTorch Transformer as a step model for `model.search`: the reference that ONNX Runtime's answers are held to."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from model.attention import KeyValue
from model.steps import Array, Kept, Memory, Question, Step
from model.transformer import Transformer


class TorchStepModel:
    """Steps of a Transformer; in evaluation mode while a step runs.

    Args:
        transformer: the network, on any device.

    Attributes:
        memory: keys and values of the source, one pair a decoder layer.
        state: keys and values of the target, likewise.
        dtype: of the state.
        vocabulary: entries of the target vocabulary.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, transformer: Transformer) -> None:
        self._model = transformer
        self._device = next(transformer.parameters()).device
        config = transformer.config
        count = 2 * config.decoder_layers
        self.memory: Sequence[Kept] = [(config.heads, "source", config.head_width)] * count
        self.state: Sequence[Kept] = [(config.heads, "past", config.head_width)] * count
        self.vocabulary = transformer.decoder.projection.out_features

    @torch.inference_mode()
    def encode(
        self,
        source_ids: Int[np.ndarray, "batch source"],
        source_mask: Bool[np.ndarray, "batch source"],
        attention: bool = True,
    ) -> Memory:
        """See `StepModel.encode`."""
        encoded = self._model.encode(self._tensor(source_ids), self._tensor(source_mask))
        weights = _array(torch.stack(encoded.attention, 1)) if attention else None
        return Memory(_arrays(encoded.memory), source_mask, weights)

    @torch.inference_mode()
    def step(self, question: Question) -> Step:
        """See `StepModel.step`."""
        decoded = self._model.decoder(
            self._tensor(question.target_ids),
            self._tensor(question.positions),
            self._pairs(question.memory.tensors),
            self._tensor(question.memory.source_mask),
            self._tensor(question.new_visible),
            self._pairs(question.state),
            self._tensor(question.past_visible),
        )
        log_probabilities = decoded.logits.log_softmax(-1)
        values, ids = log_probabilities.topk(question.top, -1)
        following = log_probabilities.gather(-1, self._tensor(question.next_ids)[..., None])[..., 0]
        wanted = question.attention
        return Step(
            top_log_probabilities=_array(values),
            top_ids=ids.cpu().numpy(),
            next_log_probabilities=_array(following),
            cross_attention=_array(torch.stack(decoded.cross_attention, 1)) if "cross" in wanted else None,
            decoder_attention=_array(torch.stack(decoded.decoder_attention, 1)) if "decoder" in wanted else None,
            state=_arrays(decoded.state),
        )

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _pairs(self, arrays: Sequence[Array]) -> list[KeyValue]:
        tensors = [self._tensor(array) for array in arrays]
        return [KeyValue(*tensors[index : index + 2]) for index in range(0, len(tensors), 2)]


def _array(tensor: Tensor) -> Array:
    return tensor.float().cpu().numpy()


def _arrays(pairs: Sequence[KeyValue]) -> tuple[Array, ...]:
    return tuple(_array(tensor) for pair in pairs for tensor in pair)

"""Several modalities at once, composed of the adapters of single ones (Perceiver IO, section 4.3).

Inputs, outputs and `output_positions` are dicts by the modalities' names. The modalities are widened to the same
channels, each by a trained vector of its own, which also tells them apart, and laid one after the other in the order of
their names.
"""
import torch
from torch import Tensor, nn

from perceiver.model import PerceiverIO, init_weights


def trained_vectors(num_channels: dict[str, int], init_scale: float) -> nn.ParameterDict:
    return nn.ParameterDict({name: init_scale * torch.randn(1, n) for name, n in num_channels.items()})


def paddings(parts: nn.ModuleDict, num_channels: int, init_scale: float) -> nn.ParameterDict:
    """What widens the channels of each to `num_channels`."""
    return trained_vectors({name: num_channels - part.num_channels for name, part in parts.items()}, init_scale)


def widen(x: Tensor, padding: Tensor) -> Tensor:
    """x (B, M, C) -> (B, M, C + C') with padding (1, C') at each of M."""
    return torch.cat((x, padding.to(x.dtype).expand(*x.shape[:2], -1)), dim=-1)


class MultimodalInput(nn.Module):
    """Inputs by name, as their adapters take them -> (B, M, C), M the sum over modalities.

    What is masked gets its modality's trained mask vector instead: where the entry NAME_mask (B, M of the modality) of
    the inputs is true. Without such an entry, all of the modalities in `hidden` are masked, and none of the others.
    """

    def __init__(self, adapters: dict[str, nn.Module], num_padding_channels: int = 4, hidden: tuple[str, ...] = (),
                 init_scale: float = 0.02):
        super().__init__()
        self.num_channels = max(adapter.num_channels for adapter in adapters.values()) + num_padding_channels
        self.hidden = hidden
        self.adapters = nn.ModuleDict(sorted(adapters.items()))
        self.padding = paddings(self.adapters, self.num_channels, init_scale)
        self.mask = trained_vectors(dict.fromkeys(self.adapters, self.num_channels), init_scale)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        parts = []
        for name, adapter in self.adapters.items():
            x = widen(adapter(inputs[name]), self.padding[name])  # (B, M, C)
            mask = inputs.get(f"{name}_mask", torch.full((1, 1), name in self.hidden, device=x.device))
            parts.append(torch.where(mask[..., None], self.mask[name].to(x.dtype), x))
        return torch.cat(parts, dim=1)


class MultimodalQueries(nn.Module):
    """The adapted inputs (B, M, C) -> queries by name, (B, O of the modality, F)."""

    def __init__(self, providers: dict[str, nn.Module], num_padding_channels: int = 2, init_scale: float = 0.02):
        super().__init__()
        self.num_channels = max(provider.num_channels for provider in providers.values()) + num_padding_channels
        self.providers = nn.ModuleDict(sorted(providers.items()))
        self.padding = paddings(self.providers, self.num_channels, init_scale)

    def forward(self, x: Tensor, output_positions: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {name: widen(self.providers[name](x, positions), self.padding[name])
                for name, positions in sorted(output_positions.items())}


class MultimodalOutput(nn.Module):
    """Decoded queries by name, (B, O, F) -> outputs by name: a linear map for all, then the modality's `GridOutput`."""

    def __init__(self, adapters: dict[str, nn.Module], num_query_channels: int, num_channels: int,
                 init_scale: float = 0.02):
        super().__init__()
        self.linear = nn.Linear(num_query_channels, num_channels)
        init_weights(self.linear, init_scale)
        self.adapters = nn.ModuleDict(sorted(adapters.items()))

    def forward(self, queries: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.adapters[name](self.linear(x)) for name, x in queries.items()}


class MultimodalPerceiverIO(PerceiverIO):
    """Perceiver IO of the three modules above.

    In `output_positions`, a modality has the numbers of its outputs, (O') or (B, O'), which then come as (B, O', E), or
    None for all of them, which come in the shape of the modality. One that isn't there is not computed. Without
    `output_positions`, all of all are.
    """

    def decode(self, x: Tensor, latents: Tensor, output_positions: dict[str, Tensor | None] | None = None,
               query_pad_mask: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.output_adapter.adapters
        if output_positions is None:
            output_positions = dict.fromkeys(outputs)
        queries = self.query_provider(x, output_positions)
        decoded = self.decoder(torch.cat(tuple(queries.values()), dim=1), latents, query_pad_mask)  # (B, O, F)
        parts = decoded.split([part.shape[1] for part in queries.values()], dim=1)
        values = self.output_adapter(dict(zip(queries, parts)))
        return {name: outputs[name].join(x) if output_positions[name] is None else x for name, x in values.items()}

    def decode_in_chunks(self, x: Tensor, latents: Tensor, num_chunks: int) -> dict[str, Tensor]:
        """All outputs, computed in parts one after the other: beside them, the memory it takes is that of one part."""
        outputs = self.output_adapter.adapters
        chunks = [torch.arange(output.num_places, device=x.device).tensor_split(num_chunks)
                  for output in outputs.values()]
        whole = {}
        for positions in zip(*chunks):
            part = self.decode(x, latents, dict(zip(outputs, positions)))
            for (name, values), numbers in zip(part.items(), positions):  # (B, O', E)
                if name not in whole:
                    whole[name] = values.new_empty(len(values), outputs[name].num_places, values.shape[-1])
                whole[name][:, numbers] = values
        return {name: output.join(whole[name]) for name, output in outputs.items()}

    def reconstruct(self, inputs: dict[str, Tensor], num_chunks: int) -> dict[str, Tensor]:
        """`forward` with `decode_in_chunks`."""
        return self.decode_in_chunks(*self.encode(inputs), num_chunks)

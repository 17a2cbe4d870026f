"""Tasks on music."""
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from perceiver import pictures, sampling
from perceiver.config import Config
from perceiver.data import MusicDataConfig, MusicWindows, TextBlocks, Tokens, music
from perceiver.errors import UserError
from perceiver.tasks.base import Autoregression, bits_by_frequency


class SymbolicMusic(Autoregression):
    """Perceiver AR on the events of MIDI files (Perceiver AR, section 5.3)."""
    DataConfig = MusicDataConfig
    unit = "event"

    def __init__(self, config: Config):
        super().__init__(config)
        model, min_seq_len = config.model, config.data.min_seq_len
        if model.vocab_size != music.NUM_EVENTS:
            raise UserError(f"model.vocab_size={model.vocab_size} must be {music.NUM_EVENTS}, the number of events")
        if min_seq_len is not None and min_seq_len > model.max_seq_len:
            raise UserError(f"data.min_seq_len={min_seq_len} exceeds model.max_seq_len={model.max_seq_len}")

    def load_data(self) -> tuple[Dataset, Dataset]:
        model, data = self.config.model, self.config.data
        self.train_events, val_events = music.load_music(data)
        self.val_pieces = music.split(val_events.values)
        self.val_set = ConcatDataset([TextBlocks(Tokens(piece), model.max_seq_len, model.num_latents, music.PAD)
                                      for piece in self.val_pieces])
        num_kept = model.num_kept(model.max_seq_len - model.num_latents)
        return MusicWindows(self.train_events, model.max_seq_len, model.num_latents, num_kept, self.config.train.seed,
                            data), self.val_set

    def show(self, model: nn.Module) -> dict[str, Tensor]:
        """A continuation, in red, of the beginning of the first validation piece, if there are notes."""
        prompt = self.val_pieces[0][:256].tolist()
        events = sampling.generate(model, [prompt], max_new_tokens=256, temperature=0.9, top_p=0.95)
        notes = music.decode(prompt + [event.item() for event in events])
        return {"sample": pictures.piano_roll(notes, num_given=len(music.decode(prompt)))} if notes else {}

    def summary(self, metrics: dict[str, float]) -> str:
        return (f"validation: {metrics['bits_per_event']:.3f} bits per event; by the frequencies of events it would be "
                f"{bits_by_frequency(self.train_events, self.val_set):.3f} bits")

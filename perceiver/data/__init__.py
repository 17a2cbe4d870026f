"""Data: the byte tokenizer, corpora and images, and the order in which examples are read.

What a training step sees is a pure function of (seed, step, index in the global batch). So there is no state to save,
and the number of ranks, workers and micro-batches changes nothing.
"""
from perceiver.data.batches import LoaderConfig, Shuffled, TrainKeys, collate_padded, eval_loader, train_loader
from perceiver.data.flow import FlowDataConfig, load_flow, read_frames, stack_frames, write_flo
from perceiver.data.image import ImageDataConfig, Images, image_transform, load_images, read_image
from perceiver.data.music import MusicDataConfig, MusicWindows, Note
from perceiver.data.pixels import START, PixelBlocks, PixelCrops, PixelDataConfig, to_images, to_tokens
from perceiver.data.text import (IGNORE, ByteTokenizer, IdTokenizer, LabelledText, MaskedBlocks, MaskedTextDataConfig,
                                 MaskedWindows, TextBlocks, TextClassificationDataConfig, TextDataConfig, TextWindows,
                                 Tokens, encode_text, load_labelled_text, load_text)
from perceiver.data.tokenizer import JsonTokenizer, tokenize
from perceiver.data.video import (ClipShape, VideoDataConfig, WithQueries, load_clips, read_video,
                                  video_frames, write_sound, write_video)

"""Windows of fixed length cut from recordings, and the way back from windows to a recording."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stablekern._check import number
from stablekern.eeg.recording import Recording
from stablekern.errors import RecordingError, message


def split(recording: Recording, fraction: float) -> tuple[Recording, Recording]:
    """Cut in time: the first `fraction` (between 0 and 1) of the samples, and the rest; labels go with their samples.

    Windows made from either part cannot cross the cut. ValueError if a part would be empty.
    """
    fraction = number("eeg.split", "fraction", fraction, low=0, high=1)
    cut = round(fraction * recording.samples)
    if not 0 < cut < recording.samples:
        rule = f"`fraction` must leave samples on both sides, of {recording.samples}"
        raise ValueError(message("eeg.split", rule, fraction))
    return recording.crop(0, cut), recording.crop(cut, recording.samples)


class WindowDataset(torch.utils.data.Dataset):
    """Windows of `window_seconds`, one every `stride_seconds`, from one or more recordings.

    Item i is `(data, labels)`: float32 tensors (channels, L) and (L,), copies, L = round(window_seconds * sample_rate).
    A recording without labels gives zeros. `starts[i]` is the pair (index of the recording, first sample). No window
    crosses from one recording into the next, so train and held-out parts made by `split` share no sample.

    With `tail` a last window that ends with the recording is added where the stride would leave samples uncovered, as
    detection needs. Without it the rest is dropped.

    Raises RecordingError for no recordings, different rates or channels, or a recording shorter than one window;
    ValueError unless 0 < stride and at least one sample fits a window.
    """

    def __init__(
        self,
        recordings: Recording | Sequence[Recording],
        *,
        window_seconds: float = 60.0,
        stride_seconds: float = 10.0,
        tail: bool = False,
    ) -> None:
        where = "eeg.WindowDataset"
        number(where, "window_seconds", window_seconds, low=0, strict=True)
        number(where, "stride_seconds", stride_seconds, low=0, strict=True)
        self.recordings = list(recordings) if isinstance(recordings, Sequence) else [recordings]
        if not self.recordings:
            raise RecordingError(message(where, "`recordings` must hold at least one recording", 0))
        for name in ("sample_rate", "channels", "unit"):
            values = sorted({str(getattr(recording, name)) for recording in self.recordings})
            if len(values) > 1:
                raise RecordingError(message(where, f"all `recordings` must have one `{name}`", *values))
        self.sample_rate = self.recordings[0].sample_rate
        self.length = round(window_seconds * self.sample_rate)
        stride = round(stride_seconds * self.sample_rate)
        if self.length < 1 or stride < 1:
            rule = f"window and stride must hold a sample at {self.sample_rate:g} Hz"
            raise ValueError(message(where, rule, self.length, stride))
        self.starts: list[tuple[int, int]] = []
        for index, recording in enumerate(self.recordings):
            last = recording.samples - self.length
            if last < 0:
                rule = f"`{recording.source}` is shorter than one window of {window_seconds:g} s"
                raise RecordingError(message(where, rule, f"{recording.seconds:g} s"))
            first = list(range(0, last + 1, stride))
            if tail and first[-1] < last:
                first.append(last)
            self.starts.extend((index, start) for start in first)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        index, start = self.starts[item]
        data, labels = self.recordings[index].window(start, start + self.length)
        return torch.from_numpy(data), torch.from_numpy(labels)


def stitch(dataset: WindowDataset, outputs: Tensor) -> list[Tensor]:
    """Put one output per sample of each window, (windows, L), back together: one (samples,) tensor per recording.

    Where windows overlap the mean is taken; a sample in no window is NaN (there is none with `tail=True` and a
    stride no longer than the window). ValueError unless `outputs` has the shape (len(dataset), dataset.length).
    """
    if tuple(outputs.shape) != (len(dataset), dataset.length):
        rule = f"`outputs` must have the shape ({len(dataset)}, {dataset.length})"
        raise ValueError(message("eeg.stitch", rule, tuple(outputs.shape)))
    sums = [outputs.new_zeros(recording.samples) for recording in dataset.recordings]
    counts = [torch.zeros_like(total) for total in sums]
    for (index, start), output in zip(dataset.starts, outputs, strict=True):
        sums[index][start : start + dataset.length] += output
        counts[index][start : start + dataset.length] += 1
    return [total / count for total, count in zip(sums, counts, strict=True)]

"""The 19 electrodes of the international 10-20 system: their names, their places, and how to fill in a missing one.

Names. Files spell an electrode in many ways: `EEG FP1-REF`, `Fp1`, `fp1-LE`, `T7` for what the older system calls T3.
A label is read as `[EEG] electrode [-reference]`. A label whose part after the hyphen is itself an electrode
(`FP1-F7`) is a bipolar derivation, the difference of two electrodes, from which neither can be had back; it is never
mapped to one of them. Many derivations together can: where they connect a set of electrodes, the potentials of that
set follow up to one constant, as least squares, and the constant is fixed by their mean being zero (`potentials`).

Places. `positions` puts the 19 electrodes on the unit sphere by the definition of the system: neighbours on the nasion-
vertex-inion arc and on the ear-vertex-ear arc are 36 degrees apart, the outer ring lies 72 degrees from the vertex in
steps of 36 degrees, and F3, F4, P3, P4 lie half way between the ring and the midline. x points to the right ear, y to
the nose, z up.

Filling in. A missing electrode is interpolated by spherical splines of order 4 (Perrin et al., Electroenceph. clin.
Neurophysiol. 72, 1989, 184-187), as MNE implements them, from all electrodes of the file whose place is known.

Sources: Jasper, Electroenceph. clin. Neurophysiol. 10 (1958) 370-375; Oostenveld and Praamstra, Clin. Neurophysiol. 112
(2001) 713-719 for the finer grid and the names T7, T8, P7, P8.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from stablekern.eeg._extra import extra
from stablekern.errors import message

CHANNELS = tuple("Fp1 F3 C3 P3 F7 T3 T5 O1 Fz Cz Pz Fp2 F4 C4 P4 F8 T4 T6 O2".split())
SYNONYMS = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
REFERENCES = frozenset("REF LE AR AV AVG A1 A2 A1A2 A1+A2 M1 M2 M1M2 M1+M2".split())

_BY_NAME = {name.upper(): name for name in CHANNELS} | SYNONYMS
_ELECTRODE = re.compile(r"(FP|AF|F|FT|FC|C|T|TP|CP|P|PO|O)(Z|\d{1,2})")

# Degrees from the vertex, and around it from the right ear towards the nose.
_ANGLES = {
    "Cz": (0, 0), "Fz": (36, 90), "Pz": (36, -90), "C3": (36, 180), "C4": (36, 0),
    "Fp1": (72, 108), "F7": (72, 144), "T3": (72, 180), "T5": (72, -144), "O1": (72, -108),
    "Fp2": (72, 72), "F8": (72, 36), "T4": (72, 0), "T6": (72, -36), "O2": (72, -72),
}  # fmt: skip
_HALFWAY = {"F3": ("F7", "Fz"), "F4": ("F8", "Fz"), "P3": ("T5", "Pz"), "P4": ("T6", "Pz")}


def split_label(label: str) -> tuple[str, str | None]:
    """`EEG Fp1-REF` -> `("FP1", "REF")`: the electrode and what follows the first hyphen (None if nothing), upper case.

    A leading `EEG`, spaces, and the dots with which some files pad their labels are dropped.
    """
    compact = re.sub(r"[\s.]", "", label.upper())
    electrode, hyphen, rest = re.sub(r"^EEG[_:-]*", "", compact).partition("-")
    return electrode, rest if hyphen else None


def is_bipolar(label: str) -> bool:
    """Whether the label names the difference of two electrodes, such as `FP1-F7`."""
    electrode, rest = split_label(label)
    second = (rest or "").partition("-")[0]
    return bool(_ELECTRODE.fullmatch(electrode) and _ELECTRODE.fullmatch(second))


def derivation(label: str) -> tuple[str, str] | None:
    """The two scalp electrodes of a bipolar label, `FP1-F7` -> `("Fp1", "F7")`; None for any other label.

    A number behind it (`T8-P8-0`), with which some programs tell equal labels apart, does not matter.
    """
    if not is_bipolar(label):
        return None
    electrode, rest = split_label(label)
    pair = [_BY_NAME.get(name) or _scalp_names().get(name) for name in (electrode, (rest or "").partition("-")[0])]
    return (pair[0], pair[1]) if pair[0] and pair[1] and pair[0] != pair[1] else None


def potentials(derivations: Sequence[tuple[str, str]]) -> tuple[list[str], np.ndarray]:
    """The largest set of electrodes that `derivations` connect, and the matrix that gives their potentials.

    With $M$ the matrix of differences, (derivations, electrodes), its pseudoinverse $M^+$ has the least-squares
    potentials of mean zero over each connected set: an average reference. Rows of other sets are left out, since
    nothing relates their constant to this one. Returns the names, and float64 (electrodes, derivations).
    """
    names = list(dict.fromkeys(name for pair in derivations for name in pair))
    group = {name: {name} for name in names}
    for one, other in derivations:
        if group[one] is not group[other]:
            group[one] |= group[other]
            for name in group[other]:
                group[name] = group[one]
    connected = max((group[name] for name in names), key=len, default=set())
    differences = np.zeros((len(derivations), len(names)))
    for row, (one, other) in enumerate(derivations):
        differences[row, names.index(one)], differences[row, names.index(other)] = 1, -1
    kept = [name for name in names if name in connected]
    return kept, np.linalg.pinv(differences)[[names.index(name) for name in kept]]


def canonical_name(label: str) -> str | None:
    """The name in `CHANNELS` that a file's label stands for, or None.

    Case, spaces, a leading `EEG` and a reference in `REFERENCES` (`-REF`, `-LE`, `-AR`, `-A1`, ...) do not matter;
    T7, T8, P7, P8 become T3, T4, T5, T6. None for other electrodes, for bipolar derivations, and for labels with a
    suffix that is not a known reference.
    """
    electrode, rest = split_label(label)
    return _BY_NAME.get(electrode) if rest is None or rest in REFERENCES else None


def electrode_name(label: str) -> str | None:
    """As `canonical_name`, for every scalp electrode of the 10-05 system (`FCz`, `PO7`); needs the extra `eeg`.

    Earlobes and mastoids (A1, A2, M1, M2) are not scalp electrodes.
    """
    electrode, rest = split_label(label)
    if rest is not None and rest not in REFERENCES:
        return None
    return _BY_NAME.get(electrode) or _scalp_names().get(electrode)


@functools.cache
def _scalp_names() -> dict[str, str]:
    return {name.upper(): name for name in _montage().ch_names}


@functools.cache
def _montage():
    """The 343 places of the 10-05 system on MNE's average head, without the ears; old and new names both."""
    mne = extra("eeg.montage", "mne")
    # MNE 1.13 renamed the template that every earlier release calls standard_1005; the places are the same.
    known = mne.channels.get_builtin_montages()
    template = mne.channels.make_standard_montage("colin27_1005" if "colin27_1005" in known else "standard_1005")
    places = template.get_positions()
    scalp = {name: place for name, place in places["ch_pos"].items() if name not in REFERENCES}
    landmarks = {key: places[key] for key in ("nasion", "lpa", "rpa")}
    return mne.channels.make_dig_montage(scalp, **landmarks, coord_frame=places["coord_frame"])


def interpolation_weights(sources: Sequence[str], targets: Sequence[str]) -> np.ndarray:
    """Spherical-spline weights: `weights @ data` estimates `targets` from `data` at `sources`.

    `sources` and `targets` are electrode names as `electrode_name` gives them, without common elements. Returns float64
    (targets, sources); each row sums to 1, so that a constant field is kept. Needs the extra `eeg`. ValueError for
    fewer than 4 sources or an unknown name.
    """
    where = "eeg.interpolation_weights"
    if len(sources) < 4:
        raise ValueError(message(where, "`sources` must hold at least 4 electrodes", len(sources)))
    montage = _montage()
    names = [*sources, *targets]
    unknown = [name for name in names if name not in montage.ch_names]
    if unknown or len(set(names)) < len(names):
        rule = "`sources` and `targets` must be different known electrodes"
        raise ValueError(message(where, rule, ", ".join(unknown or names)))
    mne = extra(where, "mne")
    # The interpolation is linear in the data, so unit vectors in place of data give its matrix, at any rate.
    unit = mne.io.RawArray(np.eye(len(names)), mne.create_info(names, 1.0, "eeg"), verbose="ERROR")
    unit.set_montage(montage)
    unit.info["bads"] = list(targets)
    unit.interpolate_bads(reset_bads=True, verbose="ERROR")
    return unit.get_data()[len(sources) :, : len(sources)]


def positions(channels: Sequence[str] = CHANNELS) -> np.ndarray:
    """Unit vectors of electrodes among the 19, float64 (channels, 3): x to the right ear, y to the nose, z up."""
    unknown = [name for name in channels if name not in CHANNELS]
    if unknown:
        rule = f"`channels` must be among {', '.join(CHANNELS)}"
        raise ValueError(message("eeg.positions", rule, ", ".join(unknown)))
    place = {}
    for name, (polar, azimuth) in _ANGLES.items():
        p, a = np.radians(polar), np.radians(azimuth)
        place[name] = np.array([np.sin(p) * np.cos(a), np.sin(p) * np.sin(a), np.cos(p)])
    for name, (one, other) in _HALFWAY.items():
        middle = place[one] + place[other]
        place[name] = middle / np.linalg.norm(middle)
    return np.stack([place[name] for name in channels])


def angular_distance(channels: Sequence[str], focus: str) -> np.ndarray:
    """The angle between each electrode and `focus`, seen from the centre of the head: radians, float64 (channels,)."""
    return np.arccos(np.clip(positions(channels) @ positions([focus])[0], -1.0, 1.0))


def layout(channels: Sequence[str] = CHANNELS) -> np.ndarray:
    """Flat places for plotting a topography, float64 (channels, 2): nose up, right ear right, outer ring at radius 1.

    Azimuthal equidistant: the radius is the angle from the vertex over the 72 degrees of the outer ring.
    """
    xyz = positions(channels)
    radius = np.arccos(np.clip(xyz[:, 2], -1.0, 1.0)) / np.radians(72)
    azimuth = np.arctan2(xyz[:, 1], xyz[:, 0])
    return radius[:, None] * np.stack([np.cos(azimuth), np.sin(azimuth)], axis=1)

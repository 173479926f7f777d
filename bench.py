"""
bench.py -- speeds, each as a ratio to something else measured in the same run.

    python bench.py augment    # seconds of audio a second on one core, beside the same chains built with audiomentations

Both sides of a comparison take turns, so that a busy machine slows both. The comparison needs packages that nothing else
does: pip install -r requirements-bench.txt
"""
import os
import random
import tempfile
import time
import warnings

import numpy as np
import soundfile
import torch

from augment import CURRICULUM, augment, codec, effects, open_banks
from data import CHUNK, ArgumentParser, UserError, embedded, run
from model import SAMPLE_RATE

SECONDS = 10  # of a clip


def take_turns(contestants, clips, rounds):
    """{name: function(clip, number of the call)} -> {name: seconds of audio a second}, each over all clips, all rounds."""
    spent = dict.fromkeys(contestants, 0.0)
    for function in contestants.values():  # first calls build plans and load libraries
        function(clips[0], 0)
    for r in range(rounds):
        for name, function in contestants.items():
            began = time.perf_counter()
            for i, clip in enumerate(clips):
                function(clip, r * len(clips) + i)
            spent[name] += time.perf_counter() - began
    return {name: rounds * sum(map(len, clips)) / SAMPLE_RATE / s for name, s in spent.items()}


# -----------------------------------------------------------------------------
# augment

def theirs(config, noises, rooms, plain_speed=False):
    """The chain of augment.py for this config, built with audiomentations. It has no Opus and no resampling there and back:
    these are soundfile's and soxr's here. Its speed is a time stretch, which keeps the pitch; plain_speed exchanges it for
    soxr's rate change."""
    import audiomentations as A
    import soxr

    def there_and_back(effect, p):
        def trip(x, sample_rate):
            rate = random.randint(round(effect[1]), round(effect[2]))
            return soxr.resample(soxr.resample(x, sample_rate, rate), rate, sample_rate)
        return A.Lambda(trip, p=p)

    def band(effect, p):
        low, high = np.mean(effect[1:3]), np.mean(effect[3:5])
        centre, width = (low + high) / 2, 2 * (high - low) / (high + low)
        return A.BandPassFilter(centre, centre, width, width, p=p)

    def codec_at(rate, kbps, p):
        mp3 = A.Mp3Compression(*(min(round(k), 160 if rate >= 16000 else 64) for k in kbps), p=1)
        def coded(x, sample_rate):
            y = mp3(x if rate == sample_rate else soxr.resample(x, sample_rate, rate), rate)
            return y if rate == sample_rate else soxr.resample(y, rate, sample_rate)
        return A.Lambda(coded, p=p)

    c, (more_noise, more_room) = config, (np.mean(e[1:]) * e[0] for e in (config.more_noise, config.more_room))
    noise = [A.AddBackgroundNoise(noises, *c.noise[1:], p=p) for p in (1, *split(more_noise))]
    room = [A.ApplyImpulseResponse(rooms, p=p) for p in (1, *split(more_room))]
    return A.Compose([
        A.PitchShift(*c.pitch[1:], p=c.pitch[0]),
        A.Lambda(lambda x, rate: soxr.resample(x, rate * random.uniform(*c.speed[1:]), rate), p=c.speed[0]) if plain_speed
        else A.TimeStretch(*c.speed[1:], leave_length_unchanged=False, p=c.speed[0]),
        A.Compose(noise, p=c.noise[0]), A.Compose(room, p=c.room[0]),
        A.SevenBandParametricEQ(*c.eq[1:3], p=c.eq[0]), band(c.band_pass, c.band_pass[0]), A.Gain(*c.gain[1:], p=c.gain[0]),
        A.AddGaussianNoise(*c.gaussian[1:], p=c.gaussian[0]), A.ClippingDistortion(0, 5, p=c.clipping[0]),
        there_and_back(c.resample, c.resample[0]),
        A.Compose([there_and_back(c.telephony, 1), band(c.telephony[2:], 1)], p=c.telephony[0]),
        codec_at(c.codec_rate, c.codec[1:], c.codec[0] * (1 - c.opus)),
        A.Lambda(lambda x, sample_rate: codec(x, np.mean(c.codec[1:]), "opus", c.codec_rate), p=c.codec[0] * c.opus),
    ], p=c.touched)


def split(expected):
    """An expected number of extra sources as probabilities: 0.9 -> [0.9], 1.5 -> [1, 0.5]."""
    return [min(1, expected - i) for i in range(int(np.ceil(expected)))]


def bench_augment():
    try:
        import audiomentations
        import fast_mp3_augment  # noqa: F401 -- audiomentations' quickest MP3
    except ImportError as e:
        raise UserError(f"{e.name} is not installed: pip install -r requirements-bench.txt, or make bench") from None
    warnings.filterwarnings("ignore")  # audiomentations' remarks about its own defaults
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    speech = np.concatenate([s.audio[0] for s in embedded("ru", "train", CHUNK)]).astype(np.float32) / 32768
    clips = list(speech[:len(speech) // (SECONDS * SAMPLE_RATE) * SECONDS * SAMPLE_RATE].reshape(-1, SECONDS * SAMPLE_RATE))
    banks = noises, rooms = open_banks()
    configs = {name: (config, 2, False) for name, config in effects().items() if name != "mask"} | {  # rounds, plain_speed
        f"stage {s.name}": (s.config, 24, False) for s in CURRICULUM if s.config.touched} | {
        "stage heavy, plain speed on both sides": (CURRICULUM[-1].config, 24, True)}
    print(f"audiomentations {audiomentations.__version__}, one core, {len(clips)} clips of {SECONDS} s of speech\n\n"
          "| effect or stage | x real time | audiomentations | ratio |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, bank in (("noises", noises), ("rooms", rooms)):
            os.mkdir(f"{folder}/{name}")
            for i, clip in enumerate(bank):
                soundfile.write(f"{folder}/{name}/{i}.wav", clip, SAMPLE_RATE)
        for name, (config, rounds, plain_speed) in configs.items():
            chain = theirs(config, f"{folder}/noises", f"{folder}/rooms", plain_speed)

            def ours(clip, number, config=config):
                rng = np.random.Generator(np.random.SFC64([0, number]))
                return augment(clip, config, rng, *banks) if rng.random() < config.touched else clip

            speed = take_turns({"ours": ours, "theirs": lambda clip, _, chain=chain: chain(clip, SAMPLE_RATE)}, clips, rounds)
            print(f"| {name} | {speed['ours']:,.0f} | {speed['theirs']:,.0f} | {speed['ours'] / speed['theirs']:.1f} |",
                  flush=True)


BENCHES = {"augment": bench_augment}


def main():
    parser = ArgumentParser(prog="bench.py", allow_abbrev=False, description="Speeds, as ratios measured in one run.")
    parser.add_argument("what", choices=BENCHES)
    BENCHES[parser.parse_args().what]()


if __name__ == "__main__":
    run(main)

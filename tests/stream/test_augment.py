"""Augmentation: off by default, the same for the same utterance and pass wherever it runs, other in another
pass."""

import pytest
import torch
from transformers import WhisperConfig

from recipe.config import DataConfig, RecipeError
from stream import EvalStream, Stream
from stream.augment import augment, check
from tests.stream.conftest import data_config


def waves(data, tokenizer, model_config, world_size, start, steps):
    found = {}
    for rank in range(world_size):
        for step in Stream(data, "alignment", tokenizer, model_config, rank, world_size, start, steps):
            for batch in step.micro_batches:
                if batch.audio_is_dummy:  # a step of fewer utterances than ranks
                    continue
                for name, wave, length in zip(batch.ids, batch.waveforms, batch.audio_lengths, strict=True):
                    found[step.step, name] = wave[:length]
    return found


@pytest.fixture
def two_threads():
    """More than a worker has, whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_keyed_by_utterance_and_pass_not_by_rank_worker_or_history(
    packed, tokenizer, model_config, two_threads
):
    options = {"speed_perturb": [0.9, 1.0, 1.1], "noise_snr_db": [10.0, 20.0]}
    alone = waves(data_config(packed, **options), tokenizer, model_config, 1, 0, 8)
    spread = waves(data_config(packed, workers=2, **options), tokenizer, model_config, 3, 3, 8)
    assert set(spread) == {key for key in alone if key[0] >= 3}
    assert all(torch.equal(spread[key], alone[key]) for key in spread)
    plain = waves(data_config(packed), tokenizer, model_config, 1, 0, 8)
    assert not any(
        len(plain[key]) == len(alone[key]) and torch.equal(plain[key], alone[key]) for key in plain
    )


def test_speed_and_noise_do_what_they_say():
    wave = torch.sin(torch.arange(32000) * 0.05)
    fast = {len(augment(wave, DataConfig(speed_perturb=[0.8, 1.25]), epoch, "a")) for epoch in range(20)}
    assert fast == {40000, 25600}
    for epoch in range(5):
        noisy = augment(wave, DataConfig(noise_snr_db=[15.0, 15.0]), epoch, "a")
        snr = 10 * torch.log10(wave.square().mean() / (noisy - wave).square().mean())
        assert abs(float(snr) - 15) < 0.3
    assert (
        len(augment(wave, DataConfig(speed_perturb=[0.8], max_seconds=2.2), 0, "a")) == 32000
    )  # would be 2.5 s


def test_spec_augment_masks_reach_the_batch(packed, tokenizer, model_config, tmp_path):
    (tmp_path / "whisper").mkdir()
    WhisperConfig(num_mel_bins=40).save_pretrained(tmp_path / "whisper")
    model_config.encoder.name = str(tmp_path / "whisper")
    data = data_config(packed, spec_augment=True)
    state = torch.get_rng_state()
    steps, again = (list(Stream(data, "alignment", tokenizer, model_config, 0, 1, 0, 4)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())  # dropout does not notice
    shares = []
    for step, same in zip(steps, again, strict=True):
        for batch, other in zip(step.micro_batches, same.micro_batches, strict=True):
            frames = -(-batch.audio_lengths // 160)
            assert batch.mel_mask.dtype == torch.bool and batch.mel_mask.shape == (
                len(batch.ids),
                40,
                int(frames.max()),
            )
            assert torch.equal(batch.mel_mask, other.mel_mask)
            for mask, length in zip(batch.mel_mask, frames.tolist(), strict=True):
                bands, stretches = mask[:, :length].all(1), mask[:, :length].all(0)
                assert (
                    torch.equal(mask[:, :length], bands[:, None] | stretches[None])
                    and not mask[:, length:].any()
                )
                assert bands.sum() <= 2 * 14 and stretches.sum() <= 0.4 * length
                shares.append(float(mask[:, :length].float().mean()))
    assert 0.15 < sum(shares) / len(shares) < 0.6 and len(set(shares)) > 10
    plain = next(iter(Stream(data_config(packed), "alignment", tokenizer, model_config, 0, 1, 0, 1)))
    assert plain.micro_batches[0].mel_mask is None


def test_other_seed_epoch_or_id_is_other_noise():
    wave, data = torch.ones(1000), DataConfig(noise_snr_db=[10.0, 10.0])
    first = augment(wave, data, 0, "a")
    assert torch.equal(first, augment(wave, data, 0, "a"))
    other_seed = DataConfig(noise_snr_db=[10.0, 10.0], seed=1)
    for other in (
        augment(wave, data, 1, "a"),
        augment(wave, data, 0, "b"),
        augment(wave, other_seed, 0, "a"),
    ):
        assert not torch.equal(first, other)


def test_evaluation_uses_clean_clips(packed, tokenizer, model_config):
    def heard(**options):
        stream = EvalStream(
            str(packed), tokenizer, model_config, "alignment", data=DataConfig(workers=0, **options)
        )
        return {name: batch.waveforms[row] for batch, _ in stream for row, name in enumerate(batch.ids)}

    plain, noisy = heard(), heard(noise_snr_db=[5.0, 5.0])
    assert all(torch.equal(plain[name], noisy[name]) for name in plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"speed_perturb": [0.1]},
        {"noise_snr_db": [20.0, 10.0]},
        {"noise_snr_db": [20.0]},
        {"cache_features": "x", "spec_augment": True},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        check(DataConfig(**wrong))

"""Launches that would silently do something else than what was asked for are refused, and the reason is told."""

import logging
from dataclasses import replace

import pytest
import torch
from support.training import CONFIG, fresh_accelerator

from hf_camphive.core.errors import ConfigError


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"one of 2 processes.*ACCELERATE_USE_CPU=true"):
        fresh_accelerator()


def test_half_a_launch_is_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match=r"cannot start as it was launched.*MASTER_ADDR"):
        fresh_accelerator()


def test_a_launch_that_became_one_process_is_told(monkeypatch, caplog):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with caplog.at_level(logging.WARNING):
        fresh_accelerator()
    assert "ignores --num_processes on CPU" in caplog.text


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_launches_are_refused(monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ConfigError, match=f"{kind}.*second derivatives.*--multi_gpu"):
        fresh_accelerator()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_needs_a_gpu():
    with pytest.raises(ConfigError, match=r"fp16.*needs a GPU"):
        fresh_accelerator(replace(CONFIG, mixed_precision="fp16"))

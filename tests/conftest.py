from __future__ import annotations

import os
from pathlib import Path

# Tests download nothing from the hub; set before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from longmem.errors import BackboneNotFoundError
from longmem.pretrained import setup

# The first example pays for lazy initialisation, and test machines are shared: time is no sign of a fault here.
hypothesis.settings.register_profile("longmem", deadline=None)
hypothesis.settings.load_profile("longmem")
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded SmolLM2-135M-Instruct, from the cache that all runs share."""
    try:
        return setup("smollm2-135m")
    except BackboneNotFoundError as error:
        pytest.skip(f"the embedded model cannot be set up here: {error}")

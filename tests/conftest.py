"""Shared small worlds and models: a 120-item shop, an unfitted SASRec and a randomly initialised tiny agent."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a misspelt model is looked for in the cache only
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared to the bit is a CPU's
os.environ["no_proxy"] = "127.0.0.1"  # the mirror of test_data.py

import torch

from data import make_splits, simulate_office
from model import build_tiny_agent
from sasrec import SASRec
from tools import Context
from train import demonstration_texts


@pytest.fixture(autouse=True)
def _seed():
    """Each test draws the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world():
    ds = simulate_office(n_users=120)
    make_splits(ds)
    return ds


@pytest.fixture(scope="session")
def ctx(world):
    torch.manual_seed(1)
    return Context(world, SASRec(len(world.items)).eval())


@pytest.fixture(scope="session")
def texts(ctx):
    return demonstration_texts(ctx, ctx.ds.splits["train"][:60], 10)


@pytest.fixture
def policy(texts):
    size = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return build_tiny_agent(texts, size)

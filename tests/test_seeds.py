"""Every generator of random numbers goes on where it was."""

import random

import accelerate
import numpy as np
import pytest
import torch

from kdlib.training import seeds


@pytest.mark.parametrize("gaussian", [False, True])
def test_every_generator_goes_on_where_it_was(gaussian):
    machine = accelerate.Accelerator(cpu=True)

    def draw():
        old = np.random  # as libraries draw from it
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), old.rand(3).tolist(), old.randn()

    if gaussian:  # half of a pair of normal numbers is kept back
        draw()
    kept = seeds.rng_state(machine)
    wanted = draw()
    assert draw() != wanted
    seeds.set_rng_state(kept, machine)
    assert draw() == wanted


def test_a_process_that_was_not_there_keeps_its_own():
    machine = accelerate.Accelerator(cpu=True)
    kept = {key.replace(".0", ".1"): state for key, state in seeds.rng_state(machine).items()}
    torch.rand(1)
    before = torch.get_rng_state()
    seeds.set_rng_state(kept, machine)
    assert torch.equal(torch.get_rng_state(), before)
